"""Concepts as HTML for notebooks: words, shares, and the pictures that show them.

N rows, K concepts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from ports.tables import html_table
from xlvlm_jax.data.images import data_uri, read_image
from xlvlm_jax.metrics.most_activated import NONE, strongest_concept
from xlvlm_jax.storage.zarr_rows import StoredRows

NUM_CONCEPTS, NUM_WORDS, NUM_PICTURES = 20, 8, 5
SIDE = 64  # maximum side of a picture in pixels
_TILE_ROWS = 2**14


def concepts_html(
    activations: Any,
    words: Sequence[Sequence[str]] | None,
    images: Sequence[Sequence[str]] | None,
    *,
    num_concepts: int,
    title: str,
) -> Markup:
    """Returns a table of concepts, sorted by the share of rows on which each is the strongest.

    Args:
        activations: float[N, K], may be on disk; None if unknown.
        words: the words of each concept; None before grounding.
        images: the picture files of each concept; None before grounding.
        num_concepts: K; the first NUM_CONCEPTS in order are shown.
        title: title of the table.
    """
    shares = None if activations is None else shares_of(activations)
    order = range(num_concepts) if shares is None else np.argsort(-shares, kind="stable")
    head = ["concept", "share", "words", "pictures"]
    shown = [True, shares is not None, words is not None, images is not None]
    rows = []
    for k in map(int, order[:NUM_CONCEPTS]):
        cells = [
            k,
            None if shares is None else f"{shares[k]:.1%}",
            None if words is None else ", ".join(words[k][:NUM_WORDS]),
            None if images is None else _strip(images[k][:NUM_PICTURES]),
        ]
        rows.append([cell for cell, is_shown in zip(cells, shown, strict=True) if is_shown])
    table = html_table(
        rows,
        head=[name for name, is_shown in zip(head, shown, strict=True) if is_shown],
        title=title,
    )
    rest = num_concepts - NUM_CONCEPTS
    return table if rest <= 0 else table + Markup("<p>and {} more</p>").format(rest)


def shares_of(activations: Any) -> Float[np.ndarray, " K"] | None:
    """Returns the share of rows on which each concept is the strongest.

    None if some activations are on other hosts.
    """
    if isinstance(activations, jax.Array) and not activations.is_fully_addressable:
        return None
    if isinstance(activations, StoredRows):
        tiles = (tile for _, tile in activations.tiles(_TILE_ROWS))
    else:
        tiles = iter([np.asarray(activations)])
    N, K = activations.shape
    counts = np.zeros(K, np.int64)
    for tile in tiles:
        strongest = strongest_concept(tile)
        counts += np.bincount(strongest[strongest != NONE], minlength=K)
    return counts / max(N, 1)


def _strip(files: Sequence[str]) -> Markup:
    """Returns small pictures side by side; for a file that can't be read, its name."""
    return Markup(" ").join(map(_picture, files))


def _picture(file: str) -> Markup:
    name = str(file).rpartition("/")[2]
    try:
        picture = read_image(file)
    except (OSError, ValueError):
        return Markup("<i>{}</i>").format(name)
    picture.thumbnail((SIDE, SIDE))
    return Markup('<img src="{}" alt="{}" width="{}" height="{}" style="display:inline"/>').format(
        data_uri(picture, SIDE), name, *picture.size
    )
