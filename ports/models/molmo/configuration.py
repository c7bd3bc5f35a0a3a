"""Molmo's configuration: values of config.json, and those that are in the checkpoint's code."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ports.models.molmo import vision as molmo_vision
from ports.nn import decoder, rope

# Values that are in the checkpoint's code instead of its config.json: the tower, and token ids.
DEFAULTS = {
    "vision_config": {
        "image_size": [336, 336],
        "patch_size": 14,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "head_dim": 64,
        "num_hidden_layers": 23,
        "intermediate_size": 4096,
        "num_positions": 577,
        "layer_norm_eps": 1e-5,
        "vit_layers": [-2, -9],
    },
    "additional_vocab_size": 128,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
# Image tokens, in the order of their ids, which follow those of the first embedding table.
_MARKS = ("start", "end", "patch", "col")
# Required in config.json. Other checkpoints of the family (MolmoE) use other names.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "layer_norm_eps",
    "rope_theta",
    "qkv_bias",
)
# Options that change the computation, with the only values that this port implements.
_IMPLEMENTED = {
    "layer_norm_type": "rms",
    "attention_layer_norm": False,
    "norm_after": False,
    "clip_qkv": None,
    "weight_tying": False,
    "tie_word_embeddings": False,
    "use_position_ids": True,
}


def read_config(values: Mapping[str, Any]) -> Any:
    """Makes a transformers configuration, as the model's own class is remote code.

    Args:
        values: the values of config.json.

    Returns:
        A PretrainedConfig with the values and defaults as attributes.

    Raises:
        ValueError: a required value is missing.
    """
    from transformers import PretrainedConfig

    missing = [name for name in _REQUIRED if values.get(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} is missing; expected a config.json with the names of Molmo-7B-D"
        )
    optional = {"pad_token_id": None, "embedding_size": None, "num_key_value_heads": None}
    merged = {**optional, **DEFAULTS, **values}
    first = merged["embedding_size"] or merged["vocab_size"]
    ids = {f"image_{mark}_token_id": first + i for i, mark in enumerate(_MARKS)}
    merged = {**ids, **merged}
    merged["vision_config"] = {**DEFAULTS["vision_config"], **values.get("vision_config", {})}
    merged.pop("auto_map", None)
    config = PretrainedConfig()
    for name, value in merged.items():
        setattr(config, name, value)
    return config


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a Molmo configuration."""

    text: decoder.DecoderConfig
    vision: molmo_vision.VisionConfig
    additional_vocab_size: int  # extra embeddings after the vocabulary, for the image tokens
    image_tokens: tuple[int, int, int, int]  # ids of patch, column, start and end

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads the result of `read_config`.

        Raises:
            ValueError: a value is not implemented.
        """
        for name, implemented in _IMPLEMENTED.items():
            value = getattr(config, name, implemented)
            if value != implemented:
                raise ValueError(f"config has {name} {value!r}; expected {implemented!r}")
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        if heads % kv_heads or config.hidden_size % heads:
            raise ValueError(
                f"config has {heads} heads, {kv_heads} key-value heads and width "
                f"{config.hidden_size}; expected each to divide the next larger"
            )
        if config.intermediate_size % 2:
            raise ValueError(
                f"intermediate_size is {config.intermediate_size}; expected an even number, for "
                "gate and values together"
            )
        text = decoder.DecoderConfig(
            vocab_size=config.embedding_size or config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size // 2,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.hidden_size // heads,
            rope=rope.Rope(float(config.rope_theta)),
            norm_eps=config.layer_norm_eps,
            hidden_act="silu",
            qkv_bias=bool(config.qkv_bias),
            output_bias=False,
            mlp_bias=False,
            tie_embeddings=False,
        )
        ids = (
            getattr(config, f"image_{name}_token_id") for name in ("patch", "col", "start", "end")
        )
        vision = molmo_vision.from_hf(config)
        sizes = cls(text, vision, config.additional_vocab_size, tuple(ids))
        for token in sizes.image_tokens:
            # Features are added to the embeddings of these tokens, so the tables must have them.
            if not 0 <= token < sizes.num_embeddings:
                raise ValueError(
                    f"image token id {token} is outside the {sizes.num_embeddings} embeddings; "
                    f"expected less than embedding_size {text.vocab_size} + additional_vocab_size "
                    f"{sizes.additional_vocab_size}"
                )
        return sizes

    @property
    def num_embeddings(self) -> int:
        """Number of embeddings in both tables together."""
        return self.text.vocab_size + self.additional_vocab_size
