#!/usr/bin/env bash
# jax 0.10.2 on a CPU: `jax.checkpoint` around each of several unrolled layers makes a gradient need more memory.
#
# It trades time for memory: activations within a layer are computed again for the gradient instead of
# being kept. One would guess that memory falls on every backend, and try on a CPU what will fit on an
# accelerator. On a CPU the layers are indeed computed twice, but nothing makes the second time wait for
# the gradient that needs it: the barriers that JAX puts there are gone from the compiled program, so
# the scheduler may run ahead, and memory says that it does. Inside `jax.lax.scan`, where a step of the loop cannot be run ahead, it saves what it should.
#
# Output seen (12 layers of three products [65536, 64] x [64, 64]; MiB of temporaries, tanh in the program):
#   unrolled: 593, tanh 36; with checkpoint 769, tanh 72, barriers 0
#   scan: 1425, tanh 3; with checkpoint 272, tanh 6, barriers 0
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp

LAYERS = 12
kernels = jax.ShapeDtypeStruct((LAYERS, 3, 64, 64), jnp.float32)
rows = jax.ShapeDtypeStruct((65536, 64), jnp.float32)


def layer(x, kernel):
    for part in kernel:
        x = jnp.tanh(x @ part)
    return x


def loss(kernels, x, each, in_scan):
    if in_scan:
        x = jax.lax.scan(lambda x, kernel: (each(x, kernel), None), x, kernels)[0]
    else:
        for i in range(LAYERS):
            x = each(x, kernels[i])
    return (x**2).sum()


found = {}
for in_scan in (False, True):
    for each in (layer, jax.checkpoint(layer)):
        gradient = jax.jit(jax.grad(loss), static_argnums=(2, 3))
        lowered = gradient.lower(kernels, rows, each, in_scan)
        assert ("optimization_barrier" in lowered.as_text()) == (each is not layer)
        compiled = lowered.compile()
        text = compiled.as_text()
        size = compiled.memory_analysis().temp_size_in_bytes / 2**20
        found[in_scan, each is not layer] = size, text.count(" tanh("), text.count("opt-barrier")
for in_scan in (False, True):
    (plain, few, _), (again, more, barriers) = found[in_scan, False], found[in_scan, True]
    name = "scan" if in_scan else "unrolled"
    print(f"{name}: {plain:.0f}, tanh {few}; with checkpoint {again:.0f}, tanh {more}, barriers {barriers}")
    assert more == 2 * few and barriers == 0
assert found[False, True][0] > 1.1 * found[False, False][0]
assert found[True, True][0] < 0.3 * found[True, False][0]
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
