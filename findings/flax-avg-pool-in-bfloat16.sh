#!/usr/bin/env bash
# flax 0.12.8, jax 0.10.2 on a CPU (0.12.12, 0.12.0.1 likewise): nn.avg_pool of bfloat16 over 24 x 24 numbers that are
# all 1 is 0.445.
#
# A mean lies between the smallest and the largest number, and jnp.mean and PyTorch's avg_pool2d add up bfloat16 in
# more than bfloat16. One would guess that the average over a window does too. It adds in the dtype of its input, one
# number at a time, and such a sum of ones stops at 256: the 576 patches of a picture of 336 pixels have a mean of
# 256/576. Windows of 16 numbers lose digits only. Cast to float32 before. (Compiled for a TPU v5e, the sum is in
# bfloat16 too; it was not run there.)
#
# Output seen (pictures of ones; 4 x 4, 24 x 24 and 32 x 32 pooled to one number):
#   nn.avg_pool: float32 1.000 1.000 1.000, bfloat16 1.000 0.445 0.250
#   jnp.mean: float32 1.000 1.000 1.000, bfloat16 1.000 1.000 1.000
#   torch: float32 1.000 1.000 1.000, bfloat16 1.000 1.000 1.000
#   mean error of 4 x 4 windows of uniform numbers in bfloat16: nn.avg_pool 0.0016, jnp.mean 0.0007
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet \
    flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.3.5 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn

SIDES, KINDS = (4, 24, 32), ("float32", "bfloat16")


def pooled(kind, side):
    x = jnp.ones((1, side, side, 1), kind)
    return jax.jit(lambda x: nn.avg_pool(x, (side, side)))(x).item()


def mean(kind, side):
    return jnp.mean(jnp.ones((side, side), kind)).item()


def by_torch(kind, side):
    x = torch.ones(1, 1, side, side, dtype=getattr(torch, kind))
    return torch.nn.functional.avg_pool2d(x, side).item()


found = {}
for name, function in (("nn.avg_pool", pooled), ("jnp.mean", mean), ("torch", by_torch)):
    found[name] = {kind: [function(kind, side) for side in SIDES] for kind in KINDS}
    shown = (f"{kind} {' '.join(f'{each:.3f}' for each in values)}" for kind, values in found[name].items())
    print(f"{name}: {', '.join(shown)}")

numbers = jax.random.uniform(jax.random.key(0), (1, 256, 256, 1)).astype(jnp.bfloat16)
windows = np.asarray(numbers[0, ..., 0]).reshape(64, 4, 64, 4).transpose(0, 2, 1, 3).reshape(64, 64, 16)
exact = windows.astype(np.float64).mean(-1)
means = nn.avg_pool(numbers, (4, 4), (4, 4))[0, ..., 0], jnp.asarray(windows).mean(-1)
errors = [np.abs(np.asarray(each, np.float64) - exact).mean() for each in means]
print("mean error of 4 x 4 windows of uniform numbers in bfloat16: ", end="")
print(f"nn.avg_pool {errors[0]:.4f}, jnp.mean {errors[1]:.4f}")

assert found["nn.avg_pool"]["bfloat16"] == [1, float(jnp.bfloat16(256 / 576)), 256 / 1024]
assert all(values == [1, 1, 1] for name in ("jnp.mean", "torch") for values in found[name].values())
assert errors[0] > 1.5 * errors[1]
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
