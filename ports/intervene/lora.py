"""Low-rank adaptation (LoRA; Hu et al. 2021, section 4): y = x W + s (x A) B, with W frozen.

I input width, O output width, R rank of a linear layer.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from ports.intervene.interception import call_intercepted
from ports.intervene.sites import is_pattern, match_sites
from ports.messages import counted, few
from ports.names import by_tensor, site_name, tensor_name
from ports.parallel import sharding

Array = jax.Array
_MERGEABLE = ("kernel", "embedding")


class Factors(NamedTuple):
    """Factors of the term added to one linear layer: x[..., I] -> scale (x down) up, [..., O].

    For a patch convolution, I is the number of values per patch, in the order of the kernel; for an
    embedding, I is the number of tokens.
    """

    down: Float[Array, "I R"]  # the transpose of PEFT's lora_A
    up: Float[Array, "R O"]  # the transpose of PEFT's lora_B


class PartFactors(NamedTuple):
    """Factors of a fused layer (`layers.fused`), with an `up` for each of its parts.

    On several devices each part is divided among them by itself. An `up` for all parts, its
    gradient and the optimizer's moments would be sent around in each step to be split.
    """

    down: Float[Array, "I R"]
    ups: tuple[Float[Array, "R _"], ...]  # columns of `up`


class Adapter(NamedTuple):
    """Low-rank factors of a model's linear layers, and their scales. A pytree.

    Attributes:
        factors: site -> factors A and B.
        scale: site -> s, which multiplies B A.
        weights: tensor name -> replacement of the base model's tensor, laid out like the parameter;
            None if there are none.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> from ports.intervene.lora import Factors
        >>> factors = {"dense": Factors(jnp.ones((4, 1)), jnp.ones((1, 2)))}
        >>> adapter = ports.Adapter(factors, scale={"dense": 2.0})
        >>> adapter.scaled(0.5).scale
        {'dense': 1.0}
    """

    factors: Mapping[str, Factors | PartFactors]
    scale: dict[str, float]
    weights: dict[str, Array] | None = None

    def scaled(self, strength: float | Array) -> "Adapter":
        """Returns the adapter at another strength.

        Args:
            strength: 0 gives the original model, 1 the adapted one.

        Returns:
            The same factors with scaled scales.

        Raises:
            ValueError: the adapter replaces whole weights, which can't be scaled.
        """
        if self.weights:
            raise ValueError(
                f"the adapter replaces {few(self.weights)} as a whole, which can't be scaled; "
                "expected an adapter with low-rank factors only"
            )
        return self._replace(scale={site: strength * s for site, s in self.scale.items()})


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Rank and scale of each layer, in PEFT's terms.

    Attributes:
        rank: R of layers that match no pattern.
        alpha: the scale is alpha / R.
        rank_pattern: {end of a module name, or a regular expression: its rank}; the first match
            counts.
        alpha_pattern: {end of a module name, or a regular expression: its alpha}; likewise.
        use_rslora: use the scale alpha / sqrt(R) instead (Kalajdzievski 2023).
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False

    def rank_of(self, module: str) -> int:
        """Returns the rank R of a module."""
        return _of_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the scale s of a module."""
        rank = self.rank_of(module)
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((v for key, v in patterns.items() if is_named(module, key)), default)


def is_named(module: str, pattern: str) -> bool:
    """Returns whether a regular expression matches a module's name, or its end after a dot."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None


def _fits_pattern(module: str, pattern: str) -> bool:
    return bool(match_sites(pattern, [module]))


def linear_layers(params: Any) -> dict[str, tuple[int, int]]:
    """Returns {site: (I, O)} of the linear layers in a tree of (abstract) parameters."""
    return {
        site_name(path[:-1]): (parts[0].shape[0], sum(part.shape[1] for part in parts))
        for path, parts in _layers(params).items()
        if path[-1] == "kernel" and parts[0].ndim == 2
    }


def _layers(params: Any) -> dict[tuple[str, ...], list[Any]]:
    """Returns {path: leaves}: one leaf, or of a fused layer those of its parts in order."""
    grouped = by_tensor(traverse_util.flatten_dict(params))
    return {path: list(parts.values()) for path, parts in grouped.items()}


def mergeable_layers(params: Any) -> dict[str, tuple[int, int]]:
    """Returns {site: (I, O)} of the layers that `merge` supports: linear, patch embedding, token
    embedding.
    """
    return {
        site_name(path[:-1]): (
            math.prod(parts[0].shape[:-1]),
            sum(part.shape[-1] for part in parts),
        )
        for path, parts in _layers(params).items()
        if path[-1] in _MERGEABLE
    }


def init(
    shapes: Mapping[str, tuple[int, int]], ranks: Ranks, key: Array, names: Mapping[str, str]
) -> Adapter:
    """Initializes an adapter that changes nothing yet.

    Args:
        shapes: site -> (I, O) of the layers to adapt, from `linear_layers`.
        ranks: rank and scale per layer.
        key: JAX random key.
        names: site -> the module's name in PyTorch, which the patterns in `ranks` match.

    Returns:
        Float32 factors: `down` uniform within 1 / sqrt(I), `up` zero.
    """
    keys = jax.random.split(key, len(shapes))
    factors, scale = {}, {}
    for (site, (inputs, outputs)), own in zip(sorted(shapes.items()), keys, strict=True):
        rank, bound = ranks.rank_of(names[site]), 1 / math.sqrt(inputs)
        down = jax.random.uniform(own, (inputs, rank), jnp.float32, -bound, bound)
        factors[site] = Factors(down, jnp.zeros((rank, outputs), jnp.float32))
        scale[site] = ranks.scale_of(names[site])
    return Adapter(factors, scale)


def by_part(tree: Any, params: Any) -> Any:
    """Splits the factors of fused layers.

    Args:
        tree: a pytree that holds {site: Factors}: those of an adapter, or an optimizer's state.
        params: the model's tree of (abstract) parameters.

    Returns:
        The tree with `PartFactors` at the sites of fused layers.
    """
    widths = {
        site_name(path[:-1]): [part.shape[-1] for part in parts]
        for path, parts in _layers(params).items()
        if path[-1] == "kernel" and len(parts) > 1
    }

    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_factors)
    leaves = [leaf for _, leaf in found]
    fused = {
        i: tuple(itertools.accumulate(widths[path[-1].key]))[:-1]
        for i, (path, leaf) in enumerate(found)
        if isinstance(leaf, Factors) and path and getattr(path[-1], "key", None) in widths
    }
    if fused:
        ups = _split([leaves[i].up for i in fused], tuple(fused.values()))
        for i, parts in zip(fused, ups, strict=True):
            leaves[i] = PartFactors(leaves[i].down, parts)
    return structure.unflatten(leaves)


def joined(tree: Any) -> Any:
    """Returns a pytree with `Factors` in place of all `PartFactors`: undoes `by_part`."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_factors)
    by_part = [leaf.ups for leaf in leaves if isinstance(leaf, PartFactors)]
    ups = iter(_concatenated(by_part) if by_part else ())
    return structure.unflatten(
        Factors(leaf.down, next(ups)) if isinstance(leaf, PartFactors) else leaf for leaf in leaves
    )


# One program for the parts of all layers: on a mesh they are sent around, and many small programs
# that wait for each other may hang on devices of one CPU.
@functools.partial(jax.jit, static_argnums=1)
def _split(ups: list[Array], ends: tuple[tuple[int, ...], ...]) -> list[tuple[Array, ...]]:
    return [tuple(jnp.split(up, own, axis=-1)) for up, own in zip(ups, ends, strict=True)]


@jax.jit
def _concatenated(parts: list[tuple[Array, ...]]) -> list[Array]:
    return [jnp.concatenate(each, axis=-1) for each in parts]


def shardings(factors: Mapping[str, Any], params: Any, mesh: Mesh) -> dict[str, Any]:
    """Returns how factors are divided over a mesh.

    `down` is divided like the rows of a layer's kernel, `up` like its columns. So the compiler
    divides their gradients; factors that are placed elsewhere would be sent around in each step.

    Args:
        factors: {site: Factors or PartFactors} of linear layers, by part as from `by_part`.
        params: the model's (abstract) parameters on the mesh.
        mesh: their mesh.

    Returns:
        The tree of `factors` with their shardings.
    """
    kernels = {
        site_name(path[:-1]): parts
        for path, parts in _layers(params).items()
        if path[-1] == "kernel"
    }

    def one(site: str, own: Factors | PartFactors) -> Any:
        axes = [(*kernel.sharding.spec, None, None)[:2] for kernel in kernels[site]]
        rows = axes[0][0]
        down = NamedSharding(mesh, PartitionSpec(rows) if rows else PartitionSpec())
        ups = tuple(
            NamedSharding(mesh, PartitionSpec(None, columns) if columns else PartitionSpec())
            for _, columns in axes
        )
        kind: Any = type(own)  # of shardings, here
        return kind(down, ups if kind is PartFactors else ups[0])

    return {site: one(site, own) for site, own in factors.items()}


def _is_factors(value: Any) -> bool:
    return isinstance(value, Factors | PartFactors)


def adapted(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a Linen `apply` so that linear layers also add an adapter's low-rank term.

    The parameters do not change: one program and one set of parameters serve both models, and
    `jax.grad` with respect to the adapter computes no gradients of the kernels.

        tuned = jax.jit(ports.adapted(vlm.apply))
        tuned(vlm.params, adapter, inputs)              # with the adapter
        tuned(vlm.params, adapter.scaled(0.0), inputs)  # without it

    Args:
        apply: `module.apply` of a Linen module, or a function that calls it with its arguments.

    Returns:
        A pure function `(params, adapter, *args, **kwargs)`. The adapter's factors may be those of
        `by_part`. The term is computed in the factors' dtype and added in the layer's.

    Raises:
        ValueError: when called, if the adapter replaces whole weights or, in a call of the whole
            model, names a layer that did not run or is not linear (`merge` supports both); or if
            factors by part are of another number of parts than the layer.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, ports
        >>> from ports.intervene.lora import Factors
        >>> x, model = jnp.ones((1, 4)), nn.Sequential([nn.Dense(2)])
        >>> params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), x))
        >>> factors = {"layers.0": Factors(jnp.ones((4, 1)), jnp.ones((1, 2)))}
        >>> adapter = ports.Adapter(factors, {"layers.0": 0.5})
        >>> ports.adapted(model.apply)(params, adapter, x).tolist()
        [[2.0, 2.0]]
    """

    @functools.wraps(apply)
    def with_adapter(params: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
        ran = set()
        if adapter.weights:
            raise ValueError(
                f"the adapter replaces {few(adapter.weights)} as a whole; merge it instead"
            )

        def intercept(
            call: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            y = call(*args, **kwargs)
            is_linear = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
            site = site_name(context.module.path) if is_linear else None
            if site is None or site not in adapter.factors:
                return y
            ran.add(site)
            down, up = adapter.factors[site]
            # Each part of a fused layer by itself, as each is divided among devices by itself.
            ends = getattr(context.module, "ends", ())
            ups = up if isinstance(up, tuple) else jnp.split(up, ends, axis=-1)
            if len(ups) != len(ends) + 1:
                raise ValueError(
                    f"{site}: factors of {counted(len(ups), 'part')}, the layer has "
                    f"{len(ends) + 1}; split them with `by_part` and the model's parameters"
                )
            rows = args[0].reshape(-1, args[0].shape[-1]).astype(down.dtype)
            product = functools.partial(jnp.matmul, precision="highest")
            inner = product(rows, down)

            def added(y: Array, up: Array) -> Array:
                change = adapter.scale[site] * product(inner, up)
                return (y + change.reshape(y.shape)).astype(y.dtype)

            parts = zip(jnp.split(y, ends, axis=-1), ups, strict=True)
            return jnp.concatenate([added(*part) for part in parts], axis=-1)

        out = call_intercepted(intercept, apply, (params, *args), kwargs)
        missed = sorted(set(adapter.factors) - ran)
        if missed and kwargs.get("method") is None:
            raise ValueError(
                f"the adapter is for {missed[0]!r}, which did not run or is not a linear layer; if "
                "this model has such a layer, merge the adapter instead"
            )
        return out

    return with_adapter


def _sum(kernel: Array, factors: Factors, scale: Array) -> Array:
    down, up = (factor.astype(jnp.float32) for factor in factors)
    product = jnp.matmul(down, up, precision="highest").reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)


_add, _add_in_place = jax.jit(_sum), jax.jit(_sum, donate_argnums=0)


def merge(params: dict, adapter: Adapter, *, donate: bool = False) -> dict:
    """Merges an adapter into the parameters: W + s A B.

    The sum is computed in float32 and then takes each kernel's dtype and sharding.

    Args:
        params: the model's tree of parameters.
        adapter: factors for some of its linear layers, patch convolutions and embeddings.
        donate: free the old kernels in `params` as they are replaced, to save memory.

    Returns:
        A tree with new arrays for every layer in the adapter; all other leaves are the same objects
        as in `params`.

    Raises:
        ValueError: the adapter is for a layer that `params` does not have, or of another shape.

    Examples:
        >>> import jax.numpy as jnp, ports
        >>> from ports.intervene.lora import Factors
        >>> factors = {"dense": Factors(jnp.ones((2, 1)), jnp.ones((1, 2)))}
        >>> adapter = ports.Adapter(factors, scale={"dense": 0.5})
        >>> ports.merge({"dense": {"kernel": jnp.eye(2)}}, adapter)["dense"]["kernel"].tolist()
        [[1.5, 0.5], [0.5, 1.5]]
    """
    check(adapter, mergeable_layers(params))
    factors = by_part(joined(adapter.factors), params)
    flat = traverse_util.flatten_dict(params)
    add = _add_in_place if donate else _add
    for stored, parts in by_tensor(flat).items():
        site, own = site_name(stored[:-1]), (adapter.weights or {}).get(tensor_name(stored))
        end = 0
        for number, (path, leaf) in enumerate(parts.items()):
            placed, width = leaf.sharding, leaf.shape[-1] if leaf.ndim else 0
            # Columns of the stored tensor: all of them, but for a part of a fused layer.
            columns, end = slice(end, end + width), end + width
            if own is not None:
                value = own[..., columns] if leaf.ndim else own
                flat[path] = leaf = sharding.put(np.asarray(value).astype(leaf.dtype), placed)
            if path[-1] in _MERGEABLE and site in factors:
                down, up = factors[site]
                up = up[number] if isinstance(up, tuple) else up
                merged = add(leaf, Factors(down, up), adapter.scale[site])
                # Where it is already, it stays uncommitted if the leaf was: programs are shared.
                is_there = merged.sharding == placed
                flat[path] = merged if is_there else jax.device_put(merged, placed)
    return traverse_util.unflatten_dict(flat)


def check(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Checks that every factor fits a layer.

    Args:
        adapter: the adapter.
        shapes: site -> (I, O), from `mergeable_layers`.

    Raises:
        ValueError: a layer does not exist or has another shape.
    """
    for site, (down, up) in joined(adapter.factors).items():
        expected = shapes.get(site)
        if expected is None:
            raise ValueError(
                f"the adapter has factors for {site!r}, a layer which this model does not have; use"
                " the base model it was trained on"
            )
        got = (down.shape[0], up.shape[1])
        if got != tuple(expected) or down.shape[1] != up.shape[0]:
            raise ValueError(
                f"the adapter's factors for {site} are {tuple(down.shape)} and {tuple(up.shape)}; "
                f"expected ({expected[0]}, R) and (R, {expected[1]}); use the base model it was "
                "trained on"
            )


def select_layers(
    shapes: Mapping[str, tuple[int, int]],
    patterns: Iterable[str],
    names: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, int]]:
    """Selects linear layers by name.

    Args:
        shapes: site -> (I, O) of the layers, from `linear_layers`.
        patterns: regular expressions for a name or its end (see `is_named`); a pattern that is not
            a valid regular expression may be a site pattern ("**.q_proj", see `match_sites`).
        names: site -> an alternative name of the module, as in today's transformers.

    Returns:
        The part of `shapes` that some pattern matches.

    Raises:
        ValueError: a pattern is invalid or matches no linear layer.
    """
    called = [{site: site for site in shapes}, dict(names or {})]
    chosen: dict[str, tuple[int, int]] = {}
    for pattern in patterns:
        try:
            re.compile(pattern)
            fits = functools.partial(is_named, pattern=pattern)
        except re.error as error:
            if not is_pattern(pattern):
                raise ValueError(
                    f"target {pattern!r} is not a regular expression: {error}"
                ) from None
            fits = functools.partial(_fits_pattern, pattern=pattern)
        found = {site: shapes[site] for each in called for site, name in each.items() if fits(name)}
        if not found:
            ends = sorted({site.rpartition(".")[2] for site in shapes})
            raise ValueError(
                f"target {pattern!r} matches no linear layer; their names end in {few(ends, 20)}"
            )
        chosen |= found
    return chosen
