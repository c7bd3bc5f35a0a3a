"""Helpers for messages: lists of names, and counts."""

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


def counted(count: int, one: str, several: str = "") -> str:
    """Returns a count with its noun: "1 row", "2 rows", "1,000 rows".

    Args:
        count: how many.
        one: the noun in the singular.
        several: the plural; "" for one with an s at its end.
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"
