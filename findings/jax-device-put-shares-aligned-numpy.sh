#!/usr/bin/env bash
# jax 0.10.2 on a CPU: `jax.device_put` shares the memory of a NumPy array that begins at a multiple of 64 bytes,
# even with `may_alias=False`.
#
# JAX arrays are immutable and device_put is documented to return a copy, with `may_alias=False` as the
# way to be sure. But where the array's first byte happens to lie at a multiple of 64, the result is the
# same memory, whatever `may_alias` says; 16 bytes further the same line copies. `jnp.asarray`, which one
# would suspect of sharing, copies. So writing into the NumPy array afterwards changes a JAX array, and a
# reader that fills one buffer again and again gives batches that change under way. A float32 matrix in
# a .npy file always lies at such a multiple, as its header is padded: put from a memory map, the JAX
# array is the file, and a later write through the map shows in it. `jnp.array` copies.
#
# Output seen (the JAX array's first number, 0, after 7 was written into the NumPy array):
#   at a multiple of 64: array 0, asarray 0, device_put 7, may_alias=False 7
#   16 bytes further:    array 0, asarray 0, device_put 0, may_alias=False 0
#   a .npy file, mapped: array 0, asarray 0, device_put 7, may_alias=False 7
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

numbers = itertools.count()


def not_aliased(array):
    return jax.device_put(array, may_alias=False)


def in_memory(offset):
    room = np.zeros(4000 + 128, np.uint8)
    first = -room.ctypes.data % 64 + offset
    return room[first : first + 4000].view(np.float32)


def in_a_file():
    file = f"{sys.argv[1]}/{next(numbers)}.npy"
    np.save(file, np.zeros((10, 100), np.float32))
    return np.load(file, mmap_mode="r+").reshape(-1)


ways = {"array": jnp.array, "asarray": jnp.asarray, "device_put": jax.device_put}
ways["may_alias=False"] = not_aliased
sources = {
    "at a multiple of 64:": (lambda: in_memory(0), [0, 0, 7, 7]),
    "16 bytes further:": (lambda: in_memory(16), [0, 0, 0, 0]),
    "a .npy file, mapped:": (in_a_file, [0, 0, 7, 7]),
}
for name, (make, expected) in sources.items():
    found = {}
    for way, put in ways.items():
        given = make()
        placed = put(given).block_until_ready()  # no copy is still to be made
        given[0] = 7
        found[way] = int(placed[0])
        shares = placed.unsafe_buffer_pointer() == given.ctypes.data
        assert shares == (found[way] == 7)
    print(f"{name:<20}", ", ".join(f"{way} {value}" for way, value in found.items()))
    assert list(found.values()) == expected, found
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py" "$directory"
