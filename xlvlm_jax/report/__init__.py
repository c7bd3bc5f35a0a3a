"""Writes a run directory as one self-contained HTML page."""

from xlvlm_jax.report.page import write_report

__all__ = ["write_report"]
