"""Answers to questions: predicted, scored, and compared before and after steering."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ports import VLM
from ports.steering import Edits
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.metrics.vqa import normalise_answer, vqa_accuracy

MEAN_OVER_TYPES = "mean over types"


def predict(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 10,
    batch_size: int = 16,
    edits: Edits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The model's greedy answers, one a sample.

    Args:
        vlm: the model.
        samples: what is asked.
        max_new_tokens: of an answer at most.
        batch_size: samples a batch; the last batch is filled up.
        edits: of the states, see `ports.steer`; an edit with a row a sample can't be given here.
        progress: called after each batch with (samples done, samples in all).

    Raises ValueError or OSError for an image that can't be read, and ValueError as `VLM.generate`.
    """
    answers: list[str] = []
    for start in range(0, len(samples), batch_size):
        group = samples[start : start + batch_size]
        rows = [*group, *group[:1] * (batch_size - len(group))]
        images = [read_image(sample.image) for sample in group]
        images += images[:1] * (batch_size - len(group))
        inputs = vlm.process([vlm.render(sample.prompt) for sample in rows], images)
        tokens = vlm.generate(inputs, max_new_tokens=max_new_tokens, edits=edits).tokens
        texts = vlm.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        answers += [text.strip() for text in texts[: len(group)]]
        if progress is not None:
            progress(len(answers), len(samples))
    return answers


class Accuracy(NamedTuple):
    """Means over questions, in [0, 1]; see `metrics.vqa_accuracy`."""

    official: float
    reference: float  # by XL-VLMs' protocol
    count: int


def vqa_scores(samples: Sequence[Sample], predictions: Sequence[str]) -> dict[str, Accuracy]:
    """Accuracies over all samples ("all"), by answer type, and the mean over the types.

    Raises ValueError for samples without answers, or another number of predictions.
    """
    if len(samples) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(samples)} samples")
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sample, prediction in zip(samples, predictions, strict=True):
        if not sample.references:
            raise ValueError(f"sample {sample.id} has no answers; evaluate on questions")
        both = (
            vqa_accuracy(prediction, sample.references),
            vqa_accuracy(prediction, sample.references, protocol="xl-vlms"),
        )
        for name in ("all", sample.metadata.get("answer_type")):
            if name is not None:
                found[name].append(both)
    scores = {
        name: Accuracy(*(float(mean) for mean in np.mean(rows, axis=0)), len(rows))
        for name, rows in found.items()
    }
    types = [score for name, score in scores.items() if name != "all"]
    if types:
        official = float(np.mean([score.official for score in types]))
        reference = float(np.mean([score.reference for score in types]))
        scores[MEAN_OVER_TYPES] = Accuracy(official, reference, sum(s.count for s in types))
    return scores


class Changes(NamedTuple):
    """What steering from source to target answers did. Counts, of all samples unless said."""

    samples: int
    changed: int  # answers that differ
    source_before: int  # answers that are among the source words
    source_after: int
    target_before: int
    target_after: int
    moved: int  # from a source answer to a target answer
    gained: int  # a target answer that was none before
    gained_from_source_truth: int  # of these, those whose true answer is among the source words
    others: int  # answers that were neither source nor target
    others_changed: int

    @property
    def moved_share(self) -> float:
        """The share of source answers that became target answers; NaN without any."""
        return self.moved / self.source_before if self.source_before else float("nan")

    @property
    def others_changed_share(self) -> float:
        """The share of the other answers that changed; NaN without any."""
        return self.others_changed / self.others if self.others else float("nan")


def answer_changes(
    before: Sequence[str],
    after: Sequence[str],
    source: Sequence[str],
    target: Sequence[str],
    truths: Sequence[str | None],
) -> Changes:
    """Compares answers before and after steering (Khayatan et al. 2025, section 5).

    Args:
        before, after: the model's answers to the same questions, compared after normalisation.
        source, target: the words steered from and to.
        truths: the most frequent answer of people, or None where it is not known.

    Raises ValueError for lists of different lengths, or words that are both source and target.
    """
    if not len(before) == len(after) == len(truths):
        raise ValueError(
            f"there are {len(before)} answers before, {len(after)} after and {len(truths)} truths; "
            "expected the same number of each"
        )
    sources, targets = ({normalise_answer(word) for word in words} for words in (source, target))
    if sources & targets:
        raise ValueError(f"{sorted(sources & targets)} are both source and target words")
    old, new = ([normalise_answer(answer) for answer in answers] for answers in (before, after))
    was_source = np.array([answer in sources for answer in old], bool)
    was_target = np.array([answer in targets for answer in old], bool)
    is_source = np.array([answer in sources for answer in new], bool)
    is_target = np.array([answer in targets for answer in new], bool)
    differ = np.array([a != b for a, b in zip(old, new, strict=True)], bool)
    truth = np.array([t is not None and normalise_answer(t) in sources for t in truths], bool)
    gained, other = is_target & ~was_target, ~was_source & ~was_target
    return Changes(
        samples=len(old),
        changed=int(differ.sum()),
        source_before=int(was_source.sum()),
        source_after=int(is_source.sum()),
        target_before=int(was_target.sum()),
        target_after=int(is_target.sum()),
        moved=int((was_source & is_target).sum()),
        gained=int(gained.sum()),
        gained_from_source_truth=int((gained & truth).sum()),
        others=int(other.sum()),
        others_changed=int((other & differ).sum()),
    )


def describe(scores: dict[str, Accuracy]) -> dict[str, dict[str, Any]]:
    """Scores as JSON values."""
    return {name: score._asdict() for name, score in scores.items()}
