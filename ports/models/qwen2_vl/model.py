"""Qwen2-VL (Wang et al. 2024): images and videos of any size, a Qwen2 decoder with M-RoPE.

B batch, T positions, D width, I images (or videos), F frames, P patches per frame, M the side of
the square of patches that becomes one token.

A grid (t, h, w) gives the number of frames and the rows and columns of patches of an image or
video, which has t x h / M x w / M tokens. Their rotary positions have three components (time,
height, width), which continue after the text before them; text has the same position in all three.
The text after them continues after their largest position, as in training (see `VIDEO_POSITIONS`
for another rule).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports import names
from ports.inputs import padding
from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.models.port import Port
from ports.models.qwen2_vl import vision as qwen2_vision
from ports.models.qwen2_vl.processor import read_processor
from ports.nn import decoder, layers, vision_language
from ports.parallel import sharding

Array = jax.Array

names.number("mlp")  # in the merger
# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **qwen2_vision.AXES,
}

# The processor's arrays that the port uses; the rest (mm_token_type_ids) is ignored.
INPUTS = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
)
# Names of the patches and of their grids, for images and for videos.
_KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
# First position of the text after a video: "original", as in the original code, transformers 4 and
# vLLM, is after the largest position along all three axes. "transformers-5" ignores time, so if
# there are more frames than rows and columns, the text has positions inside the video.
VIDEO_POSITIONS = ("original", "transformers-5")


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers Qwen2VLConfig."""

    text: decoder.DecoderConfig
    vision: qwen2_vision.VisionConfig
    image_tokens: tuple[int, int]  # ids of the image token and the video token
    video_positions: str = VIDEO_POSITIONS[0]

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers Qwen2VLConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        text = decoder.DecoderConfig.from_hf(
            config.text_config, bool(config.tie_word_embeddings), "qwen2_vl_text"
        )
        if text.rope.sections is None:
            raise ValueError(
                "text_config has no mrope_section; expected the numbers of rotary frequencies for "
                "time, height and width, such as [16, 24, 24]"
            )
        vision = qwen2_vision.VisionConfig.from_hf(config.vision_config)
        if vision.output_size != text.hidden_size:
            raise ValueError(
                f"vision_config.hidden_size is {vision.output_size}; expected the decoder's width, "
                f"{text.hidden_size}"
            )
        return cls(text, vision, (config.image_token_id, config.video_token_id))


class Qwen2VL(vision_language.VisionLanguageModel):
    """Replaces image and video tokens by the features from the tower."""

    config: Config
    decoder_path = ("model",)
    head_path = ("lm_head",)
    axes = AXES

    def setup(self):
        self.visual = qwen2_vision.Qwen2Vision(self.config.vision, self.dtype)
        self.model = decoder.Decoder(self.config.text, self.dtype)
        if not self.config.text.tie_embeddings:
            self.lm_head = layers.head(self.config.text.vocab_size, self.dtype)

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The Qwen2 decoder."""
        return self.model

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        if self.config.text.tie_embeddings:
            return sharding.logits(self.model.embed_tokens.attend(x))
        return sharding.logits(self.lm_head(x))

    def positions(self, inputs: vision_language.Inputs) -> Array:
        """Returns the rotary positions int32[B, T, 3]: time, height and width of every token.

        A text token advances the position by one; the last token of an image or video by the number
        of tokens along its longest axis (see `VIDEO_POSITIONS`).
        """
        tokens = jnp.asarray(inputs["input_ids"])
        real = vision_language.attention_mask(inputs) != 0
        steps = jnp.where(real, 1, 0)
        within = jnp.zeros((*tokens.shape, 3), jnp.int32)
        for (_, grid), token in zip(_KINDS, self.config.image_tokens, strict=True):
            if inputs.get(grid) is not None:
                of_kind = (tokens == token) & real
                place, step = _within(of_kind, jnp.asarray(inputs[grid]), self.config)
                steps = jnp.where(of_kind, step, steps)
                within = jnp.where(of_kind[..., None], place, within)
        before = jnp.cumsum(steps, axis=1) - steps
        return before[..., None].astype(jnp.int32) + within

    def image_features(self, pixels: Array, grid: Array) -> tuple[Array, Array]:
        """Computes the features of images or videos.

        Args:
            pixels: float[patches, values], all patches of a batch in a row, as the processor
                returns them (attention is over all patches, with a mask); or float[F, P, values],
                frames padded to the same number of patches by `prepare_inputs`.
            grid: int[I, 3].

        Returns:
            Features [F, P / M^2, D], and bool[F, P / M^2], which of them are valid.
        """
        merge = self.config.vision.merge_size
        sizes = grid[:, 1] * grid[:, 2]  # patches per frame
        if pixels.ndim == 2:
            index = jnp.arange(len(pixels))
            image, within = _locate(index, grid[:, 0] * sizes)
            frame = within // sizes[image]
            place = within % sizes[image]
            same = (image[:, None] == image) & (frame[:, None] == frame)
            places = qwen2_vision.patch_places(place[None], grid[image, 2], merge)
            features = self.visual(pixels[None], places, same[None, None])
            return features, jnp.ones(features.shape[:2], bool)
        image, _ = _locate(jnp.arange(len(pixels)), grid[:, 0])
        index = jnp.arange(pixels.shape[1])
        real = index < sizes[image, None]
        places = qwen2_vision.patch_places(index, grid[image, 2:], merge)
        features = self.visual(pixels, places, real[:, None, None])
        return features, real[:, :: merge**2]

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps the processor's arrays, or those from `prepare_inputs`, to [B, T, D]."""
        tokens = jnp.asarray(inputs["input_ids"])
        x = self.model.embed_tokens(tokens)
        for (pixels, grid), token in zip(_KINDS, self.config.image_tokens, strict=True):
            if inputs.get(pixels) is not None:
                features, counts = self.image_features(
                    jnp.asarray(inputs[pixels]), jnp.asarray(inputs[grid])
                )
                flat = features.reshape(-1, features.shape[-1])
                x = vision_language.place_images(x, tokens == token, flat, counts.reshape(-1))
        return x


def _locate(index: Array, lengths: Array) -> tuple[Array, Array]:
    """Returns which of several consecutive runs each index is in, and its index in that run."""
    ends = jnp.cumsum(lengths)
    run = jnp.clip(jnp.searchsorted(ends, index, side="right"), 0, len(lengths) - 1)
    return run, index - (ends - lengths)[run]


def _within(of_kind: Array, grid: Array, config: Config) -> tuple[Array, Array]:
    """Returns positions of image tokens in their image int32[B, T, 3], and steps int32[B, T].

    `of_kind` bool[B, T] marks the image tokens, which belong to the images in order.
    """
    tokens = grid // jnp.array([1, config.vision.merge_size, config.vision.merge_size])
    ordinal = (jnp.cumsum(of_kind.reshape(-1)) - 1).reshape(of_kind.shape)
    image, index = _locate(ordinal, tokens.prod(axis=1))
    frames, height, width = jnp.moveaxis(tokens[image], -1, 0)
    place = jnp.stack([index // (height * width), index // width % height, index % width], axis=-1)
    last = index == tokens.prod(axis=1)[image] - 1
    step = jnp.maximum(height, width)
    if config.video_positions == "original":
        step = jnp.maximum(step, frames)
    return place.astype(jnp.int32), jnp.where(last, step, 0)


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image of 16 x 16 patches per row."""
    patches = 256
    length = length or patches // config.vision.merge_size**2 + vision_language.EXAMPLE_TEXT
    ids = jax.ShapeDtypeStruct((batch, length), np.int32)
    pixels = (batch, patches, config.vision.patch_values)
    return {
        "input_ids": ids,
        "attention_mask": ids,
        "pixel_values": jax.ShapeDtypeStruct(pixels, np.float32),
        "image_grid_thw": jax.ShapeDtypeStruct((batch, 3), np.int32),
    }


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays and prepares them for the module.

    Pads the patches to one row per frame, pixel_values[F, P, values], so that few shapes compile
    and attention is computed within frames. P is the largest frame's number of patches, rounded up.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: grids, patches and image tokens do not match.
    """
    arrays = dict(inputs)
    for (pixels, grid), token in zip(_KINDS, config.image_tokens, strict=True):
        images = _grid(config, arrays, pixels, grid)
        per_image = images.prod(axis=1) // config.vision.merge_size**2
        what = "image" if pixels == "pixel_values" else "video"
        vision_language.check_image_tokens(
            arrays["input_ids"],
            (token,),
            len(images),
            int(per_image.sum()),
            f"{', '.join(map(str, per_image.tolist()[:8])) or 'none'}, one number per {what}, "
            f"according to {grid} (pass it along with {pixels})",
            what,
        )
        if len(images):
            _check_runs(arrays["input_ids"], token, per_image, what)
            arrays[pixels] = _by_frame(arrays[pixels], images)
    return arrays


def _grid(config: Config, arrays: Mapping[str, np.ndarray], pixels: str, grid: str) -> np.ndarray:
    """Checks and returns the grids int[I, 3]; int[0, 3] if there are no images."""
    patches, images = arrays.get(pixels), arrays.get(grid)
    if patches is None and images is None:
        return np.zeros((0, 3), int)
    if patches is None or images is None:
        there, missing = (grid, pixels) if patches is None else (pixels, grid)
        raise ValueError(
            f"inputs have {there} without {missing}; pass both, as the processor returns them"
        )
    values, merge = config.vision.patch_values, config.vision.merge_size
    if patches.ndim != 2 or patches.shape[1] != values:
        raise ValueError(
            f"{pixels} has shape {patches.shape}; expected [patches, {values}], flat patches of "
            f"{config.vision.patch_size} x {config.vision.patch_size} pixels"
        )
    if images.ndim != 2 or images.shape[1] != 3:
        raise ValueError(f"{grid} has shape {images.shape}; expected [images, 3]")
    bad = np.flatnonzero((images < 1).any(1) | (images[:, 1:] % merge).any(1))
    if len(bad):
        raise ValueError(
            f"{grid} of image {bad[0]} is {images[bad[0]].tolist()}; expected rows and columns in "
            f"multiples of {merge} patches: let the processor resize images smaller than "
            f"{merge} x {merge} patches"
        )
    if images.prod(axis=1).sum() != len(patches):
        raise ValueError(
            f"{grid} describes {images.prod(axis=1).sum()} patches, but {pixels} has "
            f"{len(patches)}; pass both from the same call of the processor"
        )
    return images


def _check_runs(input_ids: np.ndarray, token: int, per_image: np.ndarray, what: str) -> None:
    """Raises ValueError unless the tokens of each image are consecutive in one prompt."""
    rows, columns = np.nonzero(input_ids == token)
    ends = np.cumsum(per_image)
    first, last = ends - per_image, ends - 1
    apart = (columns[last] - columns[first] != per_image - 1) | (rows[last] != rows[first])
    if apart.any():
        i = int(np.argmax(apart))
        raise ValueError(
            f"the {per_image[i]} tokens of {what} {i}, according to its grid, are not consecutive "
            f"in one prompt; pass the {what}s in the order of the prompts"
        )


def _by_frame(patches: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Splits patches[sum, values] into frames [F, P, values], padded with zeros."""
    sizes = np.repeat(grid[:, 1] * grid[:, 2], grid[:, 0])
    longest = padding.bucket_length(int(sizes.max()))
    frames = np.zeros((len(sizes), longest, patches.shape[1]), np.float32)
    for frame, part in zip(frames, np.split(patches, np.cumsum(sizes)[:-1]), strict=True):
        frame[: len(part)] = part
    return frames


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in any known checkpoint to the port's; None for buffers.

    The port has the Hub's names. transformers 5 keeps them or writes `model.visual.` and
    `model.language_model.`.
    """
    if name.endswith("rotary_pos_emb.inv_freq") or name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def transformers_name(name: str) -> str:
    """Converts the port's name of a tensor to that in transformers 5 (see `canonical_name`)."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if "lm_head" not in name else name


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out merged patches; the processor only resizes a picture, so that they fill it."""
    grids = [arrays.get(grid) for _, grid in _KINDS]
    return patches.of_grids(
        arrays["input_ids"],
        dict(zip(config.image_tokens, grids, strict=True)),
        config.vision.merge_size,
    )


PORT = Port(
    config=Config,
    module=Qwen2VL,
    inputs=INPUTS,
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=canonical_name,
    transformers_name=transformers_name,
    read_processor=read_processor,
    image_text="<|vision_start|>{}<|vision_end|>",
    patch_layout=patch_layout,
    options={"video_positions": VIDEO_POSITIONS},
)
