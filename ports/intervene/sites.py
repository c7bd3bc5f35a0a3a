"""Sites: the modules whose outputs can be read, and `capture`, which reads them.

Sites are named as in the checkpoints: the Flax path ("language_model", "model", "layers_19") is
the site "language_model.model.layers.19".

The ports' layers are unrolled, not scanned: when a jitted function returns only the states of one
layer, XLA drops every later layer.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import in_filter, union_filters

from ports.intervene import nnx_modules
from ports.intervene.interception import check_not_compiled, marked, split_variables
from ports.names import called_name, normal_name, site_name


def is_public(method: str) -> bool:
    """Returns whether a method can be a site: it is neither `setup` nor private."""
    return method == "__call__" or (method != "setup" and method[0] not in "_<")


def is_array(value: Any) -> bool:
    """Returns whether a value is a JAX or numpy array."""
    return isinstance(value, jax.Array | np.ndarray)


def is_floating(value: Any) -> bool:
    """Returns whether a value is a floating-point array, as states are."""
    return is_array(value) and jnp.issubdtype(value.dtype, jnp.floating)


def as_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    """Returns the names as a tuple; a single string counts as one name.

    Raises:
        ValueError: something is not a string.
    """
    names = (sites,) if isinstance(sites, str) or not isinstance(sites, Iterable) else tuple(sites)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"got site {name!r}; expected the name of a module, such as 'layers.19'"
            )
    return names


def require_sites(sites: Iterable[str], known: Iterable[str]) -> None:
    """Checks that all sites are known, in any spelling.

    Raises:
        ValueError: a site is unknown; the message lists the nearest names.
    """
    normal = {normal_name(name): name for name in known}
    for site in sites:
        if normal_name(site) not in normal:
            raise _unknown(site, normal)


def _unknown(site: str, normal: Mapping[str, str]) -> ValueError:
    """Returns the error for an unknown site; `normal` maps normal names to the known sites."""
    wrong = re.sub(r"\*+", "0", normal_name(site))
    # The end of a wrong name is usually right: prefer names with the same end.
    tail = "." + ".".join(wrong.split(".")[-2:])
    alike = [key for key in normal if ("." + key).endswith(tail)]
    close = difflib.get_close_matches(wrong, alike, 2, cutoff=0.0)
    close += difflib.get_close_matches(wrong, normal, 3, cutoff=0.3)
    nearest = [normal[key] for key in dict.fromkeys(close)][:3]
    plain = set("[]{}").isdisjoint(site)
    hint = "" if plain else " (patterns support *, ? and **, but not brackets; list the sites)"
    return ValueError(f"no site matches {site!r}{hint}; nearest: {', '.join(nearest) or 'none'}")


def is_pattern(name: str) -> bool:
    """Returns whether a name is a pattern for several sites (see `match_sites`)."""
    return "*" in name or "?" in name


def match_sites(
    name: str, known: Iterable[str], other_names: Callable[[str], Iterable[str]] | None = None
) -> list[str]:
    """Returns the known sites that match a name or pattern.

    Args:
        name: a site in any spelling, or a pattern. `*` matches any characters within a part between
            dots, `?` one such character, `**` any text; brackets are not special. A pattern may
            start at any part: "layers.*" matches the layers, "layers.**" also everything inside
            them. So may a name, if only one site ends in it: "layers.3".
        known: all sites.
        other_names: name -> alternative names, tried in order if it matches nothing.

    Returns:
        The matches in the order of `known`; empty if there are none.
    """
    known = list(known)
    names = (name, *(other_names(name) if other_names else ()))
    for said in names:
        if is_pattern(said):
            pattern = re.compile(rf"(.*\.)?{_regular_expression(said.replace('/', '.'))}")
            found = [site for site in known if pattern.fullmatch(site)]
        else:
            found = [site for site in known if normal_name(site) == normal_name(said)]
        if found:
            return found
    ends = tuple(f".{normal_name(said)}" for said in names)
    found = [site for site in known if normal_name(site).endswith(ends)]
    return found if len(found) == 1 else []


def _regular_expression(pattern: str) -> str:
    stands_for = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    return "".join(stands_for.get(part) or re.escape(part) for part in parts)


def is_full_name(
    name: str, known: Iterable[str], other_names: Callable[[str], Iterable[str]] | None = None
) -> bool:
    """Whether a name is that of a site, in any spelling: no pattern, nor the end of a name."""
    normal = set(map(normal_name, known))
    said = (name, *(other_names(name) if other_names else ()))
    return any(normal_name(each) in normal for each in said)


def find_sites(
    names: Iterable[str],
    known: Iterable[str],
    other_names: Callable[[str], Iterable[str]] | None = None,
    among: Iterable[str] | None = None,
    first: Iterable[str] = (),
) -> dict[str, str]:
    """Finds the sites that match each of several names and patterns (see `match_sites`).

    Args:
        names: names and patterns.
        known: all sites.
        other_names: name -> alternative names, tried in order if it matches nothing.
        among: the known sites that patterns and ends of names may match; None: all.
        first: the known sites that ends of names mean if they can: "layers.3" is the layer of these
            even if a site elsewhere ends in it too, and an error if these have layers but not 3.

    Returns:
        {name: site}; sites that a pattern matches appear under their own name.

    Raises:
        ValueError: a name or pattern matches nothing; the message lists the nearest names.
    """
    known, first = list(known), list(first)
    among = known if among is None else list(among)
    found: dict[str, str] = {}
    for name in names:
        is_full = is_full_name(name, known, other_names)
        choice = known if is_full else among
        matches = match_sites(name, choice, other_names)
        if not is_full and not is_pattern(name):
            if meant := match_sites(name, first, other_names):
                matches = meant
            elif matches:
                _require_no_number(name, matches[0], first, other_names)
        if not matches:
            raise _unknown(name, {normal_name(site): site for site in choice})
        found |= {site if is_pattern(name) else name: site for site in matches}
    return found


def _require_no_number(
    name: str,
    elsewhere: str,
    first: Sequence[str],
    other_names: Callable[[str], Iterable[str]] | None,
) -> None:
    """Raises ValueError if the sites `first` have one of this name with another number."""
    numbered = re.sub(r"\d+", "*", normal_name(name))
    if is_pattern(numbered) and (like := match_sites(numbered, first, other_names)):
        raise ValueError(
            f"{name!r} is not one of {like[0]} to {like[-1]}; if you mean {elsewhere!r}, give its "
            "full name"
        )


def capture(apply: Callable[..., Any], sites: str | Sequence[str]) -> Callable[..., Any]:
    """Wraps a model's `apply` so that it also returns the outputs of the modules at `sites`.

    The wrapped function works under jit, vmap and grad if `apply` does.

    Args:
        apply: `module.apply` of any Linen module, or a function that passes its keyword arguments
            on to one (as `VLM.apply` does); an nnx module, a function with one among its arguments,
            or the GraphDef of one (the wrapped function then takes the state first). Possibly
            already wrapped by `capture` or `steer`. Wrap first, then `jit`.
        sites: names of modules, such as "language_model.model.layers.19", or a single name. The
            Flax spelling "language_model/model/layers_19" also works. A method m of the module
            "encoder" other than `__call__` is the site "encoder.m".

    Returns:
        A function of the same arguments (those of its call for an nnx module), pure if `apply` is,
        that returns `(out, {site: states})`. States include
        any steering edit. A module that is called several times gives a tuple in call order. Below
        `nn.scan` and `nn.vmap` the states are stacked along the axis that their variable_axes give
        for "intermediates": {"intermediates": 0}. If the output is a tuple with only one value that
        is not None, such as the (carry, None) of a scanned block, that value is returned.

    Raises:
        ValueError: when called, if no module of that name ran (the nearest names are listed), or it
            is below a transform that drops captured states.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, ports
        >>> x, model = jnp.ones((4, 2)), nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(5)])
        >>> params = model.init(jax.random.key(0), x)
        >>> out, states = jax.jit(ports.capture(model.apply, "layers.0"))(params, x)
        >>> out.shape, states["layers.0"].shape
        ((4, 5), (4, 3))
    """
    sites = as_sites(sites)
    if (bound := nnx_modules.bound(apply)) is not None:
        return bound.wrap(lambda function: capture(function, sites))
    wanted = {normal_name(site): site for site in sites}
    mark = f"captured {', '.join(sorted(wanted))}"

    @functools.wraps(apply)
    def captured(
        *args: Any, mutable: Any = False, capture_intermediates: Any = False, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        check_not_compiled(apply)
        if (model := nnx_modules.model_among(args, kwargs)) is not None:
            return _capture_nnx(model, wanted, apply, args, kwargs)
        ran: dict[str, None] = {}
        lost: dict[str, str] = {}  # normal name of a site -> the module that could not store it
        others: set[tuple[str, ...]] = set()  # captured by the caller

        def is_wanted(module: nn.Module, method: str) -> bool:
            name = called_name(module.path, method)
            ours = normal_name(name) in wanted
            if ours or is_public(method):
                ran[name] = None
            if ours and not module.is_mutable_collection("intermediates"):
                lost[normal_name(name)] = name
            if callable(capture_intermediates):
                theirs = capture_intermediates(module, method)
            else:
                theirs = capture_intermediates and method == "__call__"
            if theirs:
                others.add((*module.path, method))
            return ours or bool(theirs)

        result = apply(
            *args,
            capture_intermediates=is_wanted,
            mutable=marked(union_filters(mutable, "intermediates"), mark),
            **kwargs,
        )
        out, variables = split_variables(apply, result)
        found: dict[str, Any] = {}
        kept = _take_outputs(dict(variables).get("intermediates", {}), set(wanted), others, found)
        if len(found) < len(wanted):
            require_sites([site for name, site in wanted.items() if name not in found], ran)
        for name in lost:
            raise ValueError(
                f"the output of site {wanted[name]!r} is dropped by a transform around it; add "
                "variable_axes={'intermediates': 0} to its nn.scan or nn.vmap, or capture a site "
                "outside it (nn.while_loop keeps nothing)"
            )
        states = {site: found[normal_name(site)] for site in sites}
        if mutable is False:
            return out, states
        variables = {name: value for name, value in variables.items() if name != "intermediates"}
        if kept and in_filter(mutable, "intermediates"):
            variables["intermediates"] = kept
        return (out, variables), states

    captured.__dict__["adds_to_result"] = True
    return captured


def _capture_nnx(
    model: Any,
    wanted: Mapping[str, str],
    function: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Does `capture` for a function of an nnx module."""
    found: dict[str, tuple[Any, ...]] = {}

    def keep(name: str, out: Any) -> Any:
        site = wanted.get(normal_name(name))
        if site is not None:
            found[site] = (*found.get(site, ()), _without_none(out))
        return out

    result, ran = nnx_modules.call(model, wanted, keep, function, args, kwargs, is_edit=False)
    require_sites(wanted.values(), ran)
    return result, {
        site: found[site][0] if len(found[site]) == 1 else found[site] for site in wanted.values()
    }


def _take_outputs(
    tree: Any,
    wanted: set[str],
    others: set[tuple[str, ...]],
    found: dict[str, Any],
    path: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Moves the outputs at the wanted sites from Linen's "intermediates" (below `path`) to `found`.

    Returns the rest of the tree, including the outputs in `others`.
    """
    kept = {}
    for key, value in tree.items():
        if hasattr(value, "items"):
            below = _take_outputs(value, wanted, others, found, (*path, key))
            if below:
                kept[key] = below
            continue
        name = normal_name(called_name(path, key))
        if name in wanted:
            calls = tuple(map(_without_none, value))
            found[name] = calls[0] if len(calls) == 1 else calls
        if name not in wanted or (*path, key) in others:
            kept[key] = value
    return kept


def _without_none(out: Any) -> Any:
    """Returns the only value of a tuple that is not None; any other output unchanged."""
    if type(out) is tuple:
        values = [value for value in out if value is not None]
        return values[0] if len(values) == 1 else out
    return out


def list_sites(apply: Callable[..., Any], *args: Any) -> dict[str, tuple[int, ...]]:
    """Lists the sites of a model with the shapes of their outputs.

    Only modules whose output is a single floating-point array are listed. Nothing is computed:
    `apply(*args)` is traced.

    Args:
        apply: `module.apply`, or a function that calls it; or an nnx module.
        *args: its arguments; arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
        {site: shape}, in the order of computation.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, ports
        >>> x, model = jnp.ones((4, 2)), nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(5)])
        >>> ports.list_sites(model.apply, model.init(jax.random.key(0), x), x)
        {'layers.0': (4, 3), 'layers.2': (4, 5)}
    """
    if (bound := nnx_modules.bound(apply)) is not None:
        return _list_nnx(bound.model, *args)
    return trace_sites(apply, *args)[1]


def trace_sites(apply: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Traces a call once, for its result and its sites.

    Args:
        apply: `module.apply`, or a function that calls it, possibly wrapped by `capture`.
        *args: its arguments; arrays may be `jax.ShapeDtypeStruct`s.

    Returns:
        The result as `jax.ShapeDtypeStruct`s, and {site: shape} as `list_sites` returns it.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(next_method, call_args, call_kwargs, context):
        out = next_method(*call_args, **call_kwargs)
        if context.method_name == "__call__" and context.module.path and is_floating(out):
            shapes.setdefault(site_name(context.module.path), out.shape)
        return out

    with nn.intercept_methods(record):
        return jax.eval_shape(apply, *args), shapes


def _list_nnx(model: Any, *args: Any) -> dict[str, tuple[int, ...]]:
    """Does `list_sites` for an nnx module, whose state it leaves alone."""
    from flax import nnx

    graph, state = nnx.split(model)
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, out: Any) -> Any:
        if is_floating(out):
            shapes.setdefault(name, out.shape)
        return out

    def run(state: Any, *args: Any) -> Any:
        copy = nnx.merge(graph, state, copy=True)
        return nnx_modules.call(copy, (), note, copy, args, {}, is_edit=False)[0]

    jax.eval_shape(run, state, *args)
    return shapes
