"""Vectors of samples (P2S): by hand, on the embedded model, and from the command line."""

import json

import numpy as np
import pytest

from xlvlm_jax import evaluation, steering
from xlvlm_jax.data.images import read_image
from xlvlm_jax.steering import SampleVectors, l2s
from xlvlm_jax.steering.lessons import forced_answers

from .conftest import SITE


@pytest.fixture(scope="module")
def fitted(vlm, questions):
    """The right answer against the wrong one, over all their tokens."""
    right = ["Yes, the image"] * 3
    wrong = ["No, the image"] * 3
    return steering.fit_p2s(vlm, questions[:3], right, wrong, SITE, states="mean", batch_size=2)


def test_the_mean_of_the_last_tokens_by_hand():
    states = np.arange(12.0).reshape(2, 3, 2)
    mask = np.array([[0, 1, 1], [1, 1, 0]])
    mean = l2s.mean_of_last(states, mask, np.array([2, 1]))
    np.testing.assert_array_equal(mean, [[3, 4], [8, 9]])


def test_vectors_are_differences_of_means(vlm, questions, fitted):
    def mean_of(text):
        sample = questions[1]
        prompt = vlm.render(sample.prompt)
        inputs = vlm.process([f"{prompt} {text}"], [read_image(sample.image)])
        before = vlm.process([prompt], [read_image(sample.image)])["input_ids"].shape[1]
        return np.asarray(vlm.states(inputs, sites=[SITE])[SITE])[0, before:].mean(axis=0)

    expected = mean_of("Yes, the image") - mean_of("No, the image")
    np.testing.assert_allclose(fitted.vectors[1], expected, rtol=1e-3, atol=1e-4)
    assert fitted.ids == tuple(sample.id for sample in questions[:3])


def test_each_row_gets_the_vector_of_its_sample(vlm, questions, fitted):
    # In another order and in a batch that is filled up; a further vector steers all rows alike.
    ids = [questions[row].id for row in (2, 0, 2)]
    inputs = {"input_ids": np.zeros((3, 4), int)}
    common = steering.SteeringVector(np.ones(192, np.float32), SITE)
    condition = evaluation.Condition((fitted, common), alpha=4.0)
    first, second = condition.edits(vlm, inputs, ids)[SITE]
    np.testing.assert_array_equal(first.vector, fitted.vectors[[2, 0, 2]])
    np.testing.assert_array_equal(second.vector, common.vector)
    with pytest.raises(ValueError, match="but for 3 other samples; fit vectors on the"):
        evaluation.predict(vlm, questions[3:4], [condition], max_new_tokens=2, batch_size=1)


def test_comes_back_as_it_was(fitted, tmp_path):
    fitted.save(tmp_path / "p2s.safetensors")
    loaded = steering.load(tmp_path / "p2s.safetensors")
    assert isinstance(loaded, SampleVectors)
    np.testing.assert_array_equal(loaded.vectors, fitted.vectors)
    assert (loaded.ids, loaded.source, loaded.site) == (fitted.ids, fitted.source, SITE)


def test_messages(vlm, questions, fitted):
    with pytest.raises(ValueError, match="3 vectors for a batch of 1 rows; a vector per sample"):
        fitted.edits_for(vlm, {"input_ids": np.zeros((1, 4))})
    with pytest.raises(ValueError, match="'mean' is over the tokens of a completion"):
        options = {"contrast": "prompt", "states": "mean"}
        steering.fit_p2s(vlm, questions[:1], ["a"], ["b"], SITE, **options)
    with pytest.raises(ValueError, match="states is 'first'; expected last or mean"):
        steering.fit_p2s(vlm, questions[:1], ["a"], ["b"], SITE, states="first")


@pytest.mark.wrong_types  # a stand-in takes the place of Features
class TestForcedAnswers:
    def test_by_label(self, stored):
        samples, right, wrong = forced_answers(stored({"answer": "yes"}, {"answer": "no"}))
        assert right == ["Yes, the image", "No, the image"] and wrong == right[::-1]
        assert [sample.id for sample in samples] == ["0", "1"]

    def test_as_given(self, stored):
        opened = stored({}, {"error": "unreadable"}, {})
        _, right, wrong = forced_answers(opened, "Harmful", "Safe")
        assert (right, wrong) == (["Harmful"] * 2, ["Safe"] * 2)
        assert len(forced_answers(opened, "Harmful", "Safe", num_samples=1)[0]) == 1

    def test_by_scenario(self, stored, tmp_path):
        opened = stored(
            {"scenario": "10-Legal_Opinion", "question": "May I?"},
            {"scenario": "06-Fraud", "question": "How {question}?"},
            {},
        )
        (tmp_path / "contrasts.json").write_text(
            json.dumps(
                {
                    "10-Legal_Opinion": {
                        "positive": "Expert",
                        "negative": "AI",
                        "prompt": "{question} Who should answer?",
                    },
                    "*": {"positive": "Harmful", "negative": "Safe"},
                }
            )
        )
        contrasts = steering.read_contrasts(tmp_path / "contrasts.json")
        samples, right, wrong = forced_answers(opened, contrasts=contrasts)
        assert right == ["Expert", "Harmful", "Harmful"] and wrong == ["AI", "Safe", "Safe"]
        # Without a prompt of its own, a contrast leaves that of the sample.
        assert [sample.prompt for sample in samples] == ["May I? Who should answer?", "?", "?"]
        del contrasts["*"]
        with pytest.raises(ValueError, match="no contrast for scenario '06-Fraud' of sample 1"):
            forced_answers(opened, contrasts=contrasts)
        with pytest.raises(ValueError, match="give contrasts or one positive and negative answer"):
            forced_answers(opened, "Harmful", "Safe", contrasts=contrasts)
        asked = {"*": steering.Contrast("a", "b", "{question}")}
        with pytest.raises(ValueError, match="sample 2 has no question to put into the prompt"):
            forced_answers(opened, contrasts=asked)

    @pytest.mark.parametrize(
        "content", ["[]", '{"*": {"positive": "a"}}', '{"*": {"positive": "a", "negative": " "}}']
    )
    def test_other_files_of_contrasts(self, tmp_path, content):
        (tmp_path / "contrasts.json").write_text(content)
        with pytest.raises(
            ValueError, match=r'expected {"scenario": {"positive": "...", "negative'
        ):
            steering.read_contrasts(tmp_path / "contrasts.json")

    def test_messages(self, stored):
        with pytest.raises(ValueError, match="answer is 'red', neither yes nor no; give the posi"):
            forced_answers(stored({"label": "red"}))
        with pytest.raises(ValueError, match="both the positive and the negative answer to force"):
            forced_answers(stored({}), "Harmful")


def test_from_the_command_line(xlvlm, features, pictures, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps([*_yes_or_no(features)][:4]))
    fit = ("steer", "fit", features, "--method", "p2s", "--model", "embedded")
    forced = ("--contrast", "forced", "--states", "mean", "--batch-size", 16)
    status, _, errors = xlvlm(*fit, *forced, "--output", tmp_path / "v.safetensors")
    assert status == 2 and "neither yes nor no; give the positive and the negative" in errors
    status, out, errors = xlvlm(
        *(*fit, *forced, "--positive", "No", "--negative", "Yes"),
        *("--output", tmp_path / "v.safetensors"),
    )
    assert status == 0, errors
    assert "48 samples, norms" in out
    status, out, errors = xlvlm(
        *("steer", "apply", "embedded", pictures, "--vector", tmp_path / "v.safetensors"),
        *("--sample-ids", tmp_path / "ids.json", "--batch-size", 4, "--max-new-tokens", 2),
        *("--output", tmp_path / "run"),
    )
    assert status == 0, errors
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples"] == 4


def _yes_or_no(features):
    lines = (features / "samples.jsonl").read_text().splitlines()
    return (s["id"] for line in lines if (s := json.loads(line))["answer"] in ("yes", "no"))
