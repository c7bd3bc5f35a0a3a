"""Reads and edits states inside any Linen `apply`: sites, edits, steering, low-rank adapters."""
