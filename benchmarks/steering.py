"""Steering on the embedded model: against PyTorch's forward hooks, and against itself.

    python -m benchmarks.steering               # captions of 16 test pictures, 20 tokens
    python -m benchmarks.steering --repeats 9 --site language_model.model.layers.3

Four comparisons, each of two sides run in turn; "ratio" is the median of the second over the first,
pair by pair, and "target" what it should reach:

    hook        16 rows x 20 tokens; transformers' `generate` with a forward hook, all cores
    unsteered   the same rows with an edit, and without
    sixteen     sixteen strengths: as one sweep, and as sixteen runs of `generate`
    gradient    of a loss with respect to the vector, and a forward pass of the same batch (a
                ratio of 1/3 is a gradient of three forward passes)

No row ends before its 20th token: the end-of-sequence token is taken from both sides. "same" counts
the rows whose tokens are identical on both sides. "floor" is what no program can undercut on this
machine: the multiplications of the prompts' prefill at the rate of a large product, measured in the
same process. PyTorch's time over the floor bounds the first ratio.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

import ports
from benchmarks import measure
from xlvlm_jax import steer
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.demo import embedded

ROWS, TOKENS = 16, 20
TARGETS = {"hook": 5.0, "unsteered": 1 / 1.02, "sixteen": 3.0, "gradient": 1 / 3}


class Setting:
    """The model on both sides, a batch of pictures with one prompt, and a vector."""

    def __init__(self, site: str):
        self.vlm = ports.load(embedded.LLAVA)
        # Both sides write all of the tokens.
        self.vlm.eos_tokens = ()
        self.peer = transformers.LlavaForConditionalGeneration.from_pretrained(
            embedded.LLAVA, dtype=torch.float32
        ).eval()
        self.peer.generation_config.eos_token_id = None
        images = [
            Image.fromarray(scenes.training_image(scenes.sample_scene("test", i)))
            for i in range(ROWS)
        ]
        self.inputs = self.vlm.process([self.vlm.render(prompts.CAPTION)] * ROWS, images)
        self.tensors = {name: torch.tensor(value) for name, value in self.inputs.items()}
        self.site = site
        width = self.vlm.sizes.text.hidden_size
        random = np.random.default_rng(0)
        self.vector = 0.5 * random.standard_normal(width).astype(np.float32)

    def generate(self, alpha: float | None = 1.0) -> jax.Array:
        """Our tokens [16, 20]; alpha None: without an edit."""
        edits = None if alpha is None else {self.site: ports.add(self.vector, alpha)}
        return self.vlm.generate(self.inputs, max_new_tokens=TOKENS, edits=edits).tokens

    def sweep(self, alphas: np.ndarray) -> jax.Array:
        """Our tokens [16, 16, 20], in one program."""
        variants = [{self.site: ports.add(self.vector, alpha)} for alpha in alphas]
        return self.vlm.sweep(self.inputs, variants, max_new_tokens=TOKENS).tokens

    @torch.no_grad()
    def peer_generate(self) -> np.ndarray:
        """PyTorch's tokens [16, 20], with a forward hook."""
        vector = torch.from_numpy(self.vector)

        def hook(module: Any, args: Any, out: Any) -> Any:
            return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        layer = self.peer.model.language_model.layers[int(self.site.rsplit(".", 1)[1])]
        handle = layer.register_forward_hook(hook)
        tokens = self.peer.generate(
            **self.tensors, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
        handle.remove()
        return tokens[:, self.inputs["input_ids"].shape[1] :].numpy()

    def prefill_flops(self) -> float:
        """Multiplications and additions of the parameters' products with what enters them."""
        sizes = {}
        for part in ("vision_tower", "multi_modal_projector", "language_model"):
            leaves = jax.tree_util.tree_leaves_with_path(self.vlm.params[part])
            sizes[part] = sum(
                value.size
                for path, value in leaves
                if path[-1].key == "kernel" and "lm_head" not in jax.tree_util.keystr(path)
            )
        patches = self.vlm.sizes.tokens_per_image
        length = self.inputs["input_ids"].shape[1]
        towers = patches * (sizes["vision_tower"] + sizes["multi_modal_projector"])
        return 2.0 * ROWS * (towers + length * sizes["language_model"])


def product_rate(repeats: int) -> float:
    """Multiplications and additions a second of the faster side's large product."""
    square = np.ones((2048, 2048), np.float32)
    ours, theirs = jnp.asarray(square), torch.from_numpy(square)
    result = measure.paired(
        lambda: jnp.matmul(ours, ours), lambda: (theirs @ theirs).numpy(), repeats
    )
    return 2 * 2048**3 / min(result.ours, result.theirs)


def gradient(setting: Setting) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The loss of the last token and its gradient, and a forward pass."""
    vlm, site = setting.vlm, setting.site
    inputs = {name: jnp.asarray(value) for name, value in vlm.prepare(setting.inputs).items()}
    vector = jnp.asarray(setting.vector)

    def loss(vector: jax.Array, params: dict, inputs: dict) -> jax.Array:
        logits = steer(vlm.apply, {site: ports.add(vector)})(params, inputs)
        return -jax.nn.log_softmax(logits[:, -1])[:, 7].mean()

    def forward(params: dict, inputs: dict) -> jax.Array:
        return vlm.apply(params, inputs)

    slope, forward = jax.jit(jax.value_and_grad(loss)), jax.jit(forward)
    return lambda: slope(vector, vlm.params, inputs), lambda: forward(vlm.params, inputs)


def run(site: str, repeats: int) -> list[dict[str, Any]]:
    """The four comparisons."""
    setting = Setting(site)
    alphas = np.linspace(0, 1.5, 16).astype(np.float32)

    def sixteen_runs() -> list[jax.Array]:
        return [setting.generate(float(alpha)) for alpha in alphas]

    slope, forward = gradient(setting)
    sides = {
        "hook": (setting.generate, setting.peer_generate),
        "unsteered": (setting.generate, lambda: setting.generate(None)),
        "sixteen": (lambda: setting.sweep(alphas), sixteen_runs),
        "gradient": (slope, forward),
    }
    same = {
        "hook": int((np.asarray(setting.generate()) == setting.peer_generate()).all(-1).sum()),
        "sixteen": int(
            (np.asarray(setting.sweep(alphas)) == np.asarray(sixteen_runs())).all(-1).sum()
        ),
    }
    rows = []
    for name, (first, second) in sides.items():
        result = measure.paired(first, second, repeats)
        row = {"what": name, "site": site, **result._asdict(), "target": TARGETS[name]}
        row |= {"same": same.get(name), "load": os.getloadavg()[0]}
        if name == "hook":
            row["floor"] = setting.prefill_flops() / product_rate(repeats)
            row["bound"] = result.theirs / row["floor"]
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a reader."""
    shown = Table(title=f"Steering, {ROWS} rows x {TOKENS} tokens, float32, medians")
    for heading in ("what", "first", "second", "ratio", "target", "floor", "bound", "same", "load"):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        floor, bound = row.get("floor"), row.get("bound")
        shown.add_row(
            row["what"],
            f"{1e3 * row['ours']:.1f} ms",
            f"{1e3 * row['theirs']:.1f} ms",
            f"{row['ratio']:.2f}",
            f"{row['target']:.2f}",
            "" if floor is None else f"{1e3 * floor:.1f} ms",
            "" if bound is None else f"{bound:.2f}",
            "" if row["same"] is None else str(row["same"]),
            f"{row['load']:.1f}",
        )
    return shown


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--site", default="language_model.model.layers.5", help="a decoder layer")
    parser.add_argument("--repeats", type=int, default=7, help="paired runs of each case")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/steering.json"))
    arguments = parser.parse_args()
    console = Console(markup=False)
    console.width = max(console.width, 110)
    rows = run(arguments.site, arguments.repeats)
    console.print(table(rows))
    measure.save(arguments.output, rows, "torch", "transformers")
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
