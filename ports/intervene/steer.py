"""`steer`: edits the residual stream inside any Linen `apply`.

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

from ports.intervene import nnx_modules
from ports.intervene.edits import Edit, Edits, Places, as_edits, check_fits
from ports.intervene.interception import (
    call_intercepted,
    check_not_compiled,
    split_variables,
)
from ports.intervene.sites import is_array, is_floating, is_public, require_sites
from ports.names import called_name, normal_name, site_name

Array = jax.Array

_places: contextvars.ContextVar[Places | None] = contextvars.ContextVar("places", default=None)


@contextlib.contextmanager
def at_places(places: Places) -> Iterator[None]:
    """Sets what the positions are for the modules that run inside the context."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


def steer(apply: Callable[..., Any], edits: Edits, *, masks: bool = False) -> Callable[..., Any]:
    """Wraps a model's `apply` so that it edits the outputs of the modules at these sites.

    The wrapped function works under jit, vmap and grad if `apply` does.

    Args:
        apply: `module.apply` of any Linen module, or a function that calls it (as `VLM.apply`
            does); an nnx module, a function with one among its arguments, or the GraphDef of one
            (the wrapped function then takes the state first). Possibly already wrapped by `steer`
            or `capture`. Captured states include the edit. Wrap first, then `jit`: an edit can't
            change a program that is already compiled.
        edits: site -> an edit, a function of the states (see `edit_with`), or a sequence of these,
            applied in order. Outputs are states [B, T, D], or of another rank (see `Edit`). If a
            module returns several values, its states are the only floating-point array among them,
            or the first element of a tuple. A module that is called several times, or at every
            layer by `nn.scan`, is edited each time; under `nn.vmap` or `jax.vmap` shapes are those
            of one example. Outside the ports' models, positions are counted along the
            second-to-last axis and have no kinds. A method m of the module "encoder" other than
            `__call__` is the site "encoder.m".
        masks: also return which positions were edited in the module's last call.

    Returns:
        A function with the arguments and result of `apply` (for an nnx module those of its call),
        pure if `apply` is. With `masks` it returns (result, {site: a tuple with bool[B or 1, T] for
        each edit}).

    Raises:
        ValueError: something is not an edit; or, when called, no module of that name ran (the
            nearest names are listed), the module's output is not states, an edit does not fit or
            changes their shape, or it selects positions by kind where they have none.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, ports
        >>> x, model = jnp.ones((1, 2)), nn.Sequential([nn.Dense(3), nn.relu])
        >>> params = model.init(jax.random.key(0), x)
        >>> steered = ports.steer(model.apply, {"layers.0": ports.replace([-1.0, 0.0, 2.0])})
        >>> steered(params, x).tolist()
        [[0.0, 0.0, 2.0]]
    """
    if (bound := nnx_modules.bound(apply)) is not None:
        return bound.wrap(lambda function: steer(function, edits, masks=masks))
    listed: dict[str, tuple[Edit, ...]] = {}
    named: dict[str, str] = {}  # normal name -> the caller's spelling
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
        # Computed after the modules have run: values computed inside a scan can't leave it.
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
    """Wraps a model's `apply` so that the modules at these sites output the given states.

    Under `jit`, nothing that only leads up to these states is computed: with the stored states of a
    layer, a run starts after that layer. Edits of a `steer` around it apply afterwards, so the same
    site can be substituted and steered. The wrapped function works under jit, vmap and grad if
    `apply` does, and the states may be traced.

    Args:
        apply: as for `steer`.
        states: site -> the module's new output, with the shape of the old one.

    Returns:
        A pure function with the arguments and result of `apply`.

    Raises:
        ValueError: when called, if no module of that name ran.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, ports
        >>> x, model = jnp.ones((1, 2)), nn.Sequential([nn.Dense(3), nn.relu])
        >>> params = model.init(jax.random.key(0), x)
        >>> given = {"layers.0": jnp.array([[-1.0, 0.0, 2.0]])}
        >>> ports.substitute(model.apply, given)(params, x).tolist()
        [[0.0, 0.0, 2.0]]
    """

    if (bound := nnx_modules.bound(apply)) is not None:
        return bound.wrap(lambda function: substitute(function, states))

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
    """Calls `apply`, with the output of each module at `sites` replaced by change(site, output).

    Raises ValueError if no module of that name ran.
    """
    wanted, ran = {normal_name(site): site for site in sites}, dict[str, None]()
    check_not_compiled(apply)
    if (model := nnx_modules.model_among(args, kwargs)) is not None:

        def of_site(name: str, out: Any) -> Any:
            site = wanted.get(normal_name(name))
            return out if site is None else change(site, out)

        result, ran = nnx_modules.call(model, wanted, of_site, apply, args, kwargs, is_edit=True)
        require_sites(wanted.values(), ran)
        return result

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
    """Returns the states in a module's output, and a function that replaces them.

    Raises ValueError if it is not clear which of several values are the states.
    """
    leaves, tree = jax.tree.flatten(out)
    floating = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]
    if isinstance(out, tuple | list) and floating[:1] == [0] and out[0] is leaves[0]:
        floating = [0]
    if len(floating) != 1 or not leaves[floating[0]].ndim:
        kind = type(out).__name__
        found = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves if is_array(leaf))
        raise ValueError(
            f"the output of site {site!r} is a {kind} of {found or 'no array'}; expected states, "
            "one floating-point array or a tuple that starts with it: choose a module inside it"
        )
    (place,) = floating

    def put_back(states: Array) -> Any:
        return tree.unflatten([*leaves[:place], states, *leaves[place + 1 :]])

    return jnp.asarray(leaves[place]), put_back


def _places_of(out: Any) -> Places | None:
    """Returns the places of the running call if they describe the positions of out, [B, T, D] or,
    of heads, [B, T, H, D].

    A single position is the last one, the only one that a prefill's last layer computes.
    """
    places = _places.get()
    if places is None or not isinstance(out, jax.Array) or out.ndim not in (3, 4):
        return None
    if out.shape[1] == 1:
        return jax.tree.map(lambda x: x[..., -1:], places)
    return places if places.kind.shape[-1] == out.shape[1] else None


def token_sites(apply: Callable[..., Any], *args: Any) -> frozenset[str]:
    """Returns the sites of `apply(*args)` whose positions are tokens; traces, computes nothing."""
    found: set[str] = set()

    def note(method: Callable, call_args: Any, call_kwargs: Any, context: Any) -> Any:
        out = method(*call_args, **call_kwargs)
        if context.method_name == "__call__" and _places_of(out) is not None:
            found.add(site_name(context.module.path))
        return out

    with nn.intercept_methods(note):
        jax.eval_shape(apply, *args)
    return frozenset(found)
