#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1: `cost_analysis()` of a TPU program can't tell a product at full precision from one in
# bfloat16, counts the body of a loop once, and gives negative seconds.
#
# Compiled for a described v5e, as libtpu does on any machine. A float32 product at precision "highest" is six
# products in bfloat16, and one would guess that "optimal_seconds", made by the compiler for its own
# program, says so. It is the same number for all precisions, though the estimated cycles in the text of that
# program are 2.5 times as many. A loop of 1,000 steps costs what one of 10 does. A sum of
# 205 MB by segments accesses 50 kB, and an SVD takes -29 seconds: each step whose cost is not known subtracts one. So it neither
# ranks two programs nor says how near one is to the chip's limit.
#
# Output seen:
#   precision default: optimal 1.0e-05 s, 6236 cycles
#   precision highest: optimal 1.0e-05 s, 15645 cycles
#   10 steps: optimal 1.7e-05 s
#   1000 steps: optimal 1.7e-05 s
#   segment_sum of 205 MB: 0.05 MB accessed
#   svd: optimal -29.0 s
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet 'jax[tpu]==0.10.2' libtpu==0.0.42.1 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
there = SingleDeviceSharding(topology.devices[0])


def compiled(function, *shapes):
    given = [jax.ShapeDtypeStruct(shape, kind, sharding=there) for shape, kind in shapes]
    program = jax.jit(function).lower(*given).compile()
    cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text())))
    return program.cost_analysis(), cycles


square = (512, 512), jnp.float32
seconds, cycles = {}, {}
for precision in ("default", "highest"):
    cost, cycles[precision] = compiled(lambda x: jnp.matmul(x, x, precision=precision), square)
    seconds[precision] = cost["optimal_seconds"]
    print(f"precision {precision}: optimal {seconds[precision]:.1e} s, {cycles[precision]} cycles")
assert seconds["default"] == seconds["highest"] and cycles["highest"] > 2 * cycles["default"]
for steps in (10, 1000):
    loop = lambda x: jax.lax.fori_loop(0, steps, lambda i, y: jnp.tanh(y @ x), x)
    seconds[steps] = compiled(loop, square)[0]["optimal_seconds"]
    print(f"{steps} steps: optimal {seconds[steps]:.1e} s")
assert seconds[10] == seconds[1000]
rows = ((100_000, 512), jnp.float32), ((100_000,), jnp.int32)
accessed = compiled(lambda z, label: jax.ops.segment_sum(z, label, 20), *rows)[0]["bytes accessed"]
print(f"segment_sum of {100_000 * 512 * 4 / 1e6:.0f} MB: {accessed / 1e6:.2f} MB accessed")
assert accessed < 1e6
svd = compiled(lambda x: jnp.linalg.svd(x, compute_uv=False), square)[0]["optimal_seconds"]
print(f"svd: optimal {svd:.1f} s")
assert svd < 0
PYTHON
export TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu
"$directory/venv/bin/python" "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
