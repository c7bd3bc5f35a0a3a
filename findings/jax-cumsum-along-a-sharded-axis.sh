#!/usr/bin/env bash
# jax 0.10.2 on eight CPU devices (0.12.0.1 likewise): `jnp.cumsum` along a sharded axis takes a number of operations
# that is quadratic in its length, and stops at 256 in bfloat16.
#
# A sharding says where an array lies, so one would guess that it changes the last digit at most, and costs an exchange
# of eight sums. On one device, cumsum is rewritten into blocks of some 16 numbers. Along an axis that is split, it
# keeps one window as long as the whole axis: every device has all of it and adds up, for each of its own numbers, all
# those before it, one at a time, each sum rounded to bfloat16. 65,536 float32 numbers need 480 times as many operations
# on each of the eight devices as on one alone, and ones in bfloat16 are counted to 256. cumlogsumexp is wrong likewise.
# Along another axis than the split one, or by lax.associative_scan, all is as one would guess. Compiled for four chips
# of a TPU v5e, the same program is rewritten into blocks.
#
# Output seen:
#   last of 4,096 ones in bfloat16: one device 4096, eight devices 256, eight devices by associative_scan 4096
#   eight rows of 4,096, split by rows 4096, along the rows 256
#   operations for 65,536 numbers: one device 1.1e+06, each of eight 5.4e+08
#   largest error of these sums: one device 0.004, eight devices 0.007
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(np.array(jax.devices()), ("devices",))
assert mesh.size == 8


def split(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


cumsum = jax.jit(lambda x: jnp.cumsum(x, axis=-1))
scan = jax.jit(lambda x: jax.lax.associative_scan(jnp.add, x))

ones = jnp.ones(4096, jnp.bfloat16)
one, eight = int(cumsum(ones)[-1]), int(cumsum(split(ones, "devices"))[-1])
scanned = int(scan(split(ones, "devices"))[-1])
print(f"last of 4,096 ones in bfloat16: one device {one}, eight devices {eight}, ", end="")
print(f"eight devices by associative_scan {scanned}")
rows = jnp.ones((8, 4096), jnp.bfloat16)
by_rows, along = (int(cumsum(split(rows, *axes))[0, -1]) for axes in (("devices", None), (None, "devices")))
print(f"eight rows of 4,096, split by rows {by_rows}, along the rows {along}")
assert (one, eight, scanned, by_rows, along) == (4096, 256, 4096, 4096, 256)

numbers = jax.random.uniform(jax.random.key(0), (65_536,))
exact = np.cumsum(np.asarray(numbers, np.float64))
costs, errors = [], []
for given in (numbers, split(numbers, "devices")):
    compiled = cumsum.lower(given).compile()
    costs.append(compiled.cost_analysis()["flops"])
    errors.append(np.abs(np.asarray(compiled(given)) - exact).max())
print(f"operations for 65,536 numbers: one device {costs[0]:.1e}, each of eight {costs[1]:.1e}")
print(f"largest error of these sums: one device {errors[0]:.3f}, eight devices {errors[1]:.3f}")
assert costs[1] > 100 * costs[0]
PYTHON
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$directory/venv/bin/python" "$directory/run.py"
