"""What answering some samples under some conditions will need, before it starts."""

from collections.abc import Sequence
from typing import NamedTuple

from ports import VLM
from ports.programs import device_bytes
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation.predict import prepare, rows_at_once


class Needs(NamedTuple):
    """What a run will take; bytes are of a device."""

    samples: int
    answers: int  # one a sample and condition
    missing: tuple[str, ...]  # images that are not there
    prompt_tokens: int  # of the first batch's longest prompt
    conditions_at_once: int  # how many share a pass over a batch
    parameters: int
    temporaries: int  # of a batch under one condition: cache, states, buffers


def preflight(
    vlm: VLM,
    samples: Sequence[Sample],
    num_conditions: int,
    *,
    max_new_tokens: int = 10,
    batch_size: int = 16,
) -> Needs:
    """What `predict` of the samples under so many conditions will need; nothing is answered.

    vlm: of `ports.load_abstract`, or `load`. The first batch is preprocessed and the program that
    answers it is compiled. Raises ValueError if none of its images can be read.
    """
    first = list(samples[:batch_size])
    batch = prepare(vlm, first, told=[None], size=batch_size)
    if not len(batch.good):
        raise ValueError(f"none of the first images can be read; the first: {batch.errors[0]}")
    inputs = batch.inputs[None]
    lowered = vlm.lower(inputs, sites=(), max_new_tokens=max_new_tokens)
    parameters, temporaries = device_bytes(lowered)
    rows = rows_at_once(vlm, inputs, max_new_tokens)
    return Needs(
        samples=len(samples),
        answers=len(samples) * num_conditions,
        missing=tuple(str(s.image) for s in samples if not s.image.is_file()),
        prompt_tokens=int(inputs["attention_mask"].sum(axis=1).max()),
        conditions_at_once=max(1, min(num_conditions, rows // batch_size)),
        parameters=parameters,
        temporaries=temporaries,
    )
