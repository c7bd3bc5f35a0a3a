"""All sides in turn, and whether they found the same."""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ports
from benchmarks import measure
from benchmarks.extraction.ours import (
    BATCH,
    Rows,
    full,
    groups_of,
    prepare,
    run_extract,
    run_generate,
)
from benchmarks.extraction.peer import Peer
from xlvlm_jax.data import coco
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.demo import embedded

AIMS = {"loop": 10.0, "batched": 3.0}
TOLERANCE = 1e-4


class Side(NamedTuple):
    """One of what is run in turn."""

    pictures: int  # it works on
    run: Callable[[], Any]
    warm_up: Callable[[], Any]


def sides(
    vlm: ports.VLM, peer: Peer, samples: Sequence[Sample], looped: int, word: str, scratch: Path
) -> dict[str, Side]:
    """What is compared. Outputs lie below `scratch`, each run's in a directory of its own."""

    def new() -> Path:
        return Path(tempfile.mkdtemp(dir=scratch)) / "features"

    # Some samples that hold the word, as extraction without any row is refused; and one more than
    # a batch, so that the last batch is one that had to be filled up.
    few = sorted(samples, key=lambda sample: word not in " ".join(sample.references))[: BATCH + 1]
    prepared = [prepare(vlm, full(group)) for group in groups_of(samples)]
    every = len(samples)

    def images(samples: Sequence[Sample]) -> None:
        for group in groups_of(samples):
            prepare(vlm, group)

    return {
        "extract": Side(
            every,
            lambda: run_extract(vlm, samples, word, new()),
            lambda: run_extract(vlm, few, word, new()),
        ),
        "loop": Side(
            looped, lambda: peer.loop(samples[:looped], new()), lambda: peer.loop(few[:4], new())
        ),
        "batched": Side(
            every, lambda: peer.batched(samples, new()), lambda: peer.batched(few, new())
        ),
        "ahead": Side(
            every,
            lambda: peer.batched(samples, new(), read_ahead=True),
            lambda: peer.batched(few, new(), read_ahead=True),
        ),
        "peer alone": Side(every, lambda: peer.alone(prepared), lambda: peer.alone(prepared[:1])),
        "alone": Side(
            every, lambda: run_generate(vlm, prepared), lambda: run_generate(vlm, prepared[:1])
        ),
        "images": Side(every, lambda: images(samples), lambda: images(few)),
    }


def agreement(ours: Rows, theirs: Rows) -> dict[str, Any]:
    """Whether two sides found the same rows."""
    same = ours.ids == theirs.ids and np.array_equal(ours.tokens, theirs.tokens)
    difference = None
    if same:
        error = np.abs(ours.states - theirs.states).max()
        difference = float(error / np.abs(theirs.states).max())
    return {"rows": len(theirs.ids), "same": bool(same), "difference": difference}


def run(
    directory: Path, looped: int, word: str, repeats: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row of the table for each side."""
    samples = coco.load(directory, "test")
    vlm = ports.load(embedded.LLAVA)
    looped = min(looped, len(samples)) or len(samples)
    with tempfile.TemporaryDirectory() as scratch:
        compared = sides(vlm, Peer(vlm, word), samples, looped, word, Path(scratch))
        first = {name: measure.seconds(side.warm_up)[0] for name, side in compared.items()}
        times: dict[str, list[float]] = {name: [] for name in compared}
        found: dict[str, Any] = {}
        for repeat in range(repeats):
            for name, side in compared.items():
                report(f"run {repeat + 1} of {repeats}: {name} ...")
                took, found[name] = measure.seconds(side.run)
                times[name].append(took / side.pictures)
    rows = []
    for name, side in compared.items():
        row = {
            "what": name,
            "pictures": side.pictures,
            "of": len(samples),
            "milliseconds": 1e3 * statistics.median(times[name]),
            "ratio": float(np.median(np.divide(times[name], times["extract"]))),
            "aim": AIMS.get(name),
            "first": first[name],
            "runs": repeats,
            "load": os.getloadavg()[0],
        }
        if isinstance(found[name], Rows):
            ids = {sample.id for sample in samples[: side.pictures]}
            row |= agreement(found["extract"].first(ids), found[name])
        rows.append(row)
    return rows


def disagreeing(rows: list[dict[str, Any]]) -> list[str]:
    """The sides whose rows are not those of `extract`."""
    return [
        row["what"]
        for row in rows
        if "same" in row and not (row["same"] and row["difference"] <= TOLERANCE)
    ]
