"""`ShiftAnalysis`: the results of a shift, concept by concept, with `save` and `load`.

K concepts, D width.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load as load_tensors

from ports.messages import counted
from ports.tables import html_table, kind
from xlvlm_jax.shift.recovery import Correlation, correlation, mismatched_overlap, overlap
from xlvlm_jax.shift.vectors import MIN_SAMPLES, Reduce, Spread
from xlvlm_jax.storage import atomic, pictures, versions
from xlvlm_jax.storage.tensors import as_bytes

TENSORS, DESCRIPTION = "shift.safetensors", "shift.json"
KINDS = ("original", "shifted", "finetuned")
CORRELATED = (
    ("consistency", "recovery"),
    ("magnitude", "recovery"),
    ("magnitude", "consistency"),
)
_SHOWN = ("recovery", "consistency", "magnitude")  # the figures that a notebook shows
# Figures per concept, by their names in shift.json.
_FIGURES = ("recovery", "recovery_l2", *Spread._fields)


@dataclass(frozen=True, repr=False)
class ShiftAnalysis:
    """How each original concept moves, and how close it comes to the fine-tuned model's own.

    Rows of `finetuned` are in the order of the original concepts that they are matched to. A
    concept with fewer than two common samples has no shift: its figures are NaN.

    Attributes:
        original, shifts, shifted, finetuned: float32[K, D].
        matching: int[K], the number of the fine-tuned concept in each row of `finetuned`.
        counts: int[K], number of common samples of each concept.
        spread: how consistently the samples of a concept move; all fields are float32[K].
        recovery, recovery_l2: float32[K], see `xlvlm_jax.shift.recovery`.
        alpha, reduce: the strength of the shift, and the kind of centre, see `analyse`.
        rows: {"original": N, "finetuned": M, "common": number of pairs}, and once grounded in
            images "finetuned samples", the number of samples that have the M rows.
        words: {"original" | "shifted" | "finetuned" | "shift": K lists}; those of "shift" are
            decoded from the shift vectors themselves. None before grounding.
        images: {"original" | "shifted" | "finetuned": K lists of sample IDs}, the strongest first.
            None before grounding.
        pictures: {sample ID: image file} of the first few images.
        num_words, num_images: number of words and images requested per concept.
        vocabulary: number of different words in the tokenizer that may describe a concept.
        source: where the states come from, JSON values.
    """

    original: Float[np.ndarray, "K D"]
    shifts: Float[np.ndarray, "K D"]
    shifted: Float[np.ndarray, "K D"]
    finetuned: Float[np.ndarray, "K D"]
    matching: Int[np.ndarray, " K"]
    counts: Int[np.ndarray, " K"]
    spread: Spread
    recovery: Float[np.ndarray, " K"]
    recovery_l2: Float[np.ndarray, " K"]
    alpha: float = 1.0
    reduce: Reduce = "mean"
    rows: dict[str, int] = field(default_factory=dict)
    words: dict[str, list[list[str]]] | None = None
    images: dict[str, list[list[str]]] | None = None
    pictures: dict[str, str] = field(default_factory=dict)
    num_words: int = 0
    num_images: int = 0
    vocabulary: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"ShiftAnalysis({self._in_short()})"

    def _repr_html_(self) -> str:
        words = (self.words or {}).get("shift")
        head = ["concept", "matched", "samples", *_SHOWN] + ["words of the shift"] * bool(words)
        figures = np.stack([self.figure(name) for name in _SHOWN], axis=1)
        rows = [
            (str(i), int(self.matching[i]), int(self.counts[i]), *(f"{x:.3g}" for x in figures[i]))
            + ((words[i],) if words else ())
            for i in range(len(self.shifts))
        ]
        return html_table(rows, head=head, title=self._in_short())

    def _in_short(self) -> str:
        said = f"{counted(len(self.shifts), 'concept')}: {kind(self.shifts)} shifts"
        if "common" in self.rows:
            said += f", {counted(self.rows['common'], 'common row')}"
        return f"{said}, {self.reduce}, alpha {self.alpha:g}"

    @property
    def moved(self) -> np.ndarray:
        """bool[K], whether each concept has a shift."""
        return self.counts >= MIN_SAMPLES

    @property
    def correlations(self) -> dict[str, Correlation]:
        """Correlations "consistency-recovery", "magnitude-recovery", "magnitude-consistency"."""
        return {f"{a}-{b}": correlation(self.figure(a), self.figure(b)) for a, b in CORRELATED}

    def figure(self, name: str) -> Float[np.ndarray, " K"]:
        """Returns float32[K], a figure of each concept: a recovery, or a field of `spread`."""
        return np.asarray(getattr(self if hasattr(self, name) else self.spread, name))

    def overlap(self, kind: str, of: str = "words") -> Float[np.ndarray, " K"]:
        """Returns the share of words (or images) that each concept shares with its match.

        Args:
            kind: "original" or "shifted" concepts.
            of: "words" for T-Overlap, "images" for the overlap of the most activating samples.

        Returns:
            float64[K]; for "shifted", NaN for concepts without a shift.

        Raises:
            ValueError: the analysis is not grounded in these.
        """
        grounded, size = getattr(self, of), getattr(self, f"num_{of}")
        if grounded is None:
            raise ValueError(
                f"the shift is not grounded in {of}; call shift.ground_words and ground_samples"
            )
        shares = overlap(grounded[kind], grounded["finetuned"], size)
        return np.where(self.moved, shares, np.nan) if kind == "shifted" else shares

    def mean_overlap(self, kind: str, of: str = "words") -> float:
        """Returns the mean of `overlap` over the concepts that have a shift."""
        shares = self.overlap(kind, of)[self.moved]
        return float(shares.mean()) if len(shares) else float("nan")

    def chance(self, of: str = "words") -> dict[str, float]:
        """Returns the mean `overlap` by chance.

        Args:
            of: "words" or "images".

        Returns:
            {"random": for equally many words (images) drawn at random, "mismatched": for original
            concepts and fine-tuned concepts that are not their match}.

        Raises:
            ValueError: the analysis is not grounded in these.
        """
        grounded, size = getattr(self, of), getattr(self, f"num_{of}")
        if grounded is None:
            raise ValueError(
                f"the shift is not grounded in {of}; call shift.ground_words and ground_samples"
            )
        # Analyses of earlier versions counted rows.
        samples = self.rows.get("finetuned samples", self.rows["finetuned"])
        whole = self.vocabulary if of == "words" else samples
        drawn = [len(a) * len(b) for a, b in zip(grounded["original"], grounded["finetuned"])]  # noqa: B905
        return {
            "random": float(np.mean(drawn)) / whole / size if whole else float("nan"),
            "mismatched": mismatched_overlap(grounded["original"], grounded["finetuned"], size),
        }

    def save(self, directory: str | Path) -> None:
        """Writes shift.safetensors, then shift.json, each atomically."""
        tensors = as_bytes({name: np.asarray(getattr(self, name), np.float32) for name in _ARRAYS})
        described: dict[str, Any] = {"version": versions.VERSION}
        described |= {name: getattr(self, name) for name in _DESCRIBED}
        described["summary"] = self.summary()
        described["concepts"] = self._concepts()
        described["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
        directory = Path(directory)
        root = pictures.root_of(self.pictures.values())
        described["root of pictures"] = pictures.describe(root, directory)
        described["pictures"] = {
            name: pictures.name_in(root, path) for name, path in self.pictures.items()
        }
        described["source"] = pictures.store_features(self.source, directory)
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write(directory / TENSORS, tensors)
        atomic.write(directory / DESCRIPTION, json.dumps(_plain(described), indent=1) + "\n")

    def summary(self) -> dict[str, Any]:
        """Returns means, correlations, and concepts without a shift.

        Means are over the concepts whose figure is finite; "counted" says how many those are.
        """
        figures = {name: self.figure(name)[self.moved] for name in _FIGURES}
        finite = {name: values[np.isfinite(values)] for name, values in figures.items()}
        means = {
            name: float(np.mean(values)) if len(values) else math.nan
            for name, values in finite.items()
        }
        result: dict[str, Any] = {
            "concepts": len(self.counts),
            "without shift": np.flatnonzero(~self.moved).tolist(),
            "means": means,
            "counted": {name: len(values) for name, values in finite.items()},
            "correlations": {name: c._asdict() for name, c in self.correlations.items()},
        }
        for of in ("words", "images"):
            if getattr(self, of) is not None:
                result[f"{of} overlap"] = {
                    kind: self.mean_overlap(kind, of) for kind in ("original", "shifted")
                } | self.chance(of)
        return result

    def _concepts(self) -> list[dict[str, Any]]:
        figures = {name: self.figure(name) for name in _FIGURES}
        for of in ("words", "images"):
            if getattr(self, of) is not None:
                for kind in ("original", "shifted"):
                    figures[f"{of} overlap {kind}"] = self.overlap(kind, of)
        return [
            {"matched": int(self.matching[k]), "samples": int(self.counts[k])}
            | {name: float(values[k]) for name, values in figures.items()}
            for k in range(len(self.counts))
        ]

    @classmethod
    def load(
        cls, directory: str | Path, *, images: str | os.PathLike[str] | None = None
    ) -> "ShiftAnalysis":
        """Reads what `save` wrote.

        Args:
            directory: the directory of the shift.
            images: directory that holds the pictures now, if they were moved.

        Returns:
            The analysis.

        Raises:
            FileNotFoundError: the directory holds no shift.
            ValueError: a file is damaged, or the two files were not saved together.
        """
        directory = Path(directory)
        for name in (TENSORS, DESCRIPTION):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"no shift in {directory}: {name} is missing; run `xlvlm shift` first"
                )
        content = (directory / TENSORS).read_bytes()
        try:
            described = json.loads((directory / DESCRIPTION).read_text("utf-8"))
            versions.require(directory / DESCRIPTION, described, "run `xlvlm shift` again")
            digest, concepts = described["tensors_sha256"], described["concepts"]
            known = {name: described[name] for name in _DESCRIBED}
            named = known["pictures"]
            paths = pictures.find_all(
                list(named.values()), directory, described.get("root of pictures"), images
            )
            known["pictures"] = dict(zip(named, paths, strict=True))
            known["source"] = pictures.restore_features(known["source"], directory)
            figures = {
                name: np.array([math.nan if c[name] is None else c[name] for c in concepts], "f4")
                for name in _FIGURES
            }
            whole = {
                "matching": np.array([concept["matched"] for concept in concepts], int),
                "counts": np.array([concept["samples"] for concept in concepts], int),
            }
        except versions.UnknownVersionError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{directory / DESCRIPTION} does not describe a shift ({error});"
                " run `xlvlm shift` again"
            ) from error
        if digest != hashlib.sha256(content).hexdigest():
            raise ValueError(
                f"{directory}: {TENSORS} and {DESCRIPTION} were not saved together;"
                " run `xlvlm shift` again"
            )
        moves = Spread(*(figures.pop(name) for name in Spread._fields))
        return cls(**load_tensors(content), **figures, **whole, **known, spread=moves)


_ARRAYS = ("original", "shifts", "shifted", "finetuned")
_DESCRIBED = tuple(
    f.name
    for f in dataclasses.fields(ShiftAnalysis)
    if f.name not in (*_ARRAYS, "matching", "counts", "spread", "recovery", "recovery_l2")
)


def _plain(value: Any) -> Any:
    """Converts a value for JSON: NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
