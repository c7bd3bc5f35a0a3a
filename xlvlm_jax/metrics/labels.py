"""Labels as integers: one label for each of N rows, with each distinct value stored once.

Texts are compared and hashed once, when they become integers; all counts after that are of small
integers.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

UNKNOWN = -1


class Labels(NamedTuple):
    """One label for each of N rows."""

    codes: Int32[np.ndarray, " N"]  # index into `values` of each row; UNKNOWN if it has none
    values: list[str]  # distinct

    def take(self, rows: Int[np.ndarray, " M"] | Bool[np.ndarray, " N"]) -> "Labels":
        """Returns the labels of some rows: their numbers, which may repeat, or a mask."""
        return Labels(self.codes[rows], self.values)

    def counts(self) -> Int[np.ndarray, " V"]:
        """Returns how many rows have each value."""
        return np.bincount(self.codes[self.codes != UNKNOWN], minlength=len(self.values))

    def counts_by(self, groups: Int[np.ndarray, " N"], num_groups: int) -> Int[np.ndarray, "G V"]:
        """Returns how many rows of each group have each value.

        Args:
            groups: int[N], 0 to G - 1, or -1 for rows of no group.
            num_groups: G.
        """
        counted = (self.codes != UNKNOWN) & (groups >= 0)
        V = len(self.values)
        cells = groups[counted].astype(np.int64) * V + self.codes[counted]
        return np.bincount(cells, minlength=num_groups * V).reshape(num_groups, V)


def factorise(values: Iterable[Any]) -> Labels:
    """Converts values to text, and each text to an integer by appearance; None is UNKNOWN."""
    places: dict[str, int] = {}
    codes = np.fromiter(
        (
            UNKNOWN if value is None else places.setdefault(str(value), len(places))
            for value in values
        ),
        np.int32,
    )
    return Labels(codes, list(places))


def factorise_each(rows: Iterable[Mapping[str, Any]], count: int) -> dict[str, Labels]:
    """Does `factorise` for every key of `count` mappings without keeping them: {key: Labels}."""
    codes: dict[str, np.ndarray] = {}
    places: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows):
        for key, value in row.items():
            if key not in codes:
                codes[key], places[key] = np.full(count, UNKNOWN, np.int32), {}
            if value is not None:
                known = places[key]
                codes[key][number] = known.setdefault(str(value), len(known))
    return {key: Labels(codes[key], list(places[key])) for key in codes}
