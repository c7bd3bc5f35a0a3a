"""Time, memory and disk space of every command, and their growth with the number of rows.

    python -m benchmarks.scale --rows 10000 100000 1000000

As extracting a million states takes hours, synthetic states like those of the embedded model are
written in blocks: [N, 192] with the mean at five deviations and two columns a thousand times
larger, one row per sample, and the same samples after a fine-tuning that moves each concept. Then
each command runs in its own process. Memory is the largest resident size of the process, disk the
size of its output. The exponent is the p of a + b N^p through the three largest numbers of rows,
where a includes the time to start a process. Exponents above 1.1 are marked. Prints a table, writes
JSON and, if asked, a page, both after every command.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import memory
from benchmarks.measure import save

D, CONCEPTS = 192, 20  # width of the embedded model; number of clusters of the states
SITE = "language_model.model.norm"
BLOCK = 2**15  # rows made at a time
PICTURES = 64  # image files, shared by all samples
METHODS = ("kmeans", "snmf", "pca")
FIGURES = {
    "seconds": ("s", 1),
    "cpu": ("CPU s", 1),
    "bytes": ("GB", 1e9),
    "disk": ("GB on disk", 1e9),
}
# Leaves what the system says about the process when it ends. The largest resident size that wait4
# gives is no less than the parent's own, which the process has before it begins its program.
PROCESS = """
import atexit, pathlib, sys
left = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: left.write_text(pathlib.Path("/proc/self/status").read_text()))
from xlvlm_jax.cli import main
main()
"""
STEEP = 1.1  # an exponent above which a figure grows faster than the rows
PAGE = """Made by `python -m benchmarks.scale --page benchmarks/scale.md`: made-up states [N, 192]
of the embedded model, 20 concepts, each command in a process of its own, in which programs are
compiled too. "CPU s" are of all cores. "GB" is the largest resident size of the process, of which
loading JAX and the model and compiling take 0.4 to 1 GB; the matrix of a million rows is 0.77 GB,
and `shift` reads two. An exponent is the p of a + b N^p through the three sizes; "steep" marks
those above 1.1. Cells are empty where a run was ended before."""


# Features.


def write_features(root: Path, rows: int) -> None:
    """Writes features/ and tuned/ below `root`: states of the same samples under two models."""
    from xlvlm_jax.features.writer import FeaturesWriter

    pictures = root / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(
            pictures / f"{number}.png"
        )
    centres = rng.standard_normal((CONCEPTS, D), np.float32)
    moves = 0.5 * rng.standard_normal((CONCEPTS, D), np.float32)
    scale = np.ones(D, np.float32)
    scale[[17, 91]] = 1000
    manifest = {"model": "embedded", "selection": {"mode": "class", "argument": "all"}}
    with (
        FeaturesWriter(root / "features", manifest) as original,
        FeaturesWriter(root / "tuned", manifest) as tuned,
    ):
        for writer in (original, tuned):
            writer.record_pictures([str(path) for path in sorted(pictures.iterdir())])
        for start in range(0, rows, BLOCK):
            count = min(BLOCK, rows - start)
            rng = np.random.default_rng(start + 1)
            concept = rng.integers(0, CONCEPTS, count)
            states = 2 * centres[concept] + rng.standard_normal((count, D), np.float32) + 5
            after = states + moves[concept]
            after += 0.1 * rng.standard_normal((count, D), np.float32)
            samples = [_sample(start + i, int(k)) for i, k in enumerate(concept)]
            order, zeros = np.arange(count), np.zeros(count, np.int32)
            original.append(samples, {SITE: states * scale}, order, zeros, zeros)
            tuned.append(samples, {SITE: after * scale}, order, zeros, zeros)
        original.close()
        tuned.close()


def _sample(number: int, concept: int) -> dict[str, Any]:
    return {
        "id": f"sample-{number}",
        "image": f"{number * 7 % PICTURES}.png",
        "prompt": "What is in the picture?",
        "prediction": f"a thing of kind {concept}",
        "references": [f"a thing of kind {concept}"],
        "attributes": {"kind": f"kind {concept}", "colour": f"colour {number % 7}"},
    }


# Commands.


class Command(NamedTuple):
    """A command of `xlvlm` and its output."""

    name: str
    arguments: list[str]
    output: Path


def commands(root: Path, num_concepts: int) -> Iterator[Command]:
    """Yields all commands, in an order in which the inputs of each exist."""
    features, tuned, run = root / "features", root / "tuned", root / "run"
    for stream in ((), ("--stream",)):
        for method in METHODS:
            name = " ".join([method, *stream])
            output = root / name.replace(" --", "-")
            options = ["--method", method, "--num-concepts", str(num_concepts), "--overwrite"]
            arguments = ["decompose", str(features), "--output", str(output), *options, *stream]
            yield Command(f"decompose {name}", arguments, output)
    for name in ("kmeans", "kmeans-stream"):
        output = root / name
        arguments = ["ground", str(output), "--model", "embedded", "--overwrite"]
        yield Command(f"ground {name}", arguments, output)
        scores = root / f"scores-{name}"
        arguments = ["score", str(output), "--output", str(scores), "--overwrite"]
        yield Command(f"score {name}", arguments, scores)
    output = root / "shift"
    arguments = ["shift", str(features), str(tuned), "--concepts", str(root / "kmeans")]
    arguments += ["--model", "embedded", "--output", str(output), "--overwrite"]
    yield Command("shift", arguments, output)
    # The report covers one directory.
    run.mkdir(exist_ok=True)
    for link, target in (("features", features), ("concepts", root / "kmeans")):
        if not (run / link).exists():
            (run / link).symlink_to(target.resolve())
    yield Command("report", ["report", str(run), "--overwrite"], run / "report.html")
    output = root / "features.pth"
    yield Command(
        "export-pth", ["export-pth", str(features), "--output", str(output), "--overwrite"], output
    )


def measure(command: Command) -> dict[str, float]:
    """Returns wall and CPU seconds, largest resident bytes and bytes on disk.

    Of a command in a process of its own.
    """
    with tempfile.TemporaryDirectory() as scratch:
        left = Path(scratch) / "status"
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(left), *command.arguments],
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        spent = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            ended = f"ended with {process.returncode}"
            raise RuntimeError(f"xlvlm {' '.join(command.arguments)} {ended}")
        peak = memory.resident(left).peak
    return {
        "seconds": spent,
        "cpu": usage.ru_utime + usage.ru_stime,
        "bytes": peak,
        "disk": size_of(command.output),
    }


def size_of(path: Path) -> int:
    """Returns the bytes of a file, or of all files below a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# Growth.


def exponent(rows: tuple[float, float, float], figures: tuple[float, float, float]) -> float | None:
    """Returns the p of a + b N^p through three points, whose N grow by the same factor twice.

    0 for what does not grow at the end, None for what grows there alone.
    """
    first, then = figures[1] - figures[0], figures[2] - figures[1]
    if then <= 0:
        return 0.0
    return None if first <= 0 else math.log(then / first) / math.log(rows[2] / rows[1])


def growth(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per command: its name, its exponents, and which of them exceed `STEEP`."""
    found = []
    for name in dict.fromkeys(row["command"] for row in measured):
        own = sorted((r for r in measured if r["command"] == name), key=lambda r: r["rows"])[-3:]
        row: dict[str, Any] = {"command": name}
        if len(own) == 3:
            rows = tuple(each["rows"] for each in own)
            for figure in FIGURES:
                row[figure] = exponent(rows, tuple(each[figure] for each in own))
        row["steep"] = [figure for figure in FIGURES if (row.get(figure) or 0) > STEEP]
        found.append(row)
    return found


def table_of(measured: list[dict[str, Any]]) -> list[list[str]]:
    """Returns the table's header and lines: each measure by number of rows, then its exponent."""
    sizes = sorted({row["rows"] for row in measured})
    by_name = {(row["command"], row["rows"]): row for row in measured}
    lines = [["command"]]
    for unit, _ in FIGURES.values():
        lines[0] += [f"{unit} at {size:,}" for size in sizes] + [f"{unit} exponent"]
    for row in growth(measured):
        line = [row["command"]]
        for figure, (_, divisor) in FIGURES.items():
            cells = [by_name.get((row["command"], size)) for size in sizes]
            line += ["" if cell is None else f"{cell[figure] / divisor:.2f}" for cell in cells]
            slope = row.get(figure)
            mark = " (steep)" if figure in row["steep"] else ""
            line.append("" if slope is None else f"{slope:.2f}{mark}")
        lines.append(line)
    return lines


def write_page(path: Path, lines: list[list[str]]) -> None:
    """Writes the table as Markdown."""
    rules = ["---"] + ["---:"] * (len(lines[0]) - 1)
    rows = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rules, *lines[1:]))
    path.write_text(f"# The commands, measured\n\n{PAGE}\n\n{rows}\n")


def main() -> None:
    """Parse, write features, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--num-concepts", type=int, default=20)
    parser.add_argument("--only", nargs="+", help="Beginnings of commands, such as 'decompose'.")
    parser.add_argument("--scratch", type=Path, default=Path("benchmarks/results/scale"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scale.json"))
    parser.add_argument("--page", type=Path, help="Where the table goes too, such as scale.md.")
    arguments = parser.parse_args()
    from xlvlm_jax.features.manifest import manifest_of

    sizes = sorted(arguments.rows)
    if any(b * b != a * c for a, b, c in zip(sizes, sizes[1:], sizes[2:], strict=False)):
        parser.error(f"--rows are {sizes}; expected numbers that grow by the same factor")
    measured = []
    for size in sizes:
        root = arguments.scratch / str(size)
        manifest = manifest_of(root / "tuned")
        if manifest is None or not manifest["complete"]:
            shutil.rmtree(root, ignore_errors=True)
            write_features(root, size)
        for command in commands(root, arguments.num_concepts):
            if arguments.only and not command.name.startswith(tuple(arguments.only)):
                continue
            row = {"command": command.name, "rows": size, "width": D, "K": arguments.num_concepts}
            measured.append(row | measure(command))
            print(json.dumps(measured[-1]), flush=True)
            # After each command: what was measured is kept if the next takes too long.
            save(arguments.output, measured)
            if arguments.page:
                write_page(arguments.page, table_of(measured))
    lines = table_of(measured)
    table = Table(*lines[0])
    for line in lines[1:]:
        table.add_row(*line)
    Console(markup=False).print(table)


if __name__ == "__main__":
    main()
