"""SigLIP's vision tower (Zhai et al. 2023), for squares or for images of any size and shape.

I images, P = h x w patches of the common grid, D width.

Images of any size are in the upper left corner of a common canvas. A patch is valid if all its
pixels belong to the image; other patches are masked and affect nothing. The learnt positions of one
square grid are spread over every image whatever its size (Dehghani et al. 2023, Patch n' Pack).
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports.nn import clip_vision, encoder, layers
from ports.parallel import sharding

Array = jax.Array
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)

# Sharding rules of the parameters.
AXES: sharding.Axes = {
    **encoder.AXES,
    **dict.fromkeys(("patch_embedding", "position_embedding", "post_layernorm"), ()),
}


def patch_mask(pixel_mask: AnyArray, patch_size: int, *, whole: bool = True) -> AnyArray:
    """Converts a mask of pixels to a mask of patches.

    Args:
        pixel_mask: bool or int[I, height, width], True where a pixel belongs to the image.
        patch_size: pixels per side of a patch.
        whole: whether all pixels of a valid patch belong to the image (Idefics2), or at least one
            (Idefics3).

    Returns:
        bool[I, h, w], the valid patches.
    """
    xp: Any = np if isinstance(pixel_mask, np.ndarray) else jnp
    images, height, width = pixel_mask.shape
    h, w = height // patch_size, width // patch_size
    pixels = pixel_mask[:, : h * patch_size, : w * patch_size].astype(bool)
    reduce = xp.all if whole else xp.any
    return reduce(pixels.reshape(images, h, patch_size, w, patch_size), (2, 4))


def spread(longest: int, side: int) -> np.ndarray:
    """Assigns learnt positions to n patches in a line, for each n.

    Patch i of n starts at the fraction i / n of the image and gets the last position that does not
    start after it. If both start at the same point, rounding decides. It is float32 as in the
    original, which rounds the factor 1 / n before the product, so that some patches (of 25, 49, 50
    and 55 in a line, for 70 positions) get the position before.

    Args:
        longest: largest n.
        side: number of positions.

    Returns:
        int32[longest + 1, longest]; row n has the positions of n patches.
    """
    counts = np.maximum(np.arange(longest + 1), 1).astype(np.float32)
    starts = np.arange(longest, dtype=np.float32) * (np.float32(1) / counts)[:, None]
    positions = (np.arange(1, side) / side).astype(np.float32)
    return np.searchsorted(positions, starts, side="right").astype(np.int32)


def position_ids(mask: Array, side: int) -> Array:
    """Assigns each patch a row of the table of learnt positions.

    Args:
        mask: bool[I, h, w], the valid patches.
        side: the table has side x side positions.

    Returns:
        int32[I, h, w]; 0 for invalid patches.
    """
    _, h, w = mask.shape
    vertical = jnp.asarray(spread(h, side))[mask[:, :, 0].sum(1)]
    horizontal = jnp.asarray(spread(w, side))[mask[:, 0, :].sum(1)]
    return jnp.where(mask, vertical[:, :, None] * side + horizontal[:, None, :], 0)


class VisionEmbeddings(nn.Module):
    """Embeds patches by a strided convolution and adds learnt positions."""

    config: clip_vision.VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, pixels: Array, mask: Array | None = None) -> Array:
        """Maps pixels[I, 3, height, width] and mask bool[I, h, w] to [I, P, D].

        Without a mask, images are squares of the tower's own size.
        """
        cfg = self.config
        patches = clip_vision.embed_patches(cfg, True, self.dtype, pixels)
        table = nn.Embed(
            cfg.num_patches, cfg.hidden_size, dtype=self.dtype, name="position_embedding"
        )
        if mask is None:
            return patches + table(jnp.arange(cfg.num_patches))
        return patches + table(position_ids(mask, cfg.side).reshape(len(pixels), -1))


class SiglipVisionTransformer(nn.Module):
    """The tower: embeddings, pre-norm blocks in which all patches see each other, a norm."""

    config: clip_vision.VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        cfg = self.config
        self.embeddings = VisionEmbeddings(cfg, self.dtype)
        self.encoder = encoder.Encoder(cfg, self.dtype)
        self.post_layernorm = layers.layer_norm(cfg.norm_eps, self.dtype)

    def __call__(self, pixels: Array, mask: Array | None = None) -> Array:
        """Maps pixels[I, 3, height, width], mask bool[I, h, w] to normalised states [I, P, D]."""
        return self.all_states(pixels, mask)[1]

    def all_states(
        self, pixels: Array, mask: Array | None = None
    ) -> tuple[tuple[Array, ...], Array]:
        """Returns the states [I, P, D] before and after each block, and the last ones normalised.

        Without a mask, images are squares of the tower's own size.
        """
        visible = None if mask is None else mask.reshape(len(pixels), 1, 1, -1)
        states = self.encoder(self.embeddings(pixels, mask), visible)
        return states, self.post_layernorm(states[-1])


class SiglipVisionModel(nn.Module):
    """Wraps the tower, for the extra level in the checkpoints' names."""

    config: clip_vision.VisionConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.vision_model = SiglipVisionTransformer(self.config, self.dtype)

    def __call__(self, pixels: Array) -> tuple[tuple[Array, ...], Array]:
        """Maps pixels[I, 3, height, width] to `SiglipVisionTransformer.all_states`."""
        return self.vision_model.all_states(pixels)
