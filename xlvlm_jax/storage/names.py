"""Short names of paths."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path


def distinct_ends(paths: Sequence[Path]) -> list[str]:
    """Returns names of paths: of each the shortest end that no other has.

    Args:
        paths: the paths; equal ones have equal names.

    Examples:
        >>> from pathlib import Path
        >>> distinct_ends([Path("/a/shift"), Path("/b/shift"), Path("/b/other")])
        ['a/shift', 'b/shift', 'other']
        >>> distinct_ends([Path("/runs/a"), Path("/x/runs/a")])
        ['/runs/a', 'x/runs/a']
    """
    every = [Path(os.path.abspath(path)).parts for path in paths]
    count = Counter(parts[-n:] for parts in set(every) for n in range(1, len(parts) + 1))
    # The whole path, which begins with the root, is the end of no other.
    names = (
        next(parts[-n:] for n in range(1, len(parts) + 1) if count[parts[-n:]] == 1)
        for parts in every
    )
    return [Path(*name).as_posix() for name in names]
