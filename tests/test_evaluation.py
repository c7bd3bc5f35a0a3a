"""Evaluation: scores and changes by hand, and the command line on the embedded model."""

import json
from pathlib import Path

import pytest

from xlvlm_jax import SteeringVector, evaluation
from xlvlm_jax.data import scenes
from xlvlm_jax.data.sample import Sample

LAYER = "language_model.model.layers.6"


def asked(number: int, answers: list[str], kind: str) -> Sample:
    return Sample(str(number), Path("x"), str(number), "?", tuple(answers), {"answer_type": kind})


def test_scores_by_hand():
    samples = [
        asked(0, ["yes"] * 10, "yes/no"),
        asked(1, ["yes"] * 10, "yes/no"),
        asked(2, ["2"] * 2 + ["3"] * 8, "number"),
    ]
    scores = evaluation.vqa_scores(samples, ["Yes.", "no", "two"])
    assert scores["yes/no"] == pytest.approx((0.5, 0.0, 2))
    assert scores["number"] == pytest.approx((0.6, 0.0, 1))
    assert scores["all"] == pytest.approx((1.6 / 3, 0.0, 3))
    assert scores[evaluation.MEAN_OVER_TYPES] == pytest.approx((0.55, 0.0, 3))


def test_changes_by_hand():
    before = ["yes", "Yes", "no", "red", "two", "yes"]
    after = ["no", "yes", "no", "no", "two", "maybe"]
    truths = ["yes", "yes", "no", "yes", None, "yes"]
    changes = evaluation.answer_changes(before, after, ["yes"], ["no"], truths)
    assert changes == evaluation.Changes(
        samples=6,
        changed=3,
        source_before=3,
        source_after=1,
        target_before=1,
        target_after=3,
        moved=1,
        gained=2,
        gained_from_source_truth=2,
        others=2,
        others_changed=1,
    )
    assert changes.moved_share == pytest.approx(1 / 3)
    assert changes.others_changed_share == 0.5


def test_nothing_changes_without_steering():
    answers = ["yes", "no", "red"]
    changes = evaluation.answer_changes(answers, answers, ["yes"], ["no"], answers)
    assert changes.changed == changes.moved == changes.gained == changes.others_changed == 0


def test_messages():
    with pytest.raises(ValueError, match="1 answers before, 2 after and 2 truths"):
        evaluation.answer_changes(["a"], ["a", "b"], ["a"], ["b"], ["a", "b"])
    with pytest.raises(ValueError, match="both source and target"):
        evaluation.answer_changes(["a"], ["a"], ["Yes"], ["yes"], ["a"])
    with pytest.raises(ValueError, match="1 predictions for 0 samples"):
        evaluation.vqa_scores([], ["a"])
    with pytest.raises(ValueError, match="sample 3 has no answers"):
        evaluation.vqa_scores([asked(3, [], "other")], ["a"])


class TestCommandLine:
    @pytest.fixture(scope="class")
    def pictures(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("scenes")
        scenes.write(directory, train=12, test=4, seed=5)
        return directory

    def test_from_questions_to_steered_answers(self, xlvlm, pictures, tmp_path):
        features, vector = tmp_path / "features", tmp_path / "steering" / "v.safetensors"
        status, _, errors = xlvlm(
            *("extract", "embedded", pictures, "--dataset", "vqav2", "--split", "train"),
            *("--output", features, "--site", LAYER, "--tokens", "before-special-tokens"),
            *("--max-new-tokens", 3, "--batch-size", 32),
        )
        assert status == 0, errors
        status, out, errors = xlvlm(
            *("steer", "fit", features, "--source", "yes", "--target", "no"),
            *("--output", vector, "--key", "prediction"),
        )
        assert status == 0, errors
        assert SteeringVector.load(vector).site == LAYER
        status, out, errors = xlvlm(
            *("evaluate", "embedded", pictures, "--split", "test", "--vector", vector),
            *("--output", tmp_path / "scores", "--batch-size", 16, "--max-new-tokens", 3),
        )
        assert status == 0, errors
        assert "answers changed" in out
        scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
        assert scores["plain"]["all"]["official"] > 0.8
        changes = scores["changes"]
        assert changes["moved"] > 0.5 * changes["source_before"] > 0
        lines = (tmp_path / "scores" / "predictions.jsonl").read_text().splitlines()
        assert len(lines) == changes["samples"]
        assert set(json.loads(lines[0])) == {"id", "plain", "steered"}

    def test_a_position_that_cannot_be(self, xlvlm, pictures, tmp_path):
        SteeringVector([0.0] * 192, LAYER).save(tmp_path / "v.safetensors")
        status, _, errors = xlvlm(
            *("evaluate", "embedded", pictures, "--split", "test", "--output", tmp_path / "out"),
            *("--vector", tmp_path / "v.safetensors", "--where", "from:now"),
        )
        assert status == 2
        assert "expected from:INDEX" in errors
        assert not (tmp_path / "out").exists()
