"""Steering: edits of the residual stream, and `steer`, which applies them inside any Linen `apply`.

    steered = steer(vlm.apply, {"language_model.model.layers.19": add(vector, alpha=2.0)})

B batch, T positions, D width.

An edit is a pytree. Its vector, its strength and its positions are arrays: a compiled program takes
them as arguments, so that changing them never compiles again, `jax.vmap` sweeps them and `jax.grad`
differentiates them. What kind of edit it is and at which site it applies are part of the program.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ports.sites import normal_name, require_sites, site_name

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
    slot: Array  # int32[T]: its column in the padded sequence


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vector", "alpha", "kinds", "start", "mask"],
    meta_fields=["change"],
)
@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of a module's output. `add`, `ablate`, `replace` ... make it.

    Attributes:
        vector: float[D] or float[B, D]; None if `change` needs none.
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

    def positions(self, shape: tuple[int, ...], places: Places | None) -> Array:
        """bool[B or 1, T]: the positions of states of that shape [B, T, D] that are edited.

        places: None for a module whose positions are no tokens; kinds mean nothing there, so that
        only an edit of all kinds applies.
        """
        kinds = jnp.asarray(self.kinds)
        if places is None:
            chosen = kinds.all() & (jnp.arange(shape[-2]) >= self.start)[None]
            slots = jnp.arange(shape[-2])
        else:
            chosen = kinds[jnp.maximum(places.kind, 0)] & (places.index >= self.start)
            chosen = chosen & (places.kind != PADDING)
            slots = places.slot
        if self.mask is not None:
            mask = jnp.asarray(self.mask, bool)
            chosen = chosen & jnp.take(mask, slots, axis=1, mode="fill", fill_value=False)
        return chosen

    def __call__(self, states: Array, places: Places | None = None) -> Array:
        """states[B, T, D] after the edit, in their dtype."""
        x = states.astype(jnp.promote_types(states.dtype, jnp.float32))
        vector = self.vector
        if vector is not None:
            vector = jnp.asarray(vector, x.dtype)
            vector = vector[:, None] if vector.ndim == 2 else vector[None, None]
        alpha = jnp.asarray(self.alpha, x.dtype).reshape(-1, 1, 1)
        changed = self.change(x, vector, alpha, places).astype(states.dtype)
        return jnp.where(self.positions(states.shape, places)[..., None], changed, states)


Edits = Mapping[str, Edit | Sequence[Edit]]


def _edit(change: Callable[..., Array], vector: Any, alpha: Any, where: Any) -> Edit:
    if vector is not None and np.ndim(vector) not in (1, 2):
        raise ValueError(
            f"a steering vector has shape {np.shape(vector)}; expected [D], or [B, D] for one a row"
        )
    if np.ndim(alpha) > 1:
        raise ValueError(f"alpha has shape {np.shape(alpha)}; expected a number, or [B]")
    start, mask, name = 0, None, "all"
    if isinstance(where, str):
        name = where
    elif isinstance(where, Mapping) and set(where) == {"from"}:
        start = where["from"]
    elif np.ndim(where) == 2 or isinstance(where, jax.core.Tracer):
        mask = where
    else:
        name = str(where)
    if name not in _WHERE:
        raise ValueError(
            f"where is {name!r}; expected one of {', '.join(_WHERE)}, {{'from': index}}, or a mask "
            "bool[B, T]"
        )
    kinds = np.isin(np.arange(4), _WHERE[name])
    alpha = jnp.asarray(alpha, jnp.float32)
    return Edit(vector, alpha, kinds, jnp.asarray(start, jnp.int32), mask, change)


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

    Raises ValueError for another `where`, or a vector or alpha of another shape.
    """
    return _edit(_add, vector, alpha, where)


def add_relative(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """states + alpha * |states| * vector / |vector|: a strength in shares of each state's norm."""
    return _edit(_add_relative, vector, alpha, where)


def ablate(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """states without their component along the vector (Arditi et al. 2024); alpha 1 takes all."""
    return _edit(_ablate, vector, alpha, where)


def replace(vector: Any, alpha: Any = 1.0, where: Any = "all") -> Edit:
    """The vector instead of the states; alpha below 1 goes only part of the way."""
    return _edit(_replace, vector, alpha, where)


class _Function(NamedTuple):
    """A user's function as a `change`; equal functions make equal programs."""

    function: Callable[..., Array]

    def __call__(self, x: Array, vector: Any, alpha: Array, places: Places | None) -> Array:
        return (1 - alpha) * x + alpha * self.function(x, places)


def edit_with(function: Callable[..., Array], alpha: Any = 1.0, where: Any = "all") -> Edit:
    """function(states[B, T, D], places) instead of the states.

    places is a `Places`, or None at a site whose positions are no tokens. Pass the same function
    object again: another one is another program.
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


_places: contextvars.ContextVar[Places | None] = contextvars.ContextVar("places", default=None)


@contextlib.contextmanager
def at_places(places: Places) -> Iterator[None]:
    """While this is open, modules that run handle these positions."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


def steer(apply: Callable[..., Any], edits: Edits, *, masks: bool = False) -> Callable[..., Any]:
    """Wraps a Linen `apply` so that it edits what the modules at the sites put out.

    Args:
        apply: `module.apply` of any Linen module, or a function that passes on to one (as
            `VLM.apply` does); `steer` and `capture` of it as well. Captured states are those after
            the edit. Wrap first, then `jit`: an edit from outside does not reach into what is
            compiled already.
        edits: site -> an edit, or several, which are done in order. Outside of the ports' models,
            positions are counted along the second to last axis and have no kinds.
        masks: also return which positions were edited.

    Returns:
        A pure function with the arguments of `apply`, and its result; with `masks`, the pair
        (result, {site: bool[B or 1, T] of each edit, in a tuple}).

    Raises:
        ValueError: when called, if a site names no module that ran (the nearest names are listed),
            a module there puts out something else than one array, an edit does not fit its
            width, or it asks for kinds of positions where there are none.
    """
    listed = {
        site: (edit,) if isinstance(edit, Edit) else tuple(edit) for site, edit in edits.items()
    }
    wanted = {normal_name(site): site for site in listed}

    @functools.wraps(apply)
    def steered(*args: Any, **kwargs: Any) -> Any:
        ran: dict[str, None] = {}
        edited: dict[str, tuple[Array, ...]] = {}

        def intercept(method: Callable, call_args: Any, call_kwargs: Any, context: Any) -> Any:
            out = method(*call_args, **call_kwargs)
            if context.method_name != "__call__":
                return out
            name = site_name(context.module.path)
            ran[name] = None
            site = wanted.get(normal_name(name))
            if site is None:
                return out
            for edit in listed[site]:
                places = _check(site, edit, out)
                if masks:
                    edited[site] = (*edited.get(site, ()), edit.positions(out.shape, places))
                out = edit(out, places)
            return out

        with nn.intercept_methods(intercept):
            result = apply(*args, **kwargs)
        require_sites(listed, ran)
        return (result, edited) if masks else result

    return steered


def _check(site: str, edit: Edit, out: Any) -> Places | None:
    """The places of the running call, if `out` has them; ValueError if the edit does not fit."""
    if not isinstance(out, jax.Array) or out.ndim < 2:
        raise ValueError(f"site {site!r} does not put out one array [B, T, D]; steer another one")
    width = out.shape[-1] if edit.vector is None else np.shape(edit.vector)[-1]
    if width != out.shape[-1]:
        raise ValueError(
            f"the steering vector has width {width}; the states at {site!r} have {out.shape[-1]}"
        )
    places = _places.get()
    if places is not None and places.kind.shape[-1] == out.shape[-2]:
        return places
    if not isinstance(edit.kinds, jax.core.Tracer):
        check_kinds(site, [edit])
    return None


def check_kinds(site: str, edits: Sequence[Edit]) -> None:
    """ValueError if one of the edits asks for kinds of positions, which this site does not have."""
    if not all(np.all(edit.kinds) for edit in edits):
        raise ValueError(
            f"the positions of site {site!r} are no tokens: where can only be 'all', "
            "{'from': index} or a mask there"
        )


def check_batch(edit: Edit, batch: int, length: int) -> None:
    """ValueError if what an edit has a row a sample does not fit the batch."""
    for name, value, rank in (("vector", edit.vector, 2), ("alpha", edit.alpha, 1)):
        if np.ndim(value) == rank and len(value) not in (1, batch):
            raise ValueError(f"the {name} of an edit has {len(value)} rows; the batch has {batch}")
    if edit.mask is not None and np.shape(edit.mask) != (batch, length):
        raise ValueError(
            f"the mask of an edit has shape {np.shape(edit.mask)}; expected that of input_ids, "
            f"{(batch, length)}"
        )
