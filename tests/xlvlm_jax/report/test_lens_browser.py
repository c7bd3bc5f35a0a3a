"""The page of a lens in a browser: pointer, keyboard, slider, dark mode, narrow screens, offline.

Skipped without Playwright, or without Debian's `chromium`, which is driven as it is installed.
"""

import numpy as np
import pytest
from PIL import Image

from ports.inputs.patch_layout import grid
from xlvlm_jax.lenses.neighbours import Neighbours
from xlvlm_jax.lenses.reading import LensReading
from xlvlm_jax.lenses.run import LensRun
from xlvlm_jax.report.lens_page import write_lens_page

WORDS = ("dog", "cat", "red", "sea", "big", "old")


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    """Three layers, a picture of 2 x 2 cells at positions 1 to 4, two tokens of text around it."""
    tokens = np.arange(3 * 6 * 2).reshape(3, 6, 2) % 6
    shares = np.full((3, 6, 2), 0.5)
    shares[..., 1] = 0.25
    layers = tuple(f"layers.{i}" for i in range(3))
    run = LensRun(
        tokens=np.arange(6),
        texts=["What", *["<image>"] * 4, "is"],
        kinds=["text", *["image"] * 4, "text"],
        reading=LensReading(layers, tokens, shares, np.zeros((3, 6))),
        pictures=[grid(np.arange(1, 5), 2, 2)],
        prediction="dog",
        neighbours={"layers.1": Neighbours(np.full((6, 1), 7), np.full((6, 1), 0.9))},
        resembled={7: ("pup", "a small pup")},
    )
    return write_lens_page(
        run,
        tmp_path_factory.mktemp("page") / "lens.html",
        decode=lambda ids: WORDS[ids[0]],
        images=[Image.new("RGB", (60, 60), "red")],
        facts={"Prompt": "What is it?"},
    )


@pytest.fixture
def page(browser, lens):
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    opened = context.new_page()
    asked, errors = [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(lens.as_uri())
    yield opened
    assert not errors
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    context.close()


def words_of(page):
    """The words in the cells of the picture."""
    return page.locator(".grid button").all_text_contents()


def test_cells_of_the_picture_follow_the_slider(page):
    assert words_of(page) == [WORDS[(24 + 2 * p) % 6] for p in range(1, 5)]
    page.locator(".seen input").fill("0")
    assert words_of(page) == [WORDS[2 * p % 6] for p in range(1, 5)]
    assert page.locator(".seen output").text_content() == "0"


def test_pointing_shows_all_words_of_a_token(page):
    detail = page.locator(".detail")
    assert not detail.is_visible()
    page.locator(".lens td").nth(1).hover()
    assert detail.locator("h2").text_content() == "text token 0: What"
    assert detail.locator("tr").count() == 3
    assert detail.locator("tr.here th").text_content() == "1"
    assert "dog 50 %" in detail.text_content() and "pup 90 %" in detail.text_content()
    page.locator(".grid button").nth(3).hover()
    assert detail.locator("h2").text_content() == "image token 4: <image>"


def test_arrow_keys_move_in_the_table_and_in_the_picture(page):
    def focused():
        return page.evaluate("document.activeElement.dataset.p")

    page.locator(".grid button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert focused() == "4"
    page.keyboard.press("ArrowDown")  # there is nothing below
    assert focused() == "4"
    page.locator(".lens td").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert focused() == "5" and page.evaluate("document.activeElement.cellIndex") == 2


@pytest.mark.parametrize("width", [320, 700, 1100])
def test_no_screen_scrolls_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.locator(".lens td").first.focus()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_pages_are_dark(page):
    page.emulate_media(color_scheme="dark")
    colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) < 150
