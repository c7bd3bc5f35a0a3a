"""Helpers for error messages."""

from collections.abc import Iterable


def few(names: Iterable[object], most: int = 5) -> str:
    """Joins the first names with commas and counts the rest.

    few(["a", "b", "c", "d"], most=2) -> "a, b and 2 more"

    Args:
        names: what to list, in order.
        most: maximum number of names shown.

    Returns:
        The names as one line of text.
    """
    listed = [str(name) for name in names]
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")
