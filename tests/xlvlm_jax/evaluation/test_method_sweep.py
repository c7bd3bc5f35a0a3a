"""Sweeps over methods: the front and the choice by hand, tables, runs that resume, messages."""

import copy
import dataclasses
import io
import json
import math
import pickle

import numpy as np
import pandas
import pytest

from xlvlm_jax import SteeringVector, evaluation
from xlvlm_jax.demo import embedded
from xlvlm_jax.evaluation import Condition, Questions, Sweep, Trial, method_sweep, stage
from xlvlm_jax.evaluation.predict import Predictions
from xlvlm_jax.report.steering_figures import plot_tradeoff

VECTOR = SteeringVector(np.ones(4, np.float32), "model.layers.3", where={"from": 2})
TASK = Questions(("yes",), ("no",))


def trial(alpha: float, effect: float, off_target: float, cost: float = 0.0) -> Trial:
    return Trial(Condition((VECTOR,), alpha), effect, cost, off_target)


def test_the_front_by_hand():
    effects = np.array([0.9, 0.5, 0.4, 0.9, 0.5, math.nan, 0.1])
    costs = np.array([0.3, 0.1, 0.2, 0.3, 0.4, 0.0, 0.0])
    expected = [True, True, False, True, False, False, True]
    assert evaluation.pareto_front(effects, costs).tolist() == expected


def test_the_front_beats_everything_else():
    effects, costs = np.random.default_rng(0).normal(size=(2, 60)).round(1)
    front = evaluation.pareto_front(effects, costs)
    for i in range(60):
        beaten = any(
            effects[j] >= effects[i]
            and costs[j] <= costs[i]
            and (effects[j], costs[j]) != (effects[i], costs[i])
            for j in range(60)
        )
        assert front[i] == (not beaten)


def test_the_largest_effect_within_the_budget():
    trials = [trial(1, 0.9, 0.3), trial(0.5, 0.6, 0.1), trial(0.4, 0.6, 0.05), trial(2, 0.1, 0.01)]
    assert evaluation.best_within(trials, 1.0) is trials[0]
    assert evaluation.best_within(trials, 0.2) is trials[2]
    assert evaluation.best_within(trials, 0.0) is trials[3]  # nothing is within: the least
    unknown = trial(3, 1.0, math.nan)
    assert evaluation.best_within([*trials, unknown], math.inf) is trials[0]
    costly = [trial(1, 0.9, 0.0, cost=9), trial(2, 0.5, 0.9, cost=1)]
    assert evaluation.best_within(costly, 5, "cost") is costly[1]
    with pytest.raises(ValueError, match="none of 1 trials has an effect and off_target"):
        evaluation.best_within([unknown], 1.0)


def test_a_sweep_is_copied_and_pickled():
    sweep = Sweep(("coarse",), (Trial(Condition((), 1.0), 0.9, 0.0, 0.3),))
    assert copy.deepcopy(sweep) == sweep == pickle.loads(pickle.dumps(sweep))
    assert "unreadable" not in sweep.describe(TASK)
    assert sweep._replace(skipped={"a": "no file"}).describe(TASK)["unreadable"] == {"a": "no file"}


def test_tables_and_the_figure(tmp_path):
    trials = (trial(1, 0.9, 0.3), trial(0.5, 0.6, 0.1), trial(2, math.nan, 0.5), trial(1, 0.7, 0.2))
    sweep = Sweep(("coarse", "coarse", "lat", "lat"), trials, budget=0.25)
    assert sweep.chosen() is trials[3] and sweep.chosen("coarse") is trials[1]
    table = pandas.read_csv(io.StringIO(sweep.to_csv()))
    pandas.testing.assert_frame_equal(table, sweep.to_pandas(), check_dtype=False)
    assert table["method"].tolist() == list(sweep.methods)
    assert table["on_front"].tolist() == [True, True, False, True]
    assert table["chosen"].tolist() == [False, False, False, True]
    assert table["effect"].isna().tolist() == [False, False, True, False]
    assert json.loads(table["where"][0]) == {"from": 2}
    described = json.loads(json.dumps(sweep.describe(TASK, split="val")))
    assert described["chosen"]["method"] == "lat" and described["split"] == "val"
    plot_tradeoff({"sweep": described}, tmp_path / "tradeoff.svg")
    drawn = (tmp_path / "tradeoff.svg").read_text()
    assert "coarse" in drawn and "share of other answers that changed" in drawn


@pytest.fixture(scope="module")
def tried(vector):
    other = dataclasses.replace(vector, vector=-np.asarray(vector.vector))
    return evaluation.attempts([("coarse", vector), ("back", other)], [0.5, 1.0])


def test_a_killed_sweep_resumes(vlm, questions, tried, tmp_path, encoded):
    asked, options = questions[:24], {"max_new_tokens": 2, "batch_size": 24, "at_once": 2}

    def stage(_):
        def advance(done, total):
            assert total == 4
            if done == 2:
                raise KeyboardInterrupt

        return advance

    def run(**more):
        return evaluation.run_sweep(vlm, asked, TASK, tried, tmp_path / "s", **options, **more)

    with pytest.raises(KeyboardInterrupt):
        run(stage=stage)
    assert len((tmp_path / "s" / "trials.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "s" / "trials.csv").exists()
    before = len(encoded)
    sweep = run()
    assert len(encoded) == before + 1  # only the second group
    assert [t.condition.alpha for t in sweep.trials] == [0.5, 1.0, 0.5, 1.0]
    # The trials are those of one pass.
    _, trials = evaluation.select(
        vlm, asked, TASK, [a.condition for a in tried], max_new_tokens=2, batch_size=24
    )
    assert list(sweep.trials) == trials
    assert sweep.chosen("coarse").effect > sweep.chosen("back").effect
    files = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    before = len(encoded)
    assert run() == sweep and len(encoded) == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == files
    with pytest.raises(
        ValueError, match=r"holds a sweep with another samples.*; give another output"
    ):
        evaluation.run_sweep(vlm, questions[:23], TASK, tried, tmp_path / "s", **options)
    with pytest.raises(ValueError, match="holds a sweep with another task"):
        evaluation.run_sweep(
            vlm, asked, Questions(("no",), ("yes",)), tried, tmp_path / "s", **options
        )
    adapted = vlm.with_adapter(embedded.find_adapter("color"))
    with pytest.raises(ValueError, match="holds a sweep with another adapter"):
        evaluation.run_sweep(adapted, asked, TASK, tried, tmp_path / "s", **options)


@pytest.fixture
def answering(monkeypatch):
    """Returns a function that makes `predict` give an answer, and fail for some samples."""

    def set_to(answer, failing=()):
        def predict(vlm, samples, conditions, **_):
            errors = {s.id: "gone" for s in samples if s.id in failing}
            given = [None if s.id in errors else answer for s in samples[:-1]] + ["red"]
            calls.append(conditions)
            return Predictions([given for _ in conditions], errors)

        calls = []
        monkeypatch.setattr(method_sweep, "predict", predict)
        monkeypatch.setattr(stage, "predict", predict)
        return calls

    return set_to


def test_a_picture_that_fails_during_trials_is_no_empty_answer(
    vlm, questions, tried, tmp_path, answering
):
    asked = questions[:24]
    answering("yes", failing=[asked[0].id])
    sweep = evaluation.run_sweep(vlm, asked, TASK, tried[:1], tmp_path)
    assert dict(sweep.skipped) == {asked[0].id: "gone"}
    assert sweep.describe(TASK)["unreadable"] == {asked[0].id: "gone"}
    before = (tmp_path / "trials.jsonl").read_text()
    answering("no", failing=[asked[1].id])
    with pytest.raises(ValueError, match=rf"sample {asked[1].id} was answered by the plain model"):
        evaluation.run_sweep(vlm, asked, TASK, tried, tmp_path)
    assert (tmp_path / "trials.jsonl").read_text() == before
    answering("no")  # what was skipped stays so
    sweep = evaluation.run_sweep(vlm, asked, TASK, tried, tmp_path)
    assert [t.effect for t in sweep.trials] == [0, 1, 1, 1] and list(sweep.skipped) == [asked[0].id]


def test_a_sweep_of_other_numbers_or_contents_is_not_resumed(
    vlm, questions, tried, tmp_path, answering
):
    answering("yes")
    asked = questions[:24]
    evaluation.run_sweep(vlm, asked, TASK, tried[:1], tmp_path)
    others = [dataclasses.replace(s, metadata={**s.metadata, "objects": {"dog"}}) for s in asked]
    with pytest.raises(ValueError, match="holds a sweep with another metadata"):
        evaluation.run_sweep(vlm, others, TASK, tried[:1], tmp_path)
    settings = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="holds a sweep with another dtype"):
        evaluation.run_sweep(vlm, asked, TASK, tried[:1], tmp_path)
    earlier = {k: v for k, v in settings.items() if k not in ("dtype", "metadata", "word lists")}
    (tmp_path / "sweep.json").write_text(json.dumps(earlier))  # of an earlier release
    evaluation.run_sweep(vlm, asked, TASK, tried[:1], tmp_path)


def test_nothing_is_tried_where_nothing_can_be_chosen(vlm, questions, tried, tmp_path, answering):
    calls = answering("no")  # no answer to steer from
    with pytest.raises(ValueError, match="leave nothing to choose by: 'source answers moved' is"):
        evaluation.run_sweep(vlm, questions[:24], TASK, tried, tmp_path)
    with pytest.raises(ValueError, match="leave nothing to choose by"):
        evaluation.select(vlm, questions[:24], TASK, [tried[0].condition])
    assert calls == [[evaluation.PLAIN]] * 2
    undefined = Sweep(("coarse",), (trial(1, math.nan, 0.1),))
    assert "coarse,model.layers.3,1,add,1," in undefined.to_csv()


@pytest.mark.wrong_types
def test_nothing_to_try(vlm, questions, tried, tmp_path):
    with pytest.raises(ValueError, match="there is nothing to try"):
        evaluation.run_sweep(vlm, questions, TASK, [], tmp_path)
    with pytest.raises(ValueError, match="axis is 'harm'; expected one of off_target, cost"):
        evaluation.run_sweep(vlm, questions, TASK, tried, tmp_path, axis="harm")
