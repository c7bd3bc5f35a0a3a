"""The figures and the section of a shift."""

import dataclasses
import re

import numpy as np
import pytest

from xlvlm_jax.report import shift_figures, write_report
from xlvlm_jax.report.shift_section import overlap_rows, read_shifts
from xlvlm_jax.shift import ShiftAnalysis, Spread


@pytest.fixture
def analysis(pictures) -> ShiftAnalysis:
    """Returns three concepts, the last without a shift."""
    random = np.random.default_rng(0)
    original, shifts, destination = random.normal(size=(3, 3, 4)).astype("f4")
    shifts[2] = np.nan
    words = {
        "original": [["dog", "red"], ["cat", "sea"], ["evil<b>", "x"]],
        "shifted": [["dog", "beach"], ["cat", "sea"], []],
        "finetuned": [["beach", "dog"], ["sea", "sky"], ["x", "y"]],
        "shift": [["beach"], [], []],
    }
    names = [["s0", "s1"], ["s2", "s3"], ["s0", "gone"]]
    return ShiftAnalysis(
        original=original,
        shifts=shifts,
        shifted=original + shifts,
        finetuned=destination,
        matching=np.array([1, 0, 2]),
        counts=np.array([5, 9, 1]),
        spread=Spread(*np.array([[0.5, 0.75, np.nan]] * 5, np.float32)),
        recovery=np.array([0.25, 0.5, np.nan], np.float32),
        recovery_l2=np.array([0.1, 0.2, np.nan], np.float32),
        rows={"original": 15, "finetuned": 16, "common": 15},
        words=words,
        images={kind: names for kind in ("original", "finetuned")} | {"shifted": [*names[:2], []]},
        pictures={f"s{i}": str(pictures[i][0]) for i in range(4)} | {"gone": "/nowhere/x.jpg"},
        num_words=2,
        num_images=2,
        vocabulary=50,
        source={"site": "language_model.model.norm"},
    )


def test_means_are_over_concepts_with_a_shift(analysis):
    # T-Overlap of the originals 1/2, 1/2, (1/2); shifted 1, 1/2, none; no word of another concept.
    assert overlap_rows(analysis) == [
        ("words (T-Overlap)", "50 %", "75 %", "0 %"),
        ("images", "100 %", "100 %", "17 %"),
    ]


def test_the_page_shows_a_shift(analysis, write_run, activations):
    run = write_run(activations)
    analysis.save(run / "shift")
    shift_figures.draw_all(analysis, run / "shift")
    text = write_report(run).read_text("utf-8")
    assert text.count("data:image/svg+xml;base64,") == 2
    plain = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "Shift by fine-tuning language_model.model.norm · 15 samples" in plain
    assert "1 of 3 concepts without a shift (fewer than two common samples)" in plain
    assert "words (T-Overlap) 50 % 75 % 0 %" in plain
    # In order of samples; words that the fine-tuned concept has too are set off.
    assert re.findall(r'id="shift-(\d)"', text) == ["1", "0", "2"]
    assert "<b>dog</b> <b>beach</b>" in text and "evil&lt;b&gt;" in text
    assert "gone" in plain


def test_a_run_without_a_shift_has_no_section(write_run, activations):
    run = write_run(activations)
    assert read_shifts(run) == []
    assert "Shift by fine-tuning" not in write_report(run).read_text("utf-8")


def test_several_shifts_have_a_section_each(analysis, write_run, activations):
    run = write_run(activations)
    for name in ("shift-colour", "shift-place"):
        analysis.save(run / name)
    plain = re.sub(r"<[^>]+>", " ", write_report(run).read_text("utf-8"))
    assert plain.index("Shift by fine-tuning: shift-colour") < plain.index("shift-place")


def test_a_damaged_shift_is_named(analysis, write_run, activations):
    run = write_run(activations)
    analysis.save(run / "shift")
    (run / "shift" / "shift.json").write_text("{}")
    with pytest.raises(ValueError, match=r"shift\.json does not describe a shift"):
        write_report(run)


def test_figures_of_several_fine_tunings(analysis, tmp_path):
    both = {"colour": analysis, "place": analysis}
    shift_figures.plot_overlap(both, tmp_path / "overlap.svg")
    shift_figures.plot_recovery(both, tmp_path / "recovery.svg")
    drawn = (tmp_path / "overlap.svg").read_text()
    for shown in ("colour", "place", "shifted concepts, mean 75 %", "T-Overlap (%)"):
        assert shown in drawn
    pooled = shift_figures.pooled_correlation(both, "consistency", "recovery")
    assert (pooled.r, pooled.count) == (pytest.approx(1), 4)
    assert "r = 1.00" in (tmp_path / "recovery.svg").read_text()
    shift_figures.plot_panels(analysis, tmp_path / "panels.svg", num_concepts=2)
    panels = (tmp_path / "panels.svg").read_text()
    assert "·dog ·beach" in panels and "1 fine-tuned" in panels and "2 original" not in panels
    with pytest.raises(ValueError, match="neither words nor pictures to show; ground its concepts"):
        shift_figures.plot_panels(dataclasses.replace(analysis, words=None), tmp_path / "x.svg")
