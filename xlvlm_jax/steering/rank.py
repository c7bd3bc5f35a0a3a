"""Ranks steering vectors by how strongly they move answers to few targets.

Following "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (Khayatan et
al., ICCV 2025, section 5), a fine vector is useful if it moves many answers and moves them to the
same few. With b_a and c_a the shares of n samples that have the answer a before and after steering:

    gain_a     max(0, c_a - b_a)
    strength   sum of all gains: the net share of answers that moved (the total variation distance
               of the two distributions)
    score      sum of the m largest gains: the share that moved to the m answers that gained most
    targets    exp(entropy of gain / strength): the effective number of answers they moved to

XL-VLMs looks at the answers that gain most and cuts them in two groups by 2-means on their gains:

    main       the answers of the upper group
    lead       the smallest gain of a main answer minus the largest of the others

and takes the vectors with the largest lead among those with few main answers (`top_by_lead`).

Vectors are ranked by score, in [0, 1], which counts only the m largest gains of a vector that
spreads over many answers. With m = 1, a vector that moves all answers to one scores 1; a vector
that moves each to a different answer scores 1 / n.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ports import VLM
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.data.sweeps import sweep_in_runs
from xlvlm_jax.metrics.vqa import normalise_answer
from xlvlm_jax.steering import teacher_forcing
from xlvlm_jax.steering.teacher_forcing import Progress
from xlvlm_jax.steering.vectors import SteeringVector
from xlvlm_jax.storage import atomic


class AnswerShift(NamedTuple):
    """How the distribution of answers moved; see the top of this file."""

    score: float
    strength: float
    targets: float  # 0 if nothing moved
    gained: dict[str, int]  # answer -> number of samples gained, the largest first
    lost: dict[str, int]  # answer -> number of samples lost, the largest first
    samples: int
    main: tuple[str, ...] = ()  # the answers that gained most, by XL-VLMs' rule
    lead: int = 0  # by how much their gains exceed those of others


class MainAnswers(NamedTuple):
    """The answers that a vector moves others to, by XL-VLMs' rule."""

    answers: tuple[str, ...]  # the largest gain first
    lead: int  # in numbers of samples


def main_answers(
    before: Mapping[str, int], after: Mapping[str, int], num_answers: int = 5
) -> MainAnswers:
    """Returns which answers gained most, as XL-VLMs finds them (model_steering.py at a599fe9).

    Runs on the host and cannot be traced.

    Of answers only the first word counts, as `keep_first_word` does there (without it, XL-VLMs
    fails). The two groups are the best ones, where XL-VLMs' k-means starts at random.

    Args:
        before, after: number of times that each answer was given before and after steering.
        num_answers: how many answers to consider, those that gain most.

    Raises:
        ValueError: nothing was answered after steering, or num_answers is below 1.
    """
    gains: Counter[str] = Counter()
    for answer, count in after.items():
        if answer:
            # An answer that is no longer given does not count, as there.
            gains[answer.split(" ")[0]] += count - before.get(answer, 0)
    if not gains or num_answers < 1:
        raise ValueError(
            f"there are {len(gains)} answers after steering and num_answers is {num_answers}; "
            "expected at least one of each"
        )
    # Ties in alphabetical order, so that the order of samples does not count.
    ordered = sorted(gains.items(), key=lambda item: (-item[1], item[0]))[:num_answers]
    values = np.array([gain for _, gain in ordered], float)
    if len(values) == 1:
        return MainAnswers((ordered[0][0],), int(values[0]))

    def within(cut: int) -> float:
        return sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(values, [cut]))

    # Groups of numbers in order are cut at one place.
    cut = min(range(1, len(values)), key=within)
    if values[0] == values[-1]:
        cut = len(values)
    lead = values[cut - 1] - values[cut] if cut < len(values) else 0
    return MainAnswers(tuple(answer for answer, _ in ordered[:cut]), int(lead))


class RankedVector(NamedTuple):
    """A vector and the shift of answers that it caused."""

    vector: SteeringVector
    shift: AnswerShift

    def describe(self) -> dict[str, Any]:
        """Returns JSON values, without the vector's components."""
        names = {name: self.vector.source.get(name) for name in ("method", "from", "to")}
        return {**names, "site": self.vector.site, **self.shift._asdict()}


def answer_shift(before: Sequence[str], after: Sequence[str], num_targets: int = 1) -> AnswerShift:
    """Measures how answers to the same questions moved.

    Runs on the host and cannot be traced.

    Args:
        before, after: the answers, compared after normalisation.
        num_targets: m, see the top of this file.

    Returns:
        The gains and losses, and their summary.

    Raises:
        ValueError: the lists are empty or of different lengths, or num_targets is below 1.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(
            f"there are {len(before)} answers before and {len(after)} after; expected the same "
            "number, at least one"
        )
    if num_targets < 1:
        raise ValueError(f"num_targets is {num_targets}; expected at least 1")
    old, new = (Counter(map(normalise_answer, answers)) for answers in (before, after))
    # Ties in alphabetical order, so that the ranking does not depend on the order of samples.
    gained = dict(sorted((new - old).items(), key=lambda item: (-item[1], item[0])))
    lost = dict(sorted((old - new).items(), key=lambda item: (-item[1], item[0])))
    gains = np.array(list(gained.values()), float) / len(before)
    given = Counter(after)
    main = main_answers(Counter(before), given) if any(given) else MainAnswers((), 0)
    shares = gains / gains.sum() if len(gains) else gains
    return AnswerShift(
        score=float(gains[:num_targets].sum()),
        strength=float(gains.sum()),
        targets=float(np.exp(-(shares * np.log(shares)).sum())) if len(gains) else 0.0,
        gained=gained,
        lost=lost,
        samples=len(before),
        main=main.answers,
        lead=main.lead,
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

    Runs on the host and cannot be traced.

    Vectors that share their samples run together as a sweep: images are encoded, and the layers
    before the site computed, once for all of them, or for as many as the key-value cache has room
    for.

    Args:
        vlm: the model.
        vectors: vectors for one site; a fine vector (`fit_fine`) is tried on the samples that its
            `source["samples"]` lists, any other vector on all. Without samples in the list, no
            answer moves.
        samples: images and prompts.
        alpha: the strength.
        num_targets: m, see the top of this file.
        num_samples: maximum number of samples to try each vector on; the first ones are taken.
        max_new_tokens: maximum number of tokens per answer.
        batch_size: samples per batch.
        strict: stop at a sample that can't be read or processed, instead of skipping it;
            `AnswerShift.samples` is the number of samples tried.
        progress: called with (vectors done, number of vectors).

    Returns:
        The vectors, the highest score first; of equal scores, the stronger vector first.

    Raises:
        ValueError: there are no vectors or no samples, vectors of several sites, or a vector none
            of whose samples is given.
    """
    if len({vector.site for vector in vectors}) != 1:
        raise ValueError(
            f"there are {len(vectors)} vectors for {len({v.site for v in vectors})} sites; "
            "expected at least one vector, and all for one site"
        )
    by_id = {sample.id: sample for sample in samples}
    if not by_id:
        raise ValueError("there are no samples to try the vectors on; expected one or more")
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, vector in enumerate(vectors):
        named = vector.source.get("samples")
        if not isinstance(named, list | tuple):  # other methods record their number
            named = by_id
        ids = tuple(name for name in named if name in by_id)[:num_samples]
        if not ids and len(named):
            raise ValueError(
                f"none of the {len(named)} samples of a vector is among the {len(samples)} given "
                "ones; give the samples that it was fitted on"
            )
        groups.setdefault(ids, []).append(number)
    unmoved = AnswerShift(0.0, 0.0, 0.0, {}, {}, 0)
    shifts = dict.fromkeys(groups.pop((), []), unmoved)
    for ids, numbers in groups.items():
        chosen = [by_id[name] for name in ids]
        # The first variant is the unsteered model.
        variants = [vectors[numbers[0]].edits(0.0)]
        variants += [vectors[number].edits_for(vlm, None, alpha) for number in numbers]
        plain, *steered = _sweep(vlm, chosen, variants, max_new_tokens, batch_size, strict)
        for number, answers in zip(numbers, steered, strict=True):
            shifts[number] = answer_shift(plain, answers, num_targets)
        if progress is not None:
            progress(len(shifts), len(vectors))
    ranked = [RankedVector(vector, shifts[number]) for number, vector in enumerate(vectors)]
    return sorted(ranked, key=lambda each: (-each.shift.score, -each.shift.strength))


def top_by_lead(
    ranked: Sequence[RankedVector],
    *,
    num_vectors: int = 5,
    num_targets: int = 1,
    unique: bool = True,
) -> list[RankedVector]:
    """Returns the vectors that XL-VLMs' `get_topk_shift_vectors` takes, the largest lead first.

    Runs on the host and cannot be traced.

    Args:
        ranked: what `rank_vectors` returns.
        num_vectors: maximum number of vectors.
        num_targets: maximum number of a vector's main answers.
        unique: of vectors with the same main answers, only the one with the largest lead.

    Returns:
        The vectors; none if all move answers to more targets.
    """
    few = [each for each in ranked if 0 < len(each.shift.main) <= num_targets]
    found: dict[Any, RankedVector] = {}
    for each in sorted(few, key=lambda each: -each.shift.lead):
        found.setdefault(each.shift.main if unique else len(found), each)
    return list(found.values())[:num_vectors]


def save_ranking(
    path: Path,
    ranked: Sequence[RankedVector],
    files: Mapping[Path, SteeringVector],
    **settings: Any,
) -> None:
    """Writes a ranking as JSON: the settings, and a record per vector, the best first.

    Runs on the host and cannot be traced.

    Args:
        path: the file to write; a missing parent directory is created.
        ranked: what `rank_vectors` or `top_by_lead` returns.
        files: the vectors by the files that they come from.
        settings: JSON values, such as the strength.

    Raises:
        KeyError: a vector is not among the files'.
    """
    names = {id(vector): str(file) for file, vector in files.items()}
    records = [{"file": names[id(each.vector)], **each.describe()} for each in ranked]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps({**settings, "vectors": records}, indent=2) + "\n")


def _sweep(
    vlm: VLM,
    samples: Sequence[Sample],
    variants: list,
    max_new_tokens: int,
    batch_size: int,
    strict: bool,
) -> list[list[str]]:
    """Returns the answers under each variant to the samples that can be processed."""
    answers: list[list[str]] = [[] for _ in variants]
    errors: dict[str, str] = {}
    for index, batch in teacher_forcing.batches(
        vlm, samples, None, batch_size, strict=strict, errors=errors
    ):
        swept = sweep_in_runs(vlm, batch.inputs[0], variants, max_new_tokens)
        for found, tokens in zip(answers, swept, strict=True):
            texts = vlm.decode(np.asarray(tokens)[: len(index)])
            found.extend(text.strip() for text in texts)
    teacher_forcing.require_some(answers[0], samples, errors)
    return answers
