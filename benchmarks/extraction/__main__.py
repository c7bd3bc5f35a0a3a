"""Extraction: features of the embedded model's test pictures, against PyTorch's forward hooks.

    python -m benchmarks.extraction                  # 500 pictures, captions of up to 20 tokens
    python -m benchmarks.extraction --pictures 100 --repeats 3

What every side makes: of each picture whose caption holds the word, the state at the final norm
from which the word was predicted. All read the same files with the same function and the same
processor, in float32, and store what they found. In turn, `repeats` times:

    extract     `xlvlm_jax.features.extract` into a new directory, batches of 32
    loop        transformers' `generate`, one picture at a time; a forward hook keeps the states of
                all positions, rows are selected at the end (what the reference does)
    batched     the same in batches of 32, in inference mode; the hook keeps the last position only,
                rows are selected after each batch
    ahead       batched, with images read and preprocessed by a thread while the model computes
    peer alone  transformers' `generate` on prepared batches, without hook, images and storing
    alone       `vlm.generate` on prepared batches, the same
    images      reading and preprocessing the images, one batch after another

"ratio" is the median of a side's time a picture over that of extract, run by run. The loop may be
timed on the first pictures only. "same" says whether samples and tokens of the rows equal those of
extract; "difference" is the largest of the states over the largest state.

Memory is the largest resident size of a process of its own that reads the images and extracts,
over that of one that reads the same and generates without capturing.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.extraction import memory
from benchmarks.extraction.ours import BATCH
from xlvlm_jax.data import scenes


def table(rows: list[dict[str, Any]], word: str) -> Table:
    """The rows for a reader."""
    shown = Table(title=f"States of {word!r} in captions of {rows[0]['of']} pictures, float32")
    headings = ("what", "timed on", "a picture", "all", "ratio", "aim", "rows", "same")
    for heading in (*headings, "difference", "load"):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        aim, difference = row["aim"], row.get("difference")
        scaled = " (scaled)" if row["pictures"] < row["of"] else ""
        shown.add_row(
            row["what"],
            f"{row['pictures']} pictures",
            f"{row['milliseconds']:.2f} ms",
            f"{row['milliseconds'] * row['of'] / 1e3:.2f} s{scaled}",
            f"{row['ratio']:.2f}",
            "" if aim is None else f"{aim:.0f}",
            str(row.get("rows", "")),
            {True: "yes", False: "no", None: ""}[row.get("same")],
            "" if difference is None else f"{difference:.0e}",
            f"{row['load']:.1f}",
        )
    return shown


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=500, help="of the test split")
    parser.add_argument("--looped", type=int, default=60, help="pictures of the loop; 0: all")
    parser.add_argument("--word", default="dog", help="the token of interest")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/extraction.json"))
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print, save."""
    arguments = parse()
    word, repeats = arguments.word, arguments.repeats
    console = Console(markup=False)
    console.width = max(console.width, 120)
    with tempfile.TemporaryDirectory() as directory:
        scenes.write(directory, test=arguments.pictures)
        # First, while this process is small: a new one begins with the peak of the one it is from.
        console.print("memory ...")
        used = memory.memory(Path(directory), word, min(repeats, 3))
        # It brings PyTorch, which would make this process large.
        from benchmarks.extraction import compare

        rows = compare.run(Path(directory), arguments.looped, word, repeats, console.print)
    console.print(table(rows, word))
    console.print(f"first run of extract, {BATCH + 1} pictures, compiles: {rows[0]['first']:.1f} s")
    console.print(
        f"memory: extract {used['extract_mib']:.0f} MiB, generate {used['generate_mib']:.0f} MiB, "
        f"ratio {used['ratio']:.3f}, at most {memory.AIM}"
    )
    measure.save(arguments.output, [*rows, used], "torch", "transformers")
    console.print(f"saved to {arguments.output}")
    if others := compare.disagreeing(rows):
        sys.exit(f"rows differ from those of extract: {', '.join(others)}")


if __name__ == "__main__":
    main()
