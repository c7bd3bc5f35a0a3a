"""Reads concepts as words and as images (CoX-LMM, NeurIPS 2024, section 3.3).

Axes: K concepts, D width, V vocabulary, N samples.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.core import Tracer
from jaxtyping import Bool, Float, Int

from ports import VLM
from xlvlm_jax.data.word_rules import Rules, concept_words
from xlvlm_jax.features.manifest import module_of
from xlvlm_jax.storage.zarr_rows import StoredRows

# Rows of activations examined at once, and their numbers: features may be thousands.
_TILE_ROWS, _TILE_NUMBERS = 2**16, 2**24
_AT_ONCE = 256  # concepts whose logits are in memory together: V numbers each
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
    rules: Rules = "default",
) -> list[list[str]]:
    """Returns the words of each concept: the tokens that the language-model head favours along it.

    The `num_candidates` tokens of highest logit are decoded, lower-cased and stripped. The first
    `num_words` distinct ones that are numbers, or English words of more than two letters and not
    stop words, are kept. A concept may have fewer words or none. Runs on the host and cannot be
    traced.

    Args:
        components: float[K, D]: means of states, atoms, directions or shifts.
        unembed: the language-model head, [K, D] -> logits [K, V], such as `VLM.unembed`.
        tokenizer: a Hugging Face tokenizer, or anything that decodes [id].
        num_words: maximum number of words per concept.
        num_candidates: number of tokens to choose from.
        through_norm: read components through the model's final norm, `unembed(components,
            through_norm=True)`, like the logit lens. Right for states before that norm (see
            `VLM.is_before_norm`), which the head alone reads as other words; XL-VLMs applies no
            norm. A centroid passes through it like a state. For an atom, a component of pca or a
            shift the length cancels: the result is the norm's weight times the direction, which is
            how the logits change along it while the scale of the state is held fixed.
        rules: which tokens count as words, "default" or "xl-vlms": see
            `xlvlm_jax.data.word_rules`.

    Raises:
        ValueError: a count is below one, the rules are unknown, components are not a matrix of
            the head's width, or they are not finite.

    Examples:
        >>> import numpy as np, ports, xlvlm_jax
        >>> vlm = ports.load("embedded")
        >>> dog = vlm.tokenizer.encode(" dog", add_special_tokens=False)[-1]
        >>> head = vlm.params["language_model"]["lm_head"]["kernel"]
        >>> xlvlm_jax.ground_text(head[:, [dog]].T, vlm.unembed, vlm.tokenizer, num_words=2)
        [['dog', 'pup']]
    """
    for name, count in (("num_words", num_words), ("num_candidates", num_candidates)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if np.ndim(components) != 2:
        raise ValueError(f"components have shape {np.shape(components)}; expected [K, D]")
    finite = np.isfinite(np.asarray(components)).all(axis=1)
    if not finite.all():
        raise ValueError(f"concept {int(np.argmin(finite))} contains NaN or Inf; factor Z again")
    try:
        candidates = _candidates(components, unembed, num_candidates, through_norm)
    except (TypeError, ValueError, FlaxError) as error:
        raise ValueError(
            f"components are {components.shape[1]} wide, which the language-model head does not "
            f"accept ({str(error).splitlines()[0]}); use the model that the states came from"
        ) from error
    # Thousands of features share their candidates.
    text = functools.cache(lambda i: tokenizer.decode([i]))
    return [concept_words(map(text, ids), num_words, rules) for ids in candidates]


def _candidates(
    components: Float[AnyArray, "K D"], unembed: Unembed, count: int, through_norm: bool
) -> list[list[int]]:
    """Returns the ids of the tokens of highest logit of each concept."""
    found: list[list[int]] = []
    for start in range(0, len(components), _AT_ONCE):
        some = components[start : start + _AT_ONCE]
        real = len(some)
        if start:  # one shape, so that one program is compiled
            some = np.pad(np.asarray(some), ((0, _AT_ONCE - real), (0, 0)))
        logits = jnp.asarray(unembed(some, through_norm=True) if through_norm else unembed(some))
        _, best = jax.lax.top_k(logits, min(count, logits.shape[-1]))
        found += np.asarray(best)[:real].tolist()
    return found


def is_before_norm(vlm: VLM, site: str | None) -> bool:
    """Returns whether components of a site must be read through the final norm.

    Args:
        vlm: the model.
        site: the site of the features; None or empty if unknown. A site of the fine-tuned model
            counts as the model's own.

    Returns:
        False if the site is unknown.
    """
    return bool(site) and vlm.is_before_norm(module_of(site))


def unembed_of(vlm: VLM, site: str | None) -> Unembed:
    """Returns the function that reads components of a site as logits.

    Args:
        vlm: the model.
        site: the site of the features; None or empty if unknown.

    Returns:
        The language-model head; after an attention's output projection for the outputs of its
        heads; nothing for logits.
    """
    own = module_of(site or "")
    if own and vlm.is_head(own):
        return lambda logits: logits
    if own in vlm.attention_heads:
        return lambda x, **options: vlm.unembed(vlm.project_heads(x, own), **options)
    return vlm.unembed


def ground_images(
    activations: Float[AnyArray, "N K"] | StoredRows, num_images: int = 5
) -> Int[AnyArray, "K {num_images}"]:
    """Returns the samples that activate each concept most, strongest first; ties go to the earlier.

    Works under jit (num_images static) and vmap; values are only checked outside of them.

    Args:
        activations: float[N, K]; of `StoredRows`, one tile is in memory at a time.
        num_images: number of samples per concept.

    Returns:
        row numbers [K, num_images]; int32 on the device of a JAX array, else int64.

    Raises:
        ValueError: num_images is not in 1..N, or activations are not finite.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> xlvlm_jax.ground_images(np.float32([[0, 7], [5, 1], [2, 8]]), num_images=2).tolist()
        [[1, 2], [2, 0]]
    """
    N = activations.shape[0]
    if not 1 <= num_images <= N:
        raise ValueError(f"num_images must be in 1..{N}, the number of samples; got {num_images}")
    if isinstance(activations, Tracer):
        return jax.lax.top_k(activations.T, num_images)[1]
    if isinstance(activations, jax.Array):
        _check_finite(np.asarray(jnp.isfinite(activations).all(axis=1)), 0)  # where they are
        return jax.lax.top_k(activations.T, num_images)[1]
    return strongest_rows(tiles_of(activations), activations.shape[1], num_images)


def strongest_rows(
    tiles: Iterable[tuple[int, Float[np.ndarray, "B K"]]], num_concepts: int, num_images: int
) -> Int[np.ndarray, "K {num_images}"]:
    """Does `ground_images` for activations that arrive as (first row, some rows), in order."""
    values = np.empty((num_concepts, 0), np.float32)
    rows = np.empty(values.shape, np.int64)
    for start, tile in _finite(tiles):
        # Earlier finds come first, so that ties go to the earlier sample.
        if values.shape[1] == num_images:
            # Most rows activate few of many features.
            above = tile > values[:, -1]
            for k in np.flatnonzero(above.any(axis=0)):
                new = np.flatnonzero(above[:, k])
                both = np.concatenate([values[k], tile[new, k]])
                numbers = np.concatenate([rows[k], start + new])
                best = largest(both, num_images)
                values[k], rows[k] = both[best], numbers[best]
            continue
        values = np.concatenate([values, tile.T], axis=1)
        numbers = np.broadcast_to(start + np.arange(len(tile)), tile.T.shape)
        rows = np.concatenate([rows, numbers], axis=1)
        best = np.stack([largest(column, min(num_images, len(column))) for column in values])
        values, rows = (np.take_along_axis(each, best, axis=1) for each in (values, rows))
    return rows


def strongest_samples(
    tiles: Iterable[tuple[int, Float[np.ndarray, "B K"]]],
    num_concepts: int,
    samples: Int[np.ndarray, " N"],
    count: int,
) -> list[Int[np.ndarray, " _"]]:
    """Returns a row of each sample that activates a concept most: its strongest one.

    Memory does not grow with the number of rows per sample, as of image tokens.

    Args:
        tiles: activations as (first row, some rows), in order.
        num_concepts: K.
        samples: the sample of each row.
        count: maximum number of samples per concept; none of 0.

    Returns:
        For each concept the rows, each of another sample, the strongest first; ties go to the
        earlier. Rows that do not activate a concept, whose activation is 0, are left out.
    """
    values = np.full((num_concepts, count), -np.inf, np.float32)
    rows = np.full(values.shape, -1, np.int64)
    if count == 0:
        return list(rows)
    for start, tile in _finite(tiles):
        own = samples[start : start + len(tile)]
        most, first = _of_samples(np.where(tile == 0, -np.inf, tile), own)
        above = most > values[:, -1]  # of most features, few samples
        for k in np.flatnonzero(above.any(axis=0)):
            new = np.flatnonzero(above[:, k])
            new = new[np.argsort(first[new, k])]
            held = rows[k] >= 0
            # Earlier finds come first, so that ties go to the earlier row.
            both = np.concatenate([values[k, held], most[new, k]])
            numbers = np.concatenate([rows[k, held], start + first[new, k]])
            # A sample may be among both, so twice as many hold enough samples.
            best = largest(both, min(2 * count, len(both)))
            _, once = np.unique(samples[numbers[best]], return_index=True)
            best = best[np.sort(once)][:count]
            values[k, : len(best)], rows[k, : len(best)] = both[best], numbers[best]
    return [each[each >= 0] for each in rows]


def _of_samples(
    tile: Float[np.ndarray, "B K"], samples: Int[np.ndarray, " B"]
) -> tuple[Float[np.ndarray, "S K"], Int[np.ndarray, "S K"]]:
    """Returns the largest activation of each sample in a tile, and the first row that has it."""
    order = np.argsort(samples, kind="stable")
    begins = np.flatnonzero(np.diff(samples[order], prepend=-1))
    if len(begins) == len(tile):
        return tile[order], np.broadcast_to(order[:, None], tile.shape)
    sorted_tile = tile[order]
    most = np.maximum.reduceat(sorted_tile, begins, axis=0)
    repeats = np.diff(begins, append=len(tile))
    rows = np.where(sorted_tile == np.repeat(most, repeats, axis=0), order[:, None], len(tile))
    return most, np.minimum.reduceat(rows, begins, axis=0)


def tiles_of(
    activations: Float[AnyArray, "N K"] | StoredRows,
) -> Iterator[tuple[int, Float[np.ndarray, "B K"]]]:
    """Yields (first row, rows) of an array or from disk, a tile at a time."""
    size = max(min(_TILE_ROWS, _TILE_NUMBERS // activations.shape[1]), 1)
    if isinstance(activations, StoredRows):
        yield from activations.tiles(size)
        return
    activations = np.asarray(activations)
    for start in range(0, len(activations), size):
        yield start, activations[start : start + size]


def _finite(tiles: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    for start, tile in tiles:
        _check_finite(np.asarray(np.isfinite(tile).all(axis=1)), start)
        yield start, tile


def _check_finite(finite: Bool[np.ndarray, " B"], start: int) -> None:
    if not finite.all():
        number = start + int(np.argmin(finite))
        raise ValueError(f"activations of sample {number} contain NaN or Inf")


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the largest values, largest first; ties go to the earlier."""
    # Narrows down the candidates first: sorting all values would take most of the time.
    candidates = np.flatnonzero(values >= np.partition(values, len(values) - count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")[:count]]
