#!/usr/bin/env bash
# ml_dtypes 0.6.0, numpy 2.3.5: np.sort of bfloat16 with a NaN in it is not sorted, and np.unique repeats numbers.
#
# NumPy sorts NaN last in every floating type of its own, and jnp.sort does so in bfloat16; so one would guess the same
# of bfloat16 in NumPy. The types of ml_dtypes compare NaN as neither less nor more than any number, and numbers on
# either side of it are not compared with each other: np.sort and np.argsort return sorted pieces, and np.unique has
# the same number twice. One NaN among activations spoils the order of all the rest, not its own place. Cast to float32
# first, the order is right.
#
# Output seen:
#   sort: float16 [-3.0, 0.5, 1.0, 2.0, nan], bfloat16 [2.0, nan, -3.0, 0.5, 1.0]
#   unique of 2, nan, 1, 2: float16 [1.0, 2.0, nan], bfloat16 [2.0, nan, 1.0, 2.0]
#   bfloat16 by jnp.sort: [-3.0, 0.5, 1.0, 2.0, nan]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet ml_dtypes==0.6.0 numpy==2.3.5 jax==0.10.2 jaxlib==0.10.2
cat > "$directory/run.py" <<'PYTHON'
import jax.numpy as jnp
import ml_dtypes
import numpy as np

nan = float("nan")
given, repeated = [2, nan, 1, 0.5, -3], [2, nan, 1, 2]


def numbers(array):
    return np.asarray(array, np.float64).tolist()


kinds = (np.float16, ml_dtypes.bfloat16)
half, brain = (numbers(np.sort(np.array(given, kind))) for kind in kinds)
print(f"sort: float16 {half}, bfloat16 {brain}")
half_unique, brain_unique = (numbers(np.unique(np.array(repeated, kind))) for kind in kinds)
print(f"unique of 2, nan, 1, 2: float16 {half_unique}, bfloat16 {brain_unique}")
by_jax = numbers(jnp.sort(jnp.array(given, jnp.bfloat16)))
print(f"bfloat16 by jnp.sort: {by_jax}")
sorted_last = repr([-3.0, 0.5, 1.0, 2.0, nan])
assert repr(half) == repr(by_jax) == sorted_last != repr(brain)
assert repr(half_unique) == repr([1.0, 2.0, nan]) and brain_unique.count(2) == 2
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
