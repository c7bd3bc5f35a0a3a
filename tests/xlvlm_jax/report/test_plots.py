"""Figures in the page: their size, their background, and their colours on dark pages."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import pytest

from xlvlm_jax.report.figure import COLOURS, FAINT, figure
from xlvlm_jax.report.plots import read_plot


@pytest.fixture
def drawn(tmp_path):
    """Returns a figure of 3 by 2 inches with every colour that figures use."""
    path = tmp_path / "a.svg"
    with figure(path, width=3, height=2) as (_, [[axes]]):
        for height, colour in enumerate((*COLOURS, FAINT, "black")):
            axes.plot([0, 1], [height, height], "o-", color=colour)
        axes.set_xlabel("strength")
    return path


def shown(plot):
    kind, content = plot.uri.split(",")
    assert kind == "data:image/svg+xml;base64"
    return base64.b64decode(content).decode()


def test_size_in_pixels_by_hand(drawn):
    plot = read_plot(drawn, "lines")
    assert (plot.width, plot.height) == (288, 192)  # 96 pixels are an inch
    assert plot.explained == "lines"


def test_the_page_has_the_figure_and_the_file_is_unchanged(drawn):
    before = drawn.read_bytes()
    svg = shown(read_plot(drawn, "lines"))
    assert drawn.read_bytes() == before
    style = re.search("<style>.*?</style>", svg)[0]
    assert svg.replace(style, "", 1).encode() == before
    assert ElementTree.fromstring(svg)[0].text in style  # it is the first element of the root


def test_the_background_is_removed_and_every_colour_has_a_dark_one(drawn):
    svg = shown(read_plot(drawn, "lines"))
    style, rest = svg.split("</style>", 1)
    always, dark = style.split("@media (prefers-color-scheme:dark)")
    assert '[style*="fill: #ffffff"]{fill:none !important}' in always
    drawn_in = set(re.findall("(fill|stroke): (#[0-9a-f]{6})", rest)) - {("fill", "#ffffff")}
    assert len({colour for _, colour in drawn_in}) == len(COLOURS) + 2
    replaced = re.findall(r'\[style\*="(\w+): (#\w+)"\]\{\1:(#\w+) !important\}', dark)
    assert drawn_in <= {(what, colour) for what, colour, _ in replaced}
    # On the page's dark ground, #16191c, each is as far from it as WCAG wants of graphics.
    for _, _, colour in replaced:
        assert (luminance(colour) + 0.05) / (luminance("#16191c") + 0.05) >= 3
    assert ":root{fill:#e6e4df}" in dark  # text has no colour of its own


def luminance(colour):
    """Returns the relative luminance of WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("content", ["", "<svg>", '<svg width="3pt" viewBox="0 0 3 3"></svg>'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a.svg").write_text(content)
    with pytest.raises(ValueError, match=r"a\.svg: not an SVG with a width and a height; draw it"):
        read_plot(tmp_path / "a.svg", "lines")
