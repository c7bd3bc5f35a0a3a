"""The configuration of Molmo2."""

import dataclasses
from typing import Any

from ports.nn import decoder, layers

# Options that change the computation, with the only values that this port implements.
_IMPLEMENTED: dict[tuple[str, str], Any] = {
    ("text_config", "use_qk_norm"): True,
    ("adapter_config", "mlp_bias"): False,
    ("adapter_config", "pooling_attention_mask"): True,
}


@dataclasses.dataclass(frozen=True)
class HeadSizes:
    """Sizes of an attention layer of the tower or the pooling."""

    width: int  # of its output
    num_heads: int
    num_kv_heads: int
    head_dim: int
    use_bias: bool

    @classmethod
    def from_hf(cls, config: Any) -> "HeadSizes":
        """Reads a transformers Molmo2VisionConfig or Molmo2AdapterConfig."""
        return cls(
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            use_bias=bool(config.attention_bias),
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers Molmo2Config."""

    text: decoder.DecoderConfig
    image_tokens: tuple[int, ...]  # ids of the patch, then of the other tokens of pictures
    tower: HeadSizes
    tower_mlp: int
    tower_act: str
    tower_eps: float
    num_layers: int  # of the tower
    num_patches: int  # P
    patch_values: int  # per patch
    feature_layers: tuple[int, ...]  # layers of the tower whose states are concatenated
    pooling: HeadSizes
    projector_width: int
    projector_act: str

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers Molmo2Config.

        Raises:
            ValueError: a value is not implemented.
        """
        for (part, name), implemented in _IMPLEMENTED.items():
            value = getattr(getattr(config, part), name, implemented)
            if value != implemented:
                raise ValueError(f"{part}.{name} is {value!r}; expected {implemented!r}")
        # The head has its own weights, whatever the configuration says.
        text = decoder.DecoderConfig.from_hf(config.text_config, False, "molmo2_text")
        kind = config.text_config.qk_norm_type
        scaled = config.text_config.rope_scaling_layers
        text = dataclasses.replace(
            text,
            qk_norm=kind == "qwen3",
            joint_qk_norm=kind == "olmo",
            norms_after=bool(config.text_config.norm_after),
            unscaled_layers=tuple(i for i in range(text.num_layers) if i not in scaled),
        )
        patch = config.image_patch_id
        # transformers' class has no name for the ends of lines: they follow the patch.
        tokens = [patch, getattr(config, "image_col_id", patch + 1)]
        tokens += [config.image_start_token_id, config.low_res_image_start_token_id]
        tokens += [config.image_end_token_id]
        tokens += [config.frame_start_token_id, config.frame_end_token_id]
        tokens += [getattr(config, "image_low_res_id", patch)]
        for token in tokens:
            # Features are added to embeddings, so there must be some.
            if not 0 <= token < text.num_embeddings:
                raise ValueError(
                    f"image token id {token} is outside the {text.num_embeddings} embeddings; "
                    f"expected less than vocab_size {text.vocab_size} + additional_vocab_size "
                    f"{text.additional_vocab}"
                )
        vision, adapter = config.vision_config, config.adapter_config
        for name in (vision.hidden_act, adapter.hidden_act):
            layers.activation(name)
        return cls(
            text=text,
            image_tokens=tuple(dict.fromkeys(tokens)),
            tower=HeadSizes.from_hf(vision),
            tower_mlp=vision.intermediate_size,
            tower_act=vision.hidden_act,
            tower_eps=vision.layer_norm_eps,
            num_layers=vision.num_hidden_layers,
            num_patches=vision.num_position_embeddings,
            patch_values=vision.num_channels * vision.patch_size**2,
            feature_layers=tuple(adapter.vision_feature_layer),
            pooling=HeadSizes.from_hf(adapter),
            projector_width=adapter.intermediate_size,
            projector_act=adapter.hidden_act,
        )
