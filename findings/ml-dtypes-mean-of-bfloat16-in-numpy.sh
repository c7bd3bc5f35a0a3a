#!/usr/bin/env bash
# ml_dtypes 0.6.0, numpy 2.3.5: NumPy's mean of 1,000 ones in bfloat16 is 0.256, and their variance 0.256 too.
#
# np.asarray of a JAX array in bfloat16, and a file that is read as bfloat16, are NumPy arrays of the type that
# ml_dtypes adds. NumPy takes means of float16 in float32, and jnp.mean of the same array is right, so that one would
# guess a lost digit at most. For an added type it has one running sum in that type, which stops where the next number
# is less than half of its last digit. Means, variances and deviations over rows of hidden states are then far off, the
# more rows the farther, without a warning. dtype=np.float32 in the call gives the right ones; np.linalg.norm and
# matrix products are right without it, which hides the rest. (numpy 2.5.5 likewise.)
#
# Output seen:
#   1,000 ones: mean float16 1.000, bfloat16 0.256; variance float16 0.000, bfloat16 0.256
#   1,000 ones in bfloat16: mean with dtype=float32 1.000; norm squared 1000, product with itself 1000
#   mean of a column around 3, by rows: 100 3.09, 1000 1.79, 10000 0.21, 100000 0.02
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet ml_dtypes==0.6.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import ml_dtypes
import numpy as np

brain = ml_dtypes.bfloat16
half, ones = np.ones((1000, 1), np.float16), np.ones((1000, 1), brain)
means = [float(array.mean()) for array in (half, ones)]
variances = [float(array.var()) for array in (half, ones)]
print(f"1,000 ones: mean float16 {means[0]:.3f}, bfloat16 {means[1]:.3f}; ", end="")
print(f"variance float16 {variances[0]:.3f}, bfloat16 {variances[1]:.3f}")
wide, norm, product = ones.mean(dtype=np.float32), np.linalg.norm(ones), (ones.T @ ones).item()
print(f"1,000 ones in bfloat16: mean with dtype=float32 {wide:.3f}; ", end="")
print(f"norm squared {norm**2:.0f}, product with itself {product:.0f}")

drawn = np.random.default_rng(0).normal(3, 1, 100_000).astype(brain)
by_rows = {count: float(drawn[:count].mean()) for count in (100, 1000, 10_000, 100_000)}
print("mean of a column around 3, by rows:", ", ".join(f"{count} {mean:.2f}" for count, mean in by_rows.items()))
assert means == [1, 0.255859375] and variances[0] == 0 and variances[1] > 0.25
assert (wide, round(norm**2), product) == (1, 1000, 1000)
assert by_rows[100] > 2.8 and by_rows[1000] < 2.5 and by_rows[100_000] < 0.1
PYTHON
"$directory/venv/bin/python" "$directory/run.py"
