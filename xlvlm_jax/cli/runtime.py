"""What a command runs in: kept programs, hosts, a profile, and signals that end it in time."""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import typer
from jax import monitoring
from rich.errors import LiveError
from rich.status import Status

from ports import programs
from xlvlm_jax.cli.console import console
from xlvlm_jax.storage import atomic

Hosts = Annotated[
    str | None,
    typer.Option(
        help="Several hosts, each with this command: 'auto' where the cluster tells them (TPU pod, "
        "Slurm), else ADDRESS:PORT,COUNT,INDEX with the address of host 0."
    ),
]
Profile = Annotated[
    Path | None, typer.Option(help="A directory for a profile of the run, for XProf or Perfetto.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what the run would need, and write nothing.")
]
# How long a command may take to end by itself after a signal: the longest step between two
# commits that does not return to Python is a compilation.
_GRACE_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GOES_ON = "interrupted; what was committed stays, the same command goes on from there"
BEGINS_AGAIN = "interrupted; the same command begins again from the start"
_resumes = False  # whether the command that runs goes on where it was interrupted


def peak_memory() -> int:
    """The largest number of bytes that this process has had in memory."""
    # In KiB, but on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resumes() -> None:
    """For a command that commits as it works: interrupted, it says that it goes on from there."""
    global _resumes
    _resumes = True


def stopped() -> str:
    """What an interrupted command says."""
    return GOES_ON if _resumes else BEGINS_AGAIN


@contextlib.contextmanager
def saying_compilations() -> Iterator[None]:
    """On a terminal, a line turns while a program is compiled for long."""
    if not console.is_terminal:
        yield
        return
    turning: list[Status] = []

    def began(name: str) -> None:
        status = console.status(f"compiling {name}")
        try:
            status.start()
            turning.append(status)
        except LiveError:  # rich before 14.1 shows one thing that moves at a time
            console.print(f"compiling {name}")

    def ended(_: str, __: float) -> None:
        while turning:
            turning.pop().stop()

    with programs.telling_compilations(began, ended):
        yield


class Programs:
    """Counts what JAX compiles while the context is open.

    Attributes:
        compiled: programs made, those of single operations among them.
        kept: programs that were taken from the cache instead.
        seconds: of compilation and of reading the cache.
    """

    def __init__(self) -> None:
        self.compiled, self.kept, self.seconds = 0, 0, 0.0

    def _event(self, event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.kept += 1

    def _duration(self, event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compiled += 1
            self.seconds += duration_secs

    def __enter__(self) -> "Programs":
        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_listener(self._event)
        monitoring.unregister_event_duration_listener(self._duration)

    def __str__(self) -> str:
        # JAX reports a program from the cache as compiled too, in the time of reading it.
        made = self.compiled - self.kept
        return f"{made} programs compiled, {self.kept} from the cache, {self.seconds:.1f} s"


def join_hosts(text: str | None) -> None:
    """--hosts: makes this process one of several. ValueError for what names none."""
    if text is None:
        return
    from ports.parallel import hosts

    if text == "auto":
        hosts.join()
    else:
        parts = text.split(",")
        if len(parts) != 3 or not parts[1].isdecimal() or not parts[2].isdecimal():
            raise ValueError(
                f"--hosts is {text!r}; expected auto, or ADDRESS:PORT,COUNT,INDEX such as "
                "10.0.0.1:8476,2,0"
            )
        hosts.join(parts[0], int(parts[1]), int(parts[2]))
    # JAX has put a handler of its own in their place.
    _handle_signals()


@contextlib.contextmanager
def profiled(directory: Path | None) -> Iterator[None]:
    """While the context is open, JAX writes a profile, if a directory is given."""
    if directory is None:
        yield
        return
    with jax.profiler.trace(directory):
        yield


class Interrupted(BaseException):
    """A signal asked the command to end; `status` is what the process then ends with.

    No KeyboardInterrupt: the command line's library ends at one without a word.
    """

    def __init__(self, number: int):
        super().__init__()
        self.status = 128 + number


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)


def _handle_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: one line, between two commits.

    What does not return to Python within a few seconds (a long compilation) is ended from a
    thread: a commit is atomic, so that nothing that was committed is lost by it.
    """
    before = [signal.getsignal(number) for number in _SIGNALS]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        # A handler of Python's waits for the main thread; this byte is written at once.
        received = os.read(reader, 1)
        if received and received[0] in _SIGNALS:
            time.sleep(_GRACE_SECONDS)
            atomic.remove_unfinished()
            print(stopped(), file=sys.stderr, flush=True)
            os._exit(128 + received[0])

    _handle_signals()
    fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd_before)
        os.close(writer)
        for number, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(number, handler)
