"""Journeys through the code: the files and rooms that a run enters, and hand-overs between rooms.

    python -m benchmarks.journeys     # Python 3.12 or later, whose sys.monitoring it uses

Runs commands on the bundled model and a few drawn scenes, each in this process. A file is entered
if one of its functions runs for the journey; what runs while modules are imported does not count.
The rooms are `ports` and the subpackages of `xlvlm_jax`. A hand-over is a file that calls a file of
another room, directly or through other packages; each pair counts once.
"""

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("ports", "xlvlm_jax")
SITE = "language_model.model.norm"


def room_of(file: str) -> str:
    """Returns the room of a file, given relative to the root."""
    package, room, *_ = file.split("/")
    return package if package == "ports" else f"{package}/{room}"


class Journey:
    """What runs while the context is open.

    Attributes:
        files: the files entered, relative to the root.
        calls: pairs of files of which the first called the second.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.calls: set[tuple[str, str]] = set()
        self._names: dict[CodeType, str | None] = {}

    @property
    def hand_overs(self) -> set[tuple[str, str]]:
        """The calls from one room to another."""
        return {(a, b) for a, b in self.calls if room_of(a) != room_of(b)}

    def _name(self, code: CodeType) -> str | None:
        """Returns the file of a code object; None if it is not ours."""
        if code not in self._names:
            path = Path(code.co_filename)
            ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES
            self._names[code] = str(path.relative_to(ROOT)) if ours else None
        return self._names[code]

    def _begins(self, code: CodeType, _: int) -> Any:
        name = self._name(code)
        if name is None or not code.co_flags & inspect.CO_OPTIMIZED:  # bodies of modules, classes
            return sys.monitoring.DISABLE
        caller, frame = None, sys._getframe(2)
        above: FrameType | None = frame
        while above is not None:
            other = self._name(above.f_code)
            if other is not None and not above.f_code.co_flags & inspect.CO_OPTIMIZED:
                return None  # runs during an import
            caller = caller or other
            above = above.f_back
        self.files.add(name)
        if caller is not None:
            self.calls.add((caller, name))
        return None

    def __enter__(self) -> "Journey":
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.PROFILER_ID, "journey")
        event = monitoring.events.PY_START
        monitoring.register_callback(monitoring.PROFILER_ID, event, self._begins)
        monitoring.set_events(monitoring.PROFILER_ID, event)
        monitoring.restart_events()
        return self

    def __exit__(self, *_: object) -> None:
        sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
        sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)


def command(*arguments: object) -> Callable[[], None]:
    """Returns a function that runs a command of `xlvlm` in silence."""

    def run() -> None:
        from xlvlm_jax import cli

        sys.argv = ["xlvlm", *map(str, arguments)]
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main()
            except SystemExit as end:
                assert not end.code, arguments

    return run


def load() -> None:
    """Loads the bundled model onto a mesh."""
    import ports

    ports.load("embedded", mesh=ports.make_mesh(1, 1))


def journeys(work: Path) -> dict[str, Callable[[], Any]]:
    """Draws the data; returns what is run by name, in this order."""
    from xlvlm_jax.data import scenes

    scenes.write(work / "pictures", train=12, test=4)
    extract = ("extract", "embedded", work / "pictures", "--site", SITE, "--batch-size", 8)
    answers = ("--dataset", "vqav2", "--tokens", "before-special-tokens", "--num-samples", 32)
    fit = ("steer", "fit", work / "answers", "--source", "yes", "--target", "no")
    evaluate = ("evaluate", "embedded", work / "pictures", "--dataset", "vqav2", "--num-samples", 8)
    vector = work / "vector.safetensors"
    return {
        "image -> row of Z on disk": command(
            *(*extract, "--tokens", "index:-1", "--max-new-tokens", 4, "--output", work / "Z")
        ),
        "Z -> decompose": command(
            *("decompose", work / "Z", "--num-concepts", 2, "--output", work / "concepts")
        ),
        "concepts -> ground": command("ground", work / "concepts", "--model", "embedded"),
        "": command(*extract, *answers, "--max-new-tokens", 3, "--output", work / "answers"),
        "steer fit": command(*fit, "--output", vector),
        "vector file -> evaluate -> generated token": command(
            *(*evaluate, "--vector", vector, "--output", work / "evaluation")
        ),
        "name -> placed parameter": load,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="also list the files and hand-overs")
    options = parser.parse_args()
    line = "{:<44}{:>6}{:>7}{:>12}"
    print(line.format("journey", "files", "rooms", "hand-overs"))
    with tempfile.TemporaryDirectory() as work:
        for name, run in journeys(Path(work)).items():
            with Journey() as journey:
                run()
            if not name:  # prepares the next
                continue
            rooms = {room_of(file) for file in journey.files}
            figures = (len(journey.files), len(rooms), len(journey.hand_overs))
            print(line.format(name, *figures), flush=True)
            if options.list:
                shown = (f"{a} -> {b}" for a, b in sorted(journey.hand_overs))
                print(*sorted(rooms), *sorted(journey.files), *shown, sep="\n")


if __name__ == "__main__":
    main()
