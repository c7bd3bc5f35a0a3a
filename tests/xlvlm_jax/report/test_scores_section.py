"""Tables and plot of scores by hand, and their section of the page."""

import json

import pytest

from xlvlm_jax.concepts.scores.records import DictionaryScores, Fit
from xlvlm_jax.report import write_report
from xlvlm_jax.report.score_figures import draw_all, plot
from xlvlm_jax.report.scores_section import read_scores, score_tables


def row(method, K, mean=None, **figures):
    clip = {} if mean is None else {1: Fit(mean, 0.25, 0.4, 0.1, 9, noise=0.5)}
    return DictionaryScores(f"{method}-{K}", method, K, clip=clip, **figures)


ROWS = [
    row("snmf", 5, 0.61, overlap=0.1, hoyer=0.8, dead=0),
    row("kmeans", 5, 0.6, overlap=0.5, hoyer=0.1, dead=0),
    row("random", 5, 0.4, overlap=0.01),
    row("snmf", 10, 0.7, overlap=0.2, hoyer=0.9, dead=2, attributes={"mood": {"concepts": 0.3}}),
    row("kmeans", 10, 0.71, overlap=0.2, hoyer=float("nan"), dead=0),
]


def cells(table):
    return {
        (scores.name, column.name): cell
        for scores, line in table.rows
        for column, cell in zip(table.columns, line, strict=True)
    }


def test_the_best_value_of_every_score_is_marked():
    words, codes = score_tables(ROWS)
    assert [column.name for column in words.columns] == ["CLIP@1", "noise", "overlap"]
    found = cells(words)
    assert found["snmf-5", "CLIP@1"] == ("0.610", True, "0.25")
    assert found["kmeans-10", "CLIP@1"].best and not found["snmf-10", "CLIP@1"].best
    # Random words overlap least, which is not a merit; where all overlap alike none is best.
    assert found["snmf-5", "overlap"].best and not found["random-5", "overlap"].best
    assert not found["snmf-10", "overlap"].best and not found["kmeans-10", "overlap"].best

    assert [column.name for column in codes.columns] == ["Hoyer", "dead", "mood"]
    found = cells(codes)
    assert ("random-5", "Hoyer") not in found  # random words have no codes
    assert found["kmeans-10", "Hoyer"].text == ""
    assert found["kmeans-10", "dead"] == ("0", True, "")
    assert found["snmf-10", "mood"].text == "0.300" and found["snmf-5", "mood"].text == ""


def test_random_words_are_shown_per_method_if_no_row_has_them():
    words, _ = score_tables(ROWS[:2])
    assert [column.name for column in words.columns] == ["CLIP@1", "random", "noise", "overlap"]
    assert cells(words)["snmf-5", "random"].text == "0.400"


def test_a_notebook_shows_the_tables_and_pandas_has_their_numbers():
    words, codes = score_tables([*ROWS[:2], row("<i>", 5, 0.2)])
    assert repr(words) == (
        "ScoreTable('How well the words fit': CLIP@1, random, noise, overlap; 3 dictionaries)"
    )
    shown = words._repr_html_()
    assert "snmf-5</th><td><b>0.610</b></td><td>0.400</td><td>0.500</td><td><b>0.100</b></td>" in (
        shown
    )
    assert "&lt;i&gt;-5</th><td>0.200</td><td>0.400</td><td>0.500</td><td></td>" in shown

    pytest.importorskip("pandas")
    table = words.to_pandas()
    assert list(table.columns) == [
        "method", "num_concepts", "CLIP@1", "CLIP@1 ±", "CLIP@1 random", "CLIP@1 noise", "overlap",
    ]  # fmt: skip
    assert table.loc["snmf-5"].tolist() == ["snmf", 5, 0.61, 0.25, 0.4, 0.5, 0.1]
    assert table["overlap"].isna().tolist() == [False, False, True]
    assert codes.to_pandas().loc["kmeans-5", "Hoyer"] == 0.1


def test_the_order_of_rows_does_not_change_what_is_marked():
    def marked(rows):
        return {key for table in score_tables(rows) for key, c in cells(table).items() if c.best}

    assert marked(ROWS) == marked(ROWS[::-1])


def test_a_line_per_method(tmp_path):
    plot(ROWS, tmp_path / "scores.svg")
    drawn = (tmp_path / "scores.svg").read_text()
    for shown in ("CLIPScore", "Word overlap", "snmf", "kmeans", "random", "concepts"):
        assert f">{shown}" in drawn
    assert "Variance explained" not in drawn  # no dictionary has it
    plot([row("pca", 3, hoyer=0.1, stability=0.9)], tmp_path / "one.svg")
    with pytest.raises(ValueError, match="none of 1 dictionaries has a score to plot; score th"):
        plot([row("pca", 3)], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def written(rows):
    on = {"rows": 24, "clip": "clip", "mean similarity of two images": 0.391}
    return {"dictionaries": [each.to_dict() for each in rows], "scored on": on}


def test_a_section_of_the_page(write_run, activations):
    run = write_run(activations)
    assert "<h2>Scores</h2>" not in write_report(run).read_text()
    (run / "scores.json").write_text(json.dumps(written(ROWS)))
    plot(ROWS, run / "scores.svg")
    text = write_report(run).read_text()
    assert text.count("<h2>Scores</h2>") == 1
    assert "<strong>0.610</strong> <small>± 0.25</small>" in text
    assert "Based on 24 samples." in text and "two images is 0.391" in text
    assert text.count('src="data:image/svg+xml;base64,') == 1
    assert text.count('class="group"') == 4  # a rule before each number of concepts
    # They are no settings.
    assert "random_std" not in text and "Scored on" not in text


def test_scores_of_a_later_version_are_refused(write_run, activations):
    run = write_run(activations)
    file = run / "scores.json"
    file.write_text(json.dumps({"version": 1, **written(ROWS)}))
    assert "<strong>0.610</strong>" in write_report(run).read_text()
    file.write_text(json.dumps({"version": 2, **written(ROWS)}))
    with pytest.raises(ValueError, match=r"scores.json: format version 2, expected 1; .* score ag"):
        write_report(run)


def test_names_stay_text(write_run, activations):
    evil = "<script>alert(1)</script>"
    run = write_run(activations)
    rows = [DictionaryScores(evil, evil, 3, hoyer=0.5, attributes={evil: {"concepts": 0.5}})]
    (run / "scores.json").write_text(json.dumps(written(rows)))
    assert "<script>alert" not in write_report(run).read_text()


@pytest.mark.parametrize(
    "broken", [[1], [{"name": "x"}], [{"name": "x", "method": "y", "num_concepts": 3, "z": 1}]]
)
def test_damaged_scores(tmp_path, broken):
    with pytest.raises(ValueError, match=r"scores.json: invalid scores of dictionaries \(.*score"):
        read_scores(tmp_path, {"dictionaries": broken})
    assert read_scores(tmp_path, {"attributes": {}}) is None


def test_a_plot_of_other_scores_is_removed(tmp_path):
    draw_all(ROWS, tmp_path)
    assert b"CLIPScore" in (tmp_path / "scores.svg").read_bytes()
    draw_all(ROWS[:1], tmp_path)
    assert not list(tmp_path.iterdir())
