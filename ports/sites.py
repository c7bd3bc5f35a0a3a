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
from flax import linen as nn
from flax.core.scope import union_filters

# Containers of numbered blocks. Other names end in a number of their own (linear_1, layer_norm2).
_NUMBERED = re.compile(r"^(layers?|blocks|resblocks|mlp)_(\d+)$")


def site_name(path: Iterable[str]) -> str:
    """The path of a Flax module, ("model", "layers_3", "mlp") -> "model.layers.3.mlp"."""
    return ".".join(_NUMBERED.sub(r"\1.\2", part) for part in path)


def normal_name(name: str) -> str:
    """One spelling for a/layers_3, a.layers_3 and a.layers.3."""
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", name.replace("/", "."))


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
    return ValueError(f"no site matches {site!r}; nearest: {', '.join(nearest) or 'none'}")


def is_pattern(name: str) -> bool:
    """Whether a name stands for several sites (see `match_sites`)."""
    return "*" in name or "?" in name


def match_sites(
    name: str, known: Iterable[str], other_names: Callable[[str], Iterable[str]] | None = None
) -> list[str]:
    """The known sites that a name or a pattern means, in their order; none is an empty list.

    Args:
        name: a site in any spelling, or a pattern: `*` and `?` stand for some characters and for
            one of a part between dots, `**` for any text. A pattern may begin at any part:
            "layers.*" are the layers, "layers.**" all that is in them too.
        known: the sites that there are.
        other_names: what else a name or pattern may be called, tried if it matches nothing.
    """
    known = list(known)
    for said in (name, *(other_names(name) if other_names else ())):
        if is_pattern(said):
            pattern = re.compile(rf"(.*\.)?{_regular_expression(said.replace('/', '.'))}")
            found = [site for site in known if pattern.fullmatch(site)]
        else:
            found = [site for site in known if normal_name(site) == normal_name(said)]
        if found:
            return found
    return []


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


def capture(apply: Callable[..., Any], sites: Sequence[str]) -> Callable[..., Any]:
    """Wraps a Linen `apply` so that it also returns what the modules at `sites` put out.

    Args:
        apply: `module.apply` of any Linen module, or a function that passes its keyword arguments
            on to one (as `VLM.apply` does).
        sites: names of modules, such as "language_model.model.layers.19". The spelling of the Flax
            path ("language_model/model/layers_19") is understood as well.

    Returns:
        A pure function of the same arguments that returns `(out, {site: states})`. States are
        those after any steering edit. A module that is called several times gives a tuple.

    Raises:
        ValueError: when called, if a site names no module that ran; lists the nearest names.
    """
    sites = tuple(sites)
    wanted = {normal_name(site): site for site in sites}

    @functools.wraps(apply)
    def captured(*args: Any, mutable: Any = False, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        ran: list[str] = []

        def is_wanted(module: nn.Module, method: str) -> bool:
            if method != "__call__":
                return False
            ran.append(site_name(module.path))
            return normal_name(ran[-1]) in wanted

        out, variables = apply(
            *args,
            capture_intermediates=is_wanted,
            mutable=union_filters(mutable, "intermediates"),
            **kwargs,
        )
        require_sites(sites, ran)
        variables = dict(variables)
        states = {}
        for path, value in _outputs(variables.pop("intermediates", {})):
            site = wanted.get(normal_name(site_name(path)))
            if site is not None:
                states[site] = value[0] if len(value) == 1 else value
        states = {site: states[site] for site in sites}
        return (out if mutable is False else (out, variables)), states

    return captured


def _outputs(tree: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], tuple]]:
    """The (module path, captured outputs) pairs in Linen's "intermediates" collection."""
    for key, value in tree.items():
        if key == "__call__":
            yield path, value
        elif hasattr(value, "items"):
            yield from _outputs(value, (*path, key))


def list_sites(apply: Callable[..., Any], *args: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in the order of the computation, of what modules put out.

    Listed are the modules that put out one floating array. Traces `apply(*args)` without computing
    anything (arguments may be `jax.ShapeDtypeStruct`s).
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(next_method, call_args, call_kwargs, context):
        out = next_method(*call_args, **call_kwargs)
        single = isinstance(out, jax.Array) and jax.numpy.issubdtype(out.dtype, jax.numpy.floating)
        if context.method_name == "__call__" and context.module.path and single:
            shapes.setdefault(site_name(context.module.path), out.shape)
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(apply, *args)
    return shapes
