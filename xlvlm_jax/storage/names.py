"""Short names of paths."""

from collections.abc import Sequence
from pathlib import Path


def distinct_ends(paths: Sequence[Path]) -> list[str]:
    """Returns names of paths: their ends of the smallest depth at which they differ.

    Args:
        paths: the paths; equal ones have equal names.

    Examples:
        >>> from pathlib import Path
        >>> distinct_ends([Path("/a/shift"), Path("/b/shift")])
        ['a/shift', 'b/shift']
        >>> distinct_ends([Path("/a/red"), Path("/a/blue")])
        ['red', 'blue']
    """
    parts = [path.resolve().parts for path in paths]
    different = len(set(parts))
    for depth in range(1, max(map(len, parts), default=0)):
        ends = [each[-depth:] for each in parts]
        if len(set(ends)) == different:
            return ["/".join(end) for end in ends]
    return [str(path.resolve()) for path in paths]
