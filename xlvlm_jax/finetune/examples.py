"""Makes training batches of samples: an image and prompt followed by one of the references.

B batch, T positions.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ports import VLM
from ports.inputs.padding import bucket_length
from xlvlm_jax.data.batches import Group, groups_of, make_batch, read_ahead
from xlvlm_jax.data.sample import Sample


class TrainingBatch(NamedTuple):
    """Rows that end with the answers to learn."""

    inputs: dict[str, np.ndarray]  # the processor's arrays, padded on the left; {} without rows
    lengths: np.ndarray  # int32[B]: tokens of each answer, with its end token; 0 in padding rows
    window: int  # at least the longest answer; takes few values, so that few programs are compiled
    skipped: dict[str, str]  # sample -> why it can't be read or processed


def batches(
    vlm: VLM,
    samples: Sequence[Sample],
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    *,
    strict: bool = False,
) -> Iterator[TrainingBatch]:
    """Yields training batches `start` to `stop`, prefetched by threads.

    Batch i holds the samples from i * batch_size on in an endless sequence of shuffled epochs, each
    with a random one of its references. Seed and number determine a batch. A sample that can't be
    read or processed has no row; a batch without rows is replaced by the next.

    Args:
        vlm: the model.
        samples: the samples.
        batch_size: B.
        seed: random seed.
        start, stop: numbers of the first batch and of the one after the last.
        strict: stop at a sample that can't be read or processed, instead of skipping it.

    Yields:
        Batches.

    Raises:
        ValueError: no sample can be read and processed; if strict, for the first that can't.
    """

    def make(number: int) -> TrainingBatch:
        skipped: dict[str, str] = {}
        # As many as hold all samples of an epoch, wherever in one they begin.
        for following in range(number, number + -(-2 * len(samples) // batch_size)):
            batch = draw(following)
            skipped |= batch.skipped
            if batch.inputs:
                return batch._replace(skipped=skipped)
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"none of {len(samples)} samples can be processed; the first, {name}: {reason}"
        )

    def draw(number: int) -> TrainingBatch:
        chosen, answers = [], []
        for place in range(number * batch_size, (number + 1) * batch_size):
            epoch, index = divmod(place, len(samples))
            sample = samples[_order(len(samples), seed, epoch)[index]]
            choice = np.random.default_rng([seed, 1, place])
            chosen.append(sample)
            answers.append(str(choice.choice(training_answers(sample))))
        return _batch(vlm, chosen, answers, batch_size, strict)

    return read_ahead(range(start, stop), make)


def evaluation_batches(
    vlm: VLM, samples: Sequence[Sample], batch_size: int, *, strict: bool = False
) -> Iterator[TrainingBatch]:
    """Yields all samples in order, each with its first reference.

    Args:
        vlm, samples, batch_size, strict: as for `batches`.

    Yields:
        Batches; those without rows have no inputs.
    """

    def make(chosen: Group) -> TrainingBatch:
        first = [training_answers(sample)[0] for sample in chosen]
        return _batch(vlm, chosen, first, batch_size, strict)

    return read_ahead(groups_of(samples, batch_size), make)


def training_answers(sample: Sample) -> tuple[str, ...]:
    """Returns the answers to learn from a sample: its captions, or its most frequent VQA answer.

    Args:
        sample: the sample.

    Returns:
        At least one answer.

    Raises:
        ValueError: the sample has none.
    """
    answer = sample.metadata.get("answer")
    answers = (answer,) if isinstance(answer, str) else sample.references
    if not answers:
        raise ValueError(
            f"sample {sample.id} has no reference to learn; use data with captions or answers"
        )
    return answers


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def _batch(
    vlm: VLM, samples: Sequence[Sample], answers: Sequence[str], batch_size: int, strict: bool
) -> TrainingBatch:
    made = make_batch(vlm, samples, batch_size, answers=answers, strict=strict)
    if not made.inputs:
        return TrainingBatch({}, np.zeros(0, np.int32), 0, made.refused)
    (inputs,), lengths = made.inputs, made.answer_lengths.astype(np.int32)
    lengths[made.num_rows :] = 0
    # 32 suffices for most data; the first position is excluded, as no position predicts it.
    window = max(32, bucket_length(int(lengths.max())))
    window = min(window, bucket_length(inputs["input_ids"].shape[1]) - 1)
    return TrainingBatch(inputs, lengths, window, made.refused)
