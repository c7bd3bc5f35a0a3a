"""A run over several hosts: each writes its own parts, which are then merged in order.

The samples are divided into blocks of `BATCHES` batches, independently of where the run is resumed
and of the number of hosts, so that the same samples share a batch and give the same states. A
block's features are a directory `parts/<first sample>/` next to the final ones. Host 0 appends each
part to the final features as soon as its turn comes, and deletes it. The final features therefore
have the same bytes as those of a run on one host, and whatever a killed host committed is used when
the run is resumed.

Hosts share only the directory and need not wait for each other.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ports.parallel import hosts
from xlvlm_jax.data.batches import Group, groups_of
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.manifest import manifest_of
from xlvlm_jax.features.reader import Features, stored_samples
from xlvlm_jax.features.writer import FeaturesWriter

BATCHES = 16
FOLDER = "parts"
_POLL_SECONDS = 0.2
_LATE_SECONDS = 60


class Block(NamedTuple):
    """Samples `start` to `stop` of the run, written to a directory of their own."""

    path: Path
    start: int
    stop: int
    done: int  # number of samples committed there
    complete: bool


def exist(output: Path) -> bool:
    """Returns whether a run over several hosts left parts there."""
    return (output / FOLDER).is_dir()


def blocks_of(output: Path, num_samples: int, done: int, batch_size: int) -> list[Block]:
    """Returns the blocks that are not completely in the final features yet.

    Host 0 looks at the disk and tells the others, so all hosts get the same list.

    Args:
        output: directory of the final features.
        num_samples: number of samples in the run.
        done: number of samples in the final features.
        batch_size: samples per batch.
    """
    size = BATCHES * batch_size

    def look(start: int) -> Block:
        path = output / FOLDER / f"{start:09d}"
        stop = min(start + size, num_samples)
        part = manifest_of(path)
        if part is None:
            return Block(path, max(start, done), stop, 0, False)
        # A run on one host may have started the block earlier.
        first = part["arguments"]["part"][0]
        # Does not ask whether it was closed: a host may be killed between its last batch and
        # closing.
        return Block(path, first, stop, part["samples"], part["samples"] == stop - first)

    found = []
    if hosts.is_first():
        found = [look(start) for start in range(done // size * size, num_samples, size)]
    told = hosts.tell([(str(block.path), *block[1:]) for block in found])
    return [Block(Path(path), *rest) for path, *rest in told]


class Parts:
    """The blocks of this host: which groups are still to be done, and where each is written.

    Args:
        blocks: blocks of all hosts; every host gets the same list.
        samples: samples of the whole run.
        arguments: manifest of the whole run.
        dtype: dtype of the states on disk.
        batch_size: samples per batch.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        samples: Sequence[Sample],
        arguments: dict[str, Any],
        dtype: str,
        batch_size: int,
    ):
        import grain

        left = grain.MapDataset.source([block for block in blocks if not block.complete])
        mine = left[jax.process_index() :: jax.process_count()]
        self.groups: list[Group] = []
        self._places: list[tuple[Block, bool]] = []  # per group: its block, whether last
        self._open: FeaturesWriter | None = None
        self._arguments, self._dtype = arguments, dtype
        for block in mine:
            here = groups_of(samples[block.start + block.done : block.stop], batch_size)
            self.groups += here
            self._places += [(block, i == len(here) - 1) for i in range(len(here))]

    def commit(self, number: int, *batch: Any) -> None:
        """Appends group `number` to its part, and closes the part after its last group."""
        block, last = self._places[number]
        if self._open is None:
            part = self._arguments | {"part": [block.start, block.stop]}
            self._open = FeaturesWriter(block.path, part, dtype=self._dtype)
        self._open.append(*batch)
        if last:
            self._open.close()
            self._open = None

    def release(self) -> None:
        """Releases the part that an error left open."""
        if self._open is not None:
            self._open.release()


def merge_ready(writer: FeaturesWriter, blocks: Sequence[Block], batch_size: int) -> int:
    """Appends the complete parts whose turn has come; returns how many samples they hold."""
    began = writer.samples_done
    for block in blocks:
        if block.stop <= began:
            continue
        if block.start > writer.samples_done or not _is_whole(block):
            break
        for batch in _batches_of(block, writer.samples_done, batch_size):
            writer.append(*batch)
        # What its host has open meanwhile, `merge_all` removes.
        shutil.rmtree(block.path, ignore_errors=True)
    return writer.samples_done - began


def merge_all(writer: FeaturesWriter, blocks: Sequence[Block], batch_size: int) -> None:
    """Waits for the parts of all hosts and appends them; then removes the directory of parts.

    If a host died, JAX reports it and ends the others.
    """
    while blocks and writer.samples_done < blocks[-1].stop:
        if not merge_ready(writer, blocks, batch_size):
            time.sleep(_POLL_SECONDS)
    shutil.rmtree(writer.path / FOLDER, ignore_errors=True)


def await_whole(output: Path) -> None:
    """Waits, on hosts other than 0, until the features are complete.

    Raises:
        ValueError: host 0 gave up and removed its features; its own message says why.
    """
    missing = 0
    while not _is_complete(output):
        missing = 0 if (output / "manifest.json").exists() else missing + 1
        # A directory that was there before the run stays; a disk over a network shows files late.
        if not output.exists() or missing * _POLL_SECONDS > _LATE_SECONDS:
            raise ValueError(f"{output}: host 0 ended without features; its message says why")
        time.sleep(_POLL_SECONDS)


def _is_whole(block: Block) -> bool:
    """Returns whether all of a block is committed, and its host writes no more."""
    state = manifest_of(block.path)
    if state is None or state["samples"] != block.stop - block.start:
        return False
    return state["complete"] or block.complete


def _is_complete(path: Path) -> bool:
    state = manifest_of(path)
    return state is not None and state["complete"]


def _batches_of(block: Block, done: int, batch_size: int) -> Iterator[tuple[Any, ...]]:
    """Yields arguments of `FeaturesWriter.append` for a part's samples from `done`, in batches."""
    part = Features.open(block.path, allow_incomplete=True)
    stored = {site: part.stored(site) for site in part.sites}
    # Committed in the model's batches, so that a killed merge resumes between two of them.
    described = stored_samples(block.path)
    for start in range(done - block.start, len(described), batch_size):
        samples = described[start : start + batch_size]
        ends = [start, start + len(samples)]
        first, last = np.searchsorted(part.sample_rows, ends).tolist()
        states = {site: rows.read(first, last) for site, rows in stored.items()}
        index = part.sample_rows[first:last] - start
        cells = None if part.cells is None else part.cells.take(slice(first, last))
        yield samples, states, index, part.positions[first:last], part.tokens[first:last], cells
