"""Small random Molmo checkpoints, and Molmo in functional PyTorch, one sample at a time.

transformers has no Molmo. `reference` is written from the equations, without padding, batches or a
cache, and is itself compared with the original code's arrays in tests/data/molmo. Sizes are odd
on purpose: crops of 5 x 5 patches, heads of 10 in a width of 60.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import torch
from torch.nn import functional

from ports import checkpoint
from ports.models.molmo import model as molmo

POOLING = ("", ".wq", ".wk", ".wv", ".wo", ".heads")
CONFIG = {
    "model_type": "molmo",
    "vocab_size": 101,
    "embedding_size": 101,
    "additional_vocab_size": 7,
    "hidden_size": 60,
    "intermediate_size": 154,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rope_theta": 10_000.0,
    "layer_norm_eps": 1e-6,
    "layer_norm_type": "rms",
    "qkv_bias": True,
    "bos_token_id": 1,
    "eos_token_id": None,
    "image_start_token_id": 101,
    "image_end_token_id": 102,
    "image_patch_token_id": 103,
    "image_col_token_id": 104,
    "vision_config": {
        "image_size": [35, 35],
        "patch_size": 7,
        "hidden_size": 36,
        "num_attention_heads": 3,
        "head_dim": 12,
        "num_hidden_layers": 3,
        "intermediate_size": 50,
        "num_positions": 26,
        "layer_norm_eps": 1e-5,
        "vit_layers": [-2, -3],
    },
}
# Name -> changes to the configuration.
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "a key for each query, no biases": {"num_key_value_heads": 6, "qkv_bias": False},
    "one layer of the tower, even crops": {
        "vision_config": {
            **CONFIG["vision_config"],
            "image_size": [28, 28],
            "num_positions": 17,
            "vit_layers": [-1],
        }
    },
}
# Name -> (crops of each row, text tokens of each row).
PROMPTS: dict[str, tuple[list[int], list[int]]] = {
    "padded on the left, three, no and two crops": ([3, 0, 2], [5, 9, 4]),
    "many crops": ([9], [6]),
    "no image": ([0, 0], [5, 12]),
}


def make_checkpoint(directory: Path, config: Mapping[str, Any]) -> None:
    """Returns random weights with which every layer changes the states by about their own size."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    sizes = molmo.Config.from_hf(molmo.read_config(config))
    abstract = checkpoint.abstract_params(molmo.Molmo(sizes), molmo.example_inputs(sizes))
    random = np.random.default_rng(0)
    tensors = {}
    for name, shape in checkpoint.stored_shapes(abstract).items():
        noise = random.standard_normal(shape, np.float32)
        if len(shape) == 2 and "embed" not in name.removesuffix("patch_embedding.weight"):
            noise *= 1.2 / np.sqrt(shape[1])
        elif len(shape) == 1 and "class_embedding" not in name:
            norm = ("norm" in name or "ln" in name) and name.endswith("weight")
            noise = noise / 5 + (1 if norm else 0)
        tensors[name] = noise.astype(np.float32)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def make_inputs(
    config: Mapping[str, Any], crops: Sequence[int], texts: Sequence[int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns what a processor might, for these numbers of crops and text tokens, padded left.

    Some features are unused, the others go to the image tokens in any order.
    """
    random = np.random.default_rng(seed)
    vision = config["vision_config"]
    side = vision["image_size"][0] // vision["patch_size"]
    features, most = (-(-side // 2)) ** 2, max(crops)
    shape = (len(crops), most, side**2)
    images = np.full((*shape, 3 * vision["patch_size"] ** 2), -1, np.float32)
    masks = np.full(shape, -1, np.float32)
    places = np.full((*shape[:2], features), -1, np.int32)
    rows = []
    for i, (count, text) in enumerate(zip(crops, texts, strict=True)):
        images[i, :count] = random.standard_normal((count, *images.shape[2:]), np.float32)
        masks[i, :count] = random.choice([0, 0.25, 1, -1], (count, side**2))
        used = np.flatnonzero(random.random(count * features) < 0.8)
        ids = np.repeat(config["image_patch_token_id"], len(used))
        ids = np.concatenate([[1, 101], ids, [104, 102], random.integers(2, 101, text)])
        flat = np.full(most * features, -1)
        flat[used] = 2 + random.permutation(len(used))
        places[i] = flat.reshape(most, features)
        rows.append(ids)
    length = max(map(len, rows))
    for i, row in enumerate(rows):
        places[i] = np.where(places[i] < 0, -100, places[i] + length - len(row))
    inputs = {
        "input_ids": np.stack([np.pad(row, (length - len(row), 0)) for row in rows]),
        "attention_mask": np.stack([np.arange(length) >= length - len(row) for row in rows]) * 1,
    }
    if most:
        inputs |= {"images": images, "image_masks": masks, "image_input_idx": places}
    return inputs


def reference(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    ids: np.ndarray,
    images: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    places: np.ndarray | None = None,
    to_heads: Mapping[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns logits and states of a sample: ids[T], images[C, P, ...], masks[C, P], places[C, F].

    `to_heads` is added to the outputs of heads at these sites.

    The pooling has no states, because it is called for one square of patches at a time.
    """
    states: dict[str, torch.Tensor] = {}
    # In double precision: what remains is the port's own rounding.
    w = {name: value.double() for name, value in weights.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        states[name] = functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
        return states[name]

    def layer_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scale, eps = w[f"{name}.weight"], config["vision_config"]["layer_norm_eps"]
        states[name] = functional.layer_norm(x, scale.shape, scale, w[f"{name}.bias"], eps)
        return states[name]

    def rms_norm(name: str, x: torch.Tensor) -> torch.Tensor:
        scale = w[f"{name}.weight"]
        states[name] = functional.rms_norm(x, scale.shape, scale, config["layer_norm_eps"])
        return states[name]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
        """Computes attention over [..., positions, heads, width], with softmax written out."""
        repeat = q.shape[-2] // k.shape[-2]
        k, v = k.repeat_interleave(repeat, -2), v.repeat_interleave(repeat, -2)
        scores = torch.einsum("...qhc,...khc->...hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return torch.einsum("...hqk,...khc->...qhc", scores.softmax(-1), v).flatten(-2)

    def joined(name: str, x: torch.Tensor) -> torch.Tensor:
        """Keeps what the heads put out, edited."""
        states[name] = x + torch.from_numpy(np.asarray((to_heads or {}).get(name, 0.0)))
        return states[name]

    def tower_attention(name: str, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        heads = (config["vision_config"]["num_attention_heads"], -1)
        q = linear(f"{name}.wq", query).unflatten(-1, heads)
        k, v = (linear(f"{name}.{n}", context).unflatten(-1, heads) for n in ("wk", "wv"))
        states[name] = linear(f"{name}.wo", joined(f"{name}.heads", attend(q, k, v, None)))
        return states[name]

    def backbone(crops: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        name, cfg = "model.vision_backbone", config["vision_config"]
        vit = f"{name}.image_vit"
        x = linear(f"{vit}.patch_embedding", crops)
        first = w[f"{vit}.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + w[f"{vit}.positional_embedding"]
        x, outputs = layer_norm(f"{vit}.pre_ln", x), []
        for i in range(cfg["num_hidden_layers"]):
            block = f"{vit}.transformer.resblocks.{i}"
            y = layer_norm(f"{block}.attention_norm", x)
            x = x + tower_attention(f"{block}.attention", y, y)
            y = linear(f"{block}.feed_forward.w1", layer_norm(f"{block}.ffn_norm", x))
            y = linear(f"{block}.feed_forward.w2", y * torch.sigmoid(1.702 * y))
            states[f"{block}.feed_forward"] = y
            x = states[block] = x + y
            outputs.append(x)
        x = torch.cat([outputs[i] for i in cfg["vit_layers"]], -1)[:, 1:]
        empty, partial = masks == 0, (masks != 0) & (masks < 1)
        pad = w[f"{name}.pad_embed"]
        x = x + empty[..., None] * pad[0] + partial[..., None] * pad[1]
        side = cfg["image_size"][0] // cfg["patch_size"]
        half = -(-side // 2)
        x = functional.pad(x.unflatten(1, (side, side)), (0, 0, 0, side % 2, 0, side % 2))
        pooled = []
        for i in range(half):
            for j in range(half):
                square = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1, 2)
                mean = square.mean(1, keepdim=True)
                pooled.append(tower_attention(f"{name}.image_pooling_2d", mean, square))
        x, projector = torch.cat(pooled, 1), f"{name}.image_projector"
        y = functional.silu(linear(f"{projector}.w1", x)) * linear(f"{projector}.w3", x)
        states[name] = states[projector] = linear(f"{projector}.w2", y)
        for each in [f"{name}.image_pooling_2d{part}" for part in POOLING]:
            del states[each]  # of the last square alone
        return states[name]

    decoder = "model.transformer"
    tables = torch.cat([w[f"{decoder}.wte.embedding"], w[f"{decoder}.wte.new_embedding"]])
    x = states[f"{decoder}.wte"] = tables[torch.from_numpy(ids).long()]
    if images is not None and len(images):
        features = backbone(torch.from_numpy(images).double(), torch.from_numpy(masks))
        x = x.clone()
        for place, feature in zip(places.reshape(-1), features.flatten(0, 1), strict=True):
            if place >= 0:
                x[place] += feature
    count, heads, groups = len(ids), config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    rates = config["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    angles = torch.arange(count)[:, None] * rates
    turns = torch.polar(torch.ones_like(angles), angles)

    def rotate(heads: torch.Tensor) -> torch.Tensor:
        """Rotates a head whose halves are the real and imaginary parts."""
        turned = torch.complex(*heads.chunk(2, -1)) * turns[:, None]
        return torch.cat([turned.real, turned.imag], -1)

    causal = torch.ones(count, count, dtype=torch.bool).tril()
    for i in range(config["num_hidden_layers"]):
        block = f"{decoder}.blocks.{i}"
        y = linear(f"{block}.att_proj", rms_norm(f"{block}.attn_norm", x)).unflatten(
            -1, (-1, width)
        )
        q, k, v = y.split((heads, groups, groups), -2)
        y = joined(f"{block}.heads", attend(rotate(q), rotate(k), v, causal))
        x = x + linear(f"{block}.attn_out", y)
        up, gate = linear(f"{block}.ff_proj", rms_norm(f"{block}.ff_norm", x)).chunk(2, -1)
        x = states[block] = x + linear(f"{block}.ff_out", functional.silu(gate) * up)
    logits = linear(f"{decoder}.ff_out", rms_norm(f"{decoder}.ln_f", x))
    states[decoder] = states[f"{decoder}.ln_f"]
    return logits.numpy(), {name: value.numpy() for name, value in states.items()}


def rows(inputs: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Yields the arguments of `reference` for each row, without padding tokens and crops."""
    out = []
    for i, mask in enumerate(np.asarray(inputs["attention_mask"]).astype(bool)):
        row = {"ids": inputs["input_ids"][i][mask]}
        if "images" in inputs:
            places, missing = inputs["image_input_idx"][i], int((~mask).sum())
            used = (places >= 0).any(-1)
            row |= {
                "images": inputs["images"][i][used],
                "masks": inputs["image_masks"][i][used],
                "places": np.where(places < 0, -1, places - missing)[used],
            }
        out.append(row)
    return out


def greedy(config: Mapping[str, Any], weights: Any, row: dict[str, Any], count: int) -> list[int]:
    """Returns the tokens of `count` whole passes."""
    row = dict(row)
    for _ in range(count):
        logits, _ = reference(config, weights, **row)
        row["ids"] = np.append(row["ids"], logits[-1].argmax())
    return row["ids"][-count:].tolist()


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    stored = safetensors.numpy.load_file(directory / "model.safetensors")
    return jax.tree.map(torch.from_numpy, stored)
