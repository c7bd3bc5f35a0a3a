"""The benchmark of hallucination: what is contrasted, by hand, and how its tables read."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.hallucination import common, questions, tables
from benchmarks.hallucination.questions import counterparts
from xlvlm_jax.data import Sample
from xlvlm_jax.evaluation import Attempt, Condition, Presence, Sweep, Trial


def question(picture: str, prompt: str, label: str | None, *answers: str) -> Sample:
    metadata = {} if label is None else {"label": label}
    return Sample(f"{picture}/{prompt}", Path(picture), picture, prompt, answers * 10, metadata)


def test_counterparts_by_hand():
    asked = [
        question("a", "dog?", "yes", "yes"),
        question("a", "car?", "no", "no"),
        question("a", "bus?", "no", "no"),
        question("a", "which colour?", None, "red"),
        question("b", "cat?", "yes", "yes"),
        question("b", "boat?", "no", "no"),
    ]
    towards, away = counterparts(asked, "completion", asked)
    assert towards == ["yes", "no", "no", "red", "yes", "no"]
    assert away == ["no", "yes", "yes", "red", "no", "yes"]
    # Another question with the same label, if the picture has one, and one with the other.
    towards, away = counterparts(asked, "prompt", asked)
    assert towards == ["dog?", "bus?", "car?", "which colour?", "cat?", "boat?"]
    assert away == ["car?", "dog?", "dog?", "which colour?", "boat?", "cat?"]


def trials() -> common.Trials:
    attempts = [
        Trial(Condition(alpha=alpha), effect, cost, 0.0)
        for alpha, effect, cost in [(0.5, 0.3, 0.2), (1.0, 0.9, 4.0), (0.5, 0.4, 1.5)]
    ]
    told = [Trial(Condition(instruction="Look."), 0.1, 0.0, 0.0)]
    told += [Trial(Condition(instruction="Say no."), 1.0, 60.0, 0.0)]
    methods = ("a", "a", "b", common.INSTRUCTION, common.INSTRUCTION)
    return common.Trials(Sweep(methods, (*attempts, *told), "cost", 1.0), list("ppqrs"))


def test_what_is_chosen_is_within_the_budget_where_anything_is():
    found = trials()
    assert found.best("a")[0].effect == 0.3 and found.best("a")[1] == "p"
    assert common.strongest(found.sweep, common.INSTRUCTION).cost == 60
    row = common.chosen_row(found, "a")
    assert row["within budget"] and row["best of all"] and row["setting"] == "p"
    assert not common.chosen_row(found, "b")["within budget"]
    assert common.chosen_row(found, common.INSTRUCTION)["setting"] == "Look."
    assert common.chosen_row(found, "instruction, strongest")["setting"] == "Say no."


def test_tables_and_figure(tmp_path):
    found = trials()
    measured = {"false yes": 3, "of": 9, "gone": 0.5, "gone interval": [0.25, 0.75]}
    measured |= {"lost": 0.5, "lost interval": [-0.5, 1.5]}
    measured |= {"p against plain": 0.015625, "p against instruction": 1.0}
    rows = [{"method": "plain", **measured}]
    rows += [common.chosen_row(found, name) | measured for name in ("a", "b", "instruction")]
    lines = tables.markdown(rows).splitlines()
    assert lines[3] == (
        "| **a** | 0.5 | 30 %, 0.20 | 3 of 9 | 50 % (25 to 75) | 0.50 (-0.50 to 1.50) | 0.016 | 1 |"
    )
    assert "40 %, 1.50 (over)" in lines[4] and "'Look.'" in lines[5]
    tables.draw(found.sweep, tmp_path / "tradeoff.svg")
    assert "false yes that are gone" in (tmp_path / "tradeoff.svg").read_text()


def test_share_gone_by_hand():
    samples = [question(name, "?", "no", "no") for name in "aabb"]
    before, after = np.array([1, 1, 1, 0]), np.array([0, 1, 0, 0])
    share, (low, high) = common.share_gone(before, after, samples)
    assert share == pytest.approx(2 / 3) and (low, high) == (0.5, 1.0)
    assert common.p_value(before == 0, after == 0) == 0.5


def test_entries_become_conditions():
    attempts = [
        Attempt("x", condition)
        for entry in (common.Entry("x", "k", "Look."), common.Entry("x", "k", (), (0.5, 1.0)))
        for condition in entry.conditions()
    ]
    assert [each.condition.instruction for each in attempts] == ["Look.", None, None]
    assert [each.condition.alpha for each in attempts[1:]] == [0.5, 1.0]


def test_what_is_tested_by_hand(tmp_path, monkeypatch):
    """Two pictures; the answers of a run are those that the evaluation stores."""
    asked = [
        question("a", "dog?", "yes", "yes"),
        question("a", "car?", "no", "no"),
        question("b", "boat?", "no", "no"),
        question("b", "which colour?", None, "red"),
    ]
    given = {
        "plain": ["yes", "yes", "yes", "red"],
        "a": ["yes", "no", "yes", "blue"],
        "instruction": ["no", "no", "no", "red"],
        "instruction, strongest": ["no", "no", "no", "no"],
    }

    def store(vlm, samples, task, directory, conditions, **_):
        assert ["plain", *conditions] == list(given)
        directory.mkdir()
        rows = [{"predictions": {n: texts[i] for n, texts in given.items()}} for i in range(4)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "predictions.jsonl").write_text(text)

    monkeypatch.setattr(common.evaluation, "evaluate", store)
    setting = common.Setting(None, tmp_path, tmp_path, 1.0, {}, print)  # type: ignore[arg-type]
    found, task = trials(), Presence()
    answers = common.test(setting, asked, task, tmp_path / "t", found, ["a"], 3, {})
    assert answers == given
    rows = {row["method"]: row for row in questions._rows(task, asked, answers, found)}
    assert list(rows) == ["plain", "a", "b", "instruction", "instruction, strongest"]
    assert rows["a"]["false yes"] == 1 and rows["a"]["of"] == 2 and rows["a"]["gone"] == 0.5
    assert rows["a"]["lost"] == 50 and rows["instruction"]["lost"] == 50
    assert rows["a"]["p against plain"] == 1 and "of" not in rows["b"]
    assert rows["instruction"]["gone"] == 1
