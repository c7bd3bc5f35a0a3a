"""Resident memory of this process and its peak, from /proc: Linux only.

The largest resident size that `getrusage` gives is no less than that of the process that started
this one, and cannot be reset. The kernel's own peak can, so that it is that of a call.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from xlvlm_jax.solvers.streamed.tiles import give_back

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PAUSE = 0.005  # seconds between two looks at the kinds of pages, of which no peak is kept


class Resident(NamedTuple):
    """Bytes of this process that are in memory."""

    now: int
    peak: int  # since the process started, or since `forget_peak`
    anonymous: int  # of `now`: what was allocated
    file: int  # of `now`: mapped files, such as libraries, whose pages the system can drop


def resident(status: Path = STATUS) -> Resident:
    """Returns the resident memory of this process, or of another from a copy of its status.

    Raises:
        OSError: this system has no /proc.
    """
    lines = (line.split() for line in status.read_text().splitlines())
    # Kernels give these in units of 1,024 bytes.
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines if line[-1] == "kB"}
    names = ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    return Resident(*(1024 * kilobytes[name] for name in names))


def forget_peak() -> None:
    """Makes the peak that of what follows; gives memory that was freed back to the system first."""
    give_back()
    CLEAR.write_text("5")


@contextlib.contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Yields a dictionary with the largest bytes of each kind of page while the block runs.

    Its entries are those of `Resident` but for `now`; those of single kinds are looked at every
    `PAUSE` seconds.
    """
    found, ended = {"anonymous": 0, "file": 0, "peak": 0}, threading.Event()

    def look() -> None:
        at = resident()
        for name in found:
            found[name] = max(found[name], getattr(at, name))

    def keep_looking() -> None:
        while not ended.is_set():
            look()
            time.sleep(PAUSE)

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        look()
