"""What error messages have in common."""

from collections.abc import Iterable


def few(names: Iterable[object], most: int = 5) -> str:
    """Joins names with commas, and says of the rest how many there are.

    few(["a", "b", "c", "d"], most=2) -> "a, b and 2 more"
    """
    listed = [str(name) for name in names]
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")
