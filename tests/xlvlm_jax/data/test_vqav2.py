"""VQAv2 questions and annotations: by hand, and messages."""

import json

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import vqav2


def question(number, image=42, text="What colour is the dog?", **change):
    entry = {"image_id": image, "question": text, "question_id": number}
    return {key: value for key, value in (entry | change).items() if value is not None}


def annotation(number, image=42, **change):
    answers = [
        {"answer": "red" if i < 7 else "brown", "answer_confidence": "yes", "answer_id": i + 1}
        for i in range(10)
    ]
    entry = {
        "question_type": "what colour is the",
        "multiple_choice_answer": "red",
        "answers": answers,
        "image_id": image,
        "answer_type": "other",
        "question_id": number,
    }
    return {key: value for key, value in (entry | change).items() if value is not None}


def write(directory, questions, annotations, subset="val2014"):
    about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
    (directory / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(
        json.dumps(about | {"task_type": "Open-Ended", "questions": questions})
    )
    (directory / f"v2_mscoco_{subset}_annotations.json").write_text(
        json.dumps(about | {"annotations": annotations})
    )
    return directory


def write_karpathy(directory, splits):
    images = [{"cocoid": image, "split": split} for image, split in splits.items()]
    (directory / "dataset_coco.json").write_text(json.dumps({"images": images}))


def test_a_question_by_hand(tmp_path):
    write(tmp_path, [question(42001)], [annotation(42001)])
    (sample,) = vqav2.load(tmp_path, "val")
    assert (sample.id, sample.image_id) == ("42001", "42")
    assert sample.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert sample.prompt == (
        "What colour is the dog?\nAnswer the question using a single word or phrase."
    )
    assert sample.references == ("red",) * 7 + ("brown",) * 3
    assert sample.metadata == {
        "split": "val",
        "question": "What colour is the dog?",
        "question_type": "what colour is the",
        "answer": "red",
        "answer_type": "other",
    }


def test_questions_and_annotations_may_stand_in_any_order(tmp_path):
    numbers = [3, 1, 2]
    write(tmp_path, [question(i) for i in numbers], [annotation(i) for i in (1, 2, 3)], "train2014")
    samples = data.load("vqav2", tmp_path)
    assert [sample.id for sample in samples] == ["3", "1", "2"]
    assert samples[0].image.parent.name == "train2014"


def test_the_test_split_is_karpathys(tmp_path):
    images = {1: "test", 2: "val", 3: "restval", 4: "test"}
    write(
        tmp_path,
        [question(10 * image, image) for image in images],
        [annotation(10 * image, image) for image in images],
    )
    with pytest.raises(FileNotFoundError, match=r"dataset_coco.json: no such file; it says which"):
        vqav2.load(tmp_path, "test")
    write_karpathy(tmp_path, images)
    assert [sample.image_id for sample in vqav2.load(tmp_path, "test")] == ["1", "4"]
    assert len(vqav2.load(tmp_path, "val")) == 4


def test_other_file_names(tmp_path):
    write(tmp_path, [question(1)], [annotation(1)])
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").rename(tmp_path / "q.json")
    (tmp_path / "v2_mscoco_val2014_annotations.json").rename(tmp_path / "a.json")
    # the folder of the images is what the file says, here val2014
    (sample,) = vqav2.load(tmp_path, questions="q.json", annotations=tmp_path / "a.json")
    assert sample.image.parent.name == "val2014"


def test_attributes_come_with_the_samples(tmp_path):
    (tmp_path / "attributes.json").write_text('{"42": {"place": "beach"}}')
    (sample,) = vqav2.load(write(tmp_path, [question(1)], [annotation(1)]), "val")
    assert sample.metadata["attributes"] == {"place": "beach"}


def test_the_drawn_scenes_are_read(tmp_path):
    scenes = pytest.importorskip("xlvlm_jax.data.scenes")
    scenes.write(tmp_path, train=2, val=1, test=2)
    for name in ("coco", "vqav2"):
        ids = [
            {s.image_id for s in data.load(name, tmp_path, split)} for split in ("train", "test")
        ]
        assert [len(images) for images in ids] == [2, 2] and not set.intersection(*ids)
        samples = data.load(name, tmp_path, "test")
        assert all(sample.image.exists() and sample.metadata["attributes"] for sample in samples)
    assert all(len(sample.references) == 10 for sample in samples)


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        (
            [question(1)] * 2,
            [annotation(1)],
            r"questions.json: questions\[1\]: question_id 1 is a duplicate",
        ),
        (
            [question(1)],
            [annotation(1)] * 2,
            r"annotations\[1\]: question_id 1 is a duplicate",
        ),
        ([question(1)], [annotation(2)], "annotations.json: no annotation for question_id 1 of "),
        ([question(1, image_id=None)], [annotation(1)], r"questions\[0\]: key 'image_id' missing"),
        ([question(1, question=3)], [annotation(1)], "'question' must be a string, got 3"),
        ([question(1)], [annotation(1, answers=[])], r"annotations\[0\]: 'answers' is empty"),
        ([question(1)], [annotation(1, answers=[{}])], r"\[0\].answers\[0\]: key 'answer' missing"),
        ([question(1)], [annotation(1, answer_type=None)], r"\[0\]: key 'answer_type' missing"),
        ([], [annotation(1)], "questions.json: 'questions' is empty"),
        ([question(1)], [], "annotations.json: 'annotations' is empty"),
    ],
)
def test_what_is_wrong_in_the_files_and_where(tmp_path, questions, annotations, message):
    with pytest.raises(ValueError, match=message) as caught:
        vqav2.load(write(tmp_path, questions, annotations), "val")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["v2_OpenEnded_mscoco_val2014_questions", "v2_mscoco_val2014_annotations"]
)
def test_files_of_other_encodings(tmp_path, name):
    path = write(tmp_path, [question(1, question="Où?")], [annotation(1)]) / f"{name}.json"
    text = json.dumps(json.loads(path.read_text()) | {"note": "café"}, ensure_ascii=False)
    path.write_text(text, encoding="utf-16")
    assert vqav2.load(tmp_path, "val")[0].metadata["question"] == "Où?"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{name}.json: byte \d+: not JSON in UTF-8"):
        vqav2.load(tmp_path, "val")


def test_a_test_split_without_questions(tmp_path):
    write(tmp_path, [question(1)], [annotation(1)])
    write_karpathy(tmp_path, {7: "test"})
    with pytest.raises(ValueError, match="no question about an image of Karpathy's test split"):
        vqav2.load(tmp_path, "test")


def test_unknown_split_and_missing_files(tmp_path):
    with pytest.raises(
        ValueError, match="VQAv2 has no split 'dev'; expected one of train, val, te"
    ):
        vqav2.load(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"mscoco_val2014_questions.json: no such file"):
        vqav2.load(tmp_path, "val")
