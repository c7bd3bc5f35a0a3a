#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1: `lax.top_k` of a vector is compiled for a TPU as a sort of the whole vector; of the
# same numbers as one row of a matrix it is a kernel.
#
# Compiled for a described v5e, as libtpu does on any machine. One would guess that [n] and [1, n] give the same
# program, as the numbers lie in memory in the same way. The vector takes over 10 times as much code;
# `top_k(x[None], k)` and two indices afterwards avoid it.
#
# Output seen (seconds differ between machines):
#   (100000,): 2.78 MB of code, compiled in 7.6 CPU seconds
#   (1, 100000): 0.09 MB of code, compiled in 0.2 CPU seconds
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet 'jax[tpu]==0.10.2' libtpu==0.0.42.1 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
there = SingleDeviceSharding(topology.devices[0])
jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=there)).compile()
sizes = {}
for shape in ((100_000,), (1, 100_000)):
    given = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=there)
    start = time.process_time()
    compiled = jax.jit(lambda x: jax.lax.top_k(x, 8)).lower(given).compile()
    seconds = time.process_time() - start
    sizes[shape] = compiled.memory_analysis().generated_code_size_in_bytes
    print(f"{shape}: {sizes[shape] / 1e6:.2f} MB of code, compiled in {seconds:.1f} CPU seconds")
assert sizes[100_000,] > 10 * sizes[1, 100_000]
PYTHON
export TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu
"$directory/venv/bin/python" "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
