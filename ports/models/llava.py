"""LLaVA (Liu et al. 2023): a vision tower, a two-layer projector, a decoder.

B batch, T positions, D width, I images, P patches per image.

The tower is CLIP's (LLaVA-1.5, BakLLaVA), SigLIP's (LLaVA-Interleave) or Pixtral's; the decoder
that of Llama, Mistral, Qwen2 or Qwen3. Pixtral's images keep their shape and have as many features
as whole patches, in rows that end with a token of their own; those of the others are squares.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports import checkpoint
from ports.inputs import padding
from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.models import llava_like, pixtral_processor, port
from ports.models.port import Port
from ports.nn import clip_vision, decoder, layers, pixtral, siglip, vision_language
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **clip_vision.AXES,
    **siglip.AXES,
    **pixtral.AXES,
    "linear_1": ("embed", "mlp"),
    "linear_2": ("mlp", "embed"),
}

# Towers by the model_type of vision_config: configuration and module.
TOWERS: dict[str, tuple[type[clip_vision.VisionConfig], type[nn.Module]]] = {
    "clip_vision_model": (clip_vision.VisionConfig, clip_vision.CLIPVisionModel),
    "siglip_vision_model": (clip_vision.VisionConfig, siglip.SiglipVisionModel),
    "pixtral": (pixtral.VisionConfig, pixtral.PixtralVisionModel),
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers LlavaConfig."""

    text: decoder.DecoderConfig
    tower: str  # a key of TOWERS
    vision: clip_vision.VisionConfig
    image_tokens: tuple[int, ...]
    feature_layers: tuple[int, ...]
    keep_first_position: bool  # CLIP's class position, or SigLIP's first patch
    projector_act: str
    projector_bias: bool

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers LlavaConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        strategy = config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy is {strategy!r}; expected 'default' or 'full'"
            )
        kind = config.vision_config.model_type
        if kind not in TOWERS:
            raise ValueError(
                f"vision_config.model_type is {kind!r}; expected one of {', '.join(TOWERS)}"
            )
        if kind == "pixtral" and strategy == "default":
            raise ValueError(
                "vision_feature_select_strategy is 'default', which drops a patch of Pixtral's "
                "tower; expected 'full'"
            )
        tower = TOWERS[kind][0].from_hf(config.vision_config, kind)
        chosen = config.vision_feature_layer
        chosen = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        for layer in chosen:
            if not -tower.num_layers - 1 <= layer <= tower.num_layers:
                raise ValueError(
                    f"vision_feature_layer is {layer}; the vision tower has {tower.num_layers} "
                    f"layers, expected {-tower.num_layers - 1} to {tower.num_layers}"
                )
        layers.activation(config.projector_hidden_act)
        # Older checkpoints have it in text_config, newer ones at the top level.
        tied = bool(config.tie_word_embeddings or config.text_config.tie_word_embeddings)
        return cls(
            text=decoder.DecoderConfig.from_hf(config.text_config, tied, *DECODERS),
            tower=kind,
            vision=tower,
            image_tokens=(config.image_token_index,),
            feature_layers=chosen,
            keep_first_position=strategy == "full",
            projector_act=config.projector_hidden_act,
            projector_bias=config.multimodal_projector_bias,
        )

    @property
    def class_positions(self) -> int:
        """Positions of the tower's output before the patches."""
        return int(self.tower == "clip_vision_model")

    @property
    def tokens_per_image(self) -> int:
        """Image tokens in a prompt per image of the tower's own size."""
        return self.vision.num_patches + self.class_positions - (not self.keep_first_position)


class Projector(nn.Module):
    """Two-layer perceptron from the tower's width to the decoder's."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> Array:
        """Maps features[I, P, tower width x chosen layers] to [I, P, D]."""
        cfg = self.config

        def linear(name: str) -> nn.Dense:
            return layers.dense(cfg.text.hidden_size, cfg.projector_bias, self.dtype, name)

        return linear("linear_2")(
            layers.activation(cfg.projector_act)(linear("linear_1")(features))
        )


# The processor's arrays that the port uses; the rest are ignored.
INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes")


class Llava(llava_like.LlavaLike):
    """Replaces image tokens by the projected features of the chosen layers of the tower."""

    config: Config
    axes = AXES

    def setup(self):
        self.vision_tower = TOWERS[self.config.tower][1](self.config.vision, self.dtype)
        self.multi_modal_projector = Projector(self.config, self.dtype)
        self.language_model = decoder.CausalLM(self.config.text, self.dtype)

    def image_features(self, pixels: Array, mask: Array | None = None) -> Array:
        """Computes the decoder's inputs for images.

        Args:
            pixels: [I, 3, height, width].
            mask: with Pixtral's tower, bool[I, h, w], the patches in each image.

        Returns:
            [I, P, D].
        """
        tower = self.vision_tower
        states = tower(pixels)[0] if mask is None else tower(pixels, mask)
        features = jnp.concatenate([states[i] for i in self.config.feature_layers], axis=-1)
        if not self.config.keep_first_position:
            features = features[:, 1:]
        return self.multi_modal_projector(features)

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps input_ids int[B, T] and optional pixel_values[I, 3, height, width] to [B, T, D].

        With Pixtral's tower, image_sizes int[I, 2] are the height and width of each image.
        """
        if self.config.tower != "pixtral" or inputs.get("pixel_values") is None:
            return super().embed_inputs(inputs)
        pixels = jnp.asarray(inputs["pixel_values"])
        mask = _patch_mask(pixels, inputs.get("image_sizes"), self.config.vision.patch_size)
        return self.place(inputs, self.image_features(pixels, mask), mask)


def _patch_mask(pixels: Array, sizes: Array | None, patch_size: int) -> Array:
    """Returns bool[I, h, w], which patches of pixels[I, 3, height, width] are in their image."""
    h, w = (side // patch_size for side in pixels.shape[2:])
    if sizes is None:
        return jnp.ones((len(pixels), h, w), bool)
    rows, columns = jnp.moveaxis(jnp.asarray(sizes) // patch_size, -1, 0)
    inside = jnp.arange(h)[:, None] < rows[:, None, None]
    return inside & (jnp.arange(w) < columns[:, None, None])


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image per row, to trace initialisation with."""
    arrays = llava_like.example_inputs(config, batch, length)
    if config.tower == "pixtral":
        arrays["image_sizes"] = jax.ShapeDtypeStruct((batch, 2), np.int32)
    return arrays


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays; with Pixtral's tower, also pads images to one of few sizes.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: images and image tokens do not match.
    """
    arrays = dict(inputs)
    sizes = arrays.pop("image_sizes", None)
    if config.tower == "pixtral":
        return _with_canvas(config, arrays, sizes)
    return llava_like.prepare_inputs(config, arrays)


def _with_canvas(
    config: Config, arrays: dict[str, np.ndarray], sizes: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Checks the images of Pixtral's tower and pads their canvas to one of a few sizes."""
    patch = config.vision.patch_size
    pixels = arrays.pop("pixel_values", None)
    count = 0 if pixels is None else len(pixels)
    if pixels is not None and (pixels.ndim != 4 or pixels.shape[1] != config.vision.num_channels):
        raise ValueError(
            f"pixel_values has shape {pixels.shape}; expected [images, "
            f"{config.vision.num_channels}, height, width], as the processor pads it (do_pad)"
        )
    if sizes is None:
        sizes = np.tile(np.zeros(2, int) if pixels is None else pixels.shape[2:], (count, 1))
    if sizes.shape != (count, 2):
        raise ValueError(
            f"image_sizes has shape {sizes.shape}; expected ({count}, 2), height and width of "
            "each image in pixel_values"
        )
    patches = sizes.astype(int) // patch
    per_image = patches.prod(axis=1)
    vision_language.check_image_tokens(
        arrays["input_ids"],
        config.image_tokens,
        count,
        int(per_image.sum()),
        f"{', '.join(map(str, per_image.tolist()[:8])) or 'none'}, one number per image, the "
        f"whole patches of {patch} x {patch} pixels in its image_sizes",
    )
    if pixels is None or not count:
        return arrays
    height, width = (
        padding.canvas_side(config.vision.side, max(int(side), 1)) * patch
        for side in patches.max(axis=0)
    )
    arrays["pixel_values"] = padding.fit_canvas(pixels, height, width)
    arrays["image_sizes"] = sizes
    return arrays


def read_processor(directory: Path) -> Any:
    """Loads the processor of a checkpoint: transformers' class, or ours of Pixtral.

    Raises:
        ValueError: the processor does not load.
    """
    tower = checkpoint.read_json(directory / "config.json").get("vision_config", {})
    if tower.get("model_type") == "pixtral":
        return pixtral_processor.read_processor(directory)
    return port.read_processor(directory)


def complete_processor(processor: Any, config: Config, directory: Path) -> None:
    """Sets the image-token settings that a processor's files lack, from config.json.

    Before 2025, transformers expanded the image token in the model, and checkpoints had no
    processor_config.json, or one with fewer values. Values in the file are kept.

    Args:
        processor: the processor from transformers; changed in place.
        config: the model's configuration.
        directory: the checkpoint.
    """
    if config.tower == "pixtral":
        return
    said = port.read_settings(directory, "processor_config.json")
    for name, value in {
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "full" if config.keep_first_position else "default",
        "num_additional_image_tokens": config.class_positions,
    }.items():
        if said.get(name) is None:
            setattr(processor, name, value)


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out the patches of each picture; a class position, where there is one, has no cell."""
    token = config.image_tokens[0]
    if config.tower != "pixtral":
        return llava_like.patch_layout(config, arrays, read_processor)
    pixels, sizes = arrays.get("pixel_values"), arrays.get("image_sizes")
    if sizes is None:
        sizes = np.zeros((0, 2)) if pixels is None else [pixels.shape[2:]] * len(pixels)
    side = config.vision.patch_size
    grids = [(height // side, width // side) for height, width in np.asarray(sizes, int).tolist()]
    # A picture reaches beyond its last whole patches.
    inside = [
        (0.0, 0.0, width / (columns * side), height / (rows * side))
        for (height, width), (rows, columns) in zip(sizes, grids, strict=True)
    ]
    lengths, given = (
        (rows * columns for rows, columns in grids),
        iter(zip(grids, inside, strict=True)),
    )

    def of_picture(places: np.ndarray) -> patches.PatchLayout:
        (rows, columns), picture = next(given)
        return patches.grid(places, rows, columns, picture)

    return [
        [of_picture(places) for places in patches.runs(row, token, lengths)]
        for row in arrays["input_ids"]
    ]


PORT = Port(
    config=Config,
    module=Llava,
    inputs=INPUTS,
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=llava_like.canonical_name,
    transformers_name=llava_like.transformers_name,
    read_processor=read_processor,
    complete_processor=complete_processor,
    patch_layout=patch_layout,
    crops_pictures=True,
)
