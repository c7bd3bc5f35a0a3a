"""Decoding: the loop over tokens, the rules that change their logits, and sampling."""
