"""Idefics3 (Laurençon et al. 2024) and SmolVLM (Marafioti et al. 2025): a SigLIP tower, a pixel
shuffle, a Llama decoder.

I images, P = h x w patches per image, S the shuffle's scale, D the decoder's width.

A picture is cut into tiles and followed by the whole, shrunk; each of them is an image here, and a
square. S x S neighbouring patches become one token. In the prompt, a tag with its row and column
precedes each tile. To SmolVLM a video is a series of images, with the time of each in the prompt.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts, PatchLayout
from ports.models import idefics2, smolvlm_processor
from ports.models.port import Port
from ports.nn import clip_vision as vision
from ports.nn import decoder, layers, siglip, vision_language
from ports.parallel import sharding

Array = jax.Array
_TAG = re.compile(r"<row_(\d+)_col_(\d+)>")

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **decoder.AXES,
    **siglip.AXES,
    "modality_projection.proj": ("embed", "mlp"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers Idefics3Config or SmolVLMConfig."""

    text: decoder.DecoderConfig
    vision: vision.VisionConfig
    scale: int  # S
    image_tokens: tuple[int, ...]
    vision_types: ClassVar[tuple[str, ...]] = ("idefics3_vision", "idefics3")

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads a transformers Idefics3Config or SmolVLMConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        # The files on the Hub name the tower after the whole model.
        given = config.vision_config.model_type
        known = cls.vision_types
        tower = vision.VisionConfig.from_hf(
            config.vision_config, given if given in known else known[0]
        )
        if config.scale_factor < 1 or tower.side % config.scale_factor:
            raise ValueError(
                f"scale_factor is {config.scale_factor}; expected a divisor of the tower's "
                f"{tower.side} patches per side"
            )
        return cls(
            # As for Idefics2, tie_word_embeddings in text_config has no effect.
            text=decoder.DecoderConfig.from_hf(
                config.text_config, bool(config.tie_word_embeddings), "llama"
            ),
            vision=tower,
            scale=config.scale_factor,
            image_tokens=(config.image_token_id,),
        )

    @property
    def tokens_per_image(self) -> int:
        """Image tokens per image of the tower's own size in a prompt."""
        return (self.vision.side // self.scale) ** 2


class SmolConfig(Config):
    """The values that the port needs from a transformers SmolVLMConfig."""

    vision_types: ClassVar[tuple[str, ...]] = ("smolvlm_vision", "smolvlm", *Config.vision_types)


def shuffle(x: Array, scale: int) -> Array:
    """Joins scale x scale neighbouring patches, row by row: [I, P, E] to [I, P / S^2, S^2 E]."""
    images, patches, width = x.shape
    side = round(patches**0.5) // scale
    x = x.reshape(images, side, scale, side, scale, width)
    return jnp.moveaxis(x, 2, 3).reshape(images, side * side, scale * scale * width)


class Projection(nn.Module):
    """Wraps a linear layer, for the extra level in the checkpoints' names."""

    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [I, P / S^2, S^2 E] to [I, P / S^2, D]."""
        return layers.dense(self.width, False, self.dtype, "proj")(x)


class Connector(nn.Module):
    """Maps the tower's width to the decoder's, and P patches to P / S^2 features."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.modality_projection = Projection(self.config.text.hidden_size, self.dtype)

    def __call__(self, features: Array) -> Array:
        """Maps features[I, P, E] to [I, P / S^2, D]."""
        return sharding.residual(self.modality_projection(shuffle(features, self.config.scale)))


class Backbone(nn.Module):
    """Wraps everything but the head, for the extra level in the checkpoints' names."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.vision_model = siglip.SiglipVisionTransformer(self.config.vision, self.dtype)
        self.connector = Connector(self.config, self.dtype)
        self.text_model = decoder.Decoder(self.config.text, self.dtype)

    def image_features(self, pixels: Array, pixel_mask: Array) -> Array:
        """Maps pixels[I, 3, height, width] and pixel_mask[I, height, width] to [I, P / S^2, D]."""
        mask = siglip.patch_mask(pixel_mask, self.config.vision.patch_size, whole=False)
        return self.connector(self.vision_model(pixels, mask))


class Idefics3(idefics2.Idefics):
    """Replaces image tokens by the features from the connector."""

    config: Config
    axes = AXES
    backbone: ClassVar[type[nn.Module]] = Backbone


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rearranges the processor's arrays so that few programs are compiled.

    Padding images are dropped, which leaves one image per row: pixel_values[I, 1, 3, height,
    width].

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: images and image tokens do not match, or an image is not a square of patches.
    """
    arrays = dict(inputs)
    pixels, mask = arrays.pop("pixel_values", None), arrays.pop("pixel_attention_mask", None)
    images, per_image = (), config.tokens_per_image
    if pixels is not None:
        images = idefics2.real_images(config.vision, pixels, mask)
        height, width = (side // config.vision.patch_size for side in images[0].shape[2:])
        if height != width or height % config.scale or not height:
            raise ValueError(
                f"pixel_values have {height} x {width} patches; expected a square whose side is a "
                f"multiple of scale_factor, {config.scale}, as the processor makes it"
            )
        per_image = (height // config.scale) ** 2
    num_images = len(images[0]) if images else 0
    vision_language.check_image_tokens(
        arrays["input_ids"],
        config.image_tokens,
        num_images,
        num_images * per_image,
        f"{per_image} per tile and whole picture, the processor's image_seq_len "
        "(an image whose values are all zero counts as padding)",
    )
    if num_images:
        arrays["pixel_values"], arrays["pixel_attention_mask"] = (x[:, None] for x in images)
    return arrays


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out the tiles of each picture, and the whole; the processor stretches it to the tiles.

    A tag before each tile has its row and column. Without a processor that knows these tags, every
    image is taken for a picture.
    """
    pixels = arrays.get("pixel_values")
    side = config.vision.image_size if pixels is None else pixels.shape[-1]
    side = side // config.vision.patch_size // config.scale
    tokenizer = getattr(read_processor(), "tokenizer", None)
    return [_pictures(ids, config.image_tokens[0], side, tokenizer) for ids in arrays["input_ids"]]


def _pictures(ids: np.ndarray, token: int, side: int, tokenizer: Any) -> list[PatchLayout]:
    """Returns the layouts of the pictures in a prompt int[T], of side x side tokens per image."""
    found: list[PatchLayout] = []
    tiles: list[np.ndarray] = []
    columns = 1
    for image in patches.equal_runs(ids, token, side**2):
        before = tokenizer and image[0] and tokenizer.convert_ids_to_tokens(int(ids[image[0] - 1]))
        if tag := _TAG.fullmatch(before or ""):
            tiles.append(image.reshape(side, side))
            columns = int(tag[2])  # of the last tile in the end
            continue
        layout = patches.grid(image, side, side)
        if tiles:
            cells = np.stack(tiles).reshape(-1, columns, side, side).swapaxes(1, 2)
            tiled = patches.grid(cells.reshape(-1), cells.shape[0] * side, columns * side)
            layout = dataclasses.replace(tiled, whole=layout)
        found.append(layout)
        tiles = []
    return found


PORT = Port(
    config=Config,
    module=Idefics3,
    inputs=idefics2.INPUTS,
    example_inputs=idefics2.example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=idefics2.canonical_name,
    pieces=("pixel_values", "pixel_attention_mask"),
    patch_layout=patch_layout,
)
SMOLVLM = dataclasses.replace(
    PORT,
    config=SmolConfig,
    read_processor=smolvlm_processor.Processor.read,
    takes_videos=True,
)
