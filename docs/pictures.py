"""Regenerates the pictures and the console output of the quick start: `python docs/pictures.py`.

Runs the demo (about two minutes on two cores) and keeps what the pages show.
"""

import io
import re
import shutil
import tempfile
from collections.abc import Callable
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


def main() -> None:
    """Runs the demo in a temporary directory and writes what the pages show."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "xlvlm-demo"
        result = pipeline.run(run, stage=_silent)
        for name in KEPT:
            shutil.copyfile(run / name, PICTURES / Path(name).name)
        draw(result.concepts[pipeline.FINAL], PICTURES / "concepts.png")
        said = io.StringIO()
        summary.show(result, Console(file=said, width=80))
    # The last sentence names a temporary file.
    text = said.getvalue().rpartition("Open ")[0].strip("\n")
    lines = [line.rstrip() for line in text.splitlines()]
    page = PAGE.read_text("utf-8")
    shown = "```console\n" + "\n".join(lines) + "\n```"
    PAGE.write_text(_CONSOLE.sub(lambda _: shown, page, count=1), "utf-8")


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


def _silent(_: str) -> Callable[..., None]:
    return lambda done, total, rows=None: None


if __name__ == "__main__":
    main()
