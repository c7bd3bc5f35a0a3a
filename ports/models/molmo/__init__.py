"""Molmo (Deitke et al. 2024): model, vision backbone and processor."""
