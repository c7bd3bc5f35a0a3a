"""Estimates what an evaluation will need before it starts."""

from collections.abc import Sequence
from typing import NamedTuple

from ports import VLM
from ports.programs import program_bytes
from xlvlm_jax.data.batches import make_batch
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.data.sweeps import rows_at_once


class EvaluationNeeds(NamedTuple):
    """What an evaluation will need; memory is in bytes per device."""

    samples: int
    answers: int  # one per sample and condition
    missing: tuple[str, ...]  # images that do not exist
    prompt_tokens: int  # length of the first batch's longest prompt
    conditions_at_once: int  # conditions that share a pass over a batch
    parameters: int
    temporaries: int  # for a batch under one condition: cache, states, buffers


def preflight(
    vlm: VLM,
    samples: Sequence[Sample],
    num_conditions: int,
    *,
    max_new_tokens: int = 10,
    batch_size: int = 16,
) -> EvaluationNeeds:
    """Returns what `predict` will need, without answering anything.

    Preprocesses the first batch and compiles the program that answers it.

    Args:
        vlm: the model, from `ports.load_abstract` or `load`.
        samples: the samples to answer.
        num_conditions: number of conditions, including the plain model if it is to answer.
        max_new_tokens: maximum number of tokens per answer.
        batch_size: samples per batch.

    Returns:
        The estimate.

    Raises:
        ValueError: no image of the first batch can be read.
    """
    first = samples[:batch_size]
    batch = make_batch(vlm, first, batch_size)
    if not batch.inputs:
        raise ValueError(
            f"none of the first {len(first)} images can be read; the first: {batch.errors[0]}"
        )
    (inputs,) = batch.inputs
    lowered = vlm.lower(inputs, sites=(), max_new_tokens=max_new_tokens)
    parameters, temporaries = program_bytes(lowered)
    rows = rows_at_once(vlm, inputs, max_new_tokens)
    return EvaluationNeeds(
        samples=len(samples),
        answers=len(samples) * num_conditions,
        missing=tuple(str(s.image) for s in samples if not s.image.is_file()),
        prompt_tokens=int(inputs["attention_mask"].sum(axis=1).max()),
        conditions_at_once=min(num_conditions, max(1, rows // batch_size)),
        parameters=parameters,
        temporaries=temporaries,
    )
