"""The figure of one sample: its picture beside the words and pictures of its concepts."""

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten, wrap

import numpy as np
from PIL import Image

from xlvlm_jax.concepts.explain import SampleExplanation
from xlvlm_jax.data.images import read_image
from xlvlm_jax.report.figure import figure

PICTURES, SIDE = 5, 96


def plot_sample(explained: SampleExplanation, path: str | os.PathLike[str]) -> None:
    """Draws a sample's picture, and a row of words and pictures per concept.

    A picture that can't be read stays grey.

    Args:
        explained: from `explain_sample`.
        path: the file to write (.svg, .png or .pdf).
    """
    rows = max(len(explained.concepts), 1)
    with figure(path, rows, 2, width=8.5, height=1.6 * rows + 0.4) as (_, grid):
        for axis in grid.flat:
            axis.set_axis_off()
        grid[0, 0].imshow(picture_strip([explained.image], count=1), interpolation="none")
        said = shorten(explained.prediction or "", 60, placeholder=" …")
        grid[0, 0].set_title(f"{explained.sample}\n{said}", fontsize=8)
        for axis, active in zip(grid[:, 1], explained.concepts, strict=False):
            axis.imshow(picture_strip(active.images), interpolation="none")
            words = "\n".join(wrap(shorten(" ".join(active.words), 110, placeholder=" …"), 70))
            axis.set_title(
                f"concept {active.concept}, activation {active.activation:.3g}\n{words}", fontsize=8
            )


def picture_strip(paths: Sequence[str | None], count: int = PICTURES) -> np.ndarray:
    """Returns the first pictures side by side; one that can't be read stays grey.

    Args:
        paths: image files; None for one that is unknown.
        count: number of places.

    Returns:
        uint8[SIDE, width, 3].
    """
    strip = np.full((SIDE, count * (SIDE + 4), 3), 238, np.uint8)
    for number, path in enumerate(paths[:count]):
        try:
            picture = read_image(Path(path or ""))
        except (OSError, ValueError):
            continue
        small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        left = number * (SIDE + 4)
        strip[:, left : left + SIDE] = np.asarray(small)
    return strip
