#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: restoring casts numbers to the template's type without an error, and checks the shape
# only of what was saved from a JAX array.
#
# A template says which tree to restore. Another shape than that of a JAX array is an error. So one would
# guess that another kind of number is one too, or is only ever widened. It is cast without a check: 0.5 comes back as 0 where the template holds the Python number 0 (a default
# that somebody wrote without a point), floats lose their fraction where it has integers, 2^40 + 3 becomes
# 3 in int32, and 70000.0 inf in float16. Another shape is refused where a JAX array was saved; the same
# numbers saved as a NumPy array come back in the stored shape, whatever the template says.
#
# Output seen:
#   strength 0.5 -> 0
#   weights [0.6 1.6 2.6] -> [0 1 2]
#   rows 1099511627779 -> 3
#   norm 70000.0 -> inf
#   five numbers wanted of a JAX array of three: ValueError
#   five numbers wanted of a NumPy array of three: shape (3,)
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)
saved = {
    "strength": 0.5,
    "weights": np.float32([0.6, 1.6, 2.6]),
    "rows": np.array(2**40 + 3),
    "norm": np.float32([70000.0]),
}
template = {
    "strength": 0,
    "weights": jax.ShapeDtypeStruct((3,), np.int32),
    "rows": np.array(0, np.int32),
    "norm": jax.ShapeDtypeStruct((1,), np.float16),
}
checkpointer = ocp.StandardCheckpointer()
checkpointer.save(sys.argv[1], saved)
checkpointer.wait_until_finished()
found = checkpointer.restore(sys.argv[1], template)
for name, value in saved.items():
    one = name == "norm"
    print(name, value[0] if one else value, "->", found[name][0] if one else found[name])
assert found["strength"] == 0 and isinstance(found["strength"], int)
assert found["weights"].tolist() == [0, 1, 2] and int(found["rows"]) == 3
assert np.isinf(np.asarray(found["norm"], np.float32)).all()
for kind, make in (("JAX", jnp.asarray), ("NumPy", np.asarray)):
    checkpointer.save(sys.argv[1] + kind, {"weights": make(saved["weights"])})
    checkpointer.wait_until_finished()
    try:
        wanted = {"weights": jax.ShapeDtypeStruct((5,), np.float32)}
        shape = checkpointer.restore(sys.argv[1] + kind, wanted)["weights"].shape
        result = f"shape {shape}"
    except ValueError:
        shape, result = None, "ValueError"
    print(f"five numbers wanted of a {kind} array of three:", result)
    assert shape == {"JAX": None, "NumPy": (3,)}[kind]
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" -W ignore "$directory/run.py" "$directory/checkpoint" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
