"""`steer`: edits of the residual stream inside any Linen `apply`.

    steered = steer(vlm.apply, {"language_model.model.layers.19": add(vector, alpha=2.0)})

B batch, T positions, D width. The edits themselves are in `ports.edits`.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ports.edits import Edit, Edits, Places, is_traced
from ports.sites import normal_name, require_sites, site_name

Array = jax.Array

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

    @functools.wraps(apply)
    def steered(*args: Any, **kwargs: Any) -> Any:
        edited: dict[str, tuple[Array, ...]] = {}

        def change(site: str, out: Any) -> Any:
            for edit in listed[site]:
                places = _check(site, edit, out)
                if masks:
                    edited[site] = (*edited.get(site, ()), edit.positions(out.shape, places))
                out = edit(out, places)
            return out

        with _changing(listed, change):
            result = apply(*args, **kwargs)
        return (result, edited) if masks else result

    return steered


def substitute(apply: Callable[..., Any], states: Mapping[str, Array]) -> Callable[..., Any]:
    """Wraps a Linen `apply` so that the modules at the sites put out the given states.

    What led up to them is not computed by a jitted function that returns nothing else of it: with
    the states of a layer kept, a run begins behind that layer. Edits of a `steer` around it come
    after, so that a steered site can be the one whose states are given.

    Raises ValueError, when called, if a site names no module that ran.
    """

    @functools.wraps(apply)
    def substituted(*args: Any, **kwargs: Any) -> Any:
        with _changing(states, lambda site, _: jnp.asarray(states[site])):
            return apply(*args, **kwargs)

    return substituted


@contextlib.contextmanager
def _changing(sites: Iterable[str], change: Callable[[str, Any], Any]) -> Iterator[None]:
    """While this is open, change(site, out) is what the modules at the sites put out.

    Raises ValueError at its end for a site that names no module that ran.
    """
    wanted, ran = {normal_name(site): site for site in sites}, dict[str, None]()

    def intercept(method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        out = method(*args, **kwargs)
        if context.method_name != "__call__":
            return out
        name = site_name(context.module.path)
        ran[name] = None
        site = wanted.get(normal_name(name))
        return out if site is None else change(site, out)

    with nn.intercept_methods(intercept):
        yield
    require_sites(wanted.values(), ran)


def _check(site: str, edit: Edit, out: Any) -> Places | None:
    """The places of the running call, if `out` has them; ValueError if the edit does not fit."""
    if not isinstance(out, jax.Array) or out.ndim < 2:
        raise ValueError(f"site {site!r} does not put out one array [B, T, D]; steer another one")
    if edit.width not in (None, out.shape[-1]):
        raise ValueError(
            f"the steering vector has width {edit.width}; the states at {site!r} have "
            f"{out.shape[-1]}"
        )
    places = _places_of(out)
    # Inside of a compiled program the kinds are traced; `VLM` has checked them before.
    if places is None and not is_traced(edit.kinds) and not np.all(edit.kinds):
        raise ValueError(
            f"the positions of site {site!r} are no tokens: where can only be 'all', "
            "{'from': index} or a mask there"
        )
    return places


def _places_of(out: Any) -> Places | None:
    """The places of the running call, if the positions of out[B, T, D] are those.

    One position is the last: a prefill's last layer puts out no other.
    """
    places = _places.get()
    if places is None or not isinstance(out, jax.Array) or out.ndim < 2:
        return None
    if out.shape[-2] == 1:
        return jax.tree.map(lambda x: x[..., -1:], places)
    return places if places.kind.shape[-1] == out.shape[-2] else None


def token_sites(apply: Callable[..., Any], *args: Any) -> frozenset[str]:
    """The sites of `apply(*args)` whose positions are known to be tokens; computes nothing."""
    found: set[str] = set()

    def note(method: Callable, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        out = method(*call_args, **call_kwargs)
        if context.method_name == "__call__" and _places_of(out) is not None:
            found.add(site_name(context.module.path))
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(apply, *args)
    return frozenset(found)
