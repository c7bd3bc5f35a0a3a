"""How the solvers' programs are compiled."""

import os
from collections.abc import Callable
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


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Like `jax.jit`, but compiles quickly for small arrays on a CPU; also works when traced.

    Options of the compiler that XLA_FLAGS sets are left alone. If an argument `plan` says that its
    loops are long (`has_long_loops`), they are compiled with more care.
    """
    flags = os.environ.get("XLA_FLAGS", "")

    def with_options(chosen: dict[str, bool | int | str]) -> Callable[..., Any]:
        ours = {name: value for name, value in chosen.items() if name not in flags}
        return jax.jit(function, **options, compiler_options=ours)

    plain, quick = jax.jit(function, **options), with_options(_QUICK)
    with_loops, of_large = with_options(_WITH_LOOPS), with_options(_WIDE)

    def call(*arguments: Any, **named: Any) -> Any:
        leaves = jax.tree.leaves((arguments, named))
        # Only an outermost program takes options.
        traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        large = any(getattr(leaf, "size", 1) > PADDED for leaf in leaves)
        if traced or jax.default_backend() != "cpu":
            compiled = plain
        elif getattr(named.get("plan"), "has_long_loops", False):
            compiled = of_large if large else with_loops
        else:
            compiled = plain if large else quick
        return compiled(*arguments, **named)

    return call
