"""Extraction: model x data -> features, resumable, on one host or several."""

from xlvlm_jax.extract.preflight import Needs, preflight
from xlvlm_jax.extract.run import extract
from xlvlm_jax.extract.settings import MODES, Settings, Summary

__all__ = ["MODES", "Needs", "Settings", "Summary", "extract", "preflight"]
