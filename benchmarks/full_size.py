"""Memory and collectives of the 7B models in bfloat16, compiled for eight devices.

    python -m benchmarks.full_size                            # all four, some minutes
    python -m benchmarks.full_size --models llava-1.5-7b

For each model, from the real configuration and without a weight allocated, the prefill of two
prompts with a photograph each and one decode step are compiled for a mesh (data 1, model 8) of CPU
devices. Of what each device holds and does:

    parameters   bytes; "share" is that over an eighth of the model (1 where all is divided)
    arguments, output, temporaries   bytes, as the compiler counts them; a decode step's cache is an
                 argument whose memory the output takes over
    collectives  how many of each kind there are in the program, and bytes of what they put out

XLA's CPU backend computes bfloat16 in float32 and converts weights and states on the way: the
temporaries, and the bytes of collectives that it widens, are an upper bound of an accelerator's.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from ports import checkpoint
from ports.models import idefics2, llava
from ports.models.molmo import model as molmo
from ports.models.qwen2_vl import model as qwen2_vl
from ports.nn import vision_language
from ports.parallel import sharding

CHECKPOINTS = Path(__file__).parents[1] / "tests" / "data" / "checkpoints"
BATCH, NEW_TOKENS = 2, 20
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Case(NamedTuple):
    """A model and the shapes of its inputs, without the batch axis."""

    port: Any
    kind: type[vision_language.VisionLanguageModel]
    tokens: int
    images: dict[str, tuple[int, ...]]


# Photographs of 640 x 480 pixels; LLaVA resizes them.
CASES = {
    "llava-1.5-7b": Case(llava, llava.Llava, 600, {"pixel_values": (3, 336, 336)}),
    # In five crops each, on a canvas of 50 x 35 patches.
    "idefics2-8b": Case(
        idefics2,
        idefics2.Idefics2,
        350,
        {"pixel_values": (5, 3, 490, 700), "pixel_attention_mask": (5, 490, 700)},
    ),
    "qwen2-vl-7b": Case(
        qwen2_vl,
        qwen2_vl.Qwen2VL,
        416,
        {"pixel_values": (1792, 1176), "image_grid_thw": (3,)},
    ),
    # 2 x 3 crops and the whole.
    "molmo-7b-d": Case(
        molmo,
        molmo.Molmo,
        760,
        {"images": (7, 576, 588), "image_masks": (7, 576), "image_input_idx": (7, 144)},
    ),
}
DEVICES = 8
WHOLE = ("input_ids", "attention_mask", "image_grid_thw", "image_input_idx")


def module_of(name: str) -> vision_language.VisionLanguageModel:
    """Returns the Linen module of a real configuration, in bfloat16."""
    case = CASES[name]
    values = json.loads((CHECKPOINTS / f"{name}.json").read_text())["config"]
    if case.port is molmo:
        config = molmo.read_config(values)
    else:
        config = transformers.AutoConfig.for_model(**values)
    return case.kind(case.port.Config.from_hf(config), dtype=jnp.dtype(jnp.bfloat16))


def abstract_params(name: str, module: Any, mesh: jax.sharding.Mesh) -> dict:
    """Returns shapes and shardings of the parameters."""
    example = CASES[name].port.example_inputs(module.config)
    params = checkpoint.abstract_params(module, example)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=where),
        params,
        sharding.param_shardings(mesh, params, module.axes, module.kv_heads),
    )


def abstract_inputs(name: str, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a batch."""
    case = CASES[name]
    shapes = {"input_ids": (case.tokens,), "attention_mask": (case.tokens,), **case.images}
    return {
        key: jax.ShapeDtypeStruct(
            (BATCH, *shape),
            np.int32 if key in WHOLE else np.float32,
            sharding=sharding.batch_sharding(mesh, (BATCH, *shape)),
        )
        for key, shape in shapes.items()
    }


def prefill(module: Any, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """Returns (params, inputs) -> logits of the last position and the filled cache."""

    def run(params: dict, inputs: dict) -> tuple[Any, Any]:
        with sharding.on(mesh):
            slots = inputs["input_ids"].shape[1] + NEW_TOKENS
            variables = {"params": params, "cache": module.init_cache(BATCH, slots)}
            logits, new = module.apply(variables, inputs, method="prefill", mutable=["cache"])
            return logits, new["cache"]

    return run


def decode(module: Any, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """Returns (params, cache, tokens, positions, valid, slot) -> logits and the extended cache."""

    def run(params: dict, cache: dict, *step: Any) -> tuple[Any, Any]:
        with sharding.on(mesh):
            variables = {"params": params, "cache": cache}
            logits, new = module.apply(variables, *step, method="decode_step", mutable=["cache"])
            return logits, new["cache"]

    return run


def step_inputs(tokens: int, mesh: jax.sharding.Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns shapes of the other arguments of a decode step."""
    everywhere = sharding.replicated(mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    row = array((BATCH,), np.int32)
    return row, row, array((BATCH, tokens + NEW_TOKENS), bool), array((), np.int32)


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Returns {kind: {count, bytes}} of the collectives in a compiled program's text, with the
    bytes of their results on one device.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    kinds = "|".join(KINDS)
    for line in re.finditer(rf"= (.+?) ({kinds})(?:-start)?\(", program):
        found[line[2]]["count"] += 1
        found[line[2]]["bytes"] += sum(
            _bytes(dtype, shape) for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", line[1])
        )
    return dict(found)


def _bytes(dtype: str, shape: str) -> int:
    bits = int(re.sub(r"\D", "", dtype) or 8)  # "pred" has no number
    return bits // 8 * int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))


def compiled(
    function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()
) -> tuple[jax.stages.Compiled, float]:
    """Compiles a program for arguments of these shapes; returns it and the seconds it took."""
    start = time.perf_counter()
    program = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    return program, time.perf_counter() - start


def figures(name: str, stage: str, program: Any, seconds: float, params: dict) -> dict[str, Any]:
    """Returns a row of the results."""
    memory = program.memory_analysis()
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    held = sharding.parameter_bytes(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    return {
        "model": name,
        "stage": stage,
        "parameters": held,
        "share": held * DEVICES / total,
        "arguments": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": collectives(program.as_text()),
        "compile s": seconds,
    }


def run(name: str, module: Any, mesh: jax.sharding.Mesh) -> list[dict[str, Any]]:
    """Returns the rows of one model: prefill and decode."""
    params = abstract_params(name, module, mesh)
    inputs = abstract_inputs(name, mesh)
    function = prefill(module, mesh)
    program, seconds = compiled(function, params, inputs)
    rows = [figures(name, "prefill", program, seconds, params)]
    shapes = jax.eval_shape(function, params, inputs)[1]
    # A decode step takes the cache as the prefill leaves it.
    cache = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        program.output_shardings[1],
    )
    step = step_inputs(CASES[name].tokens, mesh)
    program, seconds = compiled(decode(module, mesh), params, cache, *step, donate=(1,))
    return [*rows, figures(name, "decode", program, seconds, params)]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the results."""
    table = Table(
        "model", "stage", "parameters", "share", "temporaries", "output", "collectives", "compile"
    )
    for row in rows:
        kinds = (
            f"{kind} {each['count']} ({each['bytes'] / 1e6:,.1f} MB)"
            for kind, each in sorted(row["collectives"].items())
        )
        table.add_row(
            row["model"],
            row["stage"],
            f"{row['parameters'] / 1e9:.3f} GB",
            f"{row['share']:.3f}",
            f"{row['temporaries'] / 1e9:.3f} GB",
            f"{row['output'] / 1e6:,.1f} MB",
            "\n".join(kinds) or "none",
            f"{row['compile s']:.0f} s",
        )
    console.print(table)


def main() -> None:
    """Compiles, prints and saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    output = Path(__file__).parent / "results" / "full_size.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    mesh, rows, console = sharding.make_mesh(1, DEVICES), [], Console(width=120, markup=False)
    for name in arguments.models:
        rows += run(name, module_of(name), mesh)
        show(rows[-2:], console)
        measure.save(arguments.output, rows, "flax")
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
