"""Molmo2 (Clark et al. 2026): model, vision tower, and the processor's arrays."""
