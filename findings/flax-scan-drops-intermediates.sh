#!/usr/bin/env bash
# flax 0.12.8: apply(..., capture_intermediates=True) returns nothing of layers that nn.scan runs, and says nothing.
#
# capture_intermediates promises the output of every module's __call__, and unrolled layers, with nn.remat too, keep
# to it. Under nn.scan, a collection that is not named in variable_axes stays outside of the loop: "intermediates" as
# well, so neither what is captured nor what `sow` writes comes out, although "intermediates" is mutable and the rest
# of the model's states are there. Naming it, variable_axes={"params": 0, "intermediates": 0}, gives them, stacked
# along a first axis. A model whose layers are scanned for shorter compilation so loses the states it is studied by.
#
# Output seen:
#   unrolled: layer_0/dense, layer_0/sown, layer_1/dense, layer_1/sown
#   scanned, variable_axes of params: nothing of a layer
#   scanned, and of intermediates: layers/dense (2, 1, 4), layers/sown (2, 1, 4)
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(x.shape[-1], name="dense")(x)
        self.sow("intermediates", "sown", x)
        return x, None


class Model(nn.Module):
    axes: Mapping | None = None  # None unrolls

    @nn.compact
    def __call__(self, x):
        if self.axes is None:
            for i in range(2):
                x, _ = Layer(name=f"layer_{i}")(x)
            return x
        scanned = nn.scan(Layer, variable_axes=self.axes, split_rngs={"params": True}, length=2)
        return scanned(name="layers")(x, None)[0]


def captured(model):
    """Shapes of what is captured inside of the layers."""
    x = jnp.ones((1, 4))
    variables = {"params": model.init(jax.random.key(0), x)["params"]}
    _, state = model.apply(variables, x, capture_intermediates=True)
    found = flatten_dict(state["intermediates"])
    return {
        "/".join(part for part in path if part != "__call__"): values[0].shape
        for path, values in found.items()
        if "dense" in path or "sown" in path
    }


unrolled = captured(Model())
print("unrolled:", ", ".join(sorted(unrolled)))
lost = captured(Model(axes={"params": 0}))
print("scanned, variable_axes of params:", ", ".join(lost) or "nothing of a layer")
kept = captured(Model(axes={"params": 0, "intermediates": 0}))
print("scanned, and of intermediates:", ", ".join(f"{n} {s}" for n, s in sorted(kept.items())))
assert len(unrolled) == 4 and not lost
assert kept == {"layers/dense": (2, 1, 4), "layers/sown": (2, 1, 4)}
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
