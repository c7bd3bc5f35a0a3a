"""Fuzzes every reader: damaged files must give a value or a one-line error.

    python -m benchmarks.faults.fuzz --minutes 60 [--seed 0] [--targets pth coco] [--guided]

An input must be accepted, or refused with a one-line ValueError or OSError. Anything else is a
finding: other errors, more than 10 seconds, more than the memory limit, a process that dies, a file
created by code in the input, markup that is not escaped in the report. Findings are kept with their
files; an input can be reproduced from the seed and its number. With `--guided`, inputs that reach
new lines are damaged further (guided.py, with atheris); these are kept, but can't be reproduced.
"""

import argparse
import contextlib
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.faults import mutate
from benchmarks.measure import save

SECONDS = 10  # time limit per input
KEPT = 2  # inputs kept per kind of finding


class Child:
    """Runs the inputs of one target in this process, and records the results."""

    def __init__(self, target: str, seed: int, output: Path, memory: int):
        from benchmarks.faults.targets import TARGETS

        self.name, self.seed, self.output = target, seed, output
        self.target = TARGETS[target]
        self.work = output / "work" / target.replace(" ", "-")
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.target.make(self.work)
        self.valid = {
            str(file.relative_to(self.work)): file.read_bytes()
            for file in sorted(self.work.rglob("*"))
            if file.is_file()
        }
        self.target.read(self.work)  # imports what it needs, before memory is limited
        os.chdir(self.work)  # where a marker would appear
        self.damaged = [name for name in self.valid if not name.endswith((".md", ".png"))]
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        self.tally: Counter[str] = Counter()
        self.findings: Counter[str] = Counter()

    def prepare(self, number: int) -> None:
        """Writes the valid files, some of them damaged."""
        rng = random.Random(f"{self.seed}/{self.name}/{number}")
        contents = dict(self.valid)
        for name in rng.sample(self.damaged, min(len(self.damaged), rng.choice((1, 1, 1, 2)))):
            others = [contents[rng.choice(self.damaged)], contents[name]]
            contents[name] = mutate.mutate(name, contents[name], others, rng)
        self.place(contents, fitted=rng.random() < 0.8)
        if rng.random() < 0.01:
            (self.work / rng.choice(self.damaged)).unlink()

    def place(self, contents: dict[str, bytes], fitted: bool) -> None:
        """Writes exactly these files; with `fitted`, updates data that depend on other files."""
        shutil.rmtree(self.work, ignore_errors=True)
        for name, content in contents.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_bytes(content)
        os.chdir(self.work)
        if fitted:
            with contextlib.suppress(Exception):  # there may be nothing to update
                self.target.fit(self.work)

    def judge(self, number: int) -> None:
        """Reads the files, and counts the result."""
        problem = None
        try:
            self.target.read(self.work)
            self.tally["accepted"] += 1
        except (ValueError, OSError) as error:
            self.tally["refused"] += 1
            text = str(error)
            if not text.strip() or re.search(r"[\r\n]", text.strip()):
                problem = f"{type(error).__name__} of several lines or none", error
            elif str(self.work) not in text and len(text) < 300:
                self.tally["refused without the file's name"] += 1
                self.tally[f"nameless: {_place(error)}: {text[:80]}"] += 1
        except BaseException as error:
            problem = type(error).__name__, error
        if (self.work / mutate.MARKER).exists():
            problem = "code was executed", RuntimeError("a file was made")
        if problem:
            self.keep(number, f"{problem[0]} at {_place(problem[1])}", problem[1])

    def keep(self, number: int, kind: str, error: BaseException) -> None:
        """Counts a finding, and keeps the files of the first ones of each kind."""
        self.findings[kind] += 1
        if self.findings[kind] <= KEPT:
            details = "".join(traceback.format_exception(error))
            keep_files(self.output, self.name, self.seed, number, kind, self.work, details)

    def write(self, tried: int) -> None:
        """Writes the results for the parent process."""
        state = {"tried": tried, "tally": self.tally, "findings": self.findings}
        file = self.output / "state.json"
        file.with_suffix(".tmp").write_text(json.dumps(state))
        os.replace(file.with_suffix(".tmp"), file)


def _place(error: BaseException) -> str:
    """Returns the last line of our own code in the error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/xlvlm_jax/" in f.filename or "/ports/" in f.filename]
    if not ours:
        return "elsewhere"
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}:{ours[-1].lineno}"


def keep_files(
    output: Path, target: str, seed: int, number: int, kind: str, work: Path, details: str
) -> None:
    """Copies the files of an input, with the reason."""
    place = output / f"{target.replace(' ', '-')}-{seed}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(work, place)
    (place / "finding.txt").write_text(f"{kind}\n{details[-20000:]}", errors="replace")
    print(f"{target}: seed {seed}, input {number}: {kind}; kept in {place}", flush=True)


class Watch:
    """Numbers the inputs: a process that dies or hangs leaves the number of its last input."""

    def __init__(self, running: Child, first: int, until: float):
        faulthandler.enable()
        warnings.simplefilter("ignore")
        self.running, self.first, self.until, self.number = running, first, until, first
        self.current = os.open(running.output / "current", os.O_RDWR | os.O_CREAT)
        self.written = time.monotonic()

    @contextlib.contextmanager
    def input(self) -> Iterator[int]:
        """Records the number of an input while it is written and read."""
        os.pwrite(self.current, b"%-20d" % self.number, 0)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        yield self.number
        faulthandler.cancel_dump_traceback_later()
        self.number += 1
        if time.monotonic() - self.written > 0.5 or self.over:
            self.running.write(self.number - self.first)
            self.written = time.monotonic()

    @property
    def over(self) -> bool:
        """Returns whether the time is up."""
        return time.time() >= self.until


def child(target: str, seed: int, output: Path, memory: int, first: int, until: float) -> None:
    """Runs inputs from `first` on, until a time."""
    running = Child(target, seed, output, memory)
    watch = Watch(running, first, until)
    while not watch.over:
        with watch.input() as number:
            running.prepare(number)
            running.judge(number)


def campaign(target: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Runs one target for some seconds, with a new process whenever one dies."""
    output, until = arguments.output.absolute(), time.time() + seconds
    tally, findings, first = Counter(), Counter(), arguments.first
    while time.time() < until:
        (output / "state.json").unlink(missing_ok=True)
        (output / "current").unlink(missing_ok=True)
        options = [target, arguments.seed, output, arguments.memory, first, until]
        module = "guided" if arguments.guided else "fuzz"
        command = [sys.executable, "-m", f"benchmarks.faults.{module}", "--child"]
        command += map(str, options)
        with open(output / "errors.txt", "wb") as errors:
            process = subprocess.Popen(command, stderr=errors)
            code = process.wait()
        state = {"tried": 0, "tally": {}, "findings": {}}
        if (output / "state.json").exists():
            state = json.loads((output / "state.json").read_text())
        tally.update(state["tally"])
        findings.update(state["findings"])
        if code == 0:
            first += state["tried"]
            break
        said = (output / "errors.txt").read_text(errors="replace")
        if not (output / "current").exists():
            raise SystemExit(f"{target}: its process did not begin: {said[-2000:]}")
        number = int((output / "current").read_text())
        kind = "more than 10 s" if "Timeout" in said else f"the process died, status {code}"
        frames = re.findall(r'File ".*?/((?:xlvlm_jax|ports)/.*?)", line (\d+)', said)
        kind += f" at {frames[0][0]}:{frames[0][1]}" if frames else ""
        findings[kind] += 1
        if findings[kind] <= KEPT:
            work = output / "work" / target.replace(" ", "-")
            keep_files(output, target, arguments.seed, number, kind, work, said)
        first = number + 1
    nameless = {key: n for key, n in tally.items() if key.startswith("nameless")}
    return {
        "target": target,
        "tried": first - arguments.first,
        "accepted": tally["accepted"],
        "refused": tally["refused"],
        "refused without the file's name": tally["refused without the file's name"],
        "findings": dict(findings),
        "nameless": dict(Counter(nameless).most_common(10)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns a table with one row per target."""
    shown = Table()
    columns = ("tried", "accepted", "refused")
    for name in ("target", *columns, "findings", "kinds"):
        shown.add_column(name, justify="left" if name == "target" else "right")
    for row in rows:
        figures = [str(row.get(name, "")) for name in columns]
        found = row["findings"]
        shown.add_row(row["target"], *figures, str(sum(found.values())), str(len(found)))
    return shown


def child_arguments() -> tuple[str, int, Path, int, int, float]:
    """Parses the arguments of `child` from the command line."""
    target, seed, output, memory, first, until = sys.argv[2:]
    return target, int(seed), Path(output), int(memory), int(first), float(until)


def main() -> None:
    """Run, print, save."""
    if sys.argv[1:2] == ["--child"]:
        child(*child_arguments())
        return
    from benchmarks.faults.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--targets", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--guided", action="store_true", help="by coverage; needs atheris")
    parser.add_argument("--memory", type=int, default=8 * 2**30, help="bytes above the start")
    parser.add_argument("--output", type=Path, default=Path("fuzzed"), help="keeps the findings")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/faults_fuzz.json"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, console = [], Console(markup=False)
    shares = {name: TARGETS[name].share for name in arguments.targets}
    for name, share in shares.items():
        seconds = 60 * arguments.minutes * share / sum(shares.values())
        rows.append(campaign(name, arguments, seconds))
        console.print(rows[-1])
    console.print(table(rows))
    save(arguments.results, rows)
    if any(row["findings"] for row in rows):
        raise SystemExit("there are findings")


if __name__ == "__main__":
    main()
