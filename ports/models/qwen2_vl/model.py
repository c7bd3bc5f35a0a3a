"""Qwen2-VL (Wang et al. 2024): images and videos of any size, a Qwen2 decoder with M-RoPE.

B batch, T positions, D width, I images (or videos), F frames, P patches per frame, M the side of
the square of patches that becomes one token.

A grid (t, h, w) gives the number of frames and the rows and columns of patches of an image or
video, which has t x h / M x w / M tokens. Their rotary positions have three components (time,
height, width), which continue after the text before them; text has the same position in all three.
The text after them continues after their largest position, as in training (see `VIDEO_POSITIONS`
for another rule).

Qwen2.5-VL and Qwen3-VL (`ports.models.qwen2_5_vl`, `ports.models.qwen3_vl`) are this model with
another tower and other positions.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from ports import names
from ports.models.port import Port
from ports.models.qwen2_vl import vision as qwen2_vision
from ports.models.qwen2_vl.config import VIDEO_POSITIONS, Config
from ports.models.qwen2_vl.inputs import (
    INPUTS,
    KINDS,
    PIECES,
    example_inputs,
    patch_layout,
    prepare_inputs,
)
from ports.models.qwen2_vl.processor import Processor
from ports.nn import decoder, layers, vision_language
from ports.parallel import sharding

Array = jax.Array

names.number("mlp")  # in the merger
# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **qwen2_vision.AXES,
}


class Qwen2VL(vision_language.VisionLanguageModel):
    """Replaces image and video tokens by the features from the tower."""

    config: Config
    decoder_path = ("model",)
    head_path = ("lm_head",)
    axes = AXES
    tower: ClassVar[type[qwen2_vision.Qwen2Vision]] = qwen2_vision.Qwen2Vision

    def setup(self):
        self.visual = self.tower(self.config.vision, self.dtype)
        self.model = decoder.Decoder(self.config.text, self.dtype)
        if not self.config.text.tie_embeddings:
            self.lm_head = layers.head(self.config.text.vocab_size, self.dtype)

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The Qwen2 decoder."""
        return self.model

    def see(self, pixels: Array, places: qwen2_vision.Places) -> tuple[Array, Sequence[Array]]:
        """Maps patches[F, P, values] to features [F, P / M^2, D] that replace the tokens, and those
        that are added to them after each of the decoder's first layers.
        """
        return self.visual(pixels, places), ()

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        if self.config.text.tie_embeddings:
            return sharding.logits(self.text_decoder.embed_tokens.attend(x))
        return sharding.logits(self.lm_head(x))

    position_inputs = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

    def positions(self, inputs: vision_language.Inputs) -> Array:
        """Returns the rotary positions int32[B, T, 3]: time, height and width of every token.

        A text token advances the position by one; the last token of an image or video by the number
        of tokens along its longest axis (see `VIDEO_POSITIONS`).
        """
        within, steps = self._walk(inputs)
        before = jnp.cumsum(steps, axis=1) - steps
        return before[..., None].astype(jnp.int32) + within

    def next_positions(self, inputs: vision_language.Inputs) -> Array:
        """Returns int32[B], the rotary position of the first token after the prompt.

        That is one more than the last token's, which by the rule "transformers-5" may be less than
        the positions of a video's last frames.
        """
        return self._walk(inputs)[1].sum(1, dtype=jnp.int32)

    def _walk(self, inputs: vision_language.Inputs) -> tuple[Array, Array]:
        """Returns positions in an image int32[B, T, 3], and by how much each token advances the
        position of the text, int[B, T].
        """
        tokens = jnp.asarray(inputs["input_ids"])
        real = vision_language.attention_mask(inputs) != 0
        steps = jnp.where(real, 1, 0)
        within = jnp.zeros((*tokens.shape, 3), jnp.int32)
        for (_, name), token in zip(KINDS, self.config.image_tokens, strict=True):
            if inputs.get(name) is not None:
                of_kind, grid = (tokens == token) & real, jnp.asarray(inputs[name])
                interval = jnp.ones(len(grid))
                if name == "video_grid_thw":
                    interval *= self.config.video_interval(inputs.get("second_per_grid_ts"))
                place, step = _within(of_kind, grid, interval, self.config)
                steps = jnp.where(of_kind, step, steps)
                within = jnp.where(of_kind[..., None], place, within)
        return within, steps

    def image_features(self, pixels: Array, grid: Array) -> tuple[Array, Sequence[Array], Array]:
        """Computes the features of images or videos.

        Args:
            pixels: float[patches, values], all patches of a batch in a row, as the processor
                returns them (attention is over all patches, with a mask); or float[F, P, values],
                frames padded to the same number of patches by `prepare_inputs`.
            grid: int[I, 3].

        Returns:
            As `see`, and bool[F, P / M^2], which of the features are valid.
        """
        places, real = self.patch_places(pixels, grid)
        features, deep = self.see(pixels.reshape(*real.shape, -1), places)
        return features, deep, real[:, :: self.config.vision.merge_size**2]

    def patch_places(self, pixels: Array, grid: Array) -> tuple[qwen2_vision.Places, Array]:
        """Returns where the patches are, and bool[F, P], which of them are valid."""
        merge = self.config.vision.merge_size
        sizes = grid[:, 1] * grid[:, 2]  # patches per frame
        if pixels.ndim == 2:
            index = jnp.arange(len(pixels))[None]
            image, index_in_image = _locate(index, grid[:, 0] * sizes)
            place = index_in_image % sizes[image]
            frame = index - place  # a frame's number is the index of its first patch
            real = jnp.ones(index.shape, bool)
        else:
            frame = jnp.arange(len(pixels))[:, None]
            image, _ = _locate(frame, grid[:, 0])
            place = jnp.arange(pixels.shape[1])[None]
            # Frames beyond those of the grid are padding.
            real = (place < sizes[image]) & (frame < grid[:, 0].sum())
            frame = jnp.where(real, 0, -1)
        places = qwen2_vision.patch_places(place, grid[image, 1], grid[image, 2], frame, merge)
        return places, real

    def embed_with_injections(
        self, inputs: vision_language.Inputs
    ) -> tuple[Array, Sequence[Array]]:
        """Embeds the processor's arrays, or those from `prepare_inputs`.

        Returns:
            The input of the first layer [B, T, D], and what is added after each of the first ones.
        """
        tokens = jnp.asarray(inputs["input_ids"])
        x, added = self.text_decoder.embed_tokens(tokens), []
        for (pixels, grid), token in zip(KINDS, self.config.image_tokens, strict=True):
            if inputs.get(pixels) is not None:
                features, deep, valid = self.image_features(
                    jnp.asarray(inputs[pixels]), jnp.asarray(inputs[grid])
                )
                of_kind = tokens == token
                x = _place(x, of_kind, features, valid)
                added = added or [jnp.zeros_like(x)] * len(deep)
                added = [
                    _place(there, of_kind, new, valid)
                    for there, new in zip(added, deep, strict=True)
                ]
        return x, added

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps the processor's arrays, or those from `prepare_inputs`, to [B, T, D]."""
        return self.embed_with_injections(inputs)[0]


def _place(x: Array, of_kind: Array, features: Array, valid: Array) -> Array:
    """Puts the valid ones of features [F, P / M^2, D] at the positions bool[B, T] of x[B, T, D]."""
    flat = features.reshape(-1, features.shape[-1])
    return vision_language.place_images(x, of_kind, flat, valid.reshape(-1))


def _locate(index: Array, lengths: Array) -> tuple[Array, Array]:
    """Returns which of several consecutive runs each index is in, and its index in that run."""
    ends = jnp.cumsum(lengths)
    run = jnp.clip(jnp.searchsorted(ends, index, side="right"), 0, len(lengths) - 1)
    return run, index - (ends - lengths)[run]


def _within(of_kind: Array, grid: Array, interval: Array, config: Config) -> tuple[Array, Array]:
    """Returns positions of image tokens in their image int32[B, T, 3], and steps int32[B, T].

    `of_kind` bool[B, T] marks the image tokens, which belong to the images in order; `interval`
    float[I] has the positions from a frame to the next.
    """
    tokens = grid // jnp.array([1, config.vision.merge_size, config.vision.merge_size])
    ordinal = (jnp.cumsum(of_kind.reshape(-1)) - 1).reshape(of_kind.shape)
    image, index = _locate(ordinal, tokens.prod(axis=1))
    frames, height, width = jnp.moveaxis(tokens[image], -1, 0)
    if config.frames_apart:
        frames, index = jnp.ones_like(frames), index % (height * width)
    interval = interval.astype(jnp.float32)[image]
    time = (index // (height * width) * interval).astype(jnp.int32)
    place = jnp.stack([time, index // width % height, index % width], axis=-1)
    step = jnp.maximum(height, width)
    if config.video_positions == "original":
        step = jnp.maximum(step, ((frames - 1) * interval).astype(jnp.int32) + 1)
    last = index == frames * height * width - 1
    return place.astype(jnp.int32), jnp.where(last, step, 0)


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


PORT = Port(
    config=Config,
    module=Qwen2VL,
    inputs=INPUTS,
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=canonical_name,
    transformers_name=transformers_name,
    read_processor=Processor.read,
    takes_videos=True,
    image_text="<|vision_start|>{}<|vision_end|>",
    pieces=PIECES,
    patch_layout=patch_layout,
    options={"video_positions": VIDEO_POSITIONS},
)
