"""Concepts read back as words and as images (CoX-LMM, NeurIPS 2024, section 3.3).

Axes: K concepts, D width, V vocabulary, N samples.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.core import Tracer
from jaxtyping import Float, Int

from ports import VLM
from xlvlm_jax.data.words import concept_words
from xlvlm_jax.features.manifest import finetuned_site
from xlvlm_jax.storage.zarr_rows import StoredRows

_TILE_ROWS = 2**16  # of activations that are looked through at once
AnyArray = jax.Array | np.ndarray
Unembed = Callable[..., AnyArray]  # (components[K, D], *, through_norm) -> logits[K, V]


def ground_text(
    components: Float[AnyArray, "K D"],
    unembed: Unembed,
    tokenizer: Any,
    num_words: int = 10,
    num_candidates: int = 50,
    *,
    through_norm: bool = False,
) -> list[list[str]]:
    """The words of each concept: what the language-model head reads in its direction.

    Returns text: it does not trace.

    The `num_candidates` tokens of highest logit are decoded, lower-cased and stripped; the first
    `num_words` that are English words of more than two letters and no stop words, or numbers, are
    kept, each once. A concept may keep fewer, even none.

    Args:
        components: float[K, D]: means of states, atoms, directions or shifts.
        unembed: the language-model head, [K, D] -> logits [K, V], such as `VLM.unembed`.
        tokenizer: a Hugging Face tokenizer, or whatever decodes [id].
        through_norm: read components through the model's final norm, `unembed(components,
            through_norm=True)`, as the logit lens does. Right for states of before that norm (see
            `VLM.is_before_norm`), which the head alone reads as other words; XL-VLMs applies none.
            A centroid goes through it as a state does. Of an atom, a component of pca or a shift
            the length cancels: what counts is the norm's weight times the direction, which is how
            the logits change along it where the scale of the state is held.

    Raises ValueError for counts below one, components that are no matrix or of another width than
    the head takes, and components that are not finite.
    """
    for name, count in (("num_words", num_words), ("num_candidates", num_candidates)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if np.ndim(components) != 2:
        raise ValueError(f"components have shape {np.shape(components)}; expected [K, D]")
    finite = np.isfinite(np.asarray(components)).all(axis=1)
    if not finite.all():
        raise ValueError(f"concept {int(np.argmin(finite))} holds NaN or Inf; factor Z again")
    try:
        logits = jnp.asarray(
            unembed(components, through_norm=True) if through_norm else unembed(components)
        )
    except (TypeError, ValueError, FlaxError) as error:
        raise ValueError(
            f"components are {components.shape[1]} wide, which the language-model head does not"
            f" take ({str(error).splitlines()[0]}); use the model that the states came from"
        ) from error
    _, candidates = jax.lax.top_k(logits, min(num_candidates, logits.shape[-1]))
    return [
        concept_words((tokenizer.decode([int(i)]) for i in ids), num_words)
        for ids in np.asarray(candidates)
    ]


def is_before_norm(vlm: VLM, site: str | None) -> bool:
    """Whether components learnt at a site of features are to be read through the final norm.

    False where the site is not known. That of the fine-tuned model counts as the model's own.
    """
    return bool(site) and vlm.is_before_norm(site.removeprefix(finetuned_site("")))


def ground_images(
    activations: Float[AnyArray, "N K"] | StoredRows, num_images: int = 5
) -> Int[AnyArray, "K {num_images}"]:
    """The samples that activate each concept most, the strongest first; of equals, the earlier.

    Of activations on disk (`StoredRows`) one tile is in memory at a time.

    Returns row numbers of `activations`: int32 on the device of a JAX array, else int64. Traces
    under jit (num_images static) and vmap; what is not finite is found outside of them only.

    Raises ValueError unless 1 <= num_images <= N, and for activations that are not finite.
    """
    N = activations.shape[0]
    if not 1 <= num_images <= N:
        raise ValueError(f"num_images must lie in 1..{N}, the number of samples; got {num_images}")
    if isinstance(activations, Tracer):
        return jax.lax.top_k(activations.T, num_images)[1]
    if isinstance(activations, jax.Array):
        collections.deque(_finite(tiles_of(activations)), maxlen=0)
        return jax.lax.top_k(activations.T, num_images)[1]
    return strongest_rows(tiles_of(activations), activations.shape[1], num_images)


def strongest_rows(
    tiles: Iterable[tuple[int, Float[np.ndarray, "B K"]]], num_concepts: int, num_images: int
) -> Int[np.ndarray, "K {num_images}"]:
    """`ground_images` of activations that come as (first row, some rows), in order."""
    values = np.empty((num_concepts, 0), np.float32)
    rows = np.empty(values.shape, np.int64)
    for start, tile in _finite(tiles):
        # What was found before stands first: of equals, the earlier.
        values = np.concatenate([values, tile.T], axis=1)
        numbers = np.broadcast_to(start + np.arange(len(tile)), tile.T.shape)
        rows = np.concatenate([rows, numbers], axis=1)
        best = np.stack([largest(column, min(num_images, len(column))) for column in values])
        values, rows = (np.take_along_axis(each, best, axis=1) for each in (values, rows))
    return rows


def tiles_of(
    activations: Float[AnyArray, "N K"] | StoredRows,
) -> Iterator[tuple[int, Float[np.ndarray, "B K"]]]:
    """(first row, rows) of some rows at a time, of an array or from the disk."""
    if isinstance(activations, StoredRows):
        yield from activations.tiles(_TILE_ROWS)
        return
    activations = np.asarray(activations)
    for start in range(0, len(activations), _TILE_ROWS):
        yield start, activations[start : start + _TILE_ROWS]


def _finite(tiles: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    for start, tile in tiles:
        finite = np.isfinite(tile).all(axis=1)
        if not finite.all():
            number = start + int(np.argmin(finite))
            raise ValueError(f"activations of sample {number} hold NaN or Inf")
        yield start, tile


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest values, the largest first; of equals, the earlier."""
    # All that may be among them: sorting the rest would take most of the time.
    candidates = np.flatnonzero(values >= np.partition(values, len(values) - count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]
