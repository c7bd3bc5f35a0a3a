"""Extraction: model x data -> features, resumable, on one host or several."""

from xlvlm_jax.features.extraction import extract
from xlvlm_jax.features.preflight import ExtractionNeeds, preflight
from xlvlm_jax.features.settings import MODES, ExtractionSettings, ExtractionSummary

# Their names in version 0.1.
Needs, Settings, Summary = ExtractionNeeds, ExtractionSettings, ExtractionSummary

__all__ = [
    "MODES",
    "ExtractionNeeds",
    "ExtractionSettings",
    "ExtractionSummary",
    "Needs",
    "Settings",
    "Summary",
    "extract",
    "preflight",
]
