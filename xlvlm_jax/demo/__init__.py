"""The whole of it on the embedded model: `run` makes a run directory with its page.

pipeline    draw, extract, factor, ground, score, and the parts below
shift       what fine-tuning does to the concepts
steering    a vector that turns answers
summary     `show`: what is told at the end
"""

from xlvlm_jax.demo.pipeline import FINAL, MIDDLE, Result, run
from xlvlm_jax.demo.summary import show

__all__ = ["FINAL", "MIDDLE", "Result", "run", "show"]
