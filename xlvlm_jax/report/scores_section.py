"""Scores of dictionaries as tables and a plot, for the terminal and the page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from ports.messages import counted
from ports.tables import html_table
from xlvlm_jax.concepts.scores.records import DictionaryScores, Fit
from xlvlm_jax.data.frames import pandas_module
from xlvlm_jax.report.plots import Plot, read_plot

if TYPE_CHECKING:
    import pandas

KEYS = ("dictionaries", "scored on")  # keys of scores.json that this section shows
Figure = Callable[[DictionaryScores], float | None]


class Column(NamedTuple):
    """One score, a column of a table."""

    name: str
    value: Figure
    explained: str
    better: int = 0  # 1: higher is better, -1: lower is better, 0: neither
    deviation: Figure | None = None


class Cell(NamedTuple):
    """One score as text."""

    text: str  # empty if the dictionary does not have this score
    best: bool  # best among dictionaries with the same number of concepts
    deviation: str = ""  # standard deviation over samples


class ScoreTable(NamedTuple):
    """Scores of dictionaries, a column each; scores that no dictionary has are left out."""

    title: str
    columns: list[Column]
    rows: list[tuple[DictionaryScores, list[Cell]]]

    def __repr__(self) -> str:
        names = ", ".join(column.name for column in self.columns)
        rows = counted(len(self.rows), "dictionary", "dictionaries")
        return f"ScoreTable({self.title!r}: {names}; {rows})"

    def _repr_html_(self) -> str:
        rows = [
            (row.name, *(Markup("<b>{}</b>").format(c.text) if c.best else c.text for c in cells))
            for row, cells in self.rows
        ]
        return html_table(rows, head=("", *(c.name for c in self.columns)), title=self.title)

    def to_pandas(self) -> "pandas.DataFrame":
        """Returns the scores as numbers, a line per dictionary with its method and size.

        A score with a deviation over samples has a second column, such as "CLIP@1 ±"; what belongs
        to a score is named with it, such as "CLIP@1 noise".

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        dictionaries = [row for row, _ in self.rows]
        values: dict[str, list[Any]] = {
            "method": [row.method for row in dictionaries],
            "num_concepts": [row.num_concepts for row in dictionaries],
        }
        fit = ""
        for column in self.columns:
            # In the table what random words and noise score stands beside the fit that it is of.
            fit = column.name if "@" in column.name else fit
            name = f"{fit} {column.name}" if column.name in ("random", "noise") else column.name
            values[name] = [column.value(row) for row in dictionaries]
            if column.deviation is not None:
                values[f"{name} ±"] = [column.deviation(row) for row in dictionaries]
        names = [row.name for row in dictionaries]
        return pandas_module().DataFrame(values, index=names)


class ScoresSection(NamedTuple):
    """The part of scores.json that the page shows."""

    tables: list[ScoreTable]
    plot: Plot | None
    rows: int | None  # number of rows of features scored on
    clip: str | None  # CLIP model that compared images and words
    bert: str | None  # BERT model that compared captions and words
    similarity: float | None  # mean CLIP similarity of two images


def read_scores(run: Path, scores: Mapping[str, Any]) -> ScoresSection | None:
    """Returns the section on scores of a run directory.

    Args:
        run: the run directory.
        scores: the content of its scores.json.

    Returns:
        The section; None if `scores` holds no dictionaries.

    Raises:
        ValueError: the dictionaries are not in the form that `write_scores` writes.
    """
    if not scores.get("dictionaries"):
        return None
    try:
        rows = [DictionaryScores.from_dict(row) for row in scores["dictionaries"]]
        on = dict(scores.get("scored on") or {})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{run / 'scores.json'}: invalid scores of dictionaries ({error}); score them again"
        ) from None
    image = run / "scores.svg"
    explained = "Scores of each method by number of concepts"
    return ScoresSection(
        score_tables(rows),
        read_plot(image, explained) if image.is_file() else None,
        on.get("rows"),
        on.get("clip"),
        on.get("bert"),
        on.get("mean similarity of two images"),
    )


def score_tables(rows: Sequence[DictionaryScores]) -> list[ScoreTable]:
    """Returns two tables of scores, one on words and one on codes.

    Args:
        rows: scored dictionaries.

    Returns:
        The tables; the best score for each number of concepts is marked.
    """
    # The round trip through a dict turns NaN into None.
    rows = [DictionaryScores.from_dict(row.to_dict()) for row in rows]
    tables = []
    for title, columns in (
        ("How well the words fit", _word_columns(rows)),
        ("Properties of the codes", _code_columns(rows)),
    ):
        columns = [c for c in columns if any(c.value(row) is not None for row in rows)]
        lines = [(row, [_cell(row, column, rows) for column in columns]) for row in rows]
        # A row without any of these scores (random words have no codes) is left out.
        lines = [(row, cells) for row, cells in lines if any(cell.text for cell in cells)]
        if columns:
            tables.append(ScoreTable(title, columns, lines))
    return tables


def _word_columns(rows: Sequence[DictionaryScores]) -> Iterator[Column]:
    for name, of, more in (
        ("CLIP", "clip", "CLIPScore between the samples and the words of the"),
        ("BERT", "bert", "BERTScore (F1) between the samples' captions and the words of the"),
    ):
        for r in sorted({r for row in rows for r in getattr(row, of)}):
            top = "most activated concept" if r == 1 else f"{r} most activated concepts"
            yield Column(f"{name}@{r}", _fit(of, r, "mean"), f"{more} {top}", 1, _fit(of, r, "std"))
            if not any(row.method == "random" for row in rows):
                yield Column(
                    "random", _fit(of, r, "random"), "the same with equally many random words"
                )
            yield Column("noise", _fit(of, r, "noise"), "the same with images of noise")
    yield Column(
        "overlap", lambda row: row.overlap, "share of words that two concepts have in common", -1
    )


def _fit(of: str, r: int, figure: str) -> Figure:
    def value(row: DictionaryScores) -> float | None:
        fit: Fit | None = getattr(row, of).get(r)
        return None if fit is None else getattr(fit, figure)

    return value


def _code_columns(rows: Sequence[DictionaryScores]) -> Iterator[Column]:
    yield Column("variance", lambda row: row.explained_variance, "share of variance explained", 1)
    yield Column("Hoyer", lambda row: row.hoyer, "sparsity: 1 if a sample uses one concept", 1)
    yield Column("active", lambda row: row.active, "share of non-zero codes")
    yield Column("dead", lambda row: row.dead, "concepts that no sample activates most", -1)
    yield Column("stability", lambda row: row.stability, "cosine with other seeds' concepts", 1)
    yield Column("alike", lambda row: row.monosemanticity, "similarity of a concept's images", 1)
    for name in dict.fromkeys(name for row in rows for name in row.attributes):
        yield Column(
            name,
            lambda row, name=name: row.attributes.get(name, {}).get("concepts"),
            f"mutual information of the most activated concept with {name}",
            1,
        )


def _cell(row: DictionaryScores, column: Column, rows: Sequence[DictionaryScores]) -> Cell:
    value = column.value(row)
    if value is None:
        return Cell("", False)
    rivals = {
        column.better * round(found, 3)
        for other in rows
        if other.num_concepts == row.num_concepts
        and (found := column.value(other)) is not None
        # Random words always overlap least, so they can't win where lower is better.
        and (other.method != "random" or column.better > 0)
    }
    # If all are equal, none is best.
    best = len(rivals) > 1 and column.better * round(value, 3) == max(rivals)
    spread = column.deviation and column.deviation(row)
    return Cell(
        str(value) if isinstance(value, int) else f"{value:.3f}",
        best,
        "" if spread is None else f"{spread:.2f}",
    )
