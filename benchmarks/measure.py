"""Shared by the benchmarks: paired timing, and saved results with a description of the machine."""

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

REST = 0.2  # seconds before a measured call


class Paired(NamedTuple):
    """Times of two sides that ran alternately, so that other load affects both."""

    ours: float  # median seconds
    theirs: float
    ratio: float  # median of theirs / ours, pair by pair
    first: float  # seconds of our first run, which includes compilation
    runs: int


def seconds(
    call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Returns the time of a call until its arrays are ready, and its result.

    Args:
        call: the call.
        clock: wall time by default; `time.process_time` for the CPU time of all threads, which
            depends less on what else runs.
    """
    # The other side's threads may still be spinning.
    time.sleep(REST)
    start = clock()
    result = jax.block_until_ready(call())
    return clock() - start, result


def paired(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Runs both once to warm up, then alternately, `repeats` times (see `seconds`)."""
    first, _ = seconds(ours, clock)
    seconds(theirs, clock)
    return alternately(ours, theirs, repeats, clock)._replace(first=first)


def alternately(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Does `paired` for two sides that have run before; `first` is the first of these runs."""
    pairs = [(seconds(ours, clock)[0], seconds(theirs, clock)[0]) for _ in range(repeats)]
    times = np.array(pairs)
    mine, peer = np.median(times, axis=0)
    ratio = np.median(times[:, 1] / times[:, 0])
    return Paired(float(mine), float(peer), float(ratio), float(times[0, 0]), repeats)


def machine(*packages: str) -> dict[str, Any]:
    """Returns the number of cores, the devices and the versions of packages."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "cores": os.cpu_count(),
        "system": platform.machine(),
        "devices": [device.device_kind for device in jax.devices()],
        **{name: installed(name) for name in ("jax", "numpy", *packages)},
    }


def save(output: Path, rows: list[dict[str, Any]], *packages: str) -> None:
    """Writes the rows and the machine as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(*packages), "rows": rows}, indent=1)
    output.write_text(text + "\n")
