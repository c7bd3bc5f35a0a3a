"""`steer`: edits of the residual stream inside any Linen `apply`.

    steered = steer(vlm.apply, {"language_model.model.layers.19": add(vector, alpha=2.0)})

B batch, T positions, D width. The edits themselves are in `ports.intervene.edits`.
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

from ports.intervene.edits import Edit, Edits, Places, as_edits, check_fits
from ports.intervene.interception import call_intercepted, split_variables
from ports.intervene.sites import is_array, is_floating, is_public, require_sites
from ports.names import called_name, normal_name, site_name

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
    """Wraps a Linen `apply` so that it edits the outputs of the modules at the sites.

    What it returns traces under jit, vmap and grad, as `apply` does.

    Args:
        apply: `module.apply` of any Linen module, or a function that passes on to one (as
            `VLM.apply` does); `steer` and `capture` of it as well. Captured states are those after
            the edit. Wrap first, then `jit`: an edit from outside does not reach into what is
            compiled already.
        edits: site -> an edit, or a function of the states (see `edit_with`), or several, which are
            done in order. Outputs are states [B, T, D], or of any other rank (see `Edit`). Of a
            module that returns several values, the states are the only floating array among them,
            or the first of a tuple. A module that is called several times, or run by `nn.scan` at
            every layer, is edited each time; under `nn.vmap` or `jax.vmap` the shapes are those of
            one example. Outside of the ports' models, positions are counted along the second to
            last axis and have no kinds. A method m of the module "encoder" other than `__call__`
            is the site "encoder.m".
        masks: also return which positions were edited, as of the last call of the module.

    Returns:
        A pure function with the arguments of `apply`, and its result; with `masks`, the pair
        (result, {site: bool[B or 1, T] of each edit, in a tuple}).

    Raises:
        ValueError: for what is not an edit; and when called, if a site names no module that ran
            (the nearest names are listed), a module there does not put out states, an edit does
            not fit their shape or changes it, or it asks for kinds of positions where there are
            none.
    """
    listed: dict[str, tuple[Edit, ...]] = {}
    named: dict[str, str] = {}  # one spelling -> the caller's
    for site, given in as_edits(edits).items():
        own = named.setdefault(normal_name(site), site)
        listed[own] = (*listed.get(own, ()), *given)

    @functools.wraps(apply)
    def steered(*args: Any, **kwargs: Any) -> Any:
        seen: dict[str, tuple[tuple[int, ...], Places | None]] = {}

        def change(site: str, out: Any) -> Any:
            states, put_back = _states(site, out)
            places = _places_of(states)
            seen[site] = (states.shape, places)
            for edit in listed[site]:
                check_fits(site, edit, states.shape, places)
                states = edit(states, places)
            return put_back(states)

        result = _call_changing(listed, change, apply, args, kwargs)
        if not masks:
            return result
        if kwargs.get("mutable", False) is not False:
            result = split_variables(apply, result)
        # Not while the modules run: within a scan, what is computed stays there.
        return result, {
            site: tuple(edit.positions(*where) for edit in listed[site])
            for site, where in seen.items()
        }

    if masks:
        steered.__dict__["adds_to_result"] = True
    return steered


def substitute(
    apply: Callable[..., Any], states: Mapping[str, Array | np.ndarray]
) -> Callable[..., Any]:
    """Wraps a Linen `apply` so that the modules at the sites put out the given states.

    What it returns traces under jit, vmap and grad, as `apply` does; the states may be traced.

    What led up to them is not computed by a jitted function that returns nothing else of it: with
    the states of a layer kept, a run begins behind that layer. Edits of a `steer` around it come
    after, so that a steered site can be the one whose states are given.

    Raises ValueError, when called, if a site names no module that ran.
    """

    @functools.wraps(apply)
    def substituted(*args: Any, **kwargs: Any) -> Any:
        def change(site: str, _: Any) -> Array:
            return jnp.asarray(states[site])

        return _call_changing(states, change, apply, args, kwargs)

    return substituted


def _call_changing(
    sites: Iterable[str],
    change: Callable[[str, Any], Any],
    apply: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
) -> Any:
    """apply(*args, **kwargs), where the modules at the sites put out change(site, output).

    Raises ValueError for a site that names no module that ran.
    """
    wanted, ran = {normal_name(site): site for site in sites}, dict[str, None]()

    def intercept(method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        out = method(*args, **kwargs)
        name = called_name(context.module.path, context.method_name)
        site = wanted.get(normal_name(name))
        if site is not None or is_public(context.method_name):
            ran[name] = None
        return out if site is None else change(site, out)

    result = call_intercepted(intercept, apply, args, kwargs)
    require_sites(wanted.values(), ran)
    return result


def _states(site: str, out: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The states that a module put out, and what puts others in their place.

    ValueError if it is not clear which of its values they are.
    """
    leaves, tree = jax.tree.flatten(out)
    floating = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]
    if isinstance(out, tuple | list) and floating[:1] == [0] and out[0] is leaves[0]:
        floating = [0]
    if len(floating) != 1 or not leaves[floating[0]].ndim:
        kind = type(out).__name__
        found = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves if is_array(leaf))
        raise ValueError(
            f"site {site!r} does not put out states to edit, one floating array or a tuple that "
            f"begins with it, but a {kind} of {found or 'no array'}; choose a module inside it"
        )
    (place,) = floating

    def put_back(states: Array) -> Any:
        return tree.unflatten([*leaves[:place], states, *leaves[place + 1 :]])

    return jnp.asarray(leaves[place]), put_back


def _places_of(out: Any) -> Places | None:
    """The places of the running call, if the positions of out[B, T, D] are those.

    One position is the last: a prefill's last layer puts out no other.
    """
    places = _places.get()
    if places is None or not isinstance(out, jax.Array) or out.ndim != 3:
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
