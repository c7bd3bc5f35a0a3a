"""Decoding: the loop over tokens, what changes their logits, and how they are drawn."""
