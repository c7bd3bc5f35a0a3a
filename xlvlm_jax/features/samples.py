"""Samples on disk, one JSON line each, read on demand.

Opening reads nothing. The first access finds where each line starts (eight bytes of memory per
sample); after that a sample is one read, and all of them are one pass in blocks. Only what is asked
for is kept: `columns` extracts a few keys of every sample and drops the rest.
"""

import itertools
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Int64

from ports.messages import counted

_BLOCK_BYTES = 2**22  # searched at once for line ends
_BLOCK_SAMPLES = 4096  # parsed at once
_PROBES = 8  # names looked up before a directory is taken as the root of all pictures

Locate = Callable[[Sequence[str], Callable[[], Iterable[str]]], Callable[[str], str]]


class StoredSamples(Sequence[dict[str, Any]]):
    """The lines of a samples.jsonl as a sequence of dicts, read anew on every access.

    Args:
        path: path of the file.
        count: expected number of samples.
        size: number of bytes of the file that count.
        locate: given some of the pictures' names, and a function that returns all, returns a
            function from a name to its path, which becomes "image"; None leaves names as stored.

    Raises:
        ValueError: the file is too short; on access also if the number of lines differs or a line
            is not a JSON object.
    """

    def __init__(self, path: Path, count: int, size: int, locate: Locate | None = None):
        self._path = path.absolute()  # independent of later changes of the working directory
        self._count, self._size, self._locate = count, size, locate
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise ValueError(f"{path}: {there} bytes, expected {size}; extract the features again")

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step == 1:
                return list(map(self._placed, self._parsed(first, max(first, last))))
            return [self[number] for number in range(first, last, step)]
        number = operator.index(index)
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self._placed(next(self._parsed(number, number + 1)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._placed, self._parsed(0, len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __repr__(self) -> str:
        return f"StoredSamples({str(self._path)!r}, {counted(len(self), 'sample')})"

    @cached_property
    def _starts(self) -> Int64[np.ndarray, " {self._count}+1"]:
        """Where each line starts, and where the last one ends."""
        if not self._size and not self._count:
            return np.zeros(1, np.int64)
        found, done = [np.zeros(1, np.int64)], 0
        with open(self._path, "rb") as file:
            while block := file.read(min(_BLOCK_BYTES, self._size - done)):
                found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + done + 1)
                done += len(block)
        if max(ends[-1] for ends in found if len(ends)) < self._size:  # no newline at the end
            found.append(np.array([self._size]))
        starts = np.concatenate(found)
        if len(starts) != self._count + 1:
            raise ValueError(
                f"{self._path}: {len(starts) - 1} samples, expected {self._count};"
                " extract the features again"
            )
        return starts

    def _lines(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Yields (number, line) of some samples."""
        starts = self._starts
        with open(self._path, "rb") as file:
            for begin in range(first, last, _BLOCK_SAMPLES):
                end = min(begin + _BLOCK_SAMPLES, last)
                file.seek(starts[begin])
                block = file.read(starts[end] - starts[begin])
                yield from zip(range(begin, end), block.split(b"\n"), strict=False)

    def _parsed(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        return (self._parse(number, line) for number, line in self._lines(first, last))

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            sample = json.loads(line)
            sample.keys()
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(
                f"{self._path}: line {number + 1} is not a JSON object; extract the features again"
            ) from None
        return sample

    def _placed(self, sample: dict[str, Any]) -> dict[str, Any]:
        name = sample.get("image")
        if self._locate is None or not isinstance(name, str):
            return sample
        return sample | {"image": self._path_of(name)}

    @cached_property
    def _path_of(self) -> Callable[[str], str]:
        assert self._locate is not None, "only `_placed` asks for it"
        return self._locate(list(self._some_names()), self._names)

    def _names(self) -> Iterator[str]:
        """Yields the pictures of all samples."""
        for sample in self._parsed(0, self._count):
            if isinstance(name := sample.get("image"), str):
                yield name

    def _some_names(self) -> Iterator[str]:
        """Yields the first picture in each eighth of the samples."""
        bounds = [self._count * i // _PROBES for i in range(_PROBES + 1)]
        for first, last in itertools.pairwise(bounds):
            for number, line in self._lines(first, last):
                name = self._parse(number, line).get("image") if b'"image"' in line else None
                if isinstance(name, str):
                    yield name
                    break

    def find_pictures(self) -> None:
        """Looks for the pictures now.

        Raises:
            ValueError: `locate` does not find them.
        """
        if self._locate is not None:
            self._path_of  # noqa: B018


def unplaced(samples: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Returns the samples for a reader that does not need "image"; finds no pictures."""
    if isinstance(samples, StoredSamples):
        return samples._parsed(0, len(samples))
    return samples


def unplaced_pairs(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yields the n-th samples of both for a reader that does not need "image".

    Parses lines that are equal once: most are, if two models ran on the same data.
    """
    if not (isinstance(first, StoredSamples) and isinstance(second, StoredSamples)):
        yield from zip(unplaced(first), unplaced(second), strict=True)
        return
    both = zip(first._lines(0, len(first)), second._lines(0, len(second)), strict=True)
    for (number, ours), (_, theirs) in both:
        sample = first._parse(number, ours)
        yield sample, sample if theirs == ours else second._parse(number, theirs)


def columns(samples: Iterable[Mapping[str, Any]], *keys: str) -> tuple[list[Any], ...]:
    """Returns the values of each key in the samples, None where it is missing; in one pass."""
    found: tuple[list[Any], ...] = tuple([] for _ in keys)
    for sample in samples if "image" in keys else unplaced(samples):
        for key, values in zip(keys, found, strict=True):
            values.append(sample.get(key))
    return found


def name_of(number: int | str, given: Any) -> str:
    """Returns the ID that a sample was given, otherwise its number."""
    return str(number if given is None else given)
