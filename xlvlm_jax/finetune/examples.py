"""Samples -> batches to train on: a prompt with its image, and one of the references behind it.

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
    """Rows whose last tokens are the answers to learn."""

    inputs: dict[str, np.ndarray]  # the processor's arrays, rows padded on the left; {} of no row
    lengths: np.ndarray  # int32[B]: tokens of each answer, its end included; 0 in filled-up rows
    window: int  # no answer is longer; one of few, so that few programs are compiled
    skipped: dict[str, str]  # sample -> why it teaches nothing: it can't be read or processed


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
    """Training batches number `start` to `stop`, read and preprocessed by threads ahead of need.

    Batch i holds the samples from i * batch_size on in an endless row of shuffled epochs, each with
    one of its references, drawn anew. All follows from seed and number alone. A sample that can't
    be read or processed has no row; a batch of nothing else is that of the next number.

    strict: stop at such a sample. Raises ValueError for samples of which none can be learnt.
    """

    def make(number: int) -> TrainingBatch:
        skipped: dict[str, str] = {}
        for following in range(number, number + len(samples) + 1):
            batch = draw(following)
            skipped |= batch.skipped
            if batch.inputs:
                return batch._replace(skipped=skipped)
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"none of {len(samples)} samples can be learnt; the first, {name}: {reason}"
        )

    def draw(number: int) -> TrainingBatch:
        chosen, answers = [], []
        for place in range(number * batch_size, (number + 1) * batch_size):
            epoch, index = divmod(place, len(samples))
            sample = samples[_order(len(samples), seed, epoch)[index]]
            choice = np.random.default_rng([seed, 1, place])
            chosen.append(sample)
            answers.append(str(choice.choice(answers_of(sample))))
        return _batch(vlm, chosen, answers, batch_size, strict)

    return read_ahead(range(start, stop), make)


def evaluation_batches(
    vlm: VLM, samples: Sequence[Sample], batch_size: int, *, strict: bool = False
) -> Iterator[TrainingBatch]:
    """All samples in order, each with its first reference; otherwise as `batches`."""

    def make(chosen: Group) -> TrainingBatch:
        first = [answers_of(sample)[0] for sample in chosen]
        return _batch(vlm, chosen, first, batch_size, strict)

    return read_ahead(groups_of(samples, batch_size), make)


def answers_of(sample: Sample) -> tuple[str, ...]:
    """What a sample teaches: its captions; of VQAv2 the answer that was given most often.

    Raises ValueError for a sample without any.
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
    # One length for most data; but the first position predicts and is predicted by none.
    window = max(32, bucket_length(int(lengths.max())))
    window = min(window, bucket_length(inputs["input_ids"].shape[1]) - 1)
    return TrainingBatch(inputs, lengths, window, made.refused)
