"""What a process costs before it does any work: imports, and the help of the command line.

    python -m benchmarks.startup                # medians of 9 runs each, half a minute
    python -m benchmarks.startup --repeats 3

Every row runs two commands in turn, each in a new process: ours, and an import that no user of JAX
or scikit-learn can avoid. Times are CPU seconds of the whole process, user and system. "ratio" is
the median of ours over theirs, pair by pair; "limit" is what it may be at most. No compiled program
is involved, and modules are read from the page cache: the first pair is not counted.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import measure

BASE = "import jax, flax"


class Row(NamedTuple):
    """Two commands to compare."""

    name: str
    ours: str  # Python code
    theirs: str
    limit: float  # of ours / theirs


def command_line(*arguments: str) -> str:
    """Returns Python code that runs `xlvlm` with these arguments."""
    words = ["xlvlm", *arguments]
    return f"import sys; sys.argv = {words!r}; from xlvlm_jax.cli import main; main()"


ROWS = (
    Row("import xlvlm_jax", "import xlvlm_jax", BASE, 1.2),
    Row("from xlvlm_jax import decompose", "from xlvlm_jax import decompose", BASE, 1.2),
    Row("from ports import load", "from ports import load", BASE, 1.2),
    Row(
        "from xlvlm_jax import KMeans",
        "from xlvlm_jax import KMeans",
        "import sklearn.cluster",
        None,
    ),
    Row("xlvlm --help", command_line("--help"), "import jax", 1.25),
    Row("xlvlm --version", command_line("--version"), "import jax", 1.25),
    Row("xlvlm evaluate --help", command_line("evaluate", "--help"), "import jax", 1.25),
)


def cpu_seconds(script: str) -> float:
    """Returns the CPU time of a Python process that runs `script`."""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{script!r} ended with status {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measured(row: Row, repeats: int) -> dict[str, Any]:
    """Runs both commands of a row alternately."""
    pairs = [(cpu_seconds(row.ours), cpu_seconds(row.theirs)) for _ in range(repeats + 1)]
    times = np.array(pairs[1:])
    ours, theirs = np.median(times, axis=0)
    ratio = np.median(times[:, 0] / times[:, 1])
    return {
        "name": row.name,
        "ours": float(ours),
        "against": row.theirs,
        "theirs": float(theirs),
        "ratio": float(ratio),
        "limit": row.limit,
    }


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/startup.json"))
    options = parser.parse_args()
    rows = [measured(row, options.repeats) for row in ROWS]
    table = Table(
        "ours", "CPU s", "against", "CPU s", "ratio", "limit", "share of the limit", box=None
    )
    for row, shown in zip(ROWS, rows, strict=True):
        limit, share = "", ""
        if row.limit is not None:
            limit, share = f"{row.limit:.2f}", f"{shown['ratio'] / row.limit:.0%}"
        table.add_row(
            row.name,
            f"{shown['ours']:.2f}",
            row.theirs,
            f"{shown['theirs']:.2f}",
            f"{shown['ratio']:.2f}",
            limit,
            share,
        )
    Console(width=110, markup=False).print(table)
    measure.save(options.output, rows, "jaxlib", "flax", "scikit-learn", "typer")


if __name__ == "__main__":
    main()
