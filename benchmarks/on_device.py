"""The accelerator of this machine: is it right, and how near does it come to its limits?

    benchmarks/on_device.sh                          # everything, under four minutes
    python -m benchmarks.on_device --parts values    # only the comparison with the CPU
    python -m benchmarks.on_device --tiny            # small sizes, to try the script on a CPU

First part, values: the same calls run here and, at the same time, in a process of their own on the
CPU: the embedded model's logits, states, steered answers and gradients, one small random model per
port, and the solvers. "difference" is the largest difference over the largest value, in float32
with products at precision "highest"; integers must be equal. A difference beyond its bound ends the
run with status 1, after everything is measured.

Other parts, rates: the card's own limits are measured first (a large product per dtype, a copy),
then each program beside the limit that it cannot beat:

    solvers      seconds per update on all of Z, against reading Z once or multiplying it, whichever
                 takes longer; and a whole `decompose`, its first call and later ones
    generation   one layer stack of LLaVA-1.5-7B's width in bfloat16: prefill against its products,
                 a decode step against reading the weights once

The JSON is named with the card and holds versions and times of compilation. A part that would begin
after `--budget` seconds is left out; BEYOND seconds later the run ends whatever it is doing, with
status 3 and what was measured until then. Without an accelerator it ends at once with status 2.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import ports
import xlvlm_jax
from benchmarks import measure
from benchmarks.solvers import matrices
from ports.nn.vision_language import EXAMPLE_TEXT
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.demo import embedded

BOUNDS = {"logits": 1e-4, "states": 1e-5, "gradient": 1e-4, "objective": 1e-5, "components": 1e-4}
SITE = "language_model.model.layers.3"
PARTS = ("values", "limits", "solvers", "generation")
BEYOND = 50  # seconds after the budget that a part may go on for
METHODS = ("snmf", "kmeans", "pca", "simple")
_LANGUAGE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_TOWER = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
# Full-size model: what its configuration is cut to.
SMALLER: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {"text_config": _LANGUAGE, "vision_config": _TOWER | {"image_size": 112}},
    "idefics2-8b": {
        "text_config": _LANGUAGE,
        "vision_config": _TOWER | {"image_size": 112},
        "perceiver_config": {"hidden_size": 128, "resampler_n_heads": 4, "resampler_head_dim": 32},
    },
    "qwen2-vl-7b": _LANGUAGE
    | {
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {"depth": 2, "embed_dim": 96, "num_heads": 4, "hidden_size": 128},
    },
    "molmo-7b-d": _LANGUAGE
    | {
        "vision_config": _TOWER
        | {"image_size": [112, 112], "num_positions": 65, "head_dim": 24, "vit_layers": [-2, -3]}
    },
}


class Sizes(NamedTuple):
    """How large the measured problems are."""

    product: int  # rows of the square matrices multiplied for the limits
    copy: int  # bytes copied
    rows: int  # N
    width: int  # D
    layers: int  # decoder layers of LLaVA-1.5-7B's width
    batch: int
    repeats: int


FULL = Sizes(8192, 2 << 30, 100_000, 4096, 8, 8, 5)
TINY = Sizes(512, 8 << 20, 2000, 256, 1, 1, 2)


# Values


def values() -> dict[str, np.ndarray]:
    """Computes everything that is compared between this machine's accelerator and its CPU."""
    with jax.default_matmul_precision("highest"):
        found = dict(_of_embedded())
        found |= dict(_of_ports())
        found |= dict(_of_solvers())
    return {name: np.asarray(value) for name, value in found.items()}


def _of_embedded() -> Iterator[tuple[str, Any]]:
    """Logits, states, plain and steered tokens and a gradient of the embedded model."""
    vlm = ports.load(embedded.LLAVA)
    images = [scenes.training_image(scenes.sample_scene("test", i)) for i in range(4)]
    texts = [vlm.render(prompts.CAPTION), vlm.render("Is there a dog?")] * 2  # padded on the left
    inputs = vlm.process(texts, images)
    output = vlm.forward(inputs, sites=("vision_tower.*", SITE))
    yield "embedded logits", output.logits
    for site, states in output.states.items():
        yield f"embedded states {site}", states
    vector = np.random.default_rng(0).standard_normal(output.states[SITE].shape[-1])
    vector = 0.5 * vector.astype(np.float32)
    yield "embedded tokens", vlm.generate(inputs, max_new_tokens=16).tokens
    edits = {SITE: ports.add(vector)}
    yield "embedded tokens steered", vlm.generate(inputs, max_new_tokens=16, edits=edits).tokens
    arrays = {name: jnp.asarray(value) for name, value in vlm.prepare(inputs).items()}

    # Parameters that a program closes over are constants, which XLA computes with as it compiles.
    def loss(vector: jax.Array, params: Any, arrays: Any) -> jax.Array:
        logits = ports.steer(vlm.apply, {SITE: ports.add(vector)})(params, arrays)
        return -jax.nn.log_softmax(logits[:, -1])[:, 7].mean()

    yield "embedded gradient", jax.jit(jax.grad(loss))(jnp.asarray(vector), vlm.params, arrays)


def _of_ports() -> Iterator[tuple[str, Any]]:
    """Logits and two layers' states of one small random model per port, with edits at a layer."""
    for name, smaller in SMALLER.items():
        with tempfile.TemporaryDirectory() as scratch:
            values = _merged(_published(name), smaller)
            Path(scratch, "config.json").write_text(json.dumps(values))
            vlm = ports.load_abstract(scratch)
        vlm.params = _random(vlm.params)
        site = f"{vlm.decoder}.{vlm.module.cache_path[0].format(0).replace('_', '.')}"
        width = vlm.site_shapes[site][-1]
        edits = {site: ports.add(np.ones(width, np.float32), 0.1, where="image")}
        output = vlm.forward(_example_arrays(vlm), sites=site, edits=edits)
        yield f"{name} logits", output.logits
        yield f"{name} states {site}", output.states[site]


def _of_solvers() -> Iterator[tuple[str, Any]]:
    """Objective and components of each method on planted rows."""
    Z = matrices.planted(2000, 96, 8)
    for method in METHODS:
        concepts = xlvlm_jax.decompose(Z, 8, method, key=jax.random.key(0))
        yield f"{method} objective", np.float64(concepts.objective)
        components = np.asarray(concepts.components)
        if method == "pca":  # the sign of a component is free
            components = components * np.sign(components.sum(1, keepdims=True))
        yield f"{method} components", components


def _published(name: str) -> dict[str, Any]:
    """Reads the values of a full-size model's config.json."""
    directory = Path(__file__).parents[1] / "tests" / "data" / "checkpoints"
    return json.loads((directory / f"{name}.json").read_text())["config"]


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the changes, at any depth."""
    both = {
        key: _merged(values[key], change) if isinstance(change, dict) else change
        for key, change in changes.items()
    }
    return values | both


def _random(shapes: Any, dtype: Any = np.float32) -> Any:
    """Makes parameters of these shapes: small kernels, and norms near one."""
    random = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        drawn = random.standard_normal(leaf.shape, np.float32)
        vector = len(leaf.shape) < 2
        return jnp.asarray(1 + 0.1 * drawn if vector else drawn * leaf.shape[0] ** -0.5, dtype)

    return jax.tree.map(fill, shapes)


def _example_arrays(vlm: ports.VLM) -> dict[str, np.ndarray]:
    """Returns one prompt with one random image, in the shapes of the port's example inputs."""
    random = np.random.default_rng(1)
    arrays = {
        name: random.standard_normal(shape.shape).astype(shape.dtype)
        for name, shape in vlm.example_inputs().items()
    }
    ids = random.integers(10, 1000, arrays["input_ids"].shape)
    if "image_input_idx" in arrays:  # Molmo says where the features go; two places between crops
        _, crops, features = arrays["image_input_idx"].shape
        index = np.arange(features) + 2 + (features + 2) * np.arange(crops)[:, None]
        arrays["image_input_idx"] = index[None].astype(np.int32)
        arrays["image_masks"] = np.ones_like(arrays["image_masks"])
        ids[:, index.reshape(-1)] = vlm.image_tokens[0]
    else:
        ids[:, 4 : ids.shape[1] - (EXAMPLE_TEXT - 4)] = vlm.image_tokens[0]
    arrays |= {"input_ids": ids.astype(np.int32), "attention_mask": np.ones_like(ids, np.int32)}
    if "image_grid_thw" in arrays:
        side = int(arrays["pixel_values"].shape[1] ** 0.5)
        arrays["image_grid_thw"] = np.array([[1, side, side]])
        arrays["pixel_values"] = arrays["pixel_values"][0]
    if "pixel_attention_mask" in arrays:
        arrays["pixel_attention_mask"] = np.ones_like(arrays["pixel_attention_mask"])
    return arrays


# Comparison with the CPU


def start_reference(output: Path) -> subprocess.Popen:
    """Starts a process that computes the values on the CPU and writes them to `output`."""
    command = [sys.executable, "-m", "benchmarks.on_device", "--reference", str(output)]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def compared(ours: dict[str, np.ndarray], cpu: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns one row per value: its difference, its bound, whether it holds."""
    rows = []
    for name, expected in cpu.items():
        found = ours[name]
        if np.issubdtype(expected.dtype, np.integer):
            difference, bound = float(np.mean(found != expected)), 0.0
        else:
            largest = max(float(np.abs(expected).max()), np.finfo(np.float32).tiny)
            difference = float(np.abs(found.astype(np.float64) - expected).max()) / largest
            bound = next(bound for kind, bound in BOUNDS.items() if kind in name)
        # NaN is not within any bound.
        rows.append(
            {"value": name, "difference": difference, "bound": bound, "ok": difference <= bound}
        )
    return rows


# Rates


class Limits(NamedTuple):
    """What this card does at best, as measured here."""

    bfloat16: float  # multiplications and additions per second of a large product
    float32: float  # the same at precision "highest"
    bytes: float  # bytes read and written per second by a copy


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Returns the median seconds of a compiled call."""
    jax.block_until_ready(call())
    return float(np.median([measure.seconds(call)[0] for _ in range(repeats)]))


def measure_limits(sizes: Sizes) -> Limits:
    """Measures one large product per dtype, and one copy."""

    def product(dtype: Any, precision: str | None) -> float:
        square = jax.random.normal(jax.random.key(0), (sizes.product, sizes.product), dtype)
        # Several in one program, each of which needs the one before: dispatch does not count.
        chain = jax.jit(
            lambda x: jax.lax.fori_loop(
                0, 4, lambda _, y: jnp.matmul(y, x, precision=precision) / sizes.product, x
            )
        )
        return 4 * 2 * sizes.product**3 / fastest(lambda: chain(square), sizes.repeats)

    array = jnp.ones(sizes.copy // 4)
    copy = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: y + 1, x))
    moved = 8 * 2 * sizes.copy
    return Limits(
        product(jnp.bfloat16, None),
        product(jnp.float32, "highest"),
        moved / fastest(lambda: copy(array), sizes.repeats),
    )


def solver_rates(sizes: Sizes, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields an update's seconds and its share of the limit, and those of a whole `decompose`."""
    from benchmarks.solvers import pace

    Z = jax.block_until_ready(jnp.asarray(matrices.planted(sizes.rows, sizes.width, 20)))
    for method, K in (("kmeans", 20), ("snmf", 20), ("pca", 20), ("kmeans", 1024)):
        found = pace.pace(method, Z, K, sizes.repeats)
        *_, passes, columns = pace.updating(method, Z, K)
        limit = max(passes * Z.nbytes / limits.bytes, 2 * Z.size * columns / limits.float32)
        seconds = found["update_seconds"]
        yield {
            "program": f"{method} update, K {K}",
            "shape": list(Z.shape),
            "seconds": seconds,
            "limit": limit,
            "share": limit / seconds,
            "beyond_Z": found["beyond_Z"],
        }
    for method in ("kmeans", "snmf", "pca"):
        start = time.perf_counter()

        def whole(method: str = method) -> Any:
            return xlvlm_jax.decompose(Z, 20, method, key=jax.random.key(0)).components

        jax.block_until_ready(whole())
        first = time.perf_counter() - start
        seconds = fastest(whole, 3)
        yield {"program": f"decompose {method}", "seconds": seconds, "first": first}


def generation_rates(sizes: Sizes, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yields prefill and decode steps of a cut LLaVA-1.5-7B with random bfloat16 weights."""
    changes = {"text_config": {"num_hidden_layers": sizes.layers}}
    changes["vision_config"] = {"num_hidden_layers": sizes.layers + 1}
    if sizes == TINY:
        changes = _merged(SMALLER["llava-1.5-7b"], changes)
    with tempfile.TemporaryDirectory() as scratch:
        values = _merged(_published("llava-1.5-7b"), changes)
        Path(scratch, "config.json").write_text(json.dumps(values))
        vlm = ports.load_abstract(scratch, dtype="bfloat16")
    key, leaves = jax.random.key(0), jax.tree.leaves(vlm.params)
    draw = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
    )
    drawn = [draw(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)]
    vlm.params = jax.tree.unflatten(jax.tree.structure(vlm.params), drawn)
    vlm.eos_tokens = ()
    one = _example_arrays(vlm)
    inputs = {name: np.concatenate([value] * sizes.batch) for name, value in one.items()}
    weights = sum(leaf.nbytes for leaf in drawn)
    table = vlm.params["language_model"]["model"]["embed_tokens"]["embedding"].nbytes
    decoder = sum(leaf.nbytes for leaf in jax.tree.leaves(vlm.params["language_model"])) - table
    seconds, first = {}, {}
    for tokens in (1, 65):
        start = time.perf_counter()

        def call(tokens: int = tokens) -> jax.Array:
            return vlm.generate(inputs, max_new_tokens=tokens).tokens

        jax.block_until_ready(call())
        first[tokens] = time.perf_counter() - start
        seconds[tokens] = fastest(call, sizes.repeats)
    length = inputs["input_ids"].size
    patches = sizes.batch * vlm.module.config.tokens_per_image
    # Two operations per weight and token; bfloat16 weights have two bytes.
    products = length * decoder + patches * (weights - decoder - table)
    step = (seconds[65] - seconds[1]) / 64
    shape = list(inputs["input_ids"].shape)
    for name, each, limit, compiled in (
        ("prefill", seconds[1], products / limits.bfloat16, first[1]),
        ("decode step", step, decoder / limits.bytes * 2, first[65]),
    ):
        yield {
            "program": f"LLaVA-7B width, {sizes.layers} layers: {name}",
            "shape": shape,
            "seconds": each,
            "limit": limit,
            "share": limit / each,
            "first": compiled,
        }


# The run


def value_table(rows: list[dict[str, Any]]) -> Table:
    """Returns the comparison with the CPU as a printable table."""
    table = Table("value", "difference", "bound", "", title="Against this machine's CPU", box=None)
    for row in rows:
        verdict = "" if row["ok"] else "[red]differs[/red]"
        table.add_row(row["value"], f"{row['difference']:.1e}", f"{row['bound']:.0e}", verdict)
    return table


def rate_table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rates as a printable table."""
    names = ("program", "shape", "ms", "limit ms", "share", "first call s")
    table = Table(*names, title="Rates", box=None)

    def shown(row: dict[str, Any], name: str, form: str, scale: float = 1) -> str:
        return format(row[name] * scale, form) if name in row else ""

    for row in rows:
        table.add_row(
            row["program"],
            " x ".join(map(str, row.get("shape", ()))),
            shown(row, "seconds", ".3f", 1e3),
            shown(row, "limit", ".3f", 1e3),
            shown(row, "share", ".0%"),
            shown(row, "first", ".1f"),
        )
    return table


class Run:
    """A run's results so far, which are saved however it ends.

    Args:
        budget: seconds after which no part begins.
        output: directory of the JSON.
        console: where tables and lines go.
    """

    def __init__(self, budget: float, output: Path, console: Console):
        self.began, self.budget = time.perf_counter(), budget
        self.output, self.console = output, console
        self.card = ""
        self.results: dict[str, Any] = {"values": [], "limits": None, "rates": [], "left_out": []}
        self.part = "start"
        self.reference: subprocess.Popen | None = None
        # Compilers and devices let other threads run while they are waited for.
        self.end = threading.Timer(max(budget + BEYOND, 0), self._give_up)
        self.end.daemon = True
        self.end.start()

    def begins(self, part: str) -> bool:
        """Returns whether there is time for a part; if not, notes that it is left out."""
        if time.perf_counter() - self.began > self.budget:
            self.results["left_out"].append(part)
            return False
        self.part = part
        return True

    def save(self) -> None:
        """Writes the JSON and says where."""
        self.results["seconds"] = time.perf_counter() - self.began
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / f"on_device-{self.card}.json"
        path.write_text(json.dumps({"machine": measure.machine("flax"), **self.results}, indent=1))
        self.console.print(f"saved to {path} after {self.results['seconds']:.0f} s")

    def _give_up(self) -> None:
        if self.reference is not None:
            self.reference.kill()
        self.results["stopped"] = self.part
        self.console.print(f"stopped in {self.part} after {self.budget + BEYOND:.0f} s")
        if self.card:
            self.save()
        os._exit(3)


def check_values(run: Run) -> None:
    """Compares this machine's accelerator with its CPU.

    Raises:
        SystemExit: the run on the CPU failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch, "cpu.npz")
        run.reference = start_reference(reference)
        try:
            ours = values()
            # The CPU computes beside what is compared, never beside what is timed.
            if run.reference.wait() != 0:
                raise SystemExit("the reference run on the CPU failed (see above)")
            with np.load(reference) as cpu:
                run.results["values"] = compared(ours, dict(cpu))
        finally:
            run.reference.kill()
    run.console.print(value_table(run.results["values"]))


def check_rates(run: Run, parts: list[str], sizes: Sizes) -> None:
    """Measures the card's limits, and programs against them."""
    if not run.begins("limits"):  # all rates are held against the limits
        run.results["left_out"] += [part for part in parts if part in ("solvers", "generation")]
        return
    limits = measure_limits(sizes)
    run.results["limits"] = limits._asdict()
    run.console.print(
        f"limits: {limits.bfloat16 / 1e12:.1f} TFLOP/s in bfloat16, "
        f"{limits.float32 / 1e12:.1f} in float32 at highest precision, "
        f"{limits.bytes / 1e9:.0f} GB/s copied"
    )
    for part, rates in (("solvers", solver_rates), ("generation", generation_rates)):
        if part in parts and run.begins(part):
            for row in rates(sizes, limits):
                run.results["rates"].append(row)
    run.console.print(rate_table(run.results["rates"]))


def card_of(tiny: bool) -> str:
    """Returns the kind of the accelerator; of any device for small sizes.

    Raises:
        ValueError: JAX finds no accelerator.
    """
    try:
        device = jax.devices()[0]
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"JAX cannot use its devices: {why}") from None
    if device.platform == "cpu" and not tiny:
        raise ValueError(
            "JAX finds no accelerator here, only the CPU; install jax[cuda] or jax[tpu], or pass "
            "--tiny to try the script with small sizes"
        )
    return device.device_kind


def main() -> None:
    """Measures, prints, saves; ends with status 1 if a value differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--budget", type=float, default=170, help="seconds after which none begins")
    directory = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=directory, help="directory of the JSON")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reference is not None:
        np.savez(arguments.reference, **values())
        return
    run = Run(arguments.budget, arguments.output, Console(width=120))
    try:
        card = card_of(arguments.tiny)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run.card = re.sub(r"\W+", "-", card).strip("-").lower()
    run.console.print(f"{len(jax.devices())} x {card}, jax {jax.__version__}")
    if "values" in arguments.parts and run.begins("values"):
        check_values(run)
    if set(arguments.parts) - {"values"}:
        check_rates(run, arguments.parts, TINY if arguments.tiny else FULL)
    run.end.cancel()
    if left := run.results["left_out"]:
        run.console.print(f"left out, as {run.budget:.0f} s had passed: {', '.join(left)}")
    run.save()
    wrong = [row["value"] for row in run.results["values"] if not row["ok"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} values differ from the CPU's: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
