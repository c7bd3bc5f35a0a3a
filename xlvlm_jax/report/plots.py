"""Figures on the page: they adapt to light and dark pages, and have a known size."""

import base64
import re
from pathlib import Path
from typing import NamedTuple

from xlvlm_jax.report.figure import COLOURS, FAINT

# Colours on dark pages for the colours that figures are drawn in; the default colour is black.
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
    """A figure on the page."""

    uri: str  # data:image/svg+xml;base64,...
    width: int  # CSS pixels
    height: int
    explained: str  # what it shows


def read_plot(path: Path, explained: str) -> Plot:
    """Returns a figure for the page, without its background and with colours for dark pages.

    The file itself is not changed: with its white background it is legible anywhere else.

    Args:
        path: an SVG written by `figure`.
        explained: what the figure shows.

    Returns:
        The figure.

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
    """Returns style rules that remove the background and replace colours on dark pages."""
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
