"""Ranking of steering vectors by how strongly they move answers to few targets.

After "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (Khayatan et al.,
ICCV 2025, section 5): among the fine vectors, those are of use that move many answers, and move
them to the same few. With b_a and c_a the shares of n samples that are answered with a before and
after steering:

    gain_a     max(0, c_a - b_a)
    strength   sum of all gains: the share of answers that moved, on balance (the total variation
               distance of the two distributions)
    score      sum of the m largest gains: the share that moved to the m answers that gained most
    targets    exp(entropy of gain / strength): how many answers they moved to, effectively

Vectors are ranked by their score, in [0, 1]: the strength of what spreads over many answers counts
only as far as the m largest of them. One that moves all answers to one has score 1, with m = 1; one
that moves all of them, each to another answer, 1 / n.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ports import VLM
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.metrics.vqa import normalise_answer
from xlvlm_jax.steering import teacher_forcing
from xlvlm_jax.steering.teacher_forcing import Progress
from xlvlm_jax.steering.vectors import SteeringVector


class AnswerShift(NamedTuple):
    """How the distribution of answers moved; see the head of this file."""

    score: float
    strength: float
    targets: float  # 0 if nothing moved
    gained: dict[str, int]  # answer -> how many samples more, the most first
    lost: dict[str, int]  # answer -> how many samples fewer, the most first
    samples: int


class RankedVector(NamedTuple):
    """A vector and what it did."""

    vector: SteeringVector
    shift: AnswerShift

    def describe(self) -> dict[str, Any]:
        """As JSON values, without the vector's numbers."""
        names = {name: self.vector.source.get(name) for name in ("method", "from", "to")}
        return {**names, "site": self.vector.site, **self.shift._asdict()}


def answer_shift(before: Sequence[str], after: Sequence[str], num_targets: int = 1) -> AnswerShift:
    """How answers to the same questions moved.

    Runs on the host: it does not trace.

    Args:
        before, after: the answers, compared after normalisation.
        num_targets: m.

    Raises ValueError for lists of different lengths, empty ones, or num_targets below 1.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"there are {len(before)} answers before and {len(after)} after; expected the same "
            "number, at least one"
        )
    if num_targets < 1:
        raise ValueError(f"num_targets is {num_targets}; expected at least 1")
    old, new = (Counter(map(normalise_answer, answers)) for answers in (before, after))
    # Equal numbers in the order of the alphabet: the ranking does not depend on that of samples.
    gained = dict(sorted((new - old).items(), key=lambda item: (-item[1], item[0])))
    lost = dict(sorted((old - new).items(), key=lambda item: (-item[1], item[0])))
    gains = np.array(list(gained.values()), float) / len(before)
    shares = gains / gains.sum() if len(gains) else gains
    return AnswerShift(
        score=float(gains[:num_targets].sum()),
        strength=float(gains.sum()),
        targets=float(np.exp(-(shares * np.log(shares)).sum())) if len(gains) else 0.0,
        gained=gained,
        lost=lost,
        samples=len(before),
    )


def rank_vectors(
    vlm: VLM,
    vectors: Sequence[SteeringVector],
    samples: Sequence[Sample],
    *,
    alpha: float = 1.0,
    num_targets: int = 1,
    num_samples: int = 64,
    max_new_tokens: int = 10,
    batch_size: int = 16,
    strict: bool = False,
    progress: Progress | None = None,
) -> list[RankedVector]:
    """Steers samples with each vector and ranks the vectors by how the answers move.

    Runs on the host: it does not trace.

    Vectors that share their samples run together, as a sweep: images are encoded, and the layers
    in front of the site computed, once for all of them.

    Args:
        vlm: the model.
        vectors: all for one site; a fine vector (`fit_fine`) is tried on the samples that its
            `source["samples"]` names, another on all.
        samples: images and prompts.
        alpha: the strength.
        num_targets: m, see `answer_shift`.
        num_samples: each vector is tried on at most so many, the first.
        max_new_tokens: of an answer at most.
        batch_size: samples a batch.
        strict: stop at a sample that can't be read or processed, instead of leaving it out; how
            many were tried stands in each `AnswerShift`.
        progress: called with (vectors done, vectors in all).

    Returns:
        The vectors, that of the highest score first; among equal scores the stronger one.

    Raises:
        ValueError: no vectors, vectors of several sites, or a vector none of whose samples is
            among the given ones.
    """
    if len({vector.site for vector in vectors}) != 1:
        raise ValueError(
            f"there are {len(vectors)} vectors for {len({v.site for v in vectors})} sites; "
            "expected some, all for one site"
        )
    by_id = {sample.id: sample for sample in samples}
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, vector in enumerate(vectors):
        ids = tuple(vector.source.get("samples") or by_id)[:num_samples]
        groups.setdefault(ids, []).append(number)
    shifts: dict[int, AnswerShift] = {}
    for ids, numbers in groups.items():
        chosen = [by_id[name] for name in ids if name in by_id]
        if not chosen:
            raise ValueError(
                f"none of the {len(ids)} samples of a vector is among the {len(samples)} given "
                "ones; give the data that it was fitted on"
            )
        # The unsteered model runs along, as the first variant.
        variants = [vectors[numbers[0]].edits(0.0)]
        variants += [vectors[number].edits_for(vlm, None, alpha) for number in numbers]
        plain, *steered = _sweep(vlm, chosen, variants, max_new_tokens, batch_size, strict)
        for number, answers in zip(numbers, steered, strict=True):
            shifts[number] = answer_shift(plain, answers, num_targets)
        if progress is not None:
            progress(len(shifts), len(vectors))
    ranked = [RankedVector(vector, shifts[number]) for number, vector in enumerate(vectors)]
    return sorted(ranked, key=lambda each: (-each.shift.score, -each.shift.strength))


def _sweep(
    vlm: VLM,
    samples: Sequence[Sample],
    variants: list,
    max_new_tokens: int,
    batch_size: int,
    strict: bool,
) -> list[list[str]]:
    """The answers under each variant, to the samples that can be processed."""
    answers: list[list[str]] = [[] for _ in variants]
    errors: dict[str, str] = {}
    for batch in teacher_forcing.batches(
        vlm, samples, None, batch_size, strict=strict, errors=errors
    ):
        result = vlm.sweep(batch.inputs, variants, max_new_tokens=max_new_tokens)
        for found, tokens in zip(answers, np.asarray(result.tokens), strict=True):
            own = tokens[: len(batch.good)]
            texts = vlm.tokenizer.batch_decode(own, skip_special_tokens=True)
            found.extend(text.strip() for text in texts)
    teacher_forcing.require_some(answers[0], samples, errors)
    return answers
