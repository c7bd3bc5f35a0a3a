"""Sites: the modules whose outputs can be read, and `capture`, which reads them.

A site is named as in the checkpoints: the Flax path ("language_model", "model", "layers_19") is
the site "language_model.model.layers.19".

Layers of the ports are unrolled, not scanned: when the states of one layer are all that a jitted
function returns, XLA drops every later layer.
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

from ports.intervene.interception import check_not_compiled, marked, split_variables
from ports.names import called_name, normal_name, site_name


def is_public(method: str) -> bool:
    """Whether a method is one to name a site after: not `setup`, and not private."""
    return method == "__call__" or (method != "setup" and method[0] not in "_<")


def is_array(value: Any) -> bool:
    """Whether a value is an array, of JAX or of numpy."""
    return isinstance(value, jax.Array | np.ndarray)


def is_floating(value: Any) -> bool:
    """Whether a value is an array of floating numbers, as states are."""
    return is_array(value) and jnp.issubdtype(value.dtype, jnp.floating)


def as_sites(sites: str | Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; a string alone is one of them. ValueError for other than names."""
    names = (sites,) if isinstance(sites, str) or not isinstance(sites, Iterable) else tuple(sites)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"a site is {name!r}; expected the name of a module, such as 'layers.19'"
            )
    return names


def require_sites(sites: Iterable[str], known: Iterable[str]) -> None:
    """ValueError for the first of `sites` that is not among `known`, with the nearest names."""
    normal = {normal_name(name): name for name in known}
    for site in sites:
        if normal_name(site) not in normal:
            raise _unknown(site, normal)


def _unknown(site: str, normal: Mapping[str, str]) -> ValueError:
    """normal: the known sites, each by its normal name."""
    wrong = re.sub(r"\*+", "0", normal_name(site))
    # The last part of a wrong name is usually right: prefer names that end alike.
    tail = "." + ".".join(wrong.split(".")[-2:])
    alike = [key for key in normal if ("." + key).endswith(tail)]
    close = difflib.get_close_matches(wrong, alike, 2, cutoff=0.0)
    close += difflib.get_close_matches(wrong, normal, 3, cutoff=0.3)
    nearest = [normal[key] for key in dict.fromkeys(close)][:3]
    plain = set("[]{}").isdisjoint(site)
    hint = "" if plain else " (patterns know *, ? and **, no brackets: name the sites one by one)"
    return ValueError(f"no site matches {site!r}{hint}; nearest: {', '.join(nearest) or 'none'}")


def is_pattern(name: str) -> bool:
    """Whether a name stands for several sites (see `match_sites`)."""
    return "*" in name or "?" in name


def match_sites(
    name: str, known: Iterable[str], other_names: Callable[[str], Iterable[str]] | None = None
) -> list[str]:
    """The known sites that a name or a pattern means, in their order; none is an empty list.

    Args:
        name: a site in any spelling, or a pattern: `*` and `?` stand for some characters and for
            one of a part between dots, `**` for any text; brackets have no meaning. A pattern may
            begin at any part: "layers.*" are the layers, "layers.**" all that is in them too. So
            may a name, if one site alone ends in it: "layers.3".
        known: the sites that there are.
        other_names: what else a name or pattern may be called, tried if it matches nothing.
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


def find_sites(
    names: Iterable[str],
    known: Iterable[str],
    other_names: Callable[[str], Iterable[str]] | None = None,
) -> dict[str, str]:
    """The sites that names and patterns mean, as `match_sites` does.

    Returns {name: site}, where a site that a pattern matched has its own name.

    Raises ValueError for a name or a pattern that means no site; lists the nearest names.
    """
    known = list(known)
    found: dict[str, str] = {}
    for name in names:
        matches = match_sites(name, known, other_names)
        if not matches:
            raise _unknown(name, {normal_name(site): site for site in known})
        found |= {site if is_pattern(name) else name: site for site in matches}
    return found


def capture(apply: Callable[..., Any], sites: str | Sequence[str]) -> Callable[..., Any]:
    """Wraps a Linen `apply` so that it also returns what the modules at `sites` put out.

    What it returns traces under jit, vmap and grad, as `apply` does.

    Args:
        apply: `module.apply` of any Linen module, or a function that passes its keyword arguments
            on to one (as `VLM.apply` does); `capture` and `steer` of it as well. Wrap first, then
            `jit`.
        sites: names of modules, such as "language_model.model.layers.19"; a string alone is one.
            The spelling of the Flax path ("language_model/model/layers_19") is understood as well.
            A method m of the module "encoder" other than `__call__` is the site "encoder.m".

    Returns:
        A pure function of the same arguments that returns `(out, {site: states})`. States are
        those after any steering edit. A module that is called several times gives a tuple, in the
        order of the calls. Below `nn.scan` and `nn.vmap` the states are stacked along the axis that
        their variable_axes names for "intermediates": {"intermediates": 0}. Of a tuple with one
        value beside None, such as the (carry, None) of a scanned block, that value is taken.

    Raises:
        ValueError: when called, if a site names no module that ran (the nearest names are listed),
            or one below a transform that drops what is captured there.
    """
    sites = as_sites(sites)
    wanted = {normal_name(site): site for site in sites}
    mark = f"captured {', '.join(sorted(wanted))}"

    @functools.wraps(apply)
    def captured(
        *args: Any, mutable: Any = False, capture_intermediates: Any = False, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        check_not_compiled(apply)
        ran: dict[str, None] = {}
        lost: dict[str, str] = {}  # one spelling of a site -> the module that could not keep it
        others: set[tuple[str, ...]] = set()  # what the caller captures

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
                f"what site {wanted[name]!r} puts out is dropped by a transform around it: add "
                "variable_axes={'intermediates': 0} to its nn.scan or nn.vmap (nn.while_loop keeps "
                "nothing; capture a site outside of it)"
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


def _take_outputs(
    tree: Any,
    wanted: set[str],
    others: set[tuple[str, ...]],
    found: dict[str, Any],
    path: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Puts the outputs at the wanted sites, in one spelling, into `found`.

    tree: Linen's collection "intermediates", from `path` on. Returns it without them; those in
    `others` stay.
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
    """The one value of a tuple that is not None, if there is one; else the output as it is."""
    if type(out) is tuple:
        values = [value for value in out if value is not None]
        return values[0] if len(values) == 1 else out
    return out


def list_sites(apply: Callable[..., Any], *args: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in the order of the computation, of what modules put out.

    Listed are the modules that put out one floating array. Traces `apply(*args)` without computing
    anything (arguments may be `jax.ShapeDtypeStruct`s).
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(next_method, call_args, call_kwargs, context):
        out = next_method(*call_args, **call_kwargs)
        if context.method_name == "__call__" and context.module.path and is_floating(out):
            shapes.setdefault(site_name(context.module.path), out.shape)
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(apply, *args)
    return shapes
