"""The report in a browser: maps by pointer and keyboard, dark mode, narrow screens, no network.

Skipped without Playwright, or without Debian's `chromium`, which is driven as it is installed.
"""

import numpy as np
import pytest

from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.features.image_cells import Cells
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report import write_report

from .conftest import SITE


@pytest.fixture
def report(tmp_path, samples):
    """Two concepts of image tokens, four cells in each of six pictures."""
    y, x = np.divmod(np.tile(np.arange(4), 6), 2)
    index = np.stack([0 * y, 0 * y, y, x], axis=1).astype(np.int32)
    box = np.stack([x, y, x + 1, y + 1], axis=1).astype(np.float32) / 2
    rows = np.repeat(np.arange(6), 4)
    with FeaturesWriter(tmp_path / "features", {"model": "tiny"}) as writer:
        states = {SITE: np.zeros((24, 4), np.float32)}
        writer.append(samples[:6], states, rows, rows, rows, Cells(index, box))
        writer.close()
    codes = np.random.default_rng(0).random((24, 2)).astype(np.float32)
    words = [["dog"], ["sea"]]
    Concepts(np.eye(2, 4), codes, words=words, source={"site": SITE}).save(tmp_path / "concepts")
    return write_report(tmp_path)


@pytest.fixture
def page(browser, report):
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    opened = context.new_page()
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(report.as_uri())
    yield opened
    assert not errors
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    context.close()


def opacities(page, card):
    found = page.locator(f"#s1-{card} .map")
    return found.evaluate_all("maps => maps.map((map) => getComputedStyle(map).opacity)")


def test_pointing_at_a_concept_shows_its_maps(page):
    assert opacities(page, 0) == ["0"] * 5
    page.locator("#s1-0 > header").hover()
    assert opacities(page, 0) == ["0.65"] * 5
    assert opacities(page, 1) == ["0"] * 5
    page.locator("#s1-1 .histogram").hover()
    assert opacities(page, 0) == ["0"] * 5


def test_the_keyboard_shows_them_too(page):
    first = page.locator(".card").first.get_attribute("data-number")
    for _ in range(20):
        page.keyboard.press("Tab")
        if opacities(page, first) == ["0.65"] * 5:
            return
    raise AssertionError("no maps after 20 times Tab")


def test_a_map_covers_its_picture_and_lets_it_open(page):
    shot = page.locator("#s1-0 .shot").first
    one, other = (shot.locator(f"img:{nth}-child").bounding_box() for nth in ("first", "last"))
    assert one == pytest.approx(other)
    shot.click()
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


@pytest.mark.parametrize("width", [320, 700, 1200])
def test_no_screen_scrolls_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("#s1-0 > header").hover()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opacities(page, 0) == ["0.65"] * 5


def test_dark_pages_are_dark(page):
    def brightness():
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(",")))

    assert brightness() > 600
    page.emulate_media(color_scheme="dark")
    assert brightness() < 150


def test_search_hides_other_concepts(page):
    page.locator(".tools input").fill("dog")
    assert page.locator("#s1-0").is_visible() and not page.locator("#s1-1").is_visible()
