"""Qwen2-VL (Wang et al. 2024): model, vision transformer and processor."""
