#!/usr/bin/env bash
# flax 0.12.8 (jax 0.10.2): `apply` with given parameters traces every layer's initializer, each time.
#
# One would guess that an initializer runs in `init` alone and costs nothing afterwards. To compare the
# shape of a given parameter with the wanted one, `Module.param` evaluates the initializer abstractly in
# every `apply`, and so does each layer of Linen. Compiled programs do not contain it, so no profile of a
# program shows it; but all tracing pays, once per program and shape of its inputs: 200 products are
# traced 13 times as fast where their kernels are read without an initializer. One that counts its
# calls, or can't be traced, is called by code that initializes nothing.
#
# Output seen (times differ between machines):
#   calls of the initializer: init 1, two applies 2, a jitted apply 1
#   tracing 200 layers by `param` takes 13.3 times as long as reading their kernels
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat > "$directory/run.py" <<'PYTHON'
import statistics
import time

import jax
import jax.numpy as jnp
from flax import linen as nn

calls = []


def counted(key, shape, dtype=jnp.float32):
    calls.append(shape)
    return jnp.zeros(shape, dtype)


def count(run) -> int:
    calls.clear()
    run()
    return len(calls)


x = jnp.ones((1, 64))
layer = nn.Dense(4, kernel_init=counted)
at_init = count(lambda: layer.init(jax.random.key(0), x))
params = layer.init(jax.random.key(0), x)
applied = count(lambda: (layer.apply(params, x), layer.apply(params, x)))
jitted = count(lambda: jax.jit(layer.apply)(params, x))
print(f"calls of the initializer: init {at_init}, two applies {applied}, a jitted apply {jitted}")


class Stack(nn.Module):
    """Two hundred linear layers, whose parameters come by `param` or are read as they are."""

    by_param: bool

    @nn.compact
    def __call__(self, x):
        initial = nn.initializers.lecun_normal()
        for i in range(200):
            if self.by_param:
                kernel = self.param(f"kernel_{i}", initial, (64, 64))
            else:
                kernel = self.get_variable("params", f"kernel_{i}")
            x = x @ kernel
        return x


def seconds(stack: Stack, params: dict) -> float:
    before = time.process_time()
    jax.make_jaxpr(stack.apply)(params, x)
    return time.process_time() - before


stacks = [Stack(by_param=True), Stack(by_param=False)]
params = {"params": {f"kernel_{i}": jnp.zeros((64, 64)) for i in range(200)}}
times = [[seconds(stack, params) for stack in stacks] for _ in range(9)]
ratio = statistics.median(by_param / read for by_param, read in times[1:])
print(f"tracing 200 layers by `param` takes {ratio:.1f} times as long as reading their kernels")
assert (at_init, applied, jitted) == (1, 2, 1)
assert ratio > 3
PYTHON
"$directory/venv/bin/python" "$directory/run.py"
