"""Our side: what is extracted, from which batches, and what comes of it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import ports
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.selection import Selection

SITE = "language_model.model.norm"
BATCH, TOKENS = 32, 20  # a batch at which both sides are at their fastest here

Inputs = dict[str, np.ndarray]


class Rows(NamedTuple):
    """What a side found: R rows."""

    ids: list[str]  # of the samples
    tokens: np.ndarray  # int[R]
    states: np.ndarray  # float32[R, D]

    def first(self, ids: set[str]) -> "Rows":
        """Those of some samples only."""
        kept = [i for i, sample in enumerate(self.ids) if sample in ids]
        return Rows([self.ids[i] for i in kept], self.tokens[kept], self.states[kept])


def settings(word: str) -> ExtractionSettings:
    """What is extracted."""
    selection = Selection("token-of-interest", word, match="first-token")
    return ExtractionSettings((SITE,), selection, max_new_tokens=TOKENS, batch_size=BATCH)


def groups_of(samples: Sequence[Sample], size: int = BATCH) -> list[Sequence[Sample]]:
    """The samples in order, `size` at a time."""
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def prepare(vlm: ports.VLM, samples: Sequence[Sample]) -> Inputs:
    """A batch, with images from their files."""
    images = [read_image(sample.image) for sample in samples]
    return vlm.process([vlm.render(sample.prompt) for sample in samples], images)


def full(samples: Sequence[Sample]) -> Sequence[Sample]:
    """A batch filled up by its first sample, as `extract` does: one program for all."""
    return [*samples, *[samples[0]] * (BATCH - len(samples))]


def run_extract(vlm: ports.VLM, samples: Sequence[Sample], word: str, output: Path) -> Rows:
    """Extracts into `output` and reads what is there."""
    extract(vlm, samples, output, settings(word))
    features = Features.open(output)
    ids = [features.samples[i]["id"] for i in features.sample_rows]
    return Rows(ids, features.tokens, features.matrix(SITE))


def run_generate(vlm: ports.VLM, batches: Iterable[Inputs]) -> list[jax.Array]:
    """Tokens of the batches, without capturing anything."""
    return [vlm.generate(batch, max_new_tokens=TOKENS).tokens for batch in batches]
