"""Regenerates the pictures and the console output of the quick start: `python docs/pictures.py`.

Runs the demo (about two minutes on two cores) and keeps what the pages show. The picture of the
playground needs Playwright and Debian's chromium, and stays as it is without them.
"""

import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from xlvlm_jax import Concepts
from xlvlm_jax.demo import pipeline, summary

PICTURES = Path(__file__).parent / "pictures"
PAGE = Path(__file__).parent / "quickstart.md"
_CONSOLE = re.compile(r"^```console\n.*?^```$", re.M | re.S)
KEPT = ("scores.svg", "shift/overlap.svg", "steering/yes-no/answers.svg")
NUM_CONCEPTS, NUM_IMAGES, NUM_WORDS = 6, 5, 5
NUM_LINES = 5  # concepts of the quick start's console output


def main() -> None:
    """Runs the demo in a temporary directory and writes what the pages show."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "xlvlm-demo"
        result = pipeline.run(run, stage=_silent)
        for name in KEPT:
            shutil.copyfile(run / name, PICTURES / Path(name).name)
        draw(result.concepts[pipeline.FINAL], PICTURES / "concepts.png")
        photograph(run, PICTURES / "play.png")
        said = io.StringIO()
        summary.show(result, Console(file=said, width=80))
    # The last sentence names a temporary file.
    text = said.getvalue().rpartition("Open ")[0].strip("\n")
    lines = shortened([line.rstrip() for line in text.splitlines()])
    page = PAGE.read_text("utf-8")
    shown = "```console\n" + "\n".join(lines) + "\n```"
    PAGE.write_text(_CONSOLE.sub(lambda _: shown, page, count=1), "utf-8")


def shortened(lines: list[str]) -> list[str]:
    """Returns the first concepts that the demo prints, and the sentences after its tables."""
    concepts = [i for i, line in enumerate(lines) if re.match(r" \d+ +\d+ %", line)]
    after = next(i for i, line in enumerate(lines) if line.startswith("Fine-tuned"))
    return [*lines[: concepts[NUM_LINES]], " ...", *lines[after:]]


def draw(concepts: Concepts, path: Path) -> None:
    """Draws some concepts, one per row: words, and the pictures that activate them most.

    Takes the concepts that are the strongest of the most samples and named by different words.
    """
    strongest = np.bincount(np.argmax(concepts.activations, axis=1), minlength=len(concepts.words))
    chosen: list[int] = []
    for k in np.argsort(-strongest):
        first = [concepts.words[other][0] for other in chosen]
        if len(concepts.words[k]) >= NUM_WORDS and concepts.words[k][0] not in first:
            chosen.append(int(k))
    chosen = chosen[:NUM_CONCEPTS]
    figure = Figure(figsize=(8.4, 1.12 * len(chosen)), dpi=100, facecolor="white")
    grid = figure.subplots(
        len(chosen), NUM_IMAGES + 1, width_ratios=[2.2, *[1] * NUM_IMAGES], squeeze=False
    )
    for row, k in zip(grid, chosen, strict=True):
        first, *others = concepts.words[k][:NUM_WORDS]
        row[0].text(0, 0.62, first, size=13, weight="bold", color="#1c6b6b", va="center")
        row[0].text(0, 0.3, ", ".join(others), size=8.5, color="#444444", va="center")
        for axes, image in zip(row[1:], concepts.images[k], strict=False):
            axes.imshow(np.asarray(Image.open(image)))
        for axes in row:
            axes.axis("off")
    figure.subplots_adjust(left=0.01, right=0.995, top=0.99, bottom=0.01, wspace=0.06, hspace=0.06)
    figure.savefig(path)
    # 64 colours are enough for drawn scenes and save two thirds of the bytes.
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def photograph(run: Path, path: Path) -> None:
    """Draws the playground as a person sees it who has turned yes into no."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        print(f"no Playwright or chromium: {path} stays as it is", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    vector = "yes-no"
    with _served(run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 640})
        page.goto(address)
        page.get_by_label(re.compile("Ask about picture 1 of")).first.click()
        page.locator("#question").fill("Is there a dog in the picture?")
        page.keyboard.press("Enter")
        page.locator("#plain", has_text="yes").wait_for(timeout=120_000)
        page.get_by_label(f"Strength of {vector}, as a number").fill("1")
        page.keyboard.press("Tab")
        page.locator("#steered", has_text="no").wait_for()
        page.get_by_label(re.compile("Map of concept")).first.click()
        page.locator("#map").wait_for()
        page.locator("#prepared").wait_for(state="hidden", timeout=120_000)
        page.locator("h1").hover()
        page.screenshot(path=path)
        browser.close()
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


@contextmanager
def _served(run: Path) -> Iterator[str]:
    """Serves the playground of a run and yields its address."""
    said = [sys.executable, "-u", "-c", "from xlvlm_jax.cli import main; main()"]
    options = ["play", "embedded", "--run", str(run), "--port", "0"]
    with subprocess.Popen([*said, *options], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield next(line.strip() for line in server.stdout if line.startswith("http"))
        finally:
            server.terminate()


def _silent(_: str) -> Callable[..., None]:
    return lambda done, total, rows=None: None


if __name__ == "__main__":
    main()
