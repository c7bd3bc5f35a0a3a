"""Scores of dictionaries as tables and a plot, for the terminal and for the page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlvlm_jax.concepts.scores.records import DictionaryScores, Fit
from xlvlm_jax.report.plots import Plot, read_plot

KEYS = ("dictionaries", "scored on")  # of scores.json
Figure = Callable[[DictionaryScores], float | None]


class Column(NamedTuple):
    """A figure of dictionaries."""

    name: str
    value: Figure
    explained: str
    better: int = 0  # 1: the higher the better, -1: the lower, 0: neither
    deviation: Figure | None = None


class Cell(NamedTuple):
    """A figure as written."""

    text: str  # empty where there is none
    best: bool  # of the dictionaries with as many concepts
    deviation: str = ""  # over samples


class ScoreTable(NamedTuple):
    """Figures of dictionaries, a column each; those that no dictionary has are left out."""

    title: str
    columns: list[Column]
    rows: list[tuple[DictionaryScores, list[Cell]]]


class ScoresSection(NamedTuple):
    """What the page shows of scores.json."""

    tables: list[ScoreTable]
    plot: Plot | None
    rows: int | None  # scored on
    clip: str | None  # the models that judged
    bert: str | None
    similarity: float | None


def read_scores(run: Path, scores: Mapping[str, Any]) -> ScoresSection | None:
    """The section of a run directory whose scores.json holds `scores`; None if it has none.

    Raises ValueError for dictionaries that are not as `write_scores` writes them.
    """
    if not scores.get("dictionaries"):
        return None
    try:
        rows = [DictionaryScores.from_dict(row) for row in scores["dictionaries"]]
        on = dict(scores.get("scored on") or {})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{run / 'scores.json'}: no scores of dictionaries ({error}); score them again"
        ) from None
    image = run / "scores.svg"
    explained = "The scores of each method against the number of concepts"
    return ScoresSection(
        score_tables(rows),
        read_plot(image, explained) if image.is_file() else None,
        on.get("rows"),
        on.get("clip"),
        on.get("bert"),
        on.get("mean similarity of two images"),
    )


def score_tables(rows: Sequence[DictionaryScores]) -> list[ScoreTable]:
    """The figures in two tables, of words and of codes; the best of every K is marked."""
    # As they are written: a figure that is NaN is none.
    rows = [DictionaryScores.from_dict(row.to_dict()) for row in rows]
    tables = []
    for title, columns in (
        ("How well the words fit", _word_columns(rows)),
        ("What the codes are like", _code_columns(rows)),
    ):
        columns = [c for c in columns if any(c.value(row) is not None for row in rows)]
        lines = [(row, [_cell(row, column, rows) for column in columns]) for row in rows]
        # A row that has none of the figures (random words have no codes) is left out.
        lines = [(row, cells) for row, cells in lines if any(cell.text for cell in cells)]
        if columns:
            tables.append(ScoreTable(title, columns, lines))
    return tables


def _word_columns(rows: Sequence[DictionaryScores]) -> Iterator[Column]:
    for name, of, more in (
        ("CLIP", "clip", "CLIPScore of the samples with the words of the"),
        ("BERT", "bert", "BERTScore (F1) of the samples' captions with the words of the"),
    ):
        for r in sorted({r for row in rows for r in getattr(row, of)}):
            top = "most activated concept" if r == 1 else f"{r} most activated concepts"
            yield Column(f"{name}@{r}", _fit(of, r, "mean"), f"{more} {top}", 1, _fit(of, r, "std"))
            if not any(row.method == "random" for row in rows):
                yield Column("random", _fit(of, r, "random"), "the same with random words, as many")
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
    yield Column("variance", lambda row: row.explained_variance, "share of it explained", 1)
    yield Column("Hoyer", lambda row: row.hoyer, "sparsity: 1 if a sample uses one concept", 1)
    yield Column("active", lambda row: row.active, "share of codes that are not zero")
    yield Column("dead", lambda row: row.dead, "concepts that come first in no sample", -1)
    yield Column("stability", lambda row: row.stability, "cosine with other seeds' concepts", 1)
    yield Column("alike", lambda row: row.monosemanticity, "likeness of a concept's images", 1)
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
        # No words overlap as little as random ones.
        and (other.method != "random" or column.better > 0)
    }
    # Where all are alike none is best.
    best = len(rivals) > 1 and column.better * round(value, 3) == max(rivals)
    spread = column.deviation and column.deviation(row)
    return Cell(
        str(value) if isinstance(value, int) else f"{value:.3f}",
        best,
        "" if spread is None else f"{spread:.2f}",
    )
