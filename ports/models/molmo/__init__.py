"""Molmo (Deitke et al. 2024): its modules, its vision backbone and its processor."""
