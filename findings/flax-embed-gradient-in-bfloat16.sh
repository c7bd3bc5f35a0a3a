#!/usr/bin/env bash
# flax 0.12.8, jax 0.10.2 on a CPU (0.12.12, 0.12.0.1 likewise): with dtype=bfloat16, the gradient of nn.Embed counts a
# token 256 times at most, though its table is float32.
#
# The recipe for mixed precision is float32 parameters and dtype=bfloat16, and one would guess that the gradient of a
# parameter is added up in more than bfloat16, as those of nn.Dense are. But the whole table is cast before rows are
# taken from it, so that the rows of the gradient are added one by one to a table in bfloat16, where 256 + 1 is 256, and
# only the finished table becomes float32. A token that fills 10,000 places of a batch (a space, an image's placeholder)
# moves with a 40th of its gradient, and small parts that follow a large one are lost; in an array of float32 nothing
# looks wrong. A product with one-hot rows gives all of it, and so does casting the rows that were taken instead of the
# table. (Compiled for a TPU v5e, this gradient is added up in bfloat16 too; it was not run there.)
#
# Output seen (each place asks for 1):
#   100 places: nn.Embed 100, one-hot rows 100, rows cast after the look-up 100; nn.Dense: kernel 100, bias 100
#   1000 places: nn.Embed 256, one-hot rows 1000, rows cast after the look-up 1000; nn.Dense: kernel 1000, bias 1000
#   10000 places: nn.Embed 256, one-hot rows 9984, rows cast after the look-up 10000; nn.Dense: kernel 9984, bias 9984
#   dtype of the gradient of nn.Embed: float32
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.6.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import linen as nn

VOCABULARY, WIDTH = 8, 4
brain = jnp.bfloat16


def gradient(layer, given, read):
    """The gradient of the layer's parameters where every number that comes out asks for 1."""
    variables = layer.init(jax.random.key(0), given)

    def total(variables, given, asked):
        return (read(layer, variables, given).astype(jnp.float32) * asked).sum()

    asked = jnp.ones((len(given), WIDTH))
    return jax.jit(jax.grad(total))(variables, given, asked)["params"]


def applied(layer, variables, given):
    return layer.apply(variables, given)


def one_hot(layer, variables, tokens):
    table = variables["params"]["embedding"]
    return jax.nn.one_hot(tokens, VOCABULARY, dtype=brain) @ table.astype(brain)


def cast_after(layer, variables, tokens):
    return variables["params"]["embedding"][tokens].astype(brain)


found = {}
for count in (100, 1000, 10_000):
    tokens, rows = jnp.full(count, 3), jnp.ones((count, WIDTH), brain)
    embed, dense = nn.Embed(VOCABULARY, WIDTH, dtype=brain), nn.Dense(WIDTH, dtype=brain)
    tables = [gradient(embed, tokens, read)["embedding"] for read in (applied, one_hot, cast_after)]
    other = gradient(dense, rows, applied)
    assert all(table.dtype == jnp.float32 for table in tables)
    found[count] = [int(table[3, 0]) for table in tables] + [int(other["kernel"][0, 0]), int(other["bias"][0])]
    plain, hot, after, kernel, bias = found[count]
    print(f"{count} places: nn.Embed {plain}, one-hot rows {hot}, rows cast after the look-up {after}; ", end="")
    print(f"nn.Dense: kernel {kernel}, bias {bias}")
print("dtype of the gradient of nn.Embed:", tables[0].dtype)
assert found[100] == [100] * 5
assert found[1000] == [256] + [1000] * 4
assert found[10_000][0] == 256 and all(value > 9_900 for value in found[10_000][1:])
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
