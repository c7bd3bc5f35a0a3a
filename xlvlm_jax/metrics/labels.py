"""Labels as numbers: what is known of N rows, each distinct value kept once.

Texts are compared and hashed once, when they become numbers; every count after that is one of
small integers.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

UNKNOWN = -1


class Labels(NamedTuple):
    """One label for each of N rows."""

    codes: Int32[np.ndarray, " N"]  # which of `values` a row has; UNKNOWN where none is known
    values: list[str]  # each once

    def take(self, rows: Int[np.ndarray, " M"]) -> "Labels":
        """Those of some rows, or of rows that several times have one label."""
        return Labels(self.codes[rows], self.values)

    def counts(self) -> Int[np.ndarray, " V"]:
        """How many rows have each value."""
        return np.bincount(self.codes[self.codes != UNKNOWN], minlength=len(self.values))

    def counts_by(self, groups: Int[np.ndarray, " N"], num_groups: int) -> Int[np.ndarray, "G V"]:
        """How many rows of each group, 0 to G - 1, have each value; rows of no group are -1."""
        counted = (self.codes != UNKNOWN) & (groups >= 0)
        V = len(self.values)
        cells = groups[counted].astype(np.int64) * V + self.codes[counted]
        return np.bincount(cells, minlength=num_groups * V).reshape(num_groups, V)


def factorise(values: Iterable[Any]) -> Labels:
    """Values as text, each text one number in order of appearance; None is UNKNOWN."""
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
    """`factorise` of every key of `count` mappings, of which none is kept: {key: Labels}."""
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
