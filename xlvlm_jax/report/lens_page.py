"""The page of a lens: tokens by layers, and image tokens laid out as the picture.

L layers, P positions, k words, V texts that occur on the page.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from markupsafe import Markup
from PIL import Image

from xlvlm_jax.data.images import data_uri
from xlvlm_jax.lenses.neighbours import Neighbours
from xlvlm_jax.lenses.run import LensRun
from xlvlm_jax.report.environment import environment, part, store

SIDE = 640  # longest side of a picture, in pixels
# Bytes of all words and probabilities: the page stays below 5 MB.
BUDGET = 3_500_000


class Cell(NamedTuple):
    """One cell of a picture: the position whose state covers it, and its box in per cent."""

    position: int
    left: float
    top: float
    width: float
    height: float


class Picture(NamedTuple):
    """A picture and its cells."""

    uri: str
    ratio: float  # width / height
    cells: list[Cell]


def write_lens_page(
    run: LensRun,
    output: str | Path,
    *,
    decode: Any,
    images: Sequence[Image.Image],
    facts: Mapping[str, str],
) -> Path:
    """Writes a lens on one prompt as a self-contained page.

    The page holds the table of tokens by layers as text; its script adds the picture, whose cells
    show one layer at a time, and the words of the token that is pointed at or focused.

    Args:
        run: the lens.
        output: the file.
        decode: [id] -> the text of a token.
        images: the prompt's pictures.
        facts: what the page says of the run, by name.

    Returns:
        The path.

    Raises:
        OSError: the page can't be written.
    """
    reading = run.reading
    k = max(1, min(reading.tokens.shape[-1], BUDGET // (4 * reading.entropy.size)))
    ids, index = np.unique(reading.tokens[..., :k], return_inverse=True)
    words = [str(decode([int(i)])).strip() or "␣" for i in ids]
    index = index.reshape(reading.tokens[..., :k].shape)
    data = {
        "shape": index.shape,
        "words": words,
        "index": _packed(index),
        "shares": _packed(np.round(255 * reading.probabilities[..., :k]).astype(np.uint8)),
        "layers": [str(i) for i in range(len(reading.sites))],
        "texts": run.texts,
        "kinds": run.kinds,
        "neighbours": _neighbours(run),
    }
    pictures = [
        _picture(image, layout)
        for image, layout in zip(images, run.pictures, strict=False)
        if (layout.positions >= 0).any()
    ]
    page = environment().get_template("lens.html.jinja")
    text = page.render(
        title="What each layer would say",
        facts=[(name, value) for name, value in facts.items() if value],
        rows=list(_rows(run, index, words)),
        sites=reading.sites,
        pictures=pictures,
        data=_json(data),
        css=part("page.css") + part("lens.css"),
        script=part("lens.js"),
    )
    return store(Path(output), text)


class Row(NamedTuple):
    """A row of the table: a token, and the first word of each layer with its probability."""

    position: int
    text: str
    kind: str
    cells: list[tuple[str, float]]


def _rows(run: LensRun, index: Int[np.ndarray, "L P k"], words: list[str]) -> Any:
    for position, (text, kind) in enumerate(zip(run.texts, run.kinds, strict=True)):
        if kind != "image":
            first = index[:, position, 0].tolist()
            shares = run.reading.probabilities[:, position, 0].tolist()
            cells = [(words[i], share) for i, share in zip(first, shares, strict=True)]
            yield Row(position, text.strip() or "␣", kind, cells)


def _picture(image: Image.Image, layout: Any) -> Picture:
    cells = []
    for position, (x0, y0, x1, y1) in zip(
        layout.positions.ravel().tolist(), layout.boxes.reshape(-1, 4).tolist(), strict=True
    ):
        if position >= 0 and x1 > x0 and y1 > y0:
            box = (100 * x0, 100 * y0, 100 * (x1 - x0), 100 * (y1 - y0))
            cells.append(Cell(position, *(round(side, 3) for side in box)))
    return Picture(data_uri(image, SIDE), image.width / image.height, cells)


def _neighbours(run: LensRun) -> dict[str, Any]:
    """Returns {layer: [P, k] of (row, cosine in per cent)} and the rows' texts."""
    layers: dict[str, Any] = {}
    for site, found in run.neighbours.items():
        shown: Neighbours = found
        layers[str(run.reading.sites.index(site))] = {
            "rows": shown.rows.tolist(),
            "cosines": np.round(100 * shown.cosine).astype(int).tolist(),
        }
    return {"layers": layers, "rows": {str(row): text for row, text in run.resembled.items()}}


def _packed(values: np.ndarray) -> str:
    """Returns whole numbers as base64 of uint16 (uint8 stays), little-endian."""
    if values.dtype != np.uint8:
        values = values.astype("<u2" if values.max(initial=0) < 2**16 else "<u4")
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _json(data: Mapping[str, Any]) -> Markup:
    """Returns JSON that may stand in a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
