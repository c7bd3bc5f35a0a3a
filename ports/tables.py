"""Tables as HTML, for objects that show themselves in notebooks. Text in them is escaped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

Rows = Iterable[Sequence[Any]]


def html_table(rows: Rows, *, head: Sequence[Any] = (), title: str = "") -> Markup:
    """Returns a table as HTML; cells that are `Markup` are taken as they are, others as text.

    Args:
        rows: the cells of each row, the first of which names it.
        head: the names of the columns; none for a table of names and values.
        title: stands above it.

    >>> str(html_table([("a", 1)], head=["name", "<b>"])).partition("<tbody>")[0]
    '<table><thead><tr><th>name</th><th>&lt;b&gt;</th></tr></thead>'
    """
    caption = Markup('<caption style="text-align:left">{}</caption>').format(title) if title else ""
    names = Markup().join(Markup("<th>{}</th>").format(name) for name in head)
    top = Markup("<thead><tr>{}</tr></thead>").format(names) if head else ""
    body = Markup().join(
        Markup('<tr><th style="text-align:left">{}</th>{}</tr>').format(
            first, Markup().join(Markup("<td>{}</td>").format(escape(cell)) for cell in others)
        )
        for first, *others in rows
    )
    return Markup("<table>{}{}<tbody>{}</tbody></table>").format(
        caption if title else "", top, body
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of what is set; mappings within it give a row per entry.

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
    """Returns dtype and shape of an array, such as "float32[2, 3]"; for others their repr."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return repr(value)


def html_arrays(arrays: Mapping[str, Any], *, title: str) -> Markup:
    """Returns a table of arrays as HTML: the name and the kind of each, no numbers."""
    rows = ((name, kind(array)) for name, array in arrays.items())
    return html_table(rows, head=("array", "dtype and shape"), title=title)


def named_states(field: str, states: Mapping[str, Any]) -> dict[str, Any]:
    """Returns states by site under the names that they are read by: "states['layers.1']"."""
    return {f"{field}[{site!r}]": array for site, array in states.items()}
