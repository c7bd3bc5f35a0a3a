"""The ports against PyTorch: a forward pass and greedy generation, on the same checkpoint.

    python -m benchmarks.models                          # all models, small and medium, batch 1, 8
    python -m benchmarks.models --models llava --sizes small --batches 1 --repeats 3

Every case makes a random checkpoint, writes it as safetensors, loads it on both sides (transformers
in eager mode on all cores; our port in float32) and runs both alternately on the same arrays. Our
first run is reported separately, as it includes compilation. "same" is the number of rows with
identical tokens; with random weights there are near-ties, so it may not be all of them. "logits" is
the largest difference over the largest logit. Molmo is not included: transformers has no such
model.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

import ports
from benchmarks import measure

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
IMAGE, IMAGE_START = 5, 6  # token ids
TEXT = 24  # text tokens per prompt


@dataclass(frozen=True)
class Size:
    """Sizes of the parts, the same for every model that has them."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    pixels: int

    @property
    def text(self) -> dict[str, Any]:
        """Returns the sizes as arguments of a text configuration."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            **SPECIAL,
        }


SIZES = {
    "small": Size(256, 512, 4, 8, 4, 1000, 192, 3, 112),
    "medium": Size(768, 2304, 12, 12, 4, 8000, 384, 6, 224),
}


def prompts(batch: int, image: list[int], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns rows with one image and TEXT text tokens."""
    text = random.integers(10, 1000, (batch, TEXT))
    ids = np.concatenate([text[:, :4], np.tile(image, (batch, 1)), text[:, 4:]], axis=1)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


# A model: size -> (the PyTorch model, batch -> inputs)


def llava(size: Size) -> tuple[Any, Callable[[int], dict[str, np.ndarray]]]:
    """Makes LLaVA-1.5: every image is one square of patches."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**size.text),
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=size.vision_width,
            intermediate_size=4 * size.vision_width,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=size.vision_width // 64,
            image_size=size.pixels,
            patch_size=14,
        ),
        image_token_index=IMAGE,
        image_seq_length=(size.pixels // 14) ** 2,
    )

    def inputs(batch: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        pixels = random.standard_normal((batch, 3, size.pixels, size.pixels), np.float32)
        return prompts(batch, [IMAGE] * config.image_seq_length, random) | {"pixel_values": pixels}

    return transformers.LlavaForConditionalGeneration(config), inputs


def idefics2(size: Size) -> tuple[Any, Callable[[int], dict[str, np.ndarray]]]:
    """Makes Idefics2: an image that is not square, padded to a square."""
    latents = 64
    config = transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**size.text, sliding_window=None),
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": 4 * size.vision_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_width // 64,
            "image_size": size.pixels,
            "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": size.width,
            "resampler_n_latents": latents,
            "resampler_depth": 2,
            "resampler_n_heads": size.heads,
            "resampler_head_dim": size.width // size.heads,
            "num_key_value_heads": size.kv_heads,
        },
        image_token_id=IMAGE,
        pad_token_id=0,
    )

    def inputs(batch: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        shape = (batch, 1, 3, size.pixels, size.pixels)
        mask = np.ones((batch, 1, size.pixels, size.pixels), np.int64)
        mask[..., 3 * size.pixels // 4 :, :] = 0
        return prompts(batch, [IMAGE] * latents, random) | {
            "pixel_values": random.standard_normal(shape, np.float32) * mask[:, :, None],
            "pixel_attention_mask": mask,
        }

    return transformers.Idefics2ForConditionalGeneration(config), inputs


def qwen2_vl(size: Size) -> tuple[Any, Callable[[int], dict[str, np.ndarray]]]:
    """Makes Qwen2-VL: an image with 3/4 of the height."""
    half = size.width // size.heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = transformers.Qwen2VLConfig(
        text_config=size.text
        | {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "default",
                "mrope_section": sections,
            }
        },
        vision_config={
            "depth": size.vision_layers,
            "embed_dim": size.vision_width,
            "num_heads": size.vision_width // 64,
            "hidden_size": size.width,
            "patch_size": 14,
        },
        image_token_id=IMAGE,
        vision_start_token_id=IMAGE_START,
        video_token_id=7,
        vision_end_token_id=8,
    )
    grid = (1, 2 * round(size.pixels * 3 / 4 / 28), 2 * (size.pixels // 28))

    def inputs(batch: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        count = int(np.prod(grid))
        image = [IMAGE_START, *[IMAGE] * (count // 4), 8]
        rows = prompts(batch, image, random)
        return rows | {
            "pixel_values": random.standard_normal((batch * count, 3 * 2 * 14 * 14), np.float32),
            "image_grid_thw": np.array([grid] * batch),
            "mm_token_type_ids": (rows["input_ids"] == IMAGE).astype(np.int64),
        }

    return transformers.Qwen2VLForConditionalGeneration(config), inputs


MODELS = {"llava": llava, "idefics2": idefics2, "qwen2_vl": qwen2_vl}


def measure_case(name: str, size: str, batches: list[int], tokens: int, repeats: int) -> list[dict]:
    """Returns the rows of one model and size: forward and generation for each batch size."""
    torch.manual_seed(0)
    peer, make = MODELS[name](SIZES[size])
    peer = peer.eval()
    parameters = sum(p.numel() for p in peer.parameters())
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        peer.save_pretrained(directory)
        vlm = ports.load(directory)
    for batch in batches:
        inputs = make(batch)
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}

        def forward(inputs=inputs) -> Any:
            return vlm.forward(inputs).logits

        def generate(inputs=inputs) -> Any:
            return vlm.generate(inputs, max_new_tokens=tokens).tokens

        @torch.no_grad()
        def peer_forward(tensors=tensors) -> Any:
            return peer(**tensors).logits.numpy()

        @torch.no_grad()
        def peer_generate(tensors=tensors) -> Any:
            out = peer.generate(**tensors, max_new_tokens=tokens, do_sample=False)
            return out[:, tensors["input_ids"].shape[1] :].numpy()

        ours, theirs = np.asarray(forward()), peer_forward()
        same = (np.asarray(generate()) == peer_generate()).all(1).sum()
        for what, mine, others in (
            ("forward", forward, peer_forward),
            (f"generate {tokens}", generate, peer_generate),
        ):
            rows.append(
                {
                    "model": name,
                    "size": size,
                    "parameters": parameters,
                    "batch": batch,
                    "prompt_tokens": inputs["input_ids"].shape[1],
                    "what": what,
                    **measure.paired(mine, others, repeats)._asdict(),
                    "logits_error": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
                    "same_rows": int(same),
                }
            )
    return rows


def table(rows: list[dict]) -> Table:
    """Returns the rows as a printable table."""
    shown = Table(title="Ports against PyTorch eager, float32, medians")
    for heading in ("model", "parameters", "batch", "what", "ours", "PyTorch", "times faster"):
        shown.add_column(heading, justify="left" if heading in ("model", "what") else "right")
    shown.add_column("logits", justify="right")
    shown.add_column("same rows", justify="right")
    for row in rows:
        shown.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.1f} M",
            str(row["batch"]),
            row["what"],
            f"{1e3 * row['ours']:.1f} ms",
            f"{1e3 * row['theirs']:.1f} ms",
            f"{row['ratio']:.2f}",
            f"{row['logits_error']:.0e}",
            f"{row['same_rows']} of {row['batch']}",
        )
    return shown


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=20, help="to generate")
    parser.add_argument("--repeats", type=int, default=5, help="paired runs of each case")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/models.json"))
    arguments = parser.parse_args()
    console = Console(markup=False)
    console.width = max(console.width, 120)
    rows = []
    for name in arguments.models:
        for size in arguments.sizes:
            console.print(f"{name}, {size} ...")
            rows += measure_case(name, size, arguments.batches, arguments.tokens, arguments.repeats)
    console.print(table(rows))
    measure.save(arguments.output, rows, "torch", "transformers")
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
