"""Steering that depends on the state: which vectors, gates and keys are fitted, files, messages."""

import numpy as np
import pytest

from xlvlm_jax import Features, evaluation, steering
from xlvlm_jax.evaluation import Condition
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.steering.adaptive import best_threshold

# Two clusters, far apart along the second axis: in the upper one, "no" lies to the right of "yes",
# in the lower one to the left.
STATES = np.float32([[0, 9], [2, 9], [5, 9], [7, 9], [0, -9], [2, -9], [-4, -9], [-2, -9]])
ANSWERS = ["yes", "yes", "no", "no"] * 2


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Returns features of site "s" with these states, and two more that are answered with red."""
    path = tmp_path_factory.mktemp("run") / "features"
    states = np.concatenate([STATES, np.float32([[50, 0], [60, 0]])])
    number = np.arange(len(states))
    with FeaturesWriter(path, {"model": "m", "fingerprint": "f"}) as writer:
        samples = [
            {
                "id": str(i),
                "image": f"{i}.png",
                "image_id": str(i),
                "prompt": "?",
                "references": ["a"],
                "prediction": answer,
            }
            for i, answer in enumerate([*ANSWERS, "red", "red"])
        ]
        writer.append(samples, {"s": states}, number, number, number)
        writer.close()
    return Features.open(path)


def test_adaptive_by_hand(features):
    fitted = steering.fit_adaptive(features, "s", ["yes"], ["no"], where="predicting")
    np.testing.assert_allclose(fitted.vector, [0.5, 0])
    np.testing.assert_allclose(fitted.reference, [1.5, 0])
    moved = fitted.edits(alpha=1.0, where="all")["s"](STATES)
    np.testing.assert_allclose(moved, np.maximum(STATES, [1.5, -9]))
    assert (fitted.where, fitted.source["method"]) == ("predicting", "adaptive")


def test_the_gate_keeps_other_answers_out(features):
    fitted = steering.fit_conditional(features, "s", ["yes"], ["no"])
    assert fitted.source["source rows"] == 4 and fitted.vectors.tolist() == [[0.5, 0.0]]
    moved = np.asarray(fitted.edits()["s"](features.matrix("s")) - features.matrix("s"))
    passes = moved[:, 0] > 0
    # The mean of all is (12, 0): "yes" lies to the left, "red" to the right.
    assert passes[:2].all() and not passes[8:].any()
    right = (passes[[0, 1, 4, 5]].mean() + (~passes)[[2, 3, 6, 7, 8, 9]].mean()) / 2
    assert fitted.source["gate accuracy"] == pytest.approx(right)
    always = steering.fit_conditional(features, "s", ["yes"], ["no"], threshold=-1.0)
    assert always.source["gate accuracy"] == 0.5
    np.testing.assert_array_equal(always.edits()["s"](STATES), STATES + np.float32([0.5, 0]))


def test_best_threshold():
    values = np.array([0.1, 0.9, 0.4, 0.5, 0.8])
    wanted = np.array([False, True, False, True, True])
    assert best_threshold(values, wanted) == pytest.approx(0.45)
    # One on the wrong side is worth it.
    wanted = np.array([True, True, False, True, True])
    assert best_threshold(values, wanted) == pytest.approx(0.45)
    # Every split is worse than none.
    assert best_threshold(values, values < 0.2) == -1
    assert best_threshold(np.ones(3), np.array([True, False, True])) == -1


def test_a_memory_has_the_difference_within_each_cluster(features):
    fitted = steering.fit_memory(features, "s", ["yes"], ["no"], num_keys=2)
    upper = int(fitted.keys[:, 1].argmax())
    np.testing.assert_allclose(fitted.vectors[[upper, 1 - upper]], [[5, 0], [-4, 0]], atol=1e-5)
    assert fitted.source["states per key"] == [[2, 2], [2, 2]]
    moved = np.asarray(fitted.edits(alpha=2.0)["s"](STATES)) - STATES
    np.testing.assert_allclose(moved, np.repeat([[10, 0], [-8, 0]], 4, axis=0), atol=1e-4)
    # With one cluster, it is the coarse vector.
    whole = steering.fit_memory(features, "s", ["yes"], ["no"], num_keys=1)
    np.testing.assert_allclose(whole.vectors, [[0.5, 0]], atol=1e-6)


@pytest.mark.parametrize("fit", [steering.fit_adaptive, steering.fit_conditional])
def test_files(features, tmp_path, fit):
    fitted = fit(features, "s", ["yes"], ["no"], where="image")
    fitted.save(tmp_path / "v.safetensors")
    read = steering.load(tmp_path / "v.safetensors")
    assert type(read) is type(fitted) and repr(read) == repr(fitted)
    for name in fitted.TENSORS:
        np.testing.assert_array_equal(getattr(read, name), getattr(fitted, name))
    assert (read.site, read.where, read.source) == ("s", "image", fitted.source)
    assert "<table" in read._repr_html_()
    with pytest.raises(ValueError, match=f"holds {fitted.KIND!r}; expected 'vector'"):
        steering.SteeringVector.load(tmp_path / "v.safetensors")


def test_conditions_mix_kinds(vlm, features):
    adaptive = steering.fit_adaptive(features, "s", ["yes"], ["no"])
    gated = steering.fit_conditional(features, "s", ["yes"], ["no"])
    for each in (adaptive, gated):
        each.source.pop("fingerprint"), each.source.pop("model")
    conditions = [Condition((v,), alpha) for v in (adaptive, gated) for alpha in (0.5, 2.0)]
    aligned = evaluation.aligned([c.edits(vlm, {}) for c in conditions])
    # Each variant has both edits, the other one's at strength zero.
    assert [[float(e.alpha) for e in variant["s"]] for variant in aligned] == [
        [0.5, 0.0],
        [2.0, 0.0],
        [0.0, 0.5],
        [0.0, 2.0],
    ]
    expected = adaptive.edits(0.5)["s"](STATES)
    both = aligned[0]["s"]
    np.testing.assert_array_equal(both[1](both[0](STATES)), expected)
    with pytest.raises(ValueError, match="expected 'add', all that a AdaptiveVector can do"):
        Condition((adaptive,), edit="ablate").edits(vlm, {})


def test_messages(features):
    with pytest.raises(ValueError, match="all 10 states at 's' are source states"):
        steering.fit_conditional(features, "s", ["*"], ["no"])
    with pytest.raises(ValueError, match="none of 10 samples has a prediction among"):
        steering.fit_memory(features, "s", ["yes"], ["blue"])
    for threshold in (float("nan"), 1.5):
        for fit in (steering.fit_conditional, steering.fit_memory):
            with pytest.raises(ValueError, match=f"threshold is {threshold}; expected a cosine"):
                fit(features, "s", ["yes"], ["no"], threshold=threshold)
    for number in (0, 99):
        with pytest.raises(ValueError, match=f"num_keys is {number}; expected 1 to "):
            steering.fit_memory(features, "s", ["yes"], ["no"], num_keys=number)
