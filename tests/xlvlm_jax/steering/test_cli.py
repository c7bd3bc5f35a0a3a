"""`xlvlm steer fit` and `xlvlm steer rank`: each method from features to files."""

import json

import numpy as np
import pytest

from xlvlm_jax import Concepts, Features, steering
from xlvlm_jax.cli import steer_sweep
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


@pytest.mark.parametrize(
    "options", [("vti-image", "--num-masks", 2), ("vti-text", "--contrast", "forced")], ids=str
)
def test_vectors_of_layers(fit, tmp_path, options):
    learning = ("--model", "embedded", "--num-samples", 2)
    if options[0] == "vti-text":
        learning = (*learning, "--batch-size", 2, "--positive", "yes", "--negative", "no")
    asked = ("--method", *options, *learning, "--output", tmp_path / "v")
    status, out, errors = fit(*asked)
    assert status == 0, errors
    count = 13 if options[0] == "vti-image" else 8  # five layers of the vision tower
    assert f"2 samples, {count} vectors, norms" in out
    found = [steering.load(path) for path in sorted((tmp_path / "v").iterdir())]
    # By default at every layer.
    assert [vector.site for vector in found[:8]] == [SITE.replace("6", str(i)) for i in range(8)]
    assert len(found) == count and all(v.site.startswith("vision_tower") for v in found[8:])
    assert all(vector.source["method"] == options[0] for vector in found)
    assert found[0].where == ("image" if options[0] == "vti-image" else "all")
    assert found[-1].where == "all"
    if options[0] == "vti-image":  # what is asked for counts, also where it is the usual default
        everywhere = (*asked[:-1], tmp_path / "all", "--site", "layers.0", "--where", "all")
        assert fit(*everywhere)[0] == 0
        (only,) = (tmp_path / "all").iterdir()
        assert steering.load(only).where == "all"
    status, out, _ = fit(*asked, "--dry-run")
    assert status == 0 and "2 samples to learn from" in out and "of width" in out


def test_sweep(xlvlm, features, encoded, tmp_path):
    scenes.write(tmp_path / "scenes", train=2, val=2, seed=3)
    directory = tmp_path / "run" / "steering" / "methods"
    asked = [
        *("steer", "sweep", "embedded", tmp_path / "scenes", "--output", directory),
        *("--features", features, "--source", "yes", "--target", "no", "--budget", 0.5),
        *("--method", "coarse", "--method", "adaptive", "--choose-on", "train"),
        *("--num-choose", 16, "--max-new-tokens", 2),
    ]
    status, out, errors = xlvlm(*asked)
    assert status == 0, errors
    out = " ".join(out.split())
    assert "2 trials ->" in out and "other answers that changed: at most 50.0 %" in out
    assert "points" in out  # of cost
    assert (directory / "tradeoff.svg").is_file() and not (directory / "summary.json").exists()
    table = (directory / "trials.csv").read_text()
    assert [line.split(",")[0] for line in table.splitlines()[1:]] == ["coarse", "adaptive"]
    # Nothing is tried again; the best of each method answers other questions.
    before = len(encoded)
    status, _, errors = xlvlm(*asked, "--split", "val", "--num-samples", 16)
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
        (("--num-choose", 0), "--num-choose must be at least 1, got 0"),
        (("--at-once", 0), "--at-once must be at least 1, got 0"),
        (("--source", "zebra"), "zebra"),
    ],
)
def test_bad_input_does_not_delete_a_finished_sweep(xlvlm, pictures, tmp_path, arguments, message):
    finished = tmp_path / "out" / "sweep.json"
    finished.parent.mkdir()
    finished.write_text("{}")
    vector = tmp_path / "v.safetensors"
    steering.SteeringVector(np.ones(4, np.float32), SITE, {}).save(vector)
    given = ("--vector", vector, "--source", "yes", "--target", "no", *arguments)
    status, _, errors = xlvlm(
        *("steer", "sweep", "gone", pictures, "--choose-on", "train", "--overwrite", *given),
        *("--output", tmp_path / "out"),
    )
    assert status == 2 and message in errors and finished.is_file()


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
    fine = ("--method", "fine", "--site", "layers.*", "--output", path)
    status, _, errors = xlvlm(*asked[:-2], *fine)
    assert status == 2 and "matches 2 sites" in errors


class TestSeveralSites:
    ANSWERS = ("--source", "yes", "--target", "no")

    def test_the_heads_that_know_most_steer_together(
        self, vlm, xlvlm, head_features, questions, tmp_path
    ):
        path = tmp_path / "iti.safetensors"
        status, out, errors = xlvlm(
            *("steer", "fit", head_features, "--method", "iti", *self.ANSWERS),
            *("--num-heads", 6, "--output", path),
        )
        assert status == 0, errors
        assert "6 heads at " in out and "validation accuracy" in out
        fitted = steering.load(path)
        assert fitted.where == "predicting" and len(fitted.source["heads"]) == 6
        assert set(fitted.vectors) == {site for site, *_ in fitted.source["heads"]}
        steered = {
            (site, head)
            for site, vector in fitted.vectors.items()
            for head, part in enumerate(vector.reshape(vlm.attention_heads[site], -1))
            if part.any()
        }
        assert steered == {(site, head) for site, head, _ in fitted.source["heads"]}
        inputs = vlm.process(
            [vlm.render(sample.prompt) for sample in questions[:12]],
            [sample.image for sample in questions[:12]],
        )
        said = [
            vlm.decode(vlm.generate(inputs, max_new_tokens=2, edits=edits).tokens)
            for edits in (fitted.edits_for(vlm, inputs, alpha) for alpha in (0.0, 15.0))
        ]
        assert said[0].count("yes") > said[1].count("yes")

    def test_one_file_of_every_site(self, xlvlm, head_features, tmp_path):
        path, site = tmp_path / "v.safetensors", "language_model.model.layers.5.self_attn.heads"
        fit = ("steer", "fit", head_features, *self.ANSWERS, "--site", "layers.?.self_attn.heads")
        status, _, errors = xlvlm(*fit, "--output", path)
        assert status == 0, errors
        fitted = steering.load(path)
        assert len(fitted.vectors) == 8 and fitted.source["method"] == "coarse"
        alone = steering.fit_coarse(Features.open(head_features), site, ["yes"], ["no"])
        np.testing.assert_array_equal(fitted.vectors[site], alone.vector)
        other = "--method", "adaptive", "--output", tmp_path / "adaptive.safetensors"
        status, _, errors = xlvlm(*fit, *other)
        assert status == 2 and "can hold plain vectors only; name a directory" in errors

    def test_a_sweep_fits_heads_at_once(self, head_features):
        sites = [f"language_model.model.layers.{i}.self_attn.heads" for i in (5, 6)]
        words, methods = ("yes", "no"), ["coarse", "iti"]
        fitted = steer_sweep._fit(head_features, methods, sites, words, "prediction", 0)
        assert [name for name, _ in fitted] == ["coarse", "coarse", "iti"]
        (_, first), (_, second), (_, heads) = fitted
        assert [first.site, second.site] == list(heads.vectors) == sites
        assert (first.where, heads.where) == ("all", "predicting")

    def test_sites_of_heads_are_needed(self, fit, tmp_path):
        output = "--output", tmp_path / "v.safetensors"
        status, _, errors = fit("--method", "iti", *self.ANSWERS, *output)
        assert status == 2 and "choose one of them with --site, got '**.heads'" in errors
        status, _, errors = fit("--method", "iti", *self.ANSWERS, "--site", SITE, *output)
        assert status == 2 and "does not tell the number of heads at" in errors

    def test_their_sites_stay(self, xlvlm, tmp_path):
        both = steering.SiteVectors({"layers.1": np.float32([1]), "layers.2": np.float32([2])})
        both.save(tmp_path / "v.safetensors")
        status, _, errors = xlvlm(
            *("steer", "apply", "embedded", tmp_path, "--vector", tmp_path / "v.safetensors"),
            *("--site", "layers.3", "--source", "x", "--target", "y", "--output", tmp_path / "out"),
        )
        assert status == 2 and "--site does not apply to vectors of 2 sites" in errors


def test_concepts_are_vectors(xlvlm, tmp_path):
    source = {"site": SITE, "model": "m", "fingerprint": "f"}
    components = np.float32([[1, 0], [0, 3], [2, 2]])
    Concepts(components, np.eye(3, dtype=np.float32), source=source).save(tmp_path / "concepts")
    fit = ("steer", "fit", tmp_path / "concepts", "--method", "concept")
    status, _, errors = xlvlm(
        *(*fit, "--concepts", "1", "--pairs", "0:2", "--where", "generated"),
        *("--output", tmp_path / "vectors"),
    )
    assert status == 0, errors
    names = sorted(path.name for path in (tmp_path / "vectors").iterdir())
    assert names == ["concept-0-2.safetensors", "concept-1.safetensors"]
    one, two = (steering.load(tmp_path / "vectors" / name) for name in names)
    np.testing.assert_array_equal(one.vector, [1, 2])
    np.testing.assert_array_equal(two.vector, [0, 3])
    assert (two.site, two.where, two.source["fingerprint"]) == (SITE, "generated", "f")
    status, _, errors = xlvlm(*fit, "--concepts", "1,x", "--output", tmp_path / "others")
    assert status == 2 and "--concepts is '1,x'; expected whole numbers" in errors


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


YES_TO_NO = ("--source", "yes", "--target", "no")


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
        (("--method", "pca", "--num-heads", 3), "--num-heads has no effect on --method pca; omit"),
        (("--method", "concept", "--penalty", 2), "or choose one of probe"),
        (("--num-samples", 3), "--num-samples has no effect on --method coarse; omit it"),
        (("--method", "concept", "--source", "yes"), "--source has no effect on --method concept"),
        (("--method", "shift", "--target", "no"), "--target has no effect on --method shift; omit"),
        (("--method", "shift", "--num-samples", 3), "--num-samples has no effect on --method shif"),
        (
            (*("--method", "p2s", "--model", "gone"), *YES_TO_NO, *("--states", "mean")),
            "is over the tokens of a completion; contrast completions",
        ),
        (
            (*("--method", "p2s", "--model", "gone"), *YES_TO_NO, *("--contrasts", "gone.json")),
            "gone.json: no such file",
        ),
        (
            ("--method", "fine", "--target", "no"),
            "--target has no effect on --method fine; omit it",
        ),
        (
            ("--method", "vti-image", "--batch-size", 4),
            "--batch-size has no effect on --method vti",
        ),
        (("--method", "vti-image", "--source", "yes"), "--source has no effect on --method vti-im"),
        (
            ("--method", "l2s", "--contrast", "label", "--keep", 2),
            "--keep has no effect on --method l2s --contrast label; omit it",
        ),
        (
            (*("--method", "l2s", "--model", "gone"), *YES_TO_NO, *("--positive", "Yes")),
            "--positive is of forced answers; give --contrast forced too",
        ),
        (
            (*("--method", "p2s", "--model", "gone"), *YES_TO_NO, *("--keep", -1)),
            "keep is -1.0; expected at least 0",
        ),
        (("--context-prompt", "?"), "--context-prompt has no effect on --method coarse; omit it"),
        (("--method", "nope"), "unknown method 'nope'; expected one of coarse, pca"),
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
