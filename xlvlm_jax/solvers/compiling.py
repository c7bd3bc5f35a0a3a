"""How the solvers' programs are compiled."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import Tracer

from xlvlm_jax.solvers.buckets import PADDED

# On a CPU a solver's program has some hundred small loops, and compiling them is most of a first
# call. LLVM's first level, with the emitter that jaxlib had before 0.11, takes half the time for
# loops that are nearly as fast: the large products are library calls. Beyond `buckets.PADDED`
# elements the loops count more, and on an accelerator its compiler keeps its defaults.
_QUICK: dict[str, bool | int | str] = {"xla_backend_optimization_level": 1}
# Loops that compare many scores take longer with that emitter (k-means of [20000, 512], K = 1024:
# 1.39 instead of 0.88 CPU seconds), and compiling with the other one takes 1.6 more. LLVM's second
# level and vectors of 512 bits, where a CPU has them, save another tenth to fifth of an update in
# the same compile time.
_WIDE: dict[str, bool | int | str] = {"xla_cpu_prefer_vector_width": 512}
_WITH_LOOPS = _WIDE | {"xla_backend_optimization_level": 2}
if jax.__version_info__ < (0, 11):
    _QUICK["xla_cpu_use_fusion_emitters"] = False
# Without the library that XLA takes for products with rows of Z, Eigen's are faster if they have
# many columns: [20480, 512] times [512, 256] takes 23 instead of 29 CPU ms (0.10; 24 and 28 with
# 0.12). With 32 columns the one or the other is. Later releases may not know the option.
_EIGEN: dict[str, bool | int | str] = {}
if jax.__version_info__ < (0, 13):
    _EIGEN["xla_cpu_experimental_ynn_fusion_type"] = ""


class Jitted:
    """A function with the programs of `jit`."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]):
        self._function, self._options = function, options
        self._plain = jax.jit(function, **options)
        self._with_options: dict[tuple, Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Runs the function."""
        return self._chosen(arguments, named)(*arguments, **named)

    def compiled(self, *arguments: Any, **named: Any) -> tuple[Any, jax.stages.Compiled]:
        """Compiles for arrays, or for their shapes, without running; a call then finds the program.

        Returns:
            the shapes of the results, and the program.
        """
        traced = self._chosen(arguments, named).trace(*arguments, **named)
        return traced.out_info, traced.lower().compile()

    def _chosen(self, arguments: tuple, named: Mapping[str, Any]) -> Any:
        leaves = jax.tree.leaves((arguments, named))
        # Only an outermost program takes options.
        if any(isinstance(leaf, Tracer) for leaf in leaves) or jax.default_backend() != "cpu":
            return self._plain
        large = any(getattr(leaf, "size", 1) > PADDED for leaf in leaves)
        plan = named.get("plan")
        if getattr(plan, "has_long_loops", False):
            chosen = _WIDE if large else _WITH_LOOPS
        else:
            chosen = {} if large else _QUICK
        if getattr(plan, "has_wide_products", False):
            chosen = chosen | _EIGEN
        if not chosen:
            return self._plain
        key = tuple(chosen.items())
        if key not in self._with_options:
            flags = os.environ.get("XLA_FLAGS", "")
            ours = {name: value for name, value in key if name not in flags}
            self._with_options[key] = jax.jit(
                self._function, **self._options, compiler_options=ours
            )
        return self._with_options[key]


def jit(function: Callable[..., Any], **options: Any) -> Jitted:
    """Like `jax.jit`, but compiles quickly for small arrays on a CPU; also works when traced.

    Options of the compiler that XLA_FLAGS sets are left alone. An argument `plan` may say that its
    loops are long (`has_long_loops`), which are then compiled with more care, or that it multiplies
    rows with many columns (`has_wide_products`).
    """
    return Jitted(function, options)
