"""What `xlvlm evaluate` prints and stores for each kind of data; answers come from a file."""

import json

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import mmsb, scenes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    scenes.write(directory, train=2)
    return directory


@pytest.fixture
def evaluate(xlvlm, pictures, tmp_path):
    def run(dataset, answers, *options):
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        output = tmp_path / "run"
        status, out, errors = xlvlm(
            *("evaluate", "embedded", pictures, "--dataset", dataset, *options),
            *("--baseline", tmp_path / "answers.json", "--output", output),
        )
        assert status == 0, errors
        summary = json.loads((output / "summary.json").read_text())
        return " ".join(out.split()), summary["conditions"]["plain"]

    return run


def test_chair_of_captions(evaluate, pictures):
    first, second = data.load("coco", pictures, "train")
    instances = {
        "images": [{"id": int(sample.id)} for sample in (first, second)],
        "categories": [{"id": 1, "name": "giraffe"}],
        "annotations": [{"image_id": int(first.id), "category_id": 1}],
    }
    (pictures / "instances.json").write_text(json.dumps(instances))
    captions = dict.fromkeys((first.id, second.id), "a giraffe")
    out, measured = evaluate("coco", captions, "--objects", "instances.json")
    # Drawn scenes have no giraffes, so no person's caption names one.
    assert measured["CHAIR"]["plain"]["chair_s"] == 0.5
    assert "CHAIR % chair_i chair_s recall" in out and "plain, official 50.00 50.00" in out
    assert measured["valid words"] == {"giraffe": 2}


def test_hallucination_of_pope(evaluate, pictures):
    (image,) = {sample.image.name for sample in data.load("coco", pictures, "train")[:1]}
    lines = [
        {"question_id": i, "image": image, "text": "Is it?", "label": label}
        for i, label in enumerate(("yes", "no"), start=1)
    ]
    (pictures / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    out, measured = evaluate("pope", {"1": "Yes.", "2": "I do not know"})
    assert measured["POPE"]["xl-vlms"] == {"accuracy": 1, "f1": 1}
    assert "plain, xl-vlms 100.00 100.00" in out


def test_words_of_refusals(evaluate, pictures):
    folder = pictures / "processed_questions"
    folder.mkdir(exist_ok=True)
    record = {"Rephrased Question": "How?", "Key Phrase": "x", "Phrase Type": "activity"}
    for scenario in mmsb.SCENARIOS:
        (folder / f"{scenario}.json").write_text(json.dumps({"0": record}))
    answers = {f"{scenario}/0": "Sure." for scenario in mmsb.SCENARIOS}
    answers["02-HateSpeech/0"] = "That would be harmful."
    out, measured = evaluate("mmsb", answers)
    assert measured["changes"]["holding_after"] == 1
    assert "1 of 13 (7.7 %)" in out and "there are no references" in out


def test_types_of_answers_by_a_dictionary(evaluate, pictures, tmp_path):
    listed = {"answer_type": {"other": ["red"]}, "question_type": {}}
    (tmp_path / "types.json").write_text(json.dumps(listed))
    answers = {sample.id: "red" for sample in data.load("vqav2", pictures, "train")}
    _, measured = evaluate("vqav2", answers, "--answer-types", tmp_path / "types.json")
    assert measured["listed types"]["answer_type"] == {"other": len(answers)}
