"""Extraction: model x data -> features, resumable, on one host or several."""

from xlvlm_jax.features.extraction import extract
from xlvlm_jax.features.preflight import Needs, preflight
from xlvlm_jax.features.settings import MODES, Settings, Summary

__all__ = ["MODES", "Needs", "Settings", "Summary", "extract", "preflight"]
