"""Cycles of a kernel, counted in the instructions that libtpu writes for it.

The compiler's estimates do not look into a kernel. But its last dump has all its bundles, of which
a core issues one per cycle, in their order, with the loops that they are in and the constants that
end them. What is counted is a lower bound: a bundle that waits for a copy or a result takes longer.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=final_bundles"
)
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:(LB|LH|LE|PB|PF|CT)\s*)?:([ >]*)\{")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")


class Loop(NamedTuple):
    """A loop, or what is outside of all."""

    steps: int
    bundles: int  # of one step, without those of loops in it
    loops: "list[Loop]"

    @property
    def cycles(self) -> int:
        """Cycles of all steps."""
        return self.steps * self.of_step

    @property
    def of_step(self) -> int:
        """Cycles of one step."""
        return self.bundles + sum(loop.cycles for loop in self.loops)


def dump_to(folder: Path) -> None:
    """Makes libtpu write what it compiles; only before it is loaded."""
    before = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{before} {FLAGS.format(folder)}".strip()


def clear(folder: Path) -> None:
    """Removes what was written, before another program is compiled."""
    for file in folder.iterdir():
        file.unlink()


def of_kernel(folder: Path, name: str) -> Loop:
    """Returns the loop over the blocks of the kernel with this name.

    Raises:
        FileNotFoundError: no such kernel was compiled.
    """
    found = sorted(
        file
        for file in folder.glob(f"*-{name}*-final_bundles.txt")
        if "schedule-analysis" not in file.name
    )
    if not found:
        raise FileNotFoundError(f"{folder} has no bundles of a kernel {name!r}")
    return read(found[-1].read_text())


def read(text: str) -> Loop:
    """Returns the outermost loop of a kernel's bundles.

    Raises:
        ValueError: there is not one such loop.
    """
    lines = [
        (found[2].count(">"), found[1] == "LB", _EXIT.search(line))
        for line in text.splitlines()
        if (found := _BUNDLE.match(line))
    ]

    def loops(first: int, end: int, depth: int) -> list[tuple[int, int]]:
        """Returns where loops of this depth begin and end: with the last bundle that is as deep.

        Bundles of what comes before or after may be in between, moved there into empty places.
        """
        starts = [i for i in range(first, end) if lines[i][1] and lines[i][0] == depth]
        ends = [*starts[1:], end][: len(starts)]
        return [
            (start, 1 + max(i for i in range(start, stop) if lines[i][0] >= depth))
            for start, stop in zip(starts, ends, strict=True)
        ]

    def loop(first: int, end: int, depth: int) -> Loop:
        inside = loops(first + 1, end, depth + 1)
        inner = [loop(*place, depth + 1) for place in inside]
        own = [i for i in range(first, end) if not any(a <= i < b for a, b in inside)]
        steps = next((int(bound[1]) for i in own if (bound := lines[i][2])), 1)
        return Loop(steps, len(own), inner)

    outer = loops(0, len(lines), 1)
    if len(outer) != 1:
        raise ValueError(f"expected the bundles of one loop over blocks, got {len(outer)} loops")
    return loop(*outer[0], 1)
