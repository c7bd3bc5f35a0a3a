"""Scores of dictionaries: their records, a scorer, and a table over methods."""
