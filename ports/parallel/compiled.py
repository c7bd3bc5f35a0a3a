"""How every compiled program of a model is traced: over its mesh, and as precisely as its dtype.

Float32 means float32 on every backend. A TPU's own default would round the factors of each product
to bfloat16, and that of some GPUs to TensorFloat-32. On a CPU this changes nothing. JAX's setting
`jax_default_matmul_precision` has precedence.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ports.parallel import sharding

_PRECISION = "jax_default_matmul_precision"


@contextlib.contextmanager
def tracing(dtype: Any, mesh: jax.sharding.Mesh | None) -> Iterator[None]:
    """Traces what a model of this dtype computes on this mesh while the context is open."""
    chosen = getattr(jax.config, _PRECISION)
    is_float32 = jnp.dtype(dtype) == jnp.float32
    precision = "highest" if chosen is None and is_float32 else chosen
    with sharding.on(mesh), jax.default_matmul_precision(precision):
        yield


def program(*, static: Sequence[str] = (), donate: Sequence[str] = ()) -> Callable[..., Any]:
    """Compiles a function of a model, whose first argument is the Linen module.

    The compiled function takes a further keyword, `mesh`, the model's. It is static, like the
    module: a program that is traced for one mesh is not run on another.

    Args:
        static: names of further static arguments.
        donate: names of arguments whose memory results may take over.

    Returns:
        A decorator like `jax.jit`.

    Examples:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from ports.parallel import compiled
        >>> @compiled.program()
        ... def run(model, params, x):
        ...     return model.apply(params, x)
        >>> model, x = nn.Dense(2, dtype=jnp.float32), jnp.ones((1, 3))
        >>> params = model.init(jax.random.key(0), x)
        >>> "precision = [HIGHEST, HIGHEST]" in run.lower(model, params, x).as_text()
        True
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def traced(model: Any, *arguments: Any, mesh: Any = None, **named: Any) -> Any:
            with tracing(model.dtype, mesh):
                return function(model, *arguments, **named)

        given = inspect.signature(function)
        first, *rest = given.parameters.values()
        variable = [each for each in rest if each.kind is each.VAR_KEYWORD]
        own = inspect.Parameter("mesh", inspect.Parameter.KEYWORD_ONLY, default=None)
        plain = [first, *(each for each in rest if each not in variable), own, *variable]
        traced.__signature__ = given.replace(parameters=plain)  # type: ignore[attr-defined]
        names = (first.name, *static, "mesh")
        return jax.jit(traced, static_argnames=names, donate_argnames=tuple(donate))

    return decorate
