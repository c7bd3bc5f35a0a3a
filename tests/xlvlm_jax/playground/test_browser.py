"""The page in a browser: ask, slide, undo, broken files, reload, two tabs, share, dark, narrow.

Skipped without Playwright, or without Debian's `chromium`, which is driven as it is installed.
"""

import base64
import json
import threading
import time

import pytest
import uvicorn

from xlvlm_jax import steering

from .conftest import TOKEN


@pytest.fixture(scope="module")
def address(app):
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/{TOKEN}/"
    running.should_exit = running.force_exit = True
    thread.join()


@pytest.fixture
def open_page(browser, address):
    """open_page(): another tab; no tab may fail or ask another host."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(60_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    asked, errors = [], []

    def open_():
        opened = context.new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.goto(address)
        opened.locator("#items li").first.wait_for()
        return opened

    yield open_
    assert not errors
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    context.close()


@pytest.fixture
def page(open_page):
    return open_page()


def ask(page, made):
    page.locator("#file").set_input_files(made.picture)
    page.locator("#question").fill(made.question.partition("\n")[0])
    page.keyboard.press("Enter")
    expect(page, "#plain", "yes")


def expect(page, what, text):
    """Waits for an answer that is whole."""
    page.wait_for_function(
        "([what, text]) => { const line = document.querySelector(what);"
        " return line.textContent === text && !line.classList.contains('busy'); }",
        arg=[what, text],
    )


def slide(page, number):
    """Moves the vector's slider with the keyboard; its steps are 0.1."""
    page.get_by_label("Strength of yes-no", exact=True).focus()
    for _ in range(number):
        page.keyboard.press("ArrowRight")


def test_sliding_turns_yes_into_no_and_undo_takes_it_back(page, made):
    ask(page, made)
    assert page.locator("#steered").text_content() == ""
    slide(page, 10)
    expect(page, "#steered", "no")
    assert "changed" in page.locator("#steered").get_attribute("class")
    assert "no" in page.locator("#words tbody td:first-child").all_text_contents()
    page.locator("#undo").click()
    expect(page, "#steered", "")
    assert not page.locator("#words").is_visible()


def test_files_that_are_none_are_refused_and_the_page_goes_on(page, made, foreign, tmp_path):
    broken, other = tmp_path / "broken.png", tmp_path / "other.safetensors"
    broken.write_bytes(b"no picture")
    other.write_bytes(foreign)
    for file, said in (
        (broken, "broken.png: not an image in a known format"),
        (other, "fitted on 'another'"),
    ):
        page.locator("#file").set_input_files(file)
        page.locator("#problem", has_text=said).wait_for()
    ask(page, made)
    assert not page.locator("#problem").is_visible()


def test_what_is_missing_is_said_and_a_picture_of_a_concept_serves(page, made, tmp_path):
    page.locator("#ask").click()
    page.locator("#status", has_text="choose a picture").wait_for()
    page.get_by_label("Ask about picture 1 of concept 0 yes right").click()
    page.locator("#status", has_text="type a question").wait_for()
    page.locator("#question").fill(made.question.partition("\n")[0])
    page.keyboard.press("Enter")
    expect(page, "#plain", "yes")
    page.wait_for_function("/^[0-9.]+ s$/.test(document.querySelector('#status').textContent)")
    page.evaluate("known.largest = 2 ** 20")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(2**20 + 1))
    page.locator("#file").set_input_files(large)
    page.locator("#problem", has_text="large.png is larger than 1 MB; choose a smaller").wait_for()


def test_a_reload_and_a_second_tab(page, open_page, made):
    ask(page, made)
    slide(page, 10)
    expect(page, "#steered", "no")
    page.reload()
    expect(page, "#steered", "no")
    assert page.locator("#question").input_value() == made.question.partition("\n")[0]
    other = open_page()
    assert other.locator("#question").input_value() == ""
    ask(other, made)
    assert other.locator("#steered").text_content() == ""
    assert page.locator("#steered").text_content() == "no"


def test_sharing_saving_and_python(page, open_page, made, tmp_path):
    ask(page, made)
    slide(page, 10)
    expect(page, "#steered", "no")
    with page.expect_download() as saved:
        page.locator("#save").click()
    saved.value.save_as(tmp_path / "v.safetensors")
    assert steering.load(tmp_path / "v.safetensors").source["method"] == "playground"
    page.locator("#python").click()
    page.locator("#code output", has_text="copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()").startswith("import ports\n")
    page.keyboard.press("Escape")
    with page.expect_download() as shared:
        page.locator("#share").click()
    shared.value.save_as(tmp_path / "play.json")
    page.close()
    stored = json.loads((tmp_path / "play.json").read_text())["picture"]["content"]
    assert base64.b64decode(stored) == made.picture.read_bytes()
    other = open_page()
    # A picture that may just be uploaded may be opened from the file, which is larger.
    other.evaluate(f"known.largest = {made.picture.stat().st_size}")
    other.locator("#file").set_input_files(tmp_path / "play.json")
    expect(other, "#steered", "no")
    foreign = json.loads((tmp_path / "play.json").read_text()) | {"fingerprint": "another"}
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    other.locator("#file").set_input_files(tmp_path / "foreign.json")
    other.locator("#problem", has_text="another model").wait_for()


def test_a_map_lies_over_the_picture_and_search_hides(page, made):
    ask(page, made)
    page.get_by_label("Map of concept 0 yes right").click()
    page.locator("#map").wait_for()
    assert page.locator("#map").bounding_box() == pytest.approx(
        page.locator("#shown").bounding_box()
    )
    page.locator("h1").click()
    page.keyboard.press("/")
    page.keyboard.type("right")
    assert page.locator("#items li").count() == 1
    assert page.locator("#items img").evaluate("img => img.decode().then(() => true)")


def test_narrow_and_dark(page):
    def brightness():
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(",")))

    for width in (320, 700, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert brightness() > 600
    page.emulate_media(color_scheme="dark")
    assert brightness() < 150
