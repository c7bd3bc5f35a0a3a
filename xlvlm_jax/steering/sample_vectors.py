"""P2S: a steering vector for each sample, the contrast between two counterparts of its prompt.

From "Learning to Steer: Input-dependent Steering for Multimodal LLMs" (Parekh et al. 2025,
arXiv 2508.12815), where it is the shift that L2S learns to predict (see `l2s`), applied to the very
samples it was computed on. N samples, D width, B rows of a batch.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ports import VLM
from ports.intervene.edits import Edit, add
from ports.messages import few
from ports.tables import kind
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.steering import files, teacher_forcing
from xlvlm_jax.steering.l2s import contrast_shifts
from xlvlm_jax.storage.same_model import model_of

Array = np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class SampleVectors:
    """Steering vectors of samples.

    Attributes:
        vectors: float32[N, D].
        ids: the sample that each is for.
        site: the site whose states they are added to.
        source: how and on what they were fitted, as JSON values.
        where: the token positions they are meant for, see `ports.add`.
    """

    vectors: Float[Array, "N D"]
    ids: tuple[str, ...]
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    def __repr__(self) -> str:
        return f"SampleVectors({kind(self.vectors)} at {self.site!r}, where={self.where!r})"

    def _repr_html_(self) -> str:
        samples, width = self.vectors.shape
        return files.as_html(self, samples=samples, width=width)

    def of(self, ids: Sequence[str]) -> "SampleVectors":
        """Returns the vectors of some samples, in this order; a sample may repeat.

        Raises:
            ValueError: a sample has no vector.
        """
        row = {name: i for i, name in enumerate(self.ids)}
        if missing := [name for name in ids if name not in row]:
            raise ValueError(
                f"there is no vector for {few(dict.fromkeys(missing))}, but for {len(row)} other "
                "samples; fit vectors on the samples to steer"
            )
        chosen = np.array([row[name] for name in ids], int)
        return dataclasses.replace(self, vectors=self.vectors[chosen], ids=tuple(ids))

    def edits_for(
        self, vlm: VLM, inputs: Any, alpha: Any = 1.0, where: Any = None
    ) -> dict[str, Edit]:
        """Returns the edits for a batch of exactly these samples, see `of`.

        Args:
            vlm: the model they were fitted on.
            inputs: the processor's arrays, a row per vector.
            alpha: the strength, a number or float[B].
            where: the token positions, see `ports.add`; None for those they are meant for.

        Returns:
            {site: edit}.

        Raises:
            ValueError: they were fitted on another model, or the batch has other samples.
        """
        files.require_fitted_model(self.source, vlm)
        rows = len(inputs["input_ids"])
        if rows != len(self.vectors):
            raise ValueError(
                f"there are {len(self.vectors)} vectors for a batch of {rows} rows; a vector per "
                "sample steers only the answers of `xlvlm evaluate` and `xlvlm steer apply`"
            )
        return {self.site: add(self.vectors, alpha, self.where if where is None else where)}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; a missing parent directory is created."""
        names = ("site", "source", "where")
        rest = {name: getattr(self, name) for name in names} | {"ids": list(self.ids)}
        files.save(path, "sample vectors", {"vectors": self.vectors}, rest)

    @classmethod
    def load(cls, path: str | Path) -> "SampleVectors":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds something else, or NaN.
        """
        tensors, rest = files.read_as(path, "sample vectors")
        files.require_numbers(path, tensors)
        with files.assembling(path):
            return cls(tensors["vectors"], tuple(rest.pop("ids")), **rest)


def fit_p2s(
    vlm: VLM,
    samples: Sequence[Sample],
    positive: Sequence[str],
    negative: Sequence[str],
    site: str,
    *,
    contrast: str = "completion",
    states: str = "last",
    where: Any = "all",
    batch_size: int = 16,
    strict: bool = False,
    progress: teacher_forcing.Progress | None = None,
) -> SampleVectors:
    """Computes a vector for each sample: states after `positive` minus states after `negative`.

    Runs on the host and cannot be traced.

    Args:
        vlm: the model.
        samples: images and prompts.
        positive, negative: the counterpart to steer towards and away from, one each per sample.
        site: the site whose states to shift.
        contrast, states: as for `fit_l2s`.
        where: the token positions to shift, see `ports.add`.
        batch_size: samples per batch.
        strict: stop at a sample that can't be read or processed, instead of skipping it;
            `source["skipped"]` says why samples were skipped.
        progress: called with (runs done, number of runs); there are two runs per sample.

    Returns:
        The vectors.

    Raises:
        ValueError: as `contrast_shifts`.
        FloatingPointError: if strict, for the first state that is not finite.
    """
    skipped: dict[str, str] = {}
    site = vlm.find_site(site, generated=True, one_state=True)
    shifts = contrast_shifts(
        vlm,
        samples,
        positive,
        negative,
        [site],
        contrast=contrast,
        states=states,
        batch_size=batch_size,
        strict=strict,
        errors=skipped,
        progress=progress,
    )[site]
    kept = [i for i, sample in enumerate(samples) if sample.id not in skipped]
    source = {
        **model_of(vlm),
        "method": "p2s",
        "samples": len(kept),
        "skipped": skipped,
        "contrast": contrast,
        "states": states,
    }
    ids = tuple(samples[i].id for i in kept)
    return SampleVectors(shifts[kept], ids, site, source, where)
