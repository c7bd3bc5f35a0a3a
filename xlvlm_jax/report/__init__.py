"""A run directory as one HTML page that needs nothing beside it."""

from xlvlm_jax.report.page import write_report

__all__ = ["write_report"]
