"""Pairs the rows that the original and the fine-tuned model produced for the same sample.

Only samples for which both models have rows count: with a token of interest, those for which both
models produced the token.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int

from ports.messages import few
from xlvlm_jax.features.reader import Features, matching_sites
from xlvlm_jax.features.samples import columns, name_of, unplaced_pairs

# Fields besides the ID that identify a sample; if both directories have them, they must agree.
_NAMING = ("image_id", "prompt")


class Pairs(NamedTuple):
    """M pairs of rows.

    Attributes:
        original: int[M], rows of the original features.
        finetuned: int[M], rows of the fine-tuned features.
        num_samples: samples in both directories, with or without rows.
    """

    original: Int[np.ndarray, " M"]
    finetuned: Int[np.ndarray, " M"]
    num_samples: int


def match_samples(original: Features, finetuned: Features) -> Pairs:
    """Matches the rows of two directories by sample ID.

    Runs on the host and cannot be traced.

    If a sample has several rows, its n-th row in one directory is paired with its n-th row in the
    other. Of several samples with one ID, those of the same prompt and picture belong together, and
    the n-th of the others in one directory to the n-th of the others in the other.

    Args:
        original, finetuned: features of the same data under both models.

    Returns:
        The pairs, in the order of the original's rows.

    Raises:
        ValueError: the two were selected differently, hold different samples, or no sample has
            rows in both.
    """
    _check_selection(original, finetuned)
    other = _partners(original, finetuned)
    num_shared = np.count_nonzero(other >= 0)
    nth_a, (nth_b, counts_b, order_b) = _nth(original)[0], _nth(finetuned)
    sample = other[original.sample_rows]
    paired = np.flatnonzero((sample >= 0) & (nth_a < counts_b[sample]))
    if not len(paired):
        raise ValueError(
            f"{original.path} and {finetuned.path} have no common samples: of the {num_shared}"
            f" that both hold, {len(nth_a)} have rows in one and {len(nth_b)} in the other, none"
            " in both; use more samples, or a token that both models produce"
        )
    first_b = np.cumsum(counts_b) - counts_b
    theirs = order_b[first_b[sample[paired]] + nth_a[paired]]
    return Pairs(paired, theirs, int(num_shared))


def _partners(original: Features, finetuned: Features) -> Int[np.ndarray, " S"]:
    """Returns the fine-tuned features' sample for each original sample; -1 for none."""
    if _in_one_order(original, finetuned):
        return np.arange(len(original.samples))
    of_a, of_b = _numbers(original), _numbers(finetuned)
    named_a, named_b = _namings(original, finetuned)
    shared, both = [], []
    for name, numbers in of_a.items():
        pairs = [*_alike(numbers, of_b.get(name, []), named_a, named_b)]
        shared += [name] * len(pairs)
        both += pairs
    if not shared:
        some = [next(iter(numbers), "none") for numbers in (of_a, of_b)]
        raise ValueError(
            f"{original.path} and {finetuned.path} hold different samples (ids such as"
            f" {some[0]!r} and {some[1]!r}); extract both from the same data"
        )
    ours, theirs = np.array(both, np.int64).T
    _check_samples(shared, ours, theirs, original, finetuned)
    other = np.full(len(original.samples), -1, np.int64)
    other[ours] = theirs
    return other


def _in_one_order(original: Features, finetuned: Features) -> bool:
    """Returns whether both hold the same samples in the same order, as runs on the same data do.

    Keeps no names in memory: those of millions of samples would take more space than their states.
    """
    if not len(original.samples) == len(finetuned.samples) > 0:
        return False
    seen = np.empty(len(original.samples), np.int64)
    for number, (a, b) in enumerate(unplaced_pairs(original.samples, finetuned.samples)):
        name = name_of(number, a.get("id"))
        # The same object stands for equal lines.
        if a is not b and (
            name != name_of(number, b.get("id")) or any(_differ(a, b, key) for key in _NAMING)
        ):
            return False
        seen[number] = hash(name)
    return len(np.unique(seen)) == len(seen)  # otherwise a name may belong to several samples


def _differ(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> bool:
    return None not in (a.get(key), b.get(key)) and a[key] != b[key]


def _numbers(features: Features) -> dict[str, list[int]]:
    """Returns {sample ID: numbers of the samples with it}."""
    (ids,) = columns(features.samples, "id")
    numbers: dict[str, list[int]] = {}
    for number, given in enumerate(ids):
        numbers.setdefault(name_of(number, given), []).append(number)
    return numbers


def _namings(*features: Features) -> list[list[tuple[Any, ...]]]:
    """Returns, for each directory, the fields by which its samples of one ID are told apart.

    A field that one of the directories does not have tells nothing.
    """
    found = [columns(each.samples, *_NAMING) for each in features]
    kept = [
        field
        for field in range(len(_NAMING))
        if all(any(value is not None for value in fields[field]) for fields in found)
    ]
    count = [len(each.samples) for each in features]
    return [
        list(zip(*(fields[field] for field in kept), strict=True)) if kept else [()] * number
        for fields, number in zip(found, count, strict=True)
    ]


def _alike(
    ours: list[int],
    theirs: list[int],
    named_a: list[tuple[Any, ...]],
    named_b: list[tuple[Any, ...]],
) -> Iterator[tuple[int, int]]:
    """Yields pairs of samples of one ID: those with the same fields, then the others in order."""
    left, rest = ours, theirs
    if max(len(ours), len(theirs)) > 1:
        waiting: dict[str, deque[int]] = {}
        for j in theirs:
            waiting.setdefault(repr(named_b[j]), deque()).append(j)
        left = []
        for i in ours:
            if found := waiting.get(repr(named_a[i])):
                yield i, found.popleft()
            else:
                left.append(i)
        rest = sorted(itertools.chain.from_iterable(waiting.values()))
    yield from zip(left, rest, strict=False)


def _nth(features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns each row's rank among its sample's rows, rows per sample, and rows by sample."""
    rows = features.sample_rows
    counts = np.bincount(rows, minlength=len(features.samples))
    order = np.argsort(rows, kind="stable")
    nth = np.empty(len(rows), np.int64)
    nth[order] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return nth, counts, order


class RowIds(Sequence[str]):
    """The sample ID of each row, read on demand, because only few of millions are needed.

    Attributes:
        features: the features.
        samples: {sample ID: sample number} of the IDs read so far.
    """

    def __init__(self, features: Features):
        self.features, self.samples = features, {}
        self._names: dict[int, str] = {}

    @property
    def samples_of_rows(self) -> Int[np.ndarray, " N"]:
        """Number of the sample of each row."""
        return self.features.sample_rows

    def __len__(self) -> int:
        return len(self.features.sample_rows)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        number = int(self.features.sample_rows[row])
        if number not in self._names:
            name = name_of(number, self.features.samples[number].get("id"))
            self.samples[name], self._names[number] = number, name
        return self._names[number]


def common_site(original: Features, finetuned: Features, site: str | None) -> str:
    """Returns the requested site, or the only one that both features hold.

    Args:
        original, finetuned: features.
        site: a site or pattern; None for the only common site.

    Returns:
        The site.

    Raises:
        ValueError: not exactly one common site matches.
    """
    both = [name for name in original.sites if name in finetuned.sites]
    if site is None and len(both) == 1:
        return both[0]
    found = [] if site is None else matching_sites(site, both)
    if len(found) != 1:
        held = [few(each.sites) or "none" for each in (original, finetuned)]
        raise ValueError(
            f"{original.path} holds the sites {held[0]} and {finetuned.path} {held[1]};"
            f" choose one that both hold, got {site!r}"
        )
    return found[0]


def _check_selection(original: Features, finetuned: Features) -> None:
    for key in ("selection", "mode"):
        a, b = (each.manifest.get(key) for each in (original, finetuned))
        if None not in (a, b) and a != b:
            raise ValueError(
                f"{original.path} was extracted with {key} {_short(a)}, {finetuned.path} with"
                f" {_short(b)}; extract both with the same options"
            )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        named = ":".join(str(value[key]) for key in ("mode", "argument") if value.get(key))
        rest = (f"{key} {value[key]}" for key in value if key not in ("mode", "argument"))
        return f"{named} ({', '.join(rest)})"
    return repr(value)


def _check_samples(
    names: list[str],
    ours: Int[np.ndarray, " M"],
    theirs: Int[np.ndarray, " M"],
    original: Features,
    finetuned: Features,
) -> None:
    """Checks that samples agree; raises a ValueError for the first that differs."""
    for key in _NAMING:
        (of_a,), (of_b,) = (columns(each.samples, key) for each in (original, finetuned))
        for name, i, j in zip(names, ours.tolist(), theirs.tolist(), strict=True):
            if None not in (of_a[i], of_b[j]) and of_a[i] != of_b[j]:
                raise ValueError(
                    f"sample {name!r} has {key} {of_a[i]!r} in {original.path} and {of_b[j]!r} in"
                    f" {finetuned.path}: features of different samples; extract both from the same"
                    " data"
                )
