"""Teacher forcing: runs a model over given answers, from stored states of one layer on.

N samples, B batch, T positions, D width, V vocabulary.

The effect of a learnt shift depends only on the layers after it. The states of the last layer
before it are therefore computed once and stored in the model's dtype (N T D numbers), and a step of
learning neither encodes images nor runs the layers before the site again.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Float

from ports import VLM
from ports.inputs.padding import bucket_length
from ports.intervene.edits import GENERATED, LAST_PROMPT, PADDING, Edits
from ports.intervene.steer import steer, substitute
from ports.names import normal_name
from ports.nn.vision_language import VisionLanguageModel
from xlvlm_jax.data.batches import Batch, make_batch, read_ahead
from xlvlm_jax.data.sample import Sample

Array = jax.Array | np.ndarray
Progress = Callable[[int, int], None]


class Forced(NamedTuple):
    """Prompts with their answers, padded on the left; the first axis of all arrays is N."""

    tokens: np.ndarray  # int32[N, T]
    positions: np.ndarray  # int32[N, T] or [N, T, 3], rotary positions
    kinds: np.ndarray  # int32[N, T]: kinds of positions, see `ports.intervene.edits`
    states: np.ndarray  # [N, T, D]: states of the site that runs start from

    @property
    def answer_length(self) -> int:
        """Number of tokens of the longest answer, including its end token."""
        return int((self.kinds == GENERATED).sum(1).max())


def begin_site(vlm: VLM, site: str) -> str:
    """Returns the last layer up to `site` whose states determine everything after it.

    Args:
        vlm: the model.
        site: a site of the decoder.

    Returns:
        The site of the layer.

    Raises:
        ValueError: the site is unknown, or before the end of the decoder's first layer.
    """
    site = vlm.find_site(site, one_state=True)
    decoder = vlm.decoder
    block = re.compile(re.escape(normal_name(decoder)) + r"\.[a-z]+\.\d+$")
    sites = [normal_name(name) for name in vlm.sites]
    before = [name for name in sites[: sites.index(normal_name(site)) + 1] if block.match(name)]
    # The head comes after the decoder; shifts are learnt within the decoder.
    if not before or not normal_name(site).startswith(decoder):
        first = next(name for name in sites if block.match(name))
        raise ValueError(
            f"nothing can be learnt at site {site!r}; choose a site of the decoder, {first!r} or "
            "a later one"
        )
    return before[-1]


def batches(
    vlm: VLM,
    samples: Sequence[Sample],
    answers: Sequence[str] | None,
    batch_size: int,
    *,
    ended: bool = True,
    strict: bool = False,
    errors: dict[str, str] | None = None,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yields prompts with their answers in batches of one size, read ahead.

    Args:
        vlm: the model.
        samples: images and prompts.
        answers: the text that follows each prompt; None for prompts alone.
        batch_size: B.
        ended: whether to append the end token to each answer.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        errors: receives {sample: why it was skipped}.

    Yields:
        int[R], the samples of the first R rows, and the batch; batches without rows are left out.

    Raises:
        ValueError: the batch size is less than 1, the numbers of answers and samples differ, or an
            answer is empty; if strict, as `make_batch`.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; expected 1 sample or more per batch")
    if answers is not None:
        require_one_each(answers, samples)
    if answers is not None and not all(answer.strip() for answer in answers):
        empty = next(i for i, answer in enumerate(answers) if not answer.strip())
        raise ValueError(
            f"the answer to force on sample {samples[empty].id} is empty; expected text"
        )

    def make(first: int) -> Batch:
        here = slice(first, first + batch_size)
        given = None if answers is None else answers[here]
        return make_batch(vlm, samples[here], batch_size, answers=given, ended=ended, strict=strict)

    starts = range(0, len(samples), batch_size)
    for first, batch in zip(starts, read_ahead(starts, make), strict=True):
        if errors is not None:
            errors |= batch.refused
        if batch.inputs:
            yield first + batch.good, batch


def require_one_each(answers: Sequence[str], samples: Sequence[Sample]) -> None:
    """Checks that there are as many answers as samples.

    Raises:
        ValueError: there are not.
    """
    if len(samples) != len(answers):
        raise ValueError(
            f"there are {len(answers)} answers for {len(samples)} samples; expected one each"
        )


def position_kinds(vlm: VLM, inputs: Any, counts: np.ndarray) -> np.ndarray:
    """Returns the kinds of positions of rows that end with an answer.

    Args:
        vlm: the model.
        inputs: the processor's arrays.
        counts: int[B], number of tokens of each answer.

    Returns:
        int32[B, T].
    """
    places = vlm.places(inputs)
    kinds, index = np.array(places.kind), np.asarray(places.index)
    first = (index[:, -1:] + 1) - counts[:, None]
    real = kinds != PADDING
    kinds[real & (index >= first)] = GENERATED
    kinds[real & (index == first - 1)] = LAST_PROMPT
    return kinds


def force(
    vlm: VLM,
    samples: Sequence[Sample],
    answers: Sequence[str],
    site: str,
    *,
    batch_size: int = 16,
    strict: bool = False,
    progress: Progress | None = None,
) -> tuple[Forced, np.ndarray, dict[str, str]]:
    """Runs the model over prompts and answers and stores the states to start later runs from.

    Args:
        vlm: the model.
        samples: images and prompts.
        answers: an answer per sample; the model's end token is appended.
        site: the layer whose states to store, from `begin_site`.
        batch_size: B.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        progress: called after each batch with (samples done, number of samples).

    Returns:
        The forced answers, int[N] the sample of each row, and {skipped sample: why}.

    Raises:
        ValueError: an answer is empty, the numbers of answers and samples differ, or no sample can
            be processed; if strict, for the first that can't.
        OSError: if strict, for the first image that can't be read.
    """
    parts, kept, errors = [], [], {}
    for index, batch in batches(vlm, samples, answers, batch_size, strict=strict, errors=errors):
        (inputs,) = batch.inputs
        states = vlm.states(inputs, sites=[site])[site]
        prepared = vlm.prepare(inputs)
        part = Forced(
            tokens=prepared["input_ids"],
            positions=np.asarray(vlm.positions(prepared)),
            kinds=position_kinds(vlm, prepared, batch.answer_lengths),
            states=np.asarray(states),
        )
        parts.append([np.asarray(array)[: len(index)] for array in part])
        kept += index.tolist()
        if progress is not None:
            progress(len(kept) + len(errors), len(samples))
    require_some(kept, samples, errors)
    length = max(part[0].shape[1] for part in parts)
    fill = {"tokens": 0, "positions": 0, "kinds": PADDING, "states": 0}
    forced = Forced(
        *(
            np.concatenate([_pad_left(array, length, fill[name]) for array in arrays])
            for arrays, name in zip(zip(*parts, strict=True), Forced._fields, strict=True)
        )
    )
    return forced, np.array(kept, int), errors


def require_counts(**counts: int) -> None:
    """Checks options that must be at least 1.

    Args:
        **counts: value by the name of the option.

    Raises:
        ValueError: one is less.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")


def not_finite(
    site: str, rows: np.ndarray, samples: Sequence[Sample], *, strict: bool
) -> dict[str, str]:
    """Finds states that are not finite, as those of a model in float16 need not be.

    Args:
        site: the site, for the message.
        rows: float[N, D].
        samples: the N samples.
        strict: raise for the first one.

    Returns:
        {sample: why it can't be used} for those with NaN or infinite entries.

    Raises:
        FloatingPointError: if strict, for the first sample.
    """
    wrong = {
        samples[int(row)].id: f"the states of sample {samples[int(row)].id} at {site!r} are not "
        "finite; load the model in float32 or bfloat16 (numbers above 65,504 overflow in float16)"
        for row in np.flatnonzero(~np.isfinite(rows).all(axis=1))
    }
    if strict and wrong:
        raise FloatingPointError(next(iter(wrong.values())))
    return wrong


def token_means(states: Float[Array, "B T D"], chosen: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """Returns the mean state of some positions of each row, without moving the states.

    Works under jit, vmap and grad.

    Args:
        states: float[B, T, D].
        chosen: bool[B, T], the positions; at least one in each row.

    Returns:
        float32[B, D].
    """
    # Padded, so that prompts of all lengths share a few programs; padding itself compiles in less.
    length = states.shape[1]
    fill = (0, bucket_length(length) - length)
    pad = np.pad if isinstance(chosen, np.ndarray) else jnp.pad
    chosen = pad(chosen, ((0, 0), fill))
    return _token_means(jnp.pad(states, ((0, 0), fill, (0, 0))), chosen)


@jax.jit
def _token_means(states: jax.Array, chosen: jax.Array) -> jax.Array:
    chosen = jnp.asarray(chosen)
    rows = jnp.where(chosen[..., None], jnp.asarray(states).astype(jnp.float32), 0)
    return rows.sum(axis=1) / chosen.sum(axis=1)[:, None]


def require_some(kept: Sequence[Any], samples: Sequence[Sample], errors: dict[str, str]) -> None:
    """Checks that at least one sample could be processed.

    Args:
        kept: the samples that could.
        samples: all samples.
        errors: {sample: why it was skipped}.

    Raises:
        ValueError: none could; the message says why the first could not.
    """
    if not kept:
        first = next(iter(errors.values()), "there are no samples")
        raise ValueError(f"none of {len(samples)} samples can be processed; the first: {first}")


def _pad_left(array: np.ndarray, length: int, value: int) -> np.ndarray:
    missing = [(0, 0)] * array.ndim
    missing[1] = (length - array.shape[1], 0)
    return np.pad(array, missing, constant_values=value)


def answer_losses(
    module: VisionLanguageModel,
    params: dict,
    batch: Forced,
    site: str,
    edits: Edits,
    length: int,
) -> tuple[jax.Array, jax.Array]:
    """Computes cross-entropies of the answers' tokens, with edits at or after the stored layer.

    Args:
        module, params: the model.
        batch: rows of what `force` returns.
        site: the site whose states the batch holds.
        edits: edits at this site or later ones.
        length: A, at least the batch's `answer_length`.

    Returns:
        Losses float32[B, A], zero outside answers, and weights float32[B, A], one within answers.
    """
    inputs = {
        "input_ids": batch.tokens,
        "attention_mask": (batch.kinds != PADDING).astype(jnp.int32),
        "position_ids": batch.positions,
        "position_kinds": batch.kinds,
    }
    apply = steer(substitute(module.apply, {site: batch.states}), edits)
    states = apply({"params": params}, inputs, method="states")
    # Rows are padded on the left: answers are at the end.
    logits = module.bind({"params": params}).unembed(states[:, -length - 1 : -1])
    weights = jnp.asarray(batch.kinds[:, -length:] == GENERATED, jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, -length:])
    return losses * weights, weights
