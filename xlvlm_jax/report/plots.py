"""Figures in the page: they take its colours, light or dark, and their place is kept."""

import base64
import re
from pathlib import Path
from typing import NamedTuple

from xlvlm_jax.report.figure import COLOURS, FAINT

# In place of the colours that figures are drawn in. What has no colour of its own is black.
_ON_DARK = {
    "#000000": "#e6e4df",
    FAINT: "#68727b",
    **dict(
        zip(
            COLOURS,
            ("#7fb0e0", "#ea8a73", "#9ccb7d", "#c9a5c5", "#e6c15a", "#9fb0cc"),
            strict=True,
        )
    ),
}
_PIXELS_PER_POINT = 4 / 3  # of CSS
_OPENING = re.compile(rb"<svg\b[^>]*>")
_SIZE = re.compile(rb'\s(width|height)="([\d.]+)(pt|px)?"')


class Plot(NamedTuple):
    """A figure of the page."""

    uri: str  # data:image/svg+xml;base64,...
    width: int  # CSS pixels
    height: int
    explained: str  # what it shows


def read_plot(path: Path, explained: str) -> Plot:
    """Returns a figure that `figure` wrote as SVG, without its background and with dark colours.

    The file stays as it is: beside other text than the page's, its white ground makes it legible
    wherever it is shown.

    Raises:
        ValueError: the file is not such an SVG.
    """
    svg = path.read_bytes()
    opening = _OPENING.search(svg)
    size = {name: float(n) for name, n, _ in _SIZE.findall(opening[0])} if opening else {}
    if opening is None or len(size) < 2:
        raise ValueError(f"{path}: not an SVG with a width and a height; draw it again")
    svg = svg[: opening.end()] + _STYLE.encode() + svg[opening.end() :]
    return Plot(
        uri=f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}",
        width=round(_PIXELS_PER_POINT * size[b"width"]),
        height=round(_PIXELS_PER_POINT * size[b"height"]),
        explained=explained,
    )


def _rules() -> str:
    """Style rules: no background, and the colours for dark pages in place of those drawn."""
    dark = "".join(
        f'[style*="{what}: {drawn}"]{{{what}:{shown} !important}}'
        for drawn, shown in _ON_DARK.items()
        for what in ("fill", "stroke")
    )
    return (
        '[style*="fill: #ffffff"]{fill:none !important}'
        f"@media (prefers-color-scheme:dark){{:root{{fill:{_ON_DARK['#000000']}}}{dark}}}"
    )


_STYLE = f"<style>{_rules()}</style>"
