"""Commands that those who come from XL-VLMs use, one after the other, on the embedded model."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from xlvlm_jax import Concepts, Features, SteeringVector
from xlvlm_jax.data import scenes
from xlvlm_jax.shift import ShiftAnalysis

SITE = "language_model.model.norm"
HEAD = "language_model.lm_head"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("work")
    scenes.write(directory / "pictures", train=10, seed=3)
    return directory


@pytest.fixture
def run(xlvlm, work):
    """run(*arguments): what a command printed; its outputs are made once for all tests."""

    def command(*arguments, output):
        if (work / output).exists():
            return ""
        status, out, errors = xlvlm(*arguments, "--output", work / output)
        assert status == 0, errors
        return " ".join(out.split())

    return command


@pytest.fixture
def features(run, work):
    """States of the first word of ten captions, of the model and of one that names colours."""
    run(
        *("extract", "embedded", work / "pictures", "--finetuned", "color"),
        *("--site", SITE, "--site", HEAD, "--tokens", "before-special-tokens", "--rows", "first"),
        *("--batch-size", 10, "--max-new-tokens", 4),
        output="features",
    )
    return work / "features"


@pytest.fixture
def concepts(run, features, work):
    learn = ("--method", "kmeans", "--num-concepts", 2, "--site", SITE)
    run("decompose", features, *learn, output="concepts")
    return work / "concepts"


@pytest.fixture
def moved(run, features, concepts, work):
    few = ("--num-images", 3, "--store-samples")
    run("shift", features, "--concepts", concepts, "--model", "embedded", *few, output="shift")
    return work / "shift"


def test_shifts_beside_each_other(run, features, concepts, moved, work):
    beside = ("--beside", moved, "--assign-by", "cosine", "--num-images", 3)
    model = ("--model", "embedded")
    run("shift", features, "--concepts", concepts, *model, *beside, output="again")
    names = {path.name for path in (work / "again").iterdir()}
    assert {"overlap-beside.svg", "recovery-beside.svg"} <= names
    assert len(load_file(moved / "sample-shifts.safetensors")["shifts"]) == 10


def test_a_shift_becomes_a_vector_that_steers_what_is_captured(run, moved, features, work):
    said = run("steer", "fit", moved, "--method", "shift", output="vectors")
    analysis = ShiftAnalysis.load(moved)
    k = int(np.argmax(analysis.counts))
    vector = SteeringVector.load(work / "vectors" / f"concept-{k}.safetensors")
    assert "shifts of concepts, site" in said and vector.site == SITE
    np.testing.assert_array_equal(vector.vector, analysis.shifts[k])
    run(
        *("extract", "embedded", work / "pictures", "--site", SITE, "--site", HEAD),
        *("--vector", work / "vectors" / f"concept-{k}.safetensors", "--alpha", 0.5),
        *("--tokens", "before-special-tokens", "--rows", "first"),
        *("--batch-size", 10, "--max-new-tokens", 4),
        output="steered",
    )
    plain, steered = Features.open(features), Features.open(work / "steered")
    expected = plain.matrix(SITE) + 0.5 * vector.vector
    np.testing.assert_allclose(steered.matrix(SITE), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(steered.matrix(HEAD) - plain.matrix(HEAD)).max() > 0.01
    assert steered.manifest["steering"]["alpha"] == 0.5


def test_one_sample_is_explained(run, concepts, features, work, xlvlm):
    if Concepts.load(concepts).words is None:
        assert xlvlm("ground", concepts, "--model", "embedded", "--num-images", 2)[0] == 0
    name = Features.open(features).samples[4]["id"]
    said = run("explain", concepts, name, "--num-concepts", 1, output="sample.svg")
    assert "activation" in said and (work / "sample.svg").is_file()


def test_concepts_of_the_head_are_read_as_logits(run, features, work, xlvlm, vlm):
    learn = ("--method", "simple", "--num-concepts", 2, "--site", HEAD)
    run("decompose", features, *learn, output="logits")
    status, _, errors = xlvlm(
        "ground", work / "logits", "--model", "embedded", "--num-candidates", 9
    )
    assert status == 0, errors
    found = Concepts.load(work / "logits")
    for component, words in zip(found.components, found.words, strict=True):
        top = [vlm.tokenizer.decode([i]).lower().strip() for i in np.argsort(-component)[:9]]
        assert words == [word for word in dict.fromkeys(top) if word in words]


def test_a_baseline_of_an_earlier_run(run, work):
    asked = ("evaluate", "embedded", work / "pictures", "--split", "train", "--num-samples", 10)
    few = ("--batch-size", 10, "--max-new-tokens", 3)
    run(*asked, *few, output="plain")
    lines = (work / "plain" / "predictions.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    changed = {line["id"]: "blurple" for line in lines}
    (work / "theirs.json").write_text(json.dumps(changed))
    steered = ("--vector", work / "vector.safetensors")
    SteeringVector(np.ones(192, np.float32), SITE).save(work / "vector.safetensors")
    run(*asked, *few, *steered, "--baseline", work / "plain", output="steered-answers")
    first = json.loads((work / "plain" / "summary.json").read_text())["conditions"]["plain"]
    second = json.loads((work / "steered-answers" / "summary.json").read_text())
    assert second["conditions"]["plain"] == first
    assert second["about"]["baseline"] == str(work / "plain")
    run(*asked, *few, "--baseline", work / "theirs.json", output="of-theirs")
    third = json.loads((work / "of-theirs" / "summary.json").read_text())["conditions"]["plain"]
    assert third["answers"] == {"blurple": 10}
