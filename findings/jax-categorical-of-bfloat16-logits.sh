#!/usr/bin/env bash
# jax 0.10.2 (0.12.0.1 likewise): `jax.random.categorical` of bfloat16 logits draws almost only from the first classes.
#
# Logits of a model in bfloat16 are exact enough to compare, so one would guess that drawing from them is exact to a
# few per cent, the rounding of the logits. The noise that is added to them is drawn in the dtype of the logits: it has
# 128 different values in bfloat16, so that of 10,000 equal logits about 80 share the highest sum, and argmax takes the
# first of those. A vocabulary is drawn from its first ids; a rare class is drawn half as often as it should be.
# float16 (1,024 values) is wrong in the same way. For the same reason `bernoulli` with a probability in bfloat16 says
# yes to 0.001 eight times too often, and `normal` in bfloat16 never leaves -2.9 to 2.6. Logits as float32 cure it;
# mode="high" does in part.
#
# Output seen:
#   10,000 equal logits, share of draws from the first 1,000: float32 0.10, float16 0.63, bfloat16 1.00
#   the same in bfloat16 by mode="high": 0.14
#   a class of 0.005: float32 0.0049, bfloat16 0.0022
#   bernoulli(0.001): float32 0.0010, bfloat16 0.0077
#   normal of bfloat16, a million: 128 different values, from -2.89 to 2.52
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

key = jax.random.key(0)
single, half, brain = jnp.float32, jnp.float16, jnp.bfloat16


def drawn(logits, count, **how):
    return np.asarray(jax.random.categorical(key, logits, shape=(count,), **how))


first = [np.mean(drawn(jnp.zeros(10_000, dtype), 2_000) < 1_000) for dtype in (single, half, brain)]
shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(("float32", "float16", "bfloat16"), first))
print(f"10,000 equal logits, share of draws from the first 1,000: {shares}")
high = np.mean(drawn(jnp.zeros(10_000, brain), 2_000, mode="high") < 1_000)
print(f'the same in bfloat16 by mode="high": {high:.2f}')

logits = jnp.log(jnp.array([0.9, 0.05, 0.03, 0.015, 0.005]))
rare = [np.mean(drawn(logits.astype(dtype), 100_000) == 4) for dtype in (single, brain)]
print(f"a class of 0.005: float32 {rare[0]:.4f}, bfloat16 {rare[1]:.4f}")

yes = [jax.random.bernoulli(key, dtype(0.001), (1_000_000,)).mean().item() for dtype in (single, brain)]
print(f"bernoulli(0.001): float32 {yes[0]:.4f}, bfloat16 {yes[1]:.4f}")

noise = np.unique(np.asarray(jax.random.normal(key, (1_000_000,), brain)).astype(np.float32))
print(f"normal of bfloat16, a million: {len(noise)} different values, from {noise[0]:.2f} to {noise[-1]:.2f}")

assert abs(first[0] - 0.1) < 0.03 and first[1] > 0.5 and first[2] > 0.99 and high < 0.2
assert abs(rare[0] - 0.005) < 1e-3 and rare[1] < 0.003
assert abs(yes[0] - 0.001) < 1e-4 and yes[1] > 0.007
assert len(noise) == 128 and noise[0] > -3 and noise[-1] < 2.7
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
