#!/usr/bin/env bash
# flax 0.12.8 (the code is the same in 0.12.12): a module under `nn.jit` is traced once for what it
# captures and intercepts, and keeps that for all later calls.
#
# `nn.jit` keys its programs by the module and by the filter of mutable collections. One would guess
# that the filter given as `capture_intermediates` is part of the key, as `mutable` is, or that both
# it and `nn.intercept_methods` act on every call, as on a module without `nn.jit`. They act while
# the module is traced alone: the second of two captures returns what the first asked for, and an
# interceptor that was open at the first call stays in the program when it is closed. Neither warns.
#
# Output seen:
#   captured 'up': ['up']; captured 'down': ['up']
#   intercepted: 0.0; afterwards: 0.0; without nn.jit: 4.0
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat > "$directory/run.py" <<'PYTHON'
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        ones = nn.initializers.ones
        up = nn.Dense(1, kernel_init=ones, name="up")(x)
        return up + nn.Dense(1, kernel_init=ones, name="down")(x)


x = jnp.ones((1, 2))
dense = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
variables = {"params": {"up": dense, "down": dense}}
Compiled = nn.jit(Block)


def captured(name):
    def keep(module, method):
        return module.name == name

    options = {"capture_intermediates": keep, "mutable": ["intermediates"]}
    return sorted(Compiled().apply(variables, x, **options)[1]["intermediates"])


up, down = captured("up"), captured("down")
print(f"captured 'up': {up}; captured 'down': {down}")

Other = nn.jit(Block)
with nn.intercept_methods(lambda method, args, kwargs, context: 0 * method(*args, **kwargs)):
    inside = Other().apply(variables, x).item()
outside, plain = Other().apply(variables, x).item(), Block().apply(variables, x).item()
print(f"intercepted: {inside}; afterwards: {outside}; without nn.jit: {plain}")
assert (up, down) == (["up"], ["up"])
assert (inside, outside, plain) == (0.0, 0.0, 4.0)
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
