"""The pipeline of docs/guides/xl-vlms.md, command by command, gives XL-VLMs' own numbers.

tests/data/xl_vlms_run.json says how XL-VLMs computed them; it ran in float16, this runs in float32.
The states of "a" are of captions in which the fine-tuned model says it too. Each output is made
once, by the first test that needs it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from xlvlm_jax import Concepts, Features, SteeringVector, shift
from xlvlm_jax.data import scenes
from xlvlm_jax.features.manifest import finetuned_site
from xlvlm_jax.metrics.vqa import normalise_answer
from xlvlm_jax.report import shift_figures

pytestmark = pytest.mark.slow
SITE, HEAD = "language_model.model.layers.6", "language_model.lm_head"
FLOAT16 = 5e-3  # of the largest number
RUN = json.loads((Path(__file__).parents[2] / "data" / "xl_vlms_run.json").read_text())
QUESTIONS = ("--dataset", "vqav2", "--split", "train2014", "--max-new-tokens", 5)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    directory = tmp_path_factory.mktemp("work")
    scenes.write(directory / "pictures", train=24)
    return directory


@pytest.fixture
def run(xlvlm, work):
    """run(*arguments, output=name): makes an output unless it is there; returns its path."""

    def command(*arguments, output):
        path = work / output
        if not path.exists():
            status, _, errors = xlvlm(*arguments, "--output", path)
            assert status == 0, errors
        return path

    return command


@pytest.fixture
def extract(run, work):
    def of_word(word, *options, output):
        model = ("extract", "embedded", work / "pictures", "--protocol", "xl-vlms")
        chosen = ("--containing", word, "--tokens", f"token-of-interest:{word}", "--site", SITE)
        return run(*model, *chosen, *options, output=output)

    return of_word


@pytest.fixture
def features(extract):
    """States of "a" in captions, of the model and of one that names colours."""
    both = ("--finetuned", "color", "--site", HEAD, "--max-new-tokens", 20)
    return extract("a", *both, output="a")


@pytest.fixture
def concepts(run, features):
    learn = ("--method", "kmeans", "--num-concepts", 2, "--site", SITE)
    return run("decompose", features, *learn, output="concepts")


@pytest.fixture
def moved(run, features, concepts):
    options = ("--concepts", concepts, "--model", "embedded", "--num-images", 3)
    return run("shift", features, *options, "--store-samples", output="shift")


@pytest.fixture
def vector(run, extract):
    asked = ("--key", "answer", *QUESTIONS)
    yes, no = (extract(word, *asked, output=word) for word in ("yes", "no"))
    fit = ("steer", "fit", yes, "--target-features", no)
    return run(*fit, output="yes-no.safetensors")


@pytest.fixture
def steered(run, work, vector):
    return run(
        *("steer", "apply", "embedded", work / "pictures", "--protocol", "xl-vlms", *QUESTIONS),
        *("--vector", vector, "--dataset-size", 80, "--source", "yes", "--target", "no"),
        *("--without", "yes/no"),
        output="steered",
    )


def near(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=FLOAT16 * np.abs(theirs).max())


def normalised(counts):
    return {
        kind: {normalise_answer(answer): count for answer, count in of_kind.items()}
        for kind, of_kind in counts.items()
    }


def predictions(directory):
    lines = map(json.loads, (directory / "predictions.jsonl").read_text().splitlines())
    return {line["id"]: line["predictions"] for line in lines}


class TestNumbersOfXlVlms:
    def test_states_of_a_word_and_the_shift_of_concepts(self, features):
        found = Features.open(features)
        before, after = found.matrix(SITE), found.matrix(finetuned_site(SITE))
        rows = [Path(found.samples[row]["image"]).name for row in found.sample_rows]
        assert rows == list(RUN["a"])
        near(before, list(RUN["a"].values()))
        given = Concepts.from_components(np.float32(RUN["shift"]["concepts"]), "kmeans")
        each = np.arange(len(before))
        pairs = shift.Pairs(each, each, len(each))
        analysis = shift.analyse(before, after, pairs, given, given)
        near(analysis.shifted, RUN["shift"]["shifted"])
        spread = analysis.spread
        np.testing.assert_allclose(spread.consistency, RUN["shift"]["consistency"], atol=0.01)
        np.testing.assert_allclose(spread.magnitude, RUN["shift"]["magnitude"], rtol=0.01)

    def test_a_vector_and_what_it_does_to_answers(self, vector, steered):
        near(SteeringVector.load(vector).vector, RUN["yes-no"])
        answers = predictions(steered)
        summary = json.loads((steered / "summary.json").read_text())["conditions"]
        means = {"overall": "mean over types"}
        means["overall_without_category_of_interest"] = "mean without yes/no"
        for condition in ("plain", "steered"):
            ours, theirs = summary[condition], RUN[condition]
            assert {key: given[condition] for key, given in answers.items()} == theirs["answers"]
            assert list(answers) == list(theirs["answers"])  # drawn in the same order
            assert ours["answers by type"] == normalised(theirs["answer_counts"])
            for name, accuracy in theirs["global_accuracy"].items():
                score = ours["scores"][means.get(name, name)]["xl_vlms"]
                assert 100 * score == pytest.approx(accuracy), name
        # Without a baseline, XL-VLMs' counts of the plain model say nothing.
        for name, count in summary["steered"]["XL-VLMs counts"].items():
            if name != "token_of_interest_accuracy":
                assert count == RUN["steered"][f"num_{name}"], name


def test_shifts_beside_each_other(run, features, concepts, moved, tmp_path, monkeypatch):
    drawn, draw = [], shift_figures.draw_beside

    def watched(analyses, directory):
        drawn.extend(analyses)
        return draw(analyses, directory)

    monkeypatch.setattr(shift_figures, "draw_beside", watched)
    options = ("--concepts", concepts, "--model", "embedded", "--num-images", 3)
    # Directories of one name are called by more of their paths.
    others = [shutil.copytree(moved, tmp_path / name / "again") for name in ("b", "c")]
    beside = ("--beside", others[0], "--beside", others[1], "--assign-by", "cosine")
    again = run("shift", features, *options, *beside, output="again")
    assert drawn == [f"{again.parent.name}/again", "b/again", "c/again"]
    names = {path.name for path in again.iterdir()}
    assert {"overlap-beside.svg", "recovery-beside.svg"} <= names
    stored = load_file(moved / "sample-shifts.safetensors")
    assert len(stored["shifts"]) == len(RUN["a"])


def test_a_shift_becomes_a_vector_that_steers_what_is_captured(run, moved, features, extract):
    vectors = run("steer", "fit", moved, "--method", "shift", output="vectors")
    analysis = shift.ShiftAnalysis.load(moved)
    k = int(np.argmax(analysis.counts))
    vector = SteeringVector.load(vectors / f"concept-{k}.safetensors")
    np.testing.assert_array_equal(vector.vector, analysis.shifts[k])
    steering = ("--vector", vectors / f"concept-{k}.safetensors", "--alpha", 0.05)
    output = extract("a", *steering, "--site", HEAD, "--max-new-tokens", 2, output="captured")
    plain, found = Features.open(features), Features.open(output)
    assert found.manifest["steering"]["alpha"] == 0.05
    # The first token is "a": its state is that of the prompt, steered.
    first = [list(each.samples[row]["id"] for row in each.sample_rows) for each in (plain, found)]
    shared = [name for name in first[0] if name in first[1]]
    assert shared
    for name in shared:
        before, after = (
            each.matrix(SITE)[names.index(name)]
            for each, names in zip((plain, found), first, strict=True)
        )
        np.testing.assert_allclose(after, before + 0.05 * vector.vector, rtol=1e-3, atol=1e-3)


def test_one_sample_is_explained(run, concepts, features, xlvlm):
    if Concepts.load(concepts).words is None:
        assert xlvlm("ground", concepts, "--model", "embedded", "--num-images", 2)[0] == 0
    opened = Features.open(features)
    name = opened.samples[opened.sample_rows[1]]["id"]
    figure = run("explain", concepts, name, "--num-concepts", 1, output="sample.svg")
    assert "<svg" in figure.read_text()


def test_concepts_of_the_head_are_read_as_logits(run, features, xlvlm, vlm):
    learn = ("--method", "simple", "--num-concepts", 2, "--site", HEAD)
    learnt = run("decompose", features, *learn, output="logits")
    read = ("--model", "embedded", "--num-candidates", 9)
    status, _, errors = xlvlm("ground", learnt, *read)
    assert status == 0, errors
    found = Concepts.load(learnt)
    for component, words in zip(found.components, found.words, strict=True):
        top = [vlm.tokenizer.decode([i]).lower().strip() for i in np.argsort(-component)[:9]]
        assert words == [word for word in dict.fromkeys(top) if word in words]


def test_a_baseline_of_an_earlier_run(run, steered, work):
    asked = ("evaluate", "embedded", work / "pictures", "--dataset-size", 80, *QUESTIONS)
    again = run(*asked, "--baseline", steered, output="of-ours")
    assert {key: given["plain"] for key, given in predictions(again).items()} == {
        key: given["plain"] for key, given in predictions(steered).items()
    }
    (work / "theirs.json").write_text(json.dumps(RUN["steered"]["answers"]))
    theirs = run(*asked, "--baseline", work / "theirs.json", output="of-theirs")
    summary = json.loads((theirs / "summary.json").read_text())
    counts = summary["conditions"]["plain"]["answers by type"]
    assert counts == normalised(RUN["steered"]["answer_counts"])
    assert summary["about"]["baseline"] == str(work / "theirs.json")
