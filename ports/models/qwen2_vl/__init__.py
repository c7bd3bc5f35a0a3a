"""Qwen2-VL (Wang et al. 2024): its modules, its vision transformer and its processor."""
