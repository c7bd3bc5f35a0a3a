#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1: the sizes of `memory_analysis()` count an array twice that a loop carries, and an
# array in the chip's fast memory not at all.
#
# Compiled for a described v5e, as libtpu does on any machine. One would guess that arguments, temporaries and output
# add up to what a program holds, since the compiler itself refuses what does not fit. But a loop over one
# array of 4.5 GiB adds up to 18 GiB, more than the chip's 15.75, and compiles: three such arrays exist at once, not
# four. And for an array of 32 MiB, all that the loop works on lies in fast memory and counts nothing, until
# that memory is switched off. So more rows may seem to need far more memory, where an array has left the fast one.
# `peak_memory_in_bytes` counts the first program right, but in the second the fast memory too.
#
# Output seen (MiB):
#   array 4608: argument 4608, temporaries 13824, output 0; peak 13824
#   array 32: argument 32, temporaries 0, output 0; peak 128
#   array 32 without fast memory: argument 32, temporaries 96, output 0; peak 96
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet 'jax[tpu]==0.10.2' libtpu==0.0.42.1 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CHIP = 15.75 * 1024  # MiB
topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
there = SingleDeviceSharding(topology.devices[0])


def loop(x, n):
    return jax.lax.fori_loop(0, n, lambda i, y: jnp.sin(y) * y[:, ::-1], x * 2).sum()


def counted(size, said="", options=None):
    given = jax.ShapeDtypeStruct((size * 2**20 // (4096 * 4), 4096), jnp.float32, sharding=there)
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=there)
    memory = jax.jit(loop).lower(given, steps).compile(options).memory_analysis()
    argument, temporaries, output, peak = (
        getattr(memory, f"{kind}_in_bytes") / 2**20
        for kind in ("argument_size", "temp_size", "output_size", "peak_memory")
    )
    print(
        f"array {size}{said}: argument {argument:.0f}, temporaries {temporaries:.0f}, "
        f"output {output:.0f}; peak {peak:.0f}"
    )
    return argument + temporaries + output, temporaries, peak


together, _, peak = counted(4608)
assert peak < CHIP < together and round(together) == 4 * 4608 and round(peak) == 3 * 4608
_, temporaries, peak = counted(32)
assert temporaries < 1 and peak > 100
_, temporaries, peak = counted(32, " without fast memory", {"xla_msa_enable": "DISABLED"})
assert round(temporaries) == 96 and round(peak) == 96
PYTHON
export TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost JAX_PLATFORMS=cpu
"$directory/venv/bin/python" "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
