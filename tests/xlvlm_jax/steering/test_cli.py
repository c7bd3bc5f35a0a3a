"""`xlvlm steer fit` and `xlvlm steer rank`: each method from features to files."""

import json

import pytest

from xlvlm_jax import steering

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
        (("--method", "l2s", "--source", "yes", "--target", "no"), "and --model"),
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
