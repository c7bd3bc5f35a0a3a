"""Compares the solvers with the libraries that a user might choose instead; see `__main__`."""
