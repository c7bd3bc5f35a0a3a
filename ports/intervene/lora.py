"""Low-rank adaptation (LoRA; Hu et al. 2021, section 4): y = x W + s (x A) B, with W frozen.

I input width, O output width, R rank of a linear layer.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Float

from ports.intervene.interception import call_intercepted
from ports.intervene.sites import is_pattern, match_sites
from ports.messages import few
from ports.names import site_name, tensor_name
from ports.parallel import sharding

Array = jax.Array
_MERGEABLE = ("kernel", "embedding")


class Factors(NamedTuple):
    """What one linear layer gains: x[..., I] -> scale (x down) up, [..., O].

    Of a convolution over patches I counts the values of a patch, in the order of its kernel; of an
    embedding I is the number of tokens.
    """

    down: Float[Array, "I R"]  # the transpose of PEFT's lora_A
    up: Float[Array, "R O"]  # the transpose of PEFT's lora_B


class Adapter(NamedTuple):
    """The factors of a model's linear layers, and how strongly they count. A pytree."""

    factors: dict[str, Factors]  # site -> factors
    scale: dict[str, float]  # site -> s
    # Tensor's name -> what takes the place of the base model's, laid out as the parameter.
    weights: dict[str, Array] | None = None

    def scaled(self, strength: float | Array) -> "Adapter":
        """The adapter at another strength: 0 is the original model, 1 the adapted one.

        Raises ValueError for an adapter with weights of its own, which have no strength.
        """
        if self.weights:
            raise ValueError(f"the adapter replaces {few(self.weights)}: it has no strength")
        return self._replace(scale={site: strength * s for site, s in self.scale.items()})


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Rank and scale of each layer, in PEFT's terms.

    Attributes:
        rank: R of layers that no pattern names.
        alpha: the scale is alpha / R.
        rank_pattern, alpha_pattern: {the end of a module's name, or a regular expression for it:
            another rank or alpha}; the first that fits counts.
        use_rslora: the scale is alpha / sqrt(R) (Kalajdzievski 2023).
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False

    def rank_of(self, module: str) -> int:
        """R of the module of that name."""
        return _of_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """s of the module of that name."""
        rank = self.rank_of(module)
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((v for key, v in patterns.items() if is_named(module, key)), default)


def is_named(module: str, pattern: str) -> bool:
    """Whether a regular expression matches a module's name, or the end of it behind a dot."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module) is not None


def _fits_pattern(module: str, pattern: str) -> bool:
    return bool(match_sites(pattern, [module]))


def linear_layers(params: Any) -> dict[str, tuple[int, int]]:
    """Site -> (I, O) of the linear layers of a tree of (abstract) parameters."""
    return {
        site_name(path[:-1]): leaf.shape
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] == "kernel" and leaf.ndim == 2
    }


def mergeable_layers(params: Any) -> dict[str, tuple[int, int]]:
    """Site -> (I, O) of what `merge` adds to: linear layers, patch embeddings, embeddings."""
    return {
        site_name(path[:-1]): (math.prod(leaf.shape[:-1]), leaf.shape[-1])
        for path, leaf in traverse_util.flatten_dict(params).items()
        if path[-1] in _MERGEABLE
    }


def init(
    shapes: Mapping[str, tuple[int, int]], ranks: Ranks, key: Array, names: Mapping[str, str]
) -> Adapter:
    """An adapter that changes nothing yet: `down` uniform within 1 / sqrt(I), `up` zero.

    Args:
        shapes: site -> (I, O) of the layers to adapt, of `linear_layers`.
        ranks: rank and scale.
        key: of the random numbers.
        names: site -> the module's name in PyTorch, which patterns of ranks look at.
    """
    keys = jax.random.split(key, len(shapes))
    factors, scale = {}, {}
    for (site, (inputs, outputs)), own in zip(sorted(shapes.items()), keys, strict=True):
        rank, bound = ranks.rank_of(names[site]), 1 / math.sqrt(inputs)
        down = jax.random.uniform(own, (inputs, rank), jnp.float32, -bound, bound)
        factors[site] = Factors(down, jnp.zeros((rank, outputs), jnp.float32))
        scale[site] = ranks.scale_of(names[site])
    return Adapter(factors, scale)


def adapted(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a Linen `apply` so that linear layers run with an adapter beside their kernels.

    The parameters stay as they are: one program, or one set of parameters, serves both models, and
    `jax.grad` with respect to the adapter needs no gradient of a kernel.

        tuned = jax.jit(ports.adapted(vlm.apply))
        tuned(vlm.params, adapter, inputs)              # with the adapter
        tuned(vlm.params, adapter.scaled(0.0), inputs)  # without it

    Args:
        apply: `module.apply` of a Linen module, or a function that passes its arguments on to one.

    Returns:
        A pure function `(params, adapter, *args, **kwargs)`. The product is computed in the
        factors' dtype and added in the layer's.

    Raises:
        ValueError: for an adapter with weights of its own; and when the whole model is called, if
            the adapter names a layer that did not run or is not linear. `merge` takes both.
    """

    @functools.wraps(apply)
    def with_adapter(params: Any, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
        ran = set()
        if adapter.weights:
            raise ValueError(f"the adapter replaces {few(adapter.weights)}: merge it instead")

        def intercept(
            call: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            y = call(*args, **kwargs)
            is_linear = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
            site = site_name(context.module.path) if is_linear else None
            if site not in adapter.factors:
                return y
            ran.add(site)
            down, up = adapter.factors[site]
            rows = args[0].reshape(-1, args[0].shape[-1]).astype(down.dtype)
            change = adapter.scale[site] * ((rows @ down) @ up)
            return (y + change.reshape(y.shape)).astype(y.dtype)

        out = call_intercepted(intercept, apply, (params, *args), kwargs)
        missed = sorted(set(adapter.factors) - ran)
        if missed and kwargs.get("method") is None:
            raise ValueError(
                f"the adapter is for {missed[0]!r}, which did not run or is not a linear layer; "
                "merge it instead, if it is one of this model"
            )
        return out

    return with_adapter


def _sum(kernel: Array, factors: Factors, scale: Array) -> Array:
    down, up = (factor.astype(jnp.float32) for factor in factors)
    product = jnp.matmul(down, up, precision="highest").reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)


_add, _add_in_place = jax.jit(_sum), jax.jit(_sum, donate_argnums=0)


def merge(params: dict, adapter: Adapter, *, donate: bool = False) -> dict:
    """The parameters W + s A B of the adapted model.

    The sum is taken in float32 and keeps each kernel's dtype and sharding.

    Args:
        params: the model's tree of parameters.
        adapter: for some of its linear layers, convolutions over patches and embeddings.
        donate: give up the changed kernels of `params`, so that no second copy of them is needed.

    Returns a tree with new kernels where the adapter has factors, or weights of its own; all other
    leaves are the very arrays of `params`. Raises ValueError for factors that no kernel of `params`
    fits.
    """
    check(adapter, mergeable_layers(params))
    flat = traverse_util.flatten_dict(params)
    add = _add_in_place if donate else _add
    for path, leaf in list(flat.items()):
        site, own = site_name(path[:-1]), (adapter.weights or {}).get(tensor_name(path))
        placed = leaf.sharding
        if own is not None:
            flat[path] = leaf = sharding.put(np.asarray(own).astype(leaf.dtype), placed)
        if path[-1] in _MERGEABLE and site in adapter.factors:
            merged = add(leaf, adapter.factors[site], adapter.scale[site])
            flat[path] = jax.device_put(merged, placed)
    return traverse_util.unflatten_dict(flat)


def check(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    """ValueError unless every factor fits a layer; shapes as of `mergeable_layers`."""
    for site, (down, up) in adapter.factors.items():
        expected = shapes.get(site)
        if expected is None:
            raise ValueError(f"the adapter is for a layer {site!r}, which this model has not")
        got = (down.shape[0], up.shape[1])
        if got != tuple(expected) or down.shape[1] != up.shape[0]:
            raise ValueError(
                f"the adapter's factors for {site} are {tuple(down.shape)} and {tuple(up.shape)}; "
                f"expected ({expected[0]}, R) and (R, {expected[1]}): it is for another base model"
            )


def select_layers(
    shapes: Mapping[str, tuple[int, int]],
    patterns: Iterable[str],
    names: Mapping[str, str] | None = None,
) -> dict[str, tuple[int, int]]:
    """The linear layers that a pattern names.

    Args:
        shapes: site -> (I, O) of the layers, of `linear_layers`.
        patterns: regular expressions for a name or its end (`is_named`); what is none may be a
            pattern of sites ("**.q_proj", see `match_sites`).
        names: site -> what the module may be called instead, the name in today's transformers.

    Raises ValueError for a pattern that is neither, or that names no linear layer.
    """
    called = [{site: site for site in shapes}, dict(names or {})]
    chosen: dict[str, tuple[int, int]] = {}
    for pattern in patterns:
        try:
            re.compile(pattern)
            fits = functools.partial(is_named, pattern=pattern)
        except re.error as error:
            if not is_pattern(pattern):
                raise ValueError(f"target {pattern!r} is no regular expression: {error}") from None
            fits = functools.partial(_fits_pattern, pattern=pattern)
        found = {site: shapes[site] for each in called for site, name in each.items() if fits(name)}
        if not found:
            ends = sorted({site.rpartition(".")[2] for site in shapes})
            raise ValueError(
                f"target {pattern!r} names no linear layer; their names end in {few(ends, 20)}"
            )
        chosen |= found
    return chosen
