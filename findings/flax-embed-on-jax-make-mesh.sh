#!/usr/bin/env bash
# flax 0.12.12 on jax 0.12.0.1: on a mesh as jax.make_mesh makes it, nn.Embed and nn.attention raise
# ShardingTypeError.
#
# For years a mesh was only a place: arrays were put on it, and the compiler found shardings for everything between.
# jax.make_mesh now makes axes of type Explicit, on which shardings belong to types and an operation whose result's
# sharding is not unique refuses it; jax.sharding.Mesh(devices, names) still makes Auto axes. Linen asks for no output
# sharding, so a model that ran on Mesh stops at its first lookup on make_mesh with the same arrays, though nn.Dense
# and nn.LayerNorm go on working. jax 0.10.2 with flax 0.12.8 behaves likewise. axis_types=(AxisType.Auto,) * 2 gives
# the former meaning back.
#
# Output seen:
#   jax.make_mesh, axes Explicit: Dense ok, LayerNorm ok, Embed ShardingTypeError, attention ShardingTypeError
#   jax.make_mesh(axis_types=Auto): Dense ok, LayerNorm ok, Embed ok, attention ok
#   jax.sharding.Mesh, axes Auto: Dense ok, LayerNorm ok, Embed ok, attention ok
set -euo pipefail
python=python3
for candidate in python3.13 python3.12 "$HOME"/.pyenv/versions/3.1[23].*/bin/python3; do
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$candidate; fi
done
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
"$python" -m venv "$directory/venv" # JAX 0.12 needs Python 3.12
"$directory/venv/bin/pip" install --quiet flax==0.12.12 jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
cat > "$directory/run.py" <<'PYTHON'
import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

x = np.ones((8, 4, 16), np.float32)
tokens = np.ones((8, 4), np.int32)
LAYERS = {
    "Dense": (nn.Dense(8), x),
    "LayerNorm": (nn.LayerNorm(), x),
    "Embed": (nn.Embed(32, 16), tokens),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=4), x),
}


def outcomes(mesh):
    """What each layer does, its matrices split over "model" and its batch over "data"."""
    found = {}
    for name, (layer, given) in LAYERS.items():
        # No sum of nn.Dense runs over its split axis.
        axes = (None, "model") if name == "Dense" else ("model",)
        placed = jax.tree.map(
            lambda w: jax.device_put(
                np.asarray(w), NamedSharding(mesh, PartitionSpec(*axes) if w.ndim > 1 else PartitionSpec())
            ),
            layer.init(jax.random.key(0), given),
        )
        batch = jax.device_put(given, NamedSharding(mesh, PartitionSpec("data")))
        try:
            jax.jit(layer.apply)(placed, batch)
            found[name] = "ok"
        except Exception as error:
            found[name] = type(error).__name__
    return found


def tell(said, mesh):
    found = outcomes(mesh)
    print(f"{said}: {', '.join(f'{name} {what}' for name, what in found.items())}")
    return found


names, shape = ("data", "model"), (4, 2)
explicit = tell("jax.make_mesh, axes Explicit", jax.make_mesh(shape, names))
auto = tell("jax.make_mesh(axis_types=Auto)", jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2))
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), names)
old = tell("jax.sharding.Mesh, axes Auto", mesh)
assert explicit["Embed"] == explicit["attention"] == "ShardingTypeError"
assert explicit["Dense"] == explicit["LayerNorm"] == "ok"
assert set(auto.values()) == set(old.values()) == {"ok"}
PYTHON
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$directory/venv/bin/python" "$directory/run.py"
