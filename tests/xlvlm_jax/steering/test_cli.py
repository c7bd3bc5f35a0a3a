"""`xlvlm steer fit` and `xlvlm steer rank`: each method from features to files."""

import json

import numpy as np
import pytest

from xlvlm_jax import steering
from xlvlm_jax.data import scenes
from xlvlm_jax.features.writer import FeaturesWriter

from .conftest import SITE


@pytest.fixture
def fit(xlvlm, features):
    def run(*arguments):
        return xlvlm("steer", "fit", features, *arguments)

    return run


def test_coarse(fit, tmp_path):
    status, out, errors = fit(
        *("--source", "yes", "--target", "no", "--where", "from:3"),
        *("--output", tmp_path / "v.safetensors"),
    )
    assert status == 0, errors
    assert "source and" in out
    vector = steering.load(tmp_path / "v.safetensors")
    assert (vector.site, vector.where) == (SITE, {"from": 3})
    assert vector.source["target"] == ["no"]


@pytest.mark.parametrize("method", ["pca", "lat", "probe"])
def test_directions(fit, tmp_path, method):
    words = "--source", "yes", "--target", "no"
    status, out, errors = fit(*words, "--method", method, "--output", tmp_path / "v.safetensors")
    assert status == 0, errors
    assert "target rows, norm" in out
    vector = steering.load(tmp_path / "v.safetensors")
    assert isinstance(vector, steering.SteeringVector) and vector.source["method"] == method


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        (("adaptive",), steering.AdaptiveVector),
        (("conditional", "--threshold", 0.25), steering.VectorMemory),
        (("memory", "--num-keys", 3), steering.VectorMemory),
    ],
)
def test_what_depends_on_the_state(fit, tmp_path, method, kind):
    words = "--source", "yes", "--target", "no"
    status, _, errors = fit(*words, "--method", *method, "--output", tmp_path / "v.safetensors")
    assert status == 0, errors
    fitted = steering.load(tmp_path / "v.safetensors")
    assert isinstance(fitted, kind) and fitted.source["method"] == method[0]
    if method[0] == "conditional":
        assert fitted.threshold.tolist() == [0.25]
    if method[0] == "memory":
        assert len(fitted.keys) == 3


def test_sweep(xlvlm, features, encoded, tmp_path):
    scenes.write(tmp_path / "scenes", train=2, val=2, seed=3)
    directory = tmp_path / "run" / "steering" / "methods"
    asked = [
        *("steer", "sweep", "embedded", tmp_path / "scenes", "--output", directory),
        *("--features", features, "--source", "yes", "--target", "no", "--budget", 0.5),
        *("--method", "coarse", "--method", "adaptive", "--choose-on", "train"),
        *("--num-choose", 16, "--num-samples", 16, "--max-new-tokens", 2),
    ]
    status, out, errors = xlvlm(*asked)
    assert status == 0, errors
    assert "2 trials ->" in out and "off_target at most 0.5" in out
    assert (directory / "tradeoff.svg").is_file() and not (directory / "summary.json").exists()
    table = (directory / "trials.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines()[1:]] == ["coarse", "adaptive"]
    # Nothing is tried again; the best of each method answers other questions.
    before = len(encoded)
    status, _, errors = xlvlm(*asked, "--split", "val")
    assert status == 0, errors
    assert len(encoded) == before + 2  # the plain model, and both conditions at once
    assert (directory / "trials.csv").read_text() == table
    summary = json.loads((directory / "summary.json").read_text())
    assert set(summary["conditions"]) == {"plain", "coarse", "adaptive"}
    assert (summary["sweep"]["budget"], summary["sweep"]["samples"]) == (0.5, 16)
    assert sorted(path.stem for path in (directory / "vectors").iterdir()) == ["adaptive", "coarse"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to try; give --features"),
        (("--method", "l2s"), "--method l2s needs more than answers; fit it with"),
        (("--method", "best"), "unknown method 'best'"),
        (("--vector", "empty"), "holds no vectors"),
    ],
)
def test_messages_of_sweep(xlvlm, features, pictures, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    arguments = [tmp_path / "empty" if each == "empty" else each for each in arguments]
    given = ("--features", features, "--source", "yes", "--target", "no") if arguments else ()
    status, _, errors = xlvlm(
        *("steer", "sweep", "embedded", pictures, "--choose-on", "train", *given, *arguments),
        *("--output", tmp_path / "out"),
    )
    assert status == 2 and message in errors
    assert not (tmp_path / "out").exists()


def test_several_sites(xlvlm, tmp_path):
    layers = [f"language_model.model.layers.{i}" for i in (5, 6)]
    number, out, path = np.arange(4), tmp_path / "vectors", tmp_path / "fine"
    states = {site: np.float32([[i, 0], [i, 1], [0, i], [1, i]]) for i, site in enumerate(layers)}
    plain = {"image": "a.png", "image_id": "a", "prompt": "?", "references": []}
    answers = ("yes", "yes", "no", "no")
    with FeaturesWriter(tmp_path / "features", {"model": "m"}) as writer:
        samples = [{**plain, "id": str(i), "prediction": a} for i, a in enumerate(answers)]
        writer.append(samples, states, number, number, number)
        writer.close()
    asked = ("steer", "fit", tmp_path / "features", "--source", "yes", "--target", "no")
    status, said, errors = xlvlm(*asked, "--site", "layers.*", "--output", out)
    assert status == 0, errors
    assert "2 vectors, sites" in said
    found = [steering.load(out / f"{site}.safetensors") for site in layers]
    assert [vector.site for vector in found] == layers
    np.testing.assert_allclose([vector.vector for vector in found], [[0.5, -0.5], [-0.5, 0.5]])
    status, _, errors = xlvlm(*asked, "--method", "fine", "--site", "layers.*", "--output", path)
    assert status == 2 and "matches 2 sites" in errors


def test_fine_and_their_ranking(fit, xlvlm, tmp_path):
    status, _, errors = fit(
        *("--method", "fine", "--num-concepts", 3, "--pairs", "0:1,0:2"),
        *("--output", tmp_path / "fine"),
    )
    assert status == 0, errors
    names = sorted(path.name for path in (tmp_path / "fine").iterdir())
    assert names == ["0-1.safetensors", "0-2.safetensors"]
    status, out, errors = xlvlm(
        *("steer", "rank", tmp_path / "fine", "--model", "embedded", "--num-samples", 8),
        *("--max-new-tokens", 2, "--batch-size", 8, "--output", tmp_path / "ranking.json"),
    )
    assert status == 0, errors
    assert "2 vectors ranked" in out
    ranked = json.loads((tmp_path / "ranking.json").read_text())["vectors"]
    scores = [each["score"] for each in ranked]
    assert scores == sorted(scores, reverse=True)
    assert {(each["from"], each["to"]) for each in ranked} == {(0, 1), (0, 2)}
    assert all(each["samples"] <= 8 for each in ranked)

    status, _, errors = fit("--method", "fine", "--output", tmp_path / "fine")
    assert status == 2
    assert "exists; name another output or replace it with --overwrite" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (("learned", "--steps", 3), steering.SteeringVector, "validation loss"),
        (("learned", "--steps", 3, "--rank", 2), steering.LowRankMap, "validation loss"),
        (("l2s",), steering.L2S, "of the shifts unexplained"),
        (("l2s", "--contrast", "completion"), steering.L2S, "of the shifts unexplained"),
    ],
    ids=str,
)
def test_what_learns(fit, tmp_path, options, kind, said):
    status, out, errors = fit(
        *("--method", *options, "--model", "embedded", "--source", "yes", "--target", "no"),
        *("--num-samples", 8, "--batch-size", 8, "--output", tmp_path / "v.safetensors"),
    )
    assert status == 0, errors
    assert said in out
    found = steering.load(tmp_path / "v.safetensors")
    assert isinstance(found, kind)
    assert found.source["source"] == ["yes"]
    assert found.source["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "yes"), "--method coarse needs --target"),
        (("--source", "yes", "--target", "blurple"), "target words blurple; choose frequent"),
        (("--source", "yes", "--target", "no", "--site", "s"), "got 's'"),
        (("--source", "yes", "--target", "no", "--where", "everywhere"), "where is 'everywhere'"),
        (("--source", "yes", "--target", "no", "--where", "from:now"), "expected from:INDEX"),
        (("--method", "fine", "--pairs", "0-1"), "--pairs contains '0-1'; expected FROM:TO"),
        (("--method", "learned", "--target", "no"), "--method learned needs --source"),
        (("--method", "l2s", "--source", "yes", "--target", "no"), "--method l2s needs --model"),
        (("--method", "vti-image"), "--method vti-image needs --model"),
        (("--method", "sae", "--source", "yes", "--target", "no"), "there is no dictionary"),
        (("--method", "sae", "--feature-ids", "1;2"), "--feature-ids is '1;2'; expected whole"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages(fit, tmp_path, arguments, message):
    status, _, errors = fit(*arguments, "--output", tmp_path / "out")
    assert status == 2
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_a_directory_without_vectors(xlvlm, tmp_path):
    status, _, errors = xlvlm(
        *("steer", "rank", tmp_path, "--model", "embedded", "--output", tmp_path / "r.json")
    )
    assert status == 2
    assert "holds no vectors" in errors
