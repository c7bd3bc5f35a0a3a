#!/usr/bin/env bash
# jax 0.10.2: a Pallas kernel for TPU that uses `jnp.sign` can't be compiled for a topology where no TPU is attached.
#
# With libtpu installed, any machine compiles TPU programs for a described topology, Pallas kernels
# included. One would guess that this does not depend on which elementwise operation a kernel uses. But
# the rule that lowers sign asks which chip is attached to the process, not which one the program is
# compiled for, and raises where there is none; abs, and sign written as two comparisons, compile. Outside of a
# kernel sign compiles too.
#
# Output seen:
#   abs: compiles
#   sign: ValueError: Unsupported TPU device kind: cpu
#   two comparisons: compiles
#   sign outside of a kernel: compiles
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet 'jax[tpu]==0.10.2' libtpu==0.0.42.1 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
there = SingleDeviceSharding(topology.devices[0])
given = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=there)


def two_comparisons(x):
    return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


def in_kernel(function):
    def kernel(x, y):
        y[...] = function(x[...])

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))


functions = {
    "abs": in_kernel(jnp.abs),
    "sign": in_kernel(jnp.sign),
    "two comparisons": in_kernel(two_comparisons),
    "sign outside of a kernel": jnp.sign,
}
found = {}
for name, function in functions.items():
    try:
        jax.jit(function).lower(given).compile()
        found[name] = "compiles"
    except ValueError as error:
        found[name] = f"ValueError: {error}"
    print(f"{name}: {found[name]}")
assert found.pop("sign").startswith("ValueError: Unsupported TPU device kind")
assert set(found.values()) == {"compiles"}
PYTHON
export TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu
"$directory/venv/bin/python" "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
