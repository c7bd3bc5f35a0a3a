"""The environment of a command: hosts, profiling, compilation counts and signal handling."""

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.errors import LiveError
from rich.status import Status
from typer.core import TyperCommand

from xlvlm_jax.cli.console import console, spinner
from xlvlm_jax.storage import atomic

Hosts = Annotated[
    str | None,
    typer.Option(
        help="Run on several hosts, each with this command: 'auto' if the cluster announces them "
        "(TPU pod, Slurm), otherwise ADDRESS:PORT,COUNT,INDEX with the address of host 0."
    ),
]
Profile = Annotated[
    Path | None,
    typer.Option(help="Write a profile of the run to this directory, for XProf or Perfetto."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what the run would need; write nothing.")
]
# How long a command may take to end by itself after a signal. The longest step that does not
# return to Python is a compilation.
_GRACE_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GOES_ON = "interrupted; finished work is saved, run the same command to resume"
BEGINS_AGAIN = "interrupted; the same command starts over"
_resumes = False  # whether the running command can resume where it was interrupted


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes."""
    # In KiB, except on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resumes() -> None:
    """Declares that the running command saves its progress and can resume when interrupted."""
    global _resumes
    _resumes = True


def stopped() -> str:
    """Returns the message of an interrupted command."""
    return GOES_ON if _resumes else BEGINS_AGAIN


@contextlib.contextmanager
def saying_compilations() -> Iterator[None]:
    """Shows a spinner on a terminal while a long compilation runs."""
    if not console.is_terminal:
        yield
        return
    from ports import programs

    turning: list[Status] = []

    def began(name: str) -> None:
        status = spinner(f"compiling {name}")
        try:
            status.start()
            turning.append(status)
        except LiveError:  # rich before 14.1 allows one live display at a time
            console.print(f"compiling {name}")

    def ended(_: str, __: float) -> None:
        while turning:
            turning.pop().stop()

    with programs.telling_compilations(began, ended):
        yield


class Command(TyperCommand):
    """A command that, once its arguments are parsed, caches programs and shows long compilations.

    Parsing and help do not import JAX.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        from ports.programs import keep_programs

        keep_programs()
        with saying_compilations():
            return super().invoke(ctx)


class Programs:
    """Counts the programs that JAX compiles while the context is open.

    Attributes:
        compiled: programs compiled or read from the cache, including those of single operations.
        kept: programs read from the cache.
        seconds: time spent compiling and reading the cache.
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
        from jax import monitoring

        monitoring.register_event_listener(self._event)
        monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_listener(self._event)
        monitoring.unregister_event_duration_listener(self._duration)

    def __str__(self) -> str:
        # JAX also reports a program read from the cache as compiled, with the time to read it.
        made = self.compiled - self.kept
        return f"{made} programs compiled, {self.kept} from the cache, {self.seconds:.1f} s"


def join_hosts(text: str | None) -> None:
    """Makes this process one of several hosts.

    Args:
        text: the value of --hosts; None for a single host.

    Raises:
        ValueError: `text` is neither "auto" nor ADDRESS:PORT,COUNT,INDEX.
    """
    if text is None:
        return
    from ports.parallel import hosts

    if text == "auto":
        hosts.join()
    else:
        parts = text.split(",")
        if len(parts) != 3 or not parts[1].isdecimal() or not parts[2].isdecimal():
            raise ValueError(
                f"--hosts is {text!r}; expected auto or ADDRESS:PORT,COUNT,INDEX, such as "
                "10.0.0.1:8476,2,0"
            )
        hosts.join(parts[0], int(parts[1]), int(parts[2]))
    # JAX has replaced the signal handlers with its own.
    _handle_signals()


@contextlib.contextmanager
def profiled(directory: Path | None) -> Iterator[None]:
    """Writes a JAX profile of the block to `directory`, if given."""
    if directory is None:
        yield
        return
    import jax

    with jax.profiler.trace(directory):
        yield


class Interrupted(BaseException):
    """A signal asked the command to end; `status` is the exit status for it.

    Not a KeyboardInterrupt, because Typer exits silently on one.
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
    """Ends the command with one line on SIGTERM as on Ctrl-C.

    If the main thread does not return to Python within a few seconds (a long compilation), another
    thread ends the process. Commits are atomic, so no committed work is lost.
    """
    before = [signal.getsignal(number) for number in _SIGNALS]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        # A Python signal handler has to wait for the main thread; this byte arrives immediately.
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
