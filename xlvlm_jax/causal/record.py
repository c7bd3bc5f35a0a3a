"""`CausalRecord`: what edits of a dictionary's concepts do, and causal.json beside the concepts.

K concepts.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from xlvlm_jax.causal.scores import CausalScores, as_json, loss_recovered, numbers
from xlvlm_jax.storage import atomic, versions

FILE = "causal.json"


@dataclasses.dataclass(frozen=True)
class CausalRecord:
    """What edits of a dictionary's concepts do to a model's answers.

    Attributes:
        scores: a score per concept.
        answer: float[K], mean change of the answer's log-probability when the concept is removed
            (by the largest fraction); NaN without answers.
        rest: float[K], mean KL divergence of all tokens but the concept's own words, over its
            edits.
        words: each concept's words, as they were scored.
        first_order: rank correlation, over concepts and samples, of gradient x activation with the
            true effect of removing each concept on its own words.
        integrated: the same of integrated gradients.
        losses: mean loss of the answers per token, by what stands in the place of the states: own,
            spliced, zero, mean; empty without answers.
        settings: strengths, positions, model, number of samples ..., JSON values.
    """

    scores: CausalScores
    answer: Float[np.ndarray, " K"]
    rest: Float[np.ndarray, " K"]
    words: list[list[str]]
    first_order: float
    integrated: float
    losses: dict[str, float]
    settings: dict[str, Any]

    @property
    def recovered(self) -> dict[str, float]:
        """Share of the loss that the reconstruction recovers, relative to zero and to the mean."""
        losses = self.losses
        return {
            name: float(loss_recovered(losses["own"], losses["spliced"], losses[name]))
            for name in ("zero", "mean")
            if losses and losses[name] != losses["own"]
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values; NaN as None."""
        return {
            "concepts": as_json(self.scores)
            | {"answer": numbers(self.answer), "rest": numbers(self.rest), "words": self.words},
            "rank correlation": dict(
                zip(
                    ("first order", "integrated"),
                    numbers(np.array([self.first_order, self.integrated])),
                    strict=True,
                )
            ),
            "loss": {name: round(value, 6) for name, value in self.losses.items()},
            "loss recovered": {name: round(value, 6) for name, value in self.recovered.items()},
            "settings": self.settings,
        }


def digest_of(directory: Path) -> str:
    """Returns the digest of the concepts in a directory: components, words and all."""
    return hashlib.sha256((directory / "concepts.json").read_bytes()).hexdigest()


def save(record: CausalRecord, directory: Path) -> Path:
    """Writes causal.json beside the concepts, atomically.

    Args:
        record: the scores.
        directory: the directory of the concepts.

    Returns:
        The file.
    """
    path = directory / FILE
    described = {"version": versions.VERSION, "of": digest_of(directory), **record.to_dict()}
    atomic.write(path, json.dumps(described, indent=1) + "\n")
    return path


def read(directory: Path) -> dict[str, Any] | None:
    """Reads causal.json as JSON values.

    Args:
        directory: the directory of the concepts.

    Returns:
        The values; None if there is no file, or if the concepts have changed since.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        described = json.loads(path.read_text("utf-8"))
        versions.require(path, described, "score again")
        same = described["of"] == digest_of(directory)
        described["concepts"]["score"]
    except versions.UnknownVersionError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no causal scores ({error}); run `xlvlm causal` again"
        ) from None
    return described if same else None
