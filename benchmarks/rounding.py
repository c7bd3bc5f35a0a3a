"""Rounding errors of logits: ours and PyTorch's in float32, against PyTorch in float64.

    python -m benchmarks.rounding

Random models with the depth of Gemma-3-4B (34 layers) and PaliGemma2-10B (42 layers), an eighth as
wide, on a batch that is padded on the left, with one, two and no images. Each layer changes its
states by about their own size, so errors grow from layer to layer. "ours" and "PyTorch" are root
mean squares of the differences from float64 over all tokens, "apart" is the largest difference
between the two. If ours is as near to float64 as PyTorch's is, what sets them apart is rounding.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import ports
from benchmarks import measure

IMAGE, VOCABULARY, SIDE = 500, 512, 112
TOWER: dict[str, Any] = {
    "hidden_size": 144,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": SIDE,
    "vision_use_head": False,
    "projection_dim": 448,  # of PaliGemma, its decoder's width
}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "head_dim": 32, "query_pre_attn_scalar": 32}
TOKENS = {"gemma3": 16, "paligemma": (SIDE // 14) ** 2}  # per image


def gemma3() -> torch.nn.Module:
    """A Gemma 3 with the depth of the 4B."""
    text = transformers.Gemma3TextConfig(
        **TEXT,
        hidden_size=320,
        intermediate_size=1280,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        mm_tokens_per_image=TOKENS["gemma3"],
        image_token_index=IMAGE,
        boi_token_index=501,
        eoi_token_index=502,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma() -> torch.nn.Module:
    """A PaliGemma 2 with the depth of the 10B."""
    text = transformers.Gemma2Config(
        **TEXT,
        hidden_size=448,
        intermediate_size=1792,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        image_token_index=IMAGE,
        projection_dim=448,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # the only one with soft caps
    return model


def randomise(model: torch.nn.Module) -> None:
    """Draws weights with which every layer changes the states by about their own size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "embed" not in name:
                noise *= 1.5 * (parameter.shape[0] / parameter.numel()) ** 0.5
            elif parameter.ndim == 1 or "embed_tokens" in name:
                noise /= 5
            parameter.copy_(noise)


def batch(per_image: int) -> dict[str, np.ndarray]:
    """Three prompts, padded on the left."""
    random = np.random.default_rng(0)
    rows = []
    for images, text in ((1, 5), (2, 40), (0, 23)):
        rows.append([2, *random.integers(5, 490, 3), *[IMAGE] * (per_image * images)])
        rows[-1] += random.integers(5, 490, text).tolist()
    length = max(map(len, rows))
    ids = np.array([[0] * (length - len(row)) + row for row in rows])
    pixels = random.standard_normal((3, 3, SIDE, SIDE), np.float32)
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(int), "pixel_values": pixels}


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Makes what PyTorch's models compute in float32, whatever their dtype, float64."""
    kept = torch.float32, torch.Tensor.float
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = kept


def logits_of(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """PyTorch's logits."""
    with torch.no_grad():
        return model(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()


def one(name: str, model: Any) -> dict[str, Any]:
    """The errors of a family."""
    randomise(model.eval())
    inputs = batch(TOKENS[name])
    is_image = inputs["input_ids"] == IMAGE
    inputs["token_type_ids"] = (is_image if name == "gemma3" else 0 * is_image).astype(int)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        ours = np.asarray(ports.load(directory).forward(inputs).logits)
    theirs = logits_of(model, inputs)
    with float64():
        exact = {k: v.astype("f8") if v.dtype == "f4" else v for k, v in inputs.items()}
        truth = logits_of(model.double(), exact)
    tokens = inputs["attention_mask"] == 1
    errors = [float(np.sqrt(np.mean((x - truth)[tokens] ** 2))) for x in (ours, theirs)]
    return {
        "family": name,
        "largest logit": float(np.abs(truth[tokens]).max()),
        "ours": errors[0],
        "PyTorch": errors[1],
        "apart": float(np.abs(ours - theirs)[tokens].max()),
    }


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rounding.json"))
    given = parser.parse_args()
    rows = [one("gemma3", gemma3()), one("paligemma", paligemma())]
    shown = Table(title="Rounding errors of logits, against float64")
    for heading in rows[0]:
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*(x if isinstance(x, str) else f"{x:.2g}" for x in row.values()))
    console = Console(markup=False)
    console.print(shown)
    measure.save(given.output, rows, "torch", "transformers")
    console.print(f"saved to {given.output}")


if __name__ == "__main__":
    main()
