"""Solvers against the libraries that a user would pick instead; see `__main__`."""
