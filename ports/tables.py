"""HTML tables, for displaying objects in notebooks. Text is escaped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

Rows = Iterable[Sequence[Any]]


def html_table(rows: Rows, *, head: Sequence[Any] = (), title: str = "") -> Markup:
    """Returns an HTML table.

    Args:
        rows: the cells of each row, of which the first is its name. `Markup` is inserted unchanged,
            other values as escaped text, see `as_text`.
        head: names of the columns; empty for none.
        title: the table's caption.

    Returns:
        The HTML.

    >>> str(html_table([("a", 1)], head=["name", "<b>"])).partition("<tbody>")[0]
    '<table><thead><tr><th>name</th><th>&lt;b&gt;</th></tr></thead>'
    """
    caption = Markup('<caption style="text-align:left">{}</caption>').format(title) if title else ""
    names = Markup().join(Markup("<th>{}</th>").format(name) for name in head)
    top = Markup("<thead><tr>{}</tr></thead>").format(names) if head else ""
    body = Markup().join(
        Markup('<tr><th style="text-align:left">{}</th>{}</tr>').format(
            as_text(first), Markup().join(Markup("<td>{}</td>").format(as_text(x)) for x in others)
        )
        for first, *others in rows
    )
    return Markup("<table>{}{}<tbody>{}</tbody></table>").format(
        caption if title else "", top, body
    )


def as_text(value: Any) -> str:
    """Returns a value as a reader would write it: lists and mappings without Python's brackets.

    >>> as_text(["yes", 2]), as_text({"rows": 7, "words": ["no", "none"]})
    ('yes, 2', 'rows: 7, words: no, none')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {as_text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value))
    return value if isinstance(value, str) else str(value)


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of all values that are set; nested mappings yield each of their entries.

    >>> list(flat({"a": 1, "b": {"c_d": 2, "e": None}}))
    [('a', 1), ('b: c d', 2)]
    """
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}: ")
        elif value is not None and value != "" and value != []:
            yield name, value


def kind(value: Any) -> str:
    """Returns dtype and shape of an array, such as "float32[2, 3]"; other values' repr."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return repr(value)


def html_arrays(arrays: Mapping[str, Any], *, title: str) -> Markup:
    """Returns an HTML table with the name, dtype and shape of each array."""
    rows = ((name, kind(array)) for name, array in arrays.items())
    return html_table(rows, head=("array", "dtype and shape"), title=title)


def named_states(field: str, states: Mapping[str, Any]) -> dict[str, Any]:
    """Returns states under the expressions that access them, such as "states['layers.1']"."""
    return {f"{field}[{site!r}]": array for site, array in states.items()}
