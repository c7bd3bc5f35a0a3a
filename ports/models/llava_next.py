"""LLaVA-NeXT (Liu et al. 2024): LLaVA with pictures of any resolution, in tiles.

B batch, T positions, D width, I pictures, F features.

Each picture has the features of the whole, then those of its tiles, row by row, each row followed
by `image_newline` (see `anyres`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ports.inputs import patch_layout as patches
from ports.inputs.patch_layout import Layouts
from ports.models import anyres, llava, llava_like
from ports.models.anyres import Features
from ports.models.port import Port
from ports.nn import vision_language
from ports.parallel import sharding

Array = jax.Array

# Sharding rules of the parameters.
AXES: sharding.Axes = {**llava.AXES, "image_newline": ()}


@dataclasses.dataclass(frozen=True)
class Config(llava.Config):
    """The values that the port needs from a transformers LlavaNextConfig."""

    canvases: tuple[tuple[int, int], ...] = ()  # height and width in pixels, whole tiles

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers LlavaNextConfig.

        Raises:
            ValueError: a value is not implemented.
        """
        # Only the top-level value counts: in transformers, that of text_config has no effect.
        return cls.of(config, tied=bool(config.tie_word_embeddings))

    @classmethod
    def of(cls, config: Any, tied: bool, **more: Any) -> Self:
        """Returns the configuration of a family whose pictures are tiles.

        Raises:
            ValueError: a value is not implemented.
        """
        base = llava.Config.from_hf(config)
        base = dataclasses.replace(base, text=dataclasses.replace(base.text, tie_embeddings=tied))
        side = base.vision.image_size
        if base.tokens_per_image != base.vision.num_patches:
            raise ValueError(
                f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}, "
                f"which gives {base.tokens_per_image} features for {base.vision.num_patches} "
                "patches of a tile; expected one per patch"
            )
        canvases = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        if wrong := [canvas for canvas in canvases if canvas[0] % side or canvas[1] % side]:
            raise ValueError(
                f"image_grid_pinpoints has {list(wrong[0])}; expected multiples of the tower's "
                f"image_size {side}"
            )
        values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
        return cls(**{**values, "canvases": canvases, **more})

    def tiles(self, size: anyres.Size) -> tuple[int, int]:
        """Returns the rows and columns of tiles of a picture of this height and width."""
        height, width = anyres.best_canvas(size, self.canvases)
        return height // self.vision.image_size, width // self.vision.image_size

    def shape(self, size: anyres.Size) -> tuple[int, int]:
        """Returns the rows and columns of features that a picture's tiles give."""
        side = self.vision.side
        rows, columns = self.tiles(size)
        kept = anyres.shown_part(size, (rows * side, columns * side))
        return kept[0].stop - kept[0].start, kept[1].stop - kept[1].start

    def features(self, size: anyres.Size, first: int, end: int) -> Features:
        """Returns the features of a picture whose patches begin in row `first` of the table.

        Args:
            size: height and width of the picture in pixels.
            first: row of the table of its first patch.
            end: row of the table of the vector that ends rows.
        """
        side = self.vision.side
        whole = Features.of_rows(first + np.arange(side * side))
        index = anyres.tile_index(self.tiles(size), side, first + side * side)
        index = index[anyres.shown_part(size, index.shape)]
        shape = self.shape(size)
        whole_grid = index.shape == shape
        kept = Features.of_rows(index) if whole_grid else anyres.resampled(index, *shape)
        return Features.joined([whole, anyres.with_ends(kept, shape[0], end)])


# Row of the table of the vector that ends rows: after all tiles, whatever their number.
LAST = -1
INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_sizes")


class LlavaNext(llava.Llava):
    """Replaces image tokens by the features of pictures in tiles."""

    axes = AXES

    def setup(self):
        super().setup()
        shape = (self.config.text.hidden_size,)
        self.image_newline = self.param("image_newline", nn.initializers.normal(0.02), shape)

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps input_ids int[B, T], and tiles with their features' rows, to [B, T, D].

        `pixel_values` [tiles, 3, height, width], `feature_rows` int[F, 4] and `feature_weights`
        float[F, 4] are those of `prepare_inputs`; the processor's own arrays are prepared here, if
        the sizes of the images are not traced.
        """
        inputs = anyres.prepared(inputs, self.config, prepare_inputs)
        if inputs.get("pixel_values") is None:
            return self.place(inputs, None)
        features = self.table(jnp.asarray(inputs["pixel_values"]))
        rows, weights = inputs["feature_rows"], inputs["feature_weights"]
        return self.place(inputs, anyres.gather(features, jnp.asarray(rows), jnp.asarray(weights)))

    def table(self, pixels: Array) -> Array:
        """Returns [N, D], the patches of tiles [tiles, 3, height, width] and `image_newline`."""
        features = self.image_features(pixels)
        features = features.reshape(-1, features.shape[-1])
        return jnp.concatenate([features, self.image_newline.astype(features.dtype)[None]])


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch with one image per row, of one tile and the whole."""
    side, vision = config.vision.side, config.vision
    count = 2 * side * side + side
    length = length or count + vision_language.EXAMPLE_TEXT
    ids = jax.ShapeDtypeStruct((batch, length), np.int32)
    pixels = (2 * batch, vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": ids,
        "attention_mask": ids,
        "pixel_values": jax.ShapeDtypeStruct(pixels, np.float32),
        "feature_rows": jax.ShapeDtypeStruct((batch * count, 4), np.int32),
        "feature_weights": jax.ShapeDtypeStruct((batch * count, 4), np.float32),
    }


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks the processor's arrays, drops tiles of padding, and finds each feature's patches.

    Args:
        config: the model's configuration.
        inputs: the processor's arrays.

    Returns:
        The arrays that the module takes.

    Raises:
        ValueError: images and image tokens do not match.
    """
    arrays = dict(inputs)
    sizes, pixels = arrays.pop("image_sizes", None), arrays.pop("pixel_values", None)
    sizes = check_sizes(config, pixels, sizes)
    counts = [1 + rows * columns for rows, columns in map(config.tiles, sizes)]
    tiles = tiles_of(pixels, counts)
    starts = config.vision.num_patches * np.cumsum([0, *counts])
    features = Features.joined(
        config.features(size, int(first), LAST)
        for size, first in zip(sizes, starts[:-1], strict=True)
    )
    vision_language.check_image_tokens(
        arrays["input_ids"],
        config.image_tokens,
        len(sizes),
        len(features.rows),
        "as many as the sizes of the images give (a processor without patch_size does not expand "
        "the image token)",
    )
    if tiles is None:
        return arrays
    index, weight = features.padded()
    return arrays | {"pixel_values": tiles, "feature_rows": index, "feature_weights": weight}


def tiles_of(pixels: np.ndarray | None, counts: list[int]) -> np.ndarray | None:
    """Returns the tiles of the pictures, if there are any.

    Raises:
        ValueError: there are fewer tiles than the sizes of the images need.
    """
    if pixels is None or not counts:
        return None
    if pixels.shape[1] < max(counts):
        raise ValueError(
            f"pixel_values has {pixels.shape[1]} tiles per image, but an image of its size has "
            f"{max(counts)}; pass pixel_values and image_sizes of one call of the processor"
        )
    return anyres.tiles_of(pixels, counts)


def check_sizes(
    config: Config, pixels: np.ndarray | None, sizes: np.ndarray | None
) -> list[tuple[int, int]]:
    """Returns the heights and widths of the pictures.

    Raises:
        ValueError: pixels and sizes do not fit together or the tower.
    """
    if pixels is None:
        return []
    side = config.vision.image_size
    if pixels.ndim != 5 or pixels.shape[2:] != (config.vision.num_channels, side, side):
        raise ValueError(
            f"pixel_values has shape {pixels.shape}; expected [images, tiles, "
            f"{config.vision.num_channels}, {side}, {side}], as the processor pads it (do_pad)"
        )
    if sizes is None or np.shape(sizes) != (len(pixels), 2):
        raise ValueError(
            f"image_sizes has shape {np.shape(sizes) if sizes is not None else 'none'}; expected "
            f"({len(pixels)}, 2), height and width of each image in pixel_values"
        )
    return [(int(height), int(width)) for height, width in sizes]


def patch_layout(
    config: Config, arrays: Mapping[str, np.ndarray], read_processor: Callable[[], Any]
) -> Layouts:
    """Lays out the patches of each picture's tiles, with the whole as its `whole`."""
    sizes = check_sizes(config, arrays.get("pixel_values"), arrays.get("image_sizes"))
    lengths, given = (len(config.features(size, 0, 0).rows) for size in sizes), iter(sizes)
    return [
        [
            _layout(config, next(given), places)
            for places in patches.runs(row, config.image_tokens[0], lengths)
        ]
        for row in arrays["input_ids"]
    ]


def _layout(config: Config, size: anyres.Size, places: np.ndarray) -> patches.PatchLayout:
    return anyres.layout_of(size, config.tiles(size), config.vision, config.shape(size), places)


PORT = Port(
    config=Config,
    module=LlavaNext,
    inputs=INPUTS,
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=llava_like.canonical_name,
    transformers_name=llava_like.transformers_name,
    complete_processor=llava.complete_processor,
    pieces=("pixel_values",),
    patch_layout=patch_layout,
)
