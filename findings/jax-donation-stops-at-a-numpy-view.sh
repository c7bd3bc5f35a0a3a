#!/usr/bin/env bash
# jax 0.10.2 on a CPU: an array that NumPy has looked at is not donated, without a warning.
#
# `donate_argnums` promises that the argument's memory is used again and the argument deleted, and warns where no result
# fits it. One would guess that reading the array before, to log or save it, changes nothing. `np.asarray` of
# a JAX array on a CPU is a view of its memory, and as long as that view lives the donated array is copied: it stays
# readable, no warning says so, and a training loop that keeps a view of its state needs the memory twice. A copy
# (`np.array`) or a view that is gone does not matter.
#
# Output seen:
#   not read: donated True, result in the same memory True, warnings 0
#   a view lives: donated False, result in the same memory False, warnings 0
#   the view is gone: donated True, result in the same memory True, warnings 0
#   a copy lives: donated True, result in the same memory True, warnings 0
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet jax==0.10.2 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import warnings

import jax
import jax.numpy as jnp
import numpy as np

update = jax.jit(lambda x: x + 1, donate_argnums=0)
expected = {"not read": True, "a view lives": False, "the view is gone": True, "a copy lives": True}
for name, is_donated in expected.items():
    state, read = jnp.ones(1 << 20), None
    if name.endswith("copy lives"):
        read = np.array(state)
    elif name != "not read":
        read = np.asarray(state)
    if name == "the view is gone":
        read = None
    address = state.unsafe_buffer_pointer()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        result = update(state)
    deleted, same = state.is_deleted(), result.unsafe_buffer_pointer() == address
    print(f"{name}: donated {deleted}, result in the same memory {same}, warnings {len(given)}")
    assert deleted == same == is_donated and not given
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
