"""Idefics2 (Laurençon et al. 2024): a SigLIP tower, a perceiver resampler, a Mistral decoder.

B batch, T positions, D the decoder's width, I images, P = h x w patches per image, L latents, which
is also the number of tokens per image in a prompt.

Images keep their size and shape: the tower processes all patches, and the resampler turns them into
L features. The processor splits images: five crops are five images here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports.inputs import padding
from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Box, Layouts
from ports.models.port import Port
from ports.nn import clip_vision as vision
from ports.nn import decoder, layers, perceiver, siglip, vision_language
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **siglip.AXES,
    **perceiver.AXES,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers Idefics2Config."""

    text: decoder.DecoderConfig
    vision: vision.VisionConfig
    perceiver: perceiver.PerceiverConfig
    image_tokens: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers Idefics2Config.

        Raises:
            ValueError: a value is not implemented.
        """
        return cls(
            # Only the top-level configuration counts: in transformers, tie_word_embeddings in
            # text_config has no effect for this model.
            text=decoder.DecoderConfig.from_hf(
                config.text_config, bool(config.tie_word_embeddings), "mistral"
            ),
            vision=vision.VisionConfig.from_hf(config.vision_config, "idefics2_vision"),
            perceiver=perceiver.PerceiverConfig.from_hf(config.perceiver_config),
            image_tokens=(config.image_token_id,),
        )

    @property
    def tokens_per_image(self) -> int:
        """Image tokens per image (or crop) in a prompt."""
        return self.perceiver.num_latents


class Connector(nn.Module):
    """Maps the tower's width to the decoder's, and P patches to L features."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        text = self.config.text
        self.modality_projection = layers.GatedMLP(
            text.intermediate_size,
            text.hidden_act,
            dtype=self.dtype,
            output_size=text.hidden_size,
        )
        self.perceiver_resampler = perceiver.PerceiverResampler(
            self.config.perceiver, text.hidden_size, self.dtype
        )

    def __call__(self, features: Array, mask: Array) -> Array:
        """Maps features[I, P, tower width] and mask bool[I, P] to [I, L, D]."""
        return self.perceiver_resampler(self.modality_projection(features), mask)


class Backbone(nn.Module):
    """Wraps everything but the head, for the extra level in the checkpoints' names."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.vision_model = siglip.SiglipVisionTransformer(self.config.vision, self.dtype)
        self.connector = Connector(self.config, self.dtype)
        self.text_model = decoder.Decoder(self.config.text, self.dtype)

    def image_features(self, pixels: Array, pixel_mask: Array) -> Array:
        """Maps pixels[I, 3, height, width] and pixel_mask[I, height, width] to [I, L, D]."""
        mask = siglip.patch_mask(pixel_mask, self.config.vision.patch_size)
        return self.connector(self.vision_model(pixels, mask), mask.reshape(len(mask), -1))


# The processor's arrays that the port uses; the rest are ignored.
INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "pixel_values",
    "pixel_attention_mask",
)


class Idefics(vision_language.VisionLanguageModel):
    """Replaces image tokens by features; what Idefics2 and Idefics3 have in common.

    Attributes:
        backbone: class of the module with everything but the head.
    """

    decoder_path = ("model", "text_model")
    head_path = ("lm_head",)
    backbone: ClassVar[type[nn.Module]]

    def setup(self):
        self.model = self.backbone(self.config, self.dtype)
        if not self.config.text.tie_embeddings:
            self.lm_head = layers.head(self.config.text.vocab_size, self.dtype)

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The decoder."""
        return self.model.text_model

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        if self.config.text.tie_embeddings:
            return sharding.logits(self.text_decoder.embed_tokens.attend(x))
        return sharding.logits(self.lm_head(x))

    def image_features(self, pixels: Array, pixel_mask: Array | None = None) -> Array:
        """Computes the decoder's inputs for images.

        Args:
            pixels: float[I, 3, height, width].
            pixel_mask: bool or int[I, height, width], True where a pixel belongs to the image; None
                for everywhere.

        Returns:
            [I, L, D].
        """
        if pixel_mask is None:
            pixel_mask = jnp.ones((len(pixels), *pixels.shape[2:]), bool)
        return self.model.image_features(pixels, pixel_mask)

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Embeds tokens and images.

        Args:
            inputs: input_ids int[B, T]; optional pixel_values[R, I, 3, height, width] and
                pixel_attention_mask[R, I, height, width]. Only the order of the images counts, not
                how they are divided into R rows.

        Returns:
            [B, T, D].
        """
        tokens = jnp.asarray(inputs["input_ids"])
        x = self.text_decoder.embed_tokens(tokens)
        if inputs.get("pixel_values") is None:
            return x
        pixels, mask = _flat(inputs["pixel_values"]), inputs.get("pixel_attention_mask")
        features = self.image_features(pixels, None if mask is None else _flat(mask))
        # Images that are all zero are padding and give no features.
        valid = jnp.repeat((pixels != 0).any((1, 2, 3)), features.shape[1])
        return vision_language.place_images(
            x,
            vision_language.is_image(tokens, self.config.image_tokens),
            features.reshape(-1, features.shape[-1]),
            valid,
        )


class Idefics2(Idefics):
    """Replaces image tokens by the features from the resampler."""

    config: Config
    axes = AXES
    backbone: ClassVar[type[nn.Module]] = Backbone

    @property
    def kv_heads(self) -> sharding.KVHeads:
        """{module path: number of key-value heads} of the decoder and the resampler."""
        resampler = ("model", "connector", "perceiver_resampler")
        return {**super().kv_heads, resampler: self.config.perceiver.num_kv_heads}


def _flat(x: Array | np.ndarray) -> Array:
    """Merges the first two axes: [B, I, ...] -> [B * I, ...]."""
    return jnp.asarray(x).reshape(-1, *x.shape[2:])


def example_inputs(config: Any, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image per row, of the tower's own size."""
    cfg = config.vision
    ids = jax.ShapeDtypeStruct(
        (batch, length or config.tokens_per_image + vision_language.EXAMPLE_TEXT), np.int32
    )
    size = (cfg.image_size, cfg.image_size)
    return {
        "input_ids": ids,
        "attention_mask": ids,
        "pixel_values": jax.ShapeDtypeStruct((batch, 1, cfg.num_channels, *size), np.float32),
        "pixel_attention_mask": jax.ShapeDtypeStruct((batch, 1, *size), bool),
    }


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rearranges the processor's arrays so that images of all sizes compile only a few programs.

    Padding images are dropped, which leaves one image per row: pixel_values[I, 1, 3, height,
    width]. Height and width are those of the largest image, cut to whole patches and padded to a
    multiple of 1/14 of the tower's grid (5 of 70 patches in Idefics2-8B). The tower's states have
    that grid; `siglip.patch_mask` of the returned mask tells which of them are valid.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: images and image tokens do not match, or an image is too small.
    """
    arrays = dict(inputs)
    pixels, mask = arrays.pop("pixel_values", None), arrays.pop("pixel_attention_mask", None)
    images = None if pixels is None else real_images(config.vision, pixels, mask)
    num_images = 0 if images is None else len(images[0])
    per_image = config.tokens_per_image
    vision_language.check_image_tokens(
        arrays["input_ids"],
        config.image_tokens,
        num_images,
        num_images * per_image,
        f"{per_image} per image or crop, the processor's image_seq_len "
        "(an image whose values are all zero counts as padding)",
    )
    if images is not None and num_images:
        pixels, mask = images
        patches = siglip.patch_mask(mask, config.vision.patch_size)
        tiny = np.flatnonzero(~patches.any((1, 2)))
        if len(tiny):
            height, width = mask[tiny[0]].any(1).sum(), mask[tiny[0]].any(0).sum()
            patch = config.vision.patch_size
            raise ValueError(
                f"image {tiny[0]} of the batch has {height} x {width} pixels, expected at least a "
                f"patch of {patch} x {patch}; let the processor resize it, or leave it out"
            )
        height, width = (
            padding.canvas_side(config.vision.side, int(np.flatnonzero(patches.any(axes))[-1]) + 1)
            * config.vision.patch_size
            for axes in ((0, 2), (0, 1))
        )
        arrays["pixel_values"] = padding.fit_canvas(pixels, height, width)[:, None]
        arrays["pixel_attention_mask"] = padding.fit_canvas(mask, height, width)[:, None]
    return arrays


def real_images(
    tower: vision.VisionConfig, pixels: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Drops padding images.

    Args:
        tower: the tower's configuration.
        pixels: [B, I, 3, height, width].
        mask: [B, I, height, width] or None.

    Returns:
        The real images [I, 3, height, width] and their masks bool[I, height, width].

    Raises:
        ValueError: the arrays have other shapes.
    """
    if pixels.ndim != 5 or pixels.shape[2] != tower.num_channels:
        raise ValueError(
            f"pixel_values has shape {pixels.shape}; expected [batch, images, "
            f"{tower.num_channels}, height, width], as the processor pads it (do_pad)"
        )
    expected = (*pixels.shape[:2], *pixels.shape[3:])
    if mask is None:
        mask = np.ones(expected, bool)
    elif mask.shape != expected:
        raise ValueError(
            f"pixel_attention_mask has shape {mask.shape}; expected {expected}, the shape of "
            "pixel_values without the channels"
        )
    real = pixels.any((2, 3, 4))
    return pixels[real], mask[real].astype(bool)


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in any known checkpoint to the port's; None for buffers.

    The port, the Hub and transformers 5 have the same names.
    """
    if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return None
    return name


# Crops of a split picture: left and right at the top, then at the bottom. The whole follows them.
QUARTERS: tuple[Box, ...] = (
    (0, 0, 0.5, 0.5),
    (0.5, 0, 1, 0.5),
    (0, 0.5, 0.5, 1),
    (0.5, 0.5, 1, 1),
)


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out the latents of each picture; a latent may see all of its crop.

    Nothing in the arrays tells a split picture from five pictures. The processor's
    `do_image_splitting` does; without a processor, rows of five pictures each are taken as split.

    Raises:
        ValueError: the tokens are not whole pictures.
    """
    token, count = config.image_tokens[0], config.tokens_per_image
    crops = [patches.equal_runs(row, token, count) for row in arrays["input_ids"]]
    size = len(QUARTERS) + 1
    image_processor = getattr(read_processor(), "image_processor", None)
    split = getattr(
        image_processor, "do_image_splitting", all(len(row) % size == 0 for row in crops)
    )
    if not split:
        return [[patches.latents(each[None], [patches.ALL]) for each in row] for row in crops]
    if wrong := next((row for row in crops if len(row) % size), None):
        raise ValueError(
            f"a prompt has {len(wrong)} crops, but the processor splits every picture into {size}; "
            "pass arrays of this checkpoint's processor"
        )
    return [
        [
            dataclasses.replace(
                patches.latents(np.stack(row[i : i + size - 1]), QUARTERS),
                whole=patches.latents(row[i + size - 1][None], [patches.ALL]),
            )
            for i in range(0, len(row), size)
        ]
        for row in crops
    ]


PORT = Port(
    config=Config,
    module=Idefics2,
    inputs=INPUTS,
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=canonical_name,
    patch_layout=patch_layout,
)
