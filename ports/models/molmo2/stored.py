"""The tensors of Molmo2's files: their names, and those that are several parameters or a part."""

from collections.abc import Mapping
from typing import Any

from ports.checkpoint import fused
from ports.models.molmo2.config import Config

# Parts of names on the Hub, where the file of transformers has them too -> the port's.
_NAMES = (
    ("model.transformer.blocks.", "model.language_model.layers."),
    ("model.transformer.ln_f.", "model.language_model.norm."),
    ("model.transformer.wte.", "model.language_model.embed_tokens."),
    ("model.transformer.", "model.language_model."),
    ("model.vision_backbone.image_vit.transformer.resblocks.", "model.vision_tower.layers."),
    ("model.vision_backbone.image_vit.", "model.vision_tower."),
    ("model.vision_backbone.", "model.multi_modal_projector."),
    ("image_projector.w1.", "image_projector.gate_proj."),
    ("image_projector.w2.", "image_projector.down_proj."),
    ("image_projector.w3.", "image_projector.up_proj."),
    (".feed_forward.w1.", ".mlp.fc1."),
    (".feed_forward.w2.", ".mlp.fc2."),
    (".feed_forward.", ".mlp."),
    (".attention.", ".self_attn."),
    *((f".w{part}.", f".{part}_proj.") for part in "qkvo"),
    (".attention_norm.", ".layer_norm1."),
    (".ffn_norm.", ".layer_norm2."),
    (".attn_norm.", ".input_layernorm."),
    (".ff_norm.", ".post_attention_layernorm."),
    (".attn_out.", ".o_proj."),
    (".ff_out.", ".down_proj."),
)


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in any known checkpoint to the port's; None for buffers.

    The port has the names of transformers' modules. Those on the Hub, which are also those of
    transformers' files, differ, and some tensors there are several (see `rearrange`).
    """
    for old, new in _NAMES:
        name = name.replace(old, new)
    return None if name.endswith("inv_freq") else name


def rearrange(config: Config, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Splits query, key and value, and values and gate, and joins the two tables of embeddings."""
    text, tensors = config.text, {}
    heads = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    for name, tensor in stored.items():
        before, _, leaf = name.rpartition(".")
        before, _, module = before.rpartition(".")
        if module == "att_proj":
            parts = ("q_proj", "k_proj", "v_proj"), fused.split(tensor, *heads)
        elif module == "ff_proj":
            parts = ("up_proj", "gate_proj"), fused.split(tensor, text.intermediate_size)
        else:
            tensors[name] = tensor
            continue
        tensors |= {f"{before}.{part}.{leaf}": rows for part, rows in zip(*parts, strict=True)}
    table = "model.transformer.wte."
    if {f"{table}embedding", f"{table}new_embedding"} <= tensors.keys():
        above, below = (tensors.pop(f"{table}{part}embedding") for part in ("", "new_"))
        tensors[f"{table}weight"] = fused.Joined(above, below)
    return tensors
