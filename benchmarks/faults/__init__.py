"""Campaigns against our own robustness: runs that are killed, files that are damaged."""
