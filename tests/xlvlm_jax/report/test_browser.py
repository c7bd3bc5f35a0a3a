"""The report in a browser: maps by pointer and keyboard, dark mode, narrow screens, no network.

Skipped without Playwright, or without Debian's `chromium`, which is driven as it is installed.
"""

import numpy as np
import pytest

from ports.inputs.patch_layout import grid, grid_boxes
from xlvlm_jax.concepts.explain import ActiveConcept, SampleExplanation
from xlvlm_jax.concepts.picture_maps import MapRow, PictureMaps
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.image_cells import Cells
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report import write_report
from xlvlm_jax.report.explain_page import write_explanation
from xlvlm_jax.report.map_page import write_map_page

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
def open_page(browser):
    """open_page(path): the page in a browser; it must not fail or ask for anything else."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    asked, errors = [], []

    def open_(path):
        opened = context.new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(path.as_uri())
        return opened

    yield open_
    assert not errors
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    context.close()


@pytest.fixture
def page(open_page, report):
    return open_page(report)


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
    page.locator("dialog").wait_for(state="visible")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="hidden")


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


def test_a_pair_leads_to_all_of_its_concept(open_page, report, tmp_path):
    page = open_page(write_report(tmp_path, tmp_path / "two.html", beside=tmp_path))
    page.locator("#s1 .tools input").fill("sea")
    assert not page.locator("#s1-0").is_visible()
    for _ in range(2):
        page.locator("#beside-1 a.number", has_text="0").click()
        # A browser says that the address has changed after the click has returned.
        page.locator("#s1-0").wait_for(state="visible")
        page.locator("#s1 .tools input").fill("sea")
    assert page.locator("#s1 .card:visible").count() == 1


@pytest.fixture
def sample(pictures):
    image, _ = pictures[0]
    return Sample("one", image, "one", "what?")


def test_the_pages_of_maps_and_explanations_show_their_pictures(open_page, sample, tmp_path):
    one = np.arange(4, dtype=np.float32).reshape(2, 2)
    row = MapRow("dog", "activation", [one])
    found = PictureMaps([sample], [grid_boxes(2, 2)], [row])
    layout = grid(np.arange(4), 2, 2)
    concept = ActiveConcept(3, 1.5, ["dog"], [str(sample.image)], -0.5, "a cat", one)
    explained = SampleExplanation(
        "one", str(sample.image), "a dog", [concept], "what?", -0.1, layout
    )
    for path in (
        write_map_page(found, tmp_path / "maps.html"),
        write_explanation(explained, tmp_path / "why.html"),
    ):
        page = open_page(path)
        under = page.locator(".under").first
        shown = under.locator("img").first
        assert "data:image/jpeg" in shown.evaluate("img => getComputedStyle(img).backgroundImage")
        box = under.bounding_box()
        for image in (under.locator("img").first, under.locator("img").last):
            assert image.bounding_box() == pytest.approx(box)
        drawn = under.locator(".map")
        assert drawn.evaluate("map => getComputedStyle(map).opacity") == "0.65"
        under.focus()
        assert drawn.evaluate("map => getComputedStyle(map).opacity") == "0"
        for width in (320, 1200):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_tables_are_sorted_by_their_numbers(open_page, report, tmp_path):
    """Small and large numbers were read up to their exponent or their first space."""
    cells = ["0.01", "12\u202f345", "–", "1.2e-04", "3.5", "-2"]
    rows = "".join(f"<tr><th>row</th><td>{cell}</td></tr>" for cell in cells)
    head = "<thead><tr><th></th><th>x ↑</th></tr></thead>"
    table = f'<table class="scores" id="own">{head}{rows}</table>'
    path = tmp_path / "sorted.html"
    path.write_text(report.read_text("utf-8").replace("<main", f"{table}<main", 1), "utf-8")
    page = open_page(path)
    page.locator("#own th button").click()
    found = page.locator("#own td").all_text_contents()
    assert found == ["12\u202f345", "3.5", "0.01", "1.2e-04", "-2", "–"]
