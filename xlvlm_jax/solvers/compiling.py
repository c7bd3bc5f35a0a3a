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
# 1.39 instead of 0.88 CPU seconds), and compiling with the other one takes 1.6 more.
_WITH_LOOPS = dict(_QUICK)
if jax.__version_info__ < (0, 11):
    _QUICK["xla_cpu_use_fusion_emitters"] = False


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Like `jax.jit`, but compiles quickly for small arrays on a CPU; also works when traced.

    Options of the compiler that XLA_FLAGS sets are left alone. If an argument `plan` says that its
    loops are long (`has_long_loops`), they are compiled with more care.
    """
    flags = os.environ.get("XLA_FLAGS", "")

    def quickly(chosen: dict[str, bool | int | str]) -> Callable[..., Any]:
        ours = {name: value for name, value in chosen.items() if name not in flags}
        return jax.jit(function, **options, compiler_options=ours)

    plain, quick, with_loops = jax.jit(function, **options), quickly(_QUICK), quickly(_WITH_LOOPS)

    def call(*arguments: Any, **named: Any) -> Any:
        leaves = jax.tree.leaves((arguments, named))
        # Only an outermost program takes options.
        traced = any(isinstance(leaf, Tracer) for leaf in leaves)
        large = any(getattr(leaf, "size", 1) > PADDED for leaf in leaves)
        is_quick = jax.default_backend() == "cpu" and not traced and not large
        is_long = getattr(named.get("plan"), "has_long_loops", False)
        compiled = (with_loops if is_long else quick) if is_quick else plain
        return compiled(*arguments, **named)

    return call
