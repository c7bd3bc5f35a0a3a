"""Samples -> batches to train on: a prompt with its image, and one of the references behind it.

B batch, T positions.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from ports import VLM
from ports.padding import bucket_length
from xlvlm_jax.answers import answered
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample


class Batch(NamedTuple):
    """Rows whose last tokens are the answers to learn."""

    inputs: dict[str, np.ndarray]  # the processor's arrays, rows padded on the left
    lengths: np.ndarray  # int32[B]: tokens of each answer, its end included; 0 in filled-up rows
    window: int  # no answer is longer; one of few, so that few programs are compiled


def batches(
    vlm: VLM, samples: Sequence[Sample], batch_size: int, seed: int, start: int, stop: int
) -> Iterator[Batch]:
    """Training batches number `start` to `stop`, read and preprocessed by threads ahead of need.

    Batch i holds the samples from i * batch_size on in an endless row of shuffled epochs, each with
    one of its references, drawn anew. All follows from seed and number alone.
    """

    def make(number: int) -> Batch:
        chosen, answers = [], []
        for place in range(number * batch_size, (number + 1) * batch_size):
            epoch, index = divmod(place, len(samples))
            sample = samples[_order(len(samples), seed, epoch)[index]]
            choice = np.random.default_rng([seed, 1, place])
            chosen.append(sample)
            answers.append(str(choice.choice(answers_of(sample))))
        return _batch(vlm, chosen, answers, batch_size)

    return _ahead(make, start, stop)


def evaluation_batches(vlm: VLM, samples: Sequence[Sample], batch_size: int) -> Iterator[Batch]:
    """All samples in order, each with its first reference; the last batch is filled up."""

    def make(number: int) -> Batch:
        chosen = samples[number * batch_size : (number + 1) * batch_size]
        return _batch(vlm, chosen, [answers_of(sample)[0] for sample in chosen], batch_size)

    return _ahead(make, 0, -(-len(samples) // batch_size))


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


def _ahead(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    if start == stop:
        return
    # The first call of a tokenizer changes it: not while another thread uses it.
    yield make(start)
    dataset = grain.MapDataset.range(start + 1, stop).map(make)
    yield from dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def _batch(vlm: VLM, samples: Sequence[Sample], answers: Sequence[str], batch_size: int) -> Batch:
    fill = batch_size - len(samples)
    images = [read_image(sample.image) for sample in samples]
    prompts = [vlm.render(sample.prompt) for sample in samples]
    texts, lengths = answered(vlm, prompts, answers)
    inputs = vlm.process([*texts, *texts[:1] * fill], [*images, *images[:1] * fill])
    # One length for most data; but the first position predicts and is predicted by none.
    window = max(32, bucket_length(int(lengths.max())))
    window = min(window, bucket_length(inputs["input_ids"].shape[1]) - 1)
    return Batch(inputs, np.array([*lengths, *[0] * fill], np.int32), window)
