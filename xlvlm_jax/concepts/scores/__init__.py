"""Scores of dictionaries: what they are made of, one scorer, and a table over methods."""
