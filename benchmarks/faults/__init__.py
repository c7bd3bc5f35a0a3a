"""Robustness tests: killed runs and damaged files."""
