"""Edits of the residual stream: what they do to states, and at which positions.

B batch, T positions, D width.

An edit is a pytree. Its vector, its strength and its positions are arrays: a compiled program takes
them as arguments, so that changing them never compiles again, `jax.vmap` sweeps them and `jax.grad`
differentiates them. What kind of edit it is and at which site it applies are part of the program.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Where = Literal["all", "prompt", "generated", "last_prompt", "image", "text"] | dict[str, Any]

# The kinds of positions; padding is never edited.
PADDING, IMAGE, TEXT, LAST_PROMPT, GENERATED = -1, 0, 1, 2, 3
_WHERE = {
    "all": (IMAGE, TEXT, LAST_PROMPT, GENERATED),
    "prompt": (IMAGE, TEXT, LAST_PROMPT),
    "generated": (GENERATED,),
    "last_prompt": (LAST_PROMPT,),
    "image": (IMAGE,),
    "text": (TEXT, LAST_PROMPT, GENERATED),
}


class Places(NamedTuple):
    """What the positions of a call are; the joined models say it while their decoder runs."""

    kind: Array  # int32[B, T]: PADDING, IMAGE, TEXT, LAST_PROMPT or GENERATED
    index: Array  # int32[B, T]: which token of its row it is, padding not counted
    # int32[B or 1, T]: its column in the caller's inputs, after which generated tokens count on;
    # -1 for what only fills the batch up to a compiled length.
    slot: Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vector", "alpha", "kinds", "start", "mask"],
    meta_fields=["change"],
)
@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of a module's output. `add`, `ablate`, `replace` ... make it.

    Attributes:
        vector: float[D] or float[B, D]; a pair (down[R, D], up[D, R]) for a map; None if `change`
            needs none.
        alpha: float[] or float[B], the strength.
        kinds: bool[4], which kinds of positions are edited.
        start: int32[], the index of the first token that is.
        mask: None, or bool[B, T]: edited are only its positions, which are those of the prompt.
        change: (states[B, T, D], vector[B or 1, 1, D], alpha[B or 1, 1, 1], places) -> states.
    """

    vector: Any
    alpha: Any
    kinds: Any
    start: Any
    mask: Any
    change: Callable[..., Array]

    @property
    def width(self) -> int | None:
        """D, as the vector or the map has it; None for an edit that has neither."""
        first = self.vector[0] if isinstance(self.vector, tuple) else self.vector
        return None if first is None else np.shape(first)[-1]

    def positions(self, shape: tuple[int, ...], places: Places | None) -> Array:
        """bool[B or 1, T]: the positions of states of that shape [B, T, D] that are edited.

        places: None for a module whose positions are no tokens; kinds mean nothing there, so that
        only an edit of all kinds applies.
        """
        kinds = jnp.asarray(self.kinds)
        if places is None:
            chosen = kinds.all() & (jnp.arange(shape[-2]) >= self.start)[None]
            slots = jnp.arange(shape[-2])[None]
        else:
            chosen = kinds[jnp.maximum(places.kind, 0)] & (places.index >= self.start)
            chosen = chosen & (places.kind != PADDING)
            slots = places.slot
        if self.mask is not None:
            mask = jnp.asarray(self.mask, bool)
            slots = jnp.broadcast_to(slots, (*mask.shape[:-1], shape[-2]))
            mask = jnp.take_along_axis(mask, slots, axis=-1, mode="fill", fill_value=False)
            chosen = chosen & mask
        return chosen

    def __call__(self, states: Array, places: Places | None = None) -> Array:
        """states[B, T, D] after the edit, in their dtype."""
        x = states.astype(jnp.promote_types(states.dtype, jnp.float32))
        vector = self.vector
        if isinstance(vector, tuple):
            vector = tuple(jnp.asarray(matrix, x.dtype) for matrix in vector)
        elif vector is not None:
            vector = jnp.asarray(vector, x.dtype)
            vector = vector[:, None] if vector.ndim == 2 else vector[None, None]
        alpha = jnp.asarray(self.alpha, x.dtype).reshape(-1, 1, 1)
        changed = self.change(x, vector, alpha, places).astype(states.dtype)
        return jnp.where(self.positions(states.shape, places)[..., None], changed, states)


Edits = Mapping[str, Edit | Sequence[Edit]]


def is_traced(value: Any) -> bool:
    """Whether a value is an argument of a program being traced, and so not known yet."""
    return isinstance(value, jax.core.Tracer)


def _edit(change: Callable[..., Array], vector: Any, alpha: Any, where: Any) -> Edit:
    if not (vector is None or isinstance(vector, tuple) or np.ndim(vector) in (1, 2)):
        raise ValueError(
            f"a steering vector has shape {np.shape(vector)}; expected [D], or [B, D] for one a row"
        )
    if np.ndim(alpha) > 1:
        raise ValueError(f"alpha has shape {np.shape(alpha)}; expected a number, or [B]")
    for name, values in (("alpha", alpha), ("the steering vector", vector)):
        for value in jax.tree.leaves(values):
            # What is traced has no values yet.
            if not is_traced(value) and not np.isfinite(value).all():
                shown = f"is {value}" if np.ndim(value) == 0 else "has entries that are not finite"
                raise ValueError(f"{name} {shown}; expected finite numbers")
    kinds, start, mask = _positions(where)
    alpha = jnp.asarray(alpha, jnp.float32)
    return Edit(vector, alpha, kinds, jnp.asarray(start, jnp.int32), mask, change)


def _positions(where: Any) -> tuple[np.ndarray, Any, Any]:
    """An edit's kinds, start and mask. ValueError for what names no positions."""
    everything = np.ones(4, bool)
    if isinstance(where, Mapping) and set(where) == {"from"}:
        start = where["from"]
        if not is_traced(start) and (np.ndim(start) or start != int(start) or start < 0):
            raise ValueError(f"where is {where}; expected {{'from': i}} with a whole number i >= 0")
        return everything, start, None
    if is_traced(where) or np.ndim(where) == 2:
        return everything, 0, where
    if not isinstance(where, str) or where not in _WHERE:
        raise ValueError(
            f"where is {str(where)!r}; expected one of {', '.join(_WHERE)}, {{'from': index}}, or "
            "a mask bool[B, T]"
        )
    return np.isin(np.arange(4), _WHERE[where]), 0, None


def _add(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    return x + alpha * vector


def _add_relative(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    return x + alpha * jnp.linalg.norm(x, axis=-1, keepdims=True) * _unit(vector)


def _ablate(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    unit = _unit(vector)
    return x - alpha * jnp.sum(x * unit, axis=-1, keepdims=True) * unit


def _replace(x: Array, vector: Array, alpha: Array, _: Any) -> Array:
    return (1 - alpha) * x + alpha * vector


def _unit(vector: Array) -> Array:
    # A zero vector has no direction: it edits nothing.
    square = jnp.sum(vector**2, axis=-1, keepdims=True)
    return vector * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def add(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """states + alpha * vector.

    Args:
        vector: float[D], or float[B, D] with another vector for each row of the batch.
        alpha: the strength, a number or float[B].
        where: which positions: "all"; "prompt"; "generated" (the tokens that were generated, as
            they enter the model); "last_prompt"; "image"; "text" (all but image); {"from": i}, the
            i-th token of each row and what follows; or a mask bool[B, T] over the prompt.

    Raises ValueError for another `where`, a vector or alpha of another shape, or values that are
    not finite.
    """
    return _edit(_add, vector, alpha, where)


def add_relative(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """states + alpha * |states| * vector / |vector|: a strength in shares of each state's norm."""
    return _edit(_add_relative, vector, alpha, where)


def ablate(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """states without their component along the vector (Arditi et al. 2024).

    alpha 1 takes all of it; 2 mirrors the states: what lies on one side of the vector's hyperplane
    goes to the other, what lies near it stays.
    """
    return _edit(_ablate, vector, alpha, where)


def replace(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """The vector instead of the states; alpha below 1 goes only part of the way."""
    return _edit(_replace, vector, alpha, where)


def _add_mapped(x: Array, maps: tuple[Array, Array], alpha: Array, _: Any) -> Array:
    down, up = maps
    return x + alpha * ((x @ down.T) @ up.T)


def add_mapped(down: Any, up: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """states + alpha * up down states: a shift that depends linearly on the state, of rank R.

    Args:
        down: float[R, D].
        up: float[D, R].
        alpha, where: as for `add`.

    Raises ValueError as `add` does, and for matrices that do not fit each other.
    """
    if np.ndim(down) != 2 or np.shape(up) != np.shape(down)[::-1]:
        raise ValueError(
            f"the maps have shapes {np.shape(down)} and {np.shape(up)}; expected [R, D] and [D, R]"
        )
    return _edit(_add_mapped, (down, up), alpha, where)


class _Function(NamedTuple):
    """A user's function as a `change`; equal functions make equal programs."""

    function: Callable[..., Array]

    def __call__(self, x: Array, vector: Any, alpha: Array, places: Places | None) -> Array:
        if places is None or x.shape[-2] == 1:
            return (1 - alpha) * x + alpha * self.function(x, places)
        # In the order of the caller's columns: a generation moves the tokens of its rows.
        slot = jnp.broadcast_to(places.slot, places.kind.shape)
        order = jnp.argsort(jnp.where(slot < 0, jnp.iinfo(slot.dtype).max, slot), axis=-1)
        ordered = Places(
            *(jnp.take_along_axis(field, order, -1) for field in (places.kind, places.index, slot))
        )
        out = self.function(jnp.take_along_axis(x, order[..., None], -2), ordered)
        out = jnp.take_along_axis(out, jnp.argsort(order, axis=-1)[..., None], -2)
        return (1 - alpha) * x + alpha * out


def edit_with(function: Callable[..., Array], alpha: Any = 1.0, where: Any = "all") -> Edit:
    """function(states[B, T, D], places) instead of the states.

    places is a `Places`, or None at a site whose positions are no tokens. The function is called
    for the prompt, whose columns are those of the caller's inputs (T may be larger: what follows
    fills up to a compiled length, and its kind is PADDING), and for each generated token by itself
    (T = 1, its column in `places.slot`); a generation's last layer may put out the last column
    alone. Pass the same function object again: another one is another program.
    """
    return _edit(_Function(function), None, alpha, where)


def stacked(
    sites: Sequence[str], vectors: Any, alpha: Any = 1.0, where: Any = "all"
) -> dict[str, Edit]:
    """One `add` at each site: vectors[S, D] and alpha, a number or float[S].

    With alpha zero at all sites but one, the site that is steered is an argument of the compiled
    program like the vector.
    """
    vectors = jnp.asarray(vectors)
    if vectors.ndim != 2 or len(vectors) != len(sites):
        raise ValueError(
            f"vectors have shape {vectors.shape}; expected [{len(sites)}, D], one for each site"
        )
    alpha = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), (len(sites),))
    return {site: add(vectors[i], alpha[i], where) for i, site in enumerate(sites)}


def is_everywhere(edit: Edit) -> bool:
    """Whether an edit is for all positions; what is traced can't be told, and counts as all."""
    kinds = is_traced(edit.kinds) or np.all(edit.kinds)
    start = is_traced(edit.start) or edit.start == 0
    return bool(kinds and start and edit.mask is None)


def check_batch(edit: Edit, batch: int, length: int) -> None:
    """ValueError if what an edit has a row a sample does not fit the batch."""
    vector = None if isinstance(edit.vector, tuple) else edit.vector
    for name, value, rank in (("vector", vector, 2), ("alpha", edit.alpha, 1)):
        if np.ndim(value) == rank and len(value) not in (1, batch):
            raise ValueError(f"the {name} of an edit has {len(value)} rows; the batch has {batch}")
    if edit.mask is not None and np.shape(edit.mask) != (batch, length):
        raise ValueError(
            f"the mask of an edit has shape {np.shape(edit.mask)}; expected that of input_ids, "
            f"{(batch, length)}"
        )
