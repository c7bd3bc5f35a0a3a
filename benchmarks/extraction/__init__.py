"""Extraction against what others do in PyTorch."""
