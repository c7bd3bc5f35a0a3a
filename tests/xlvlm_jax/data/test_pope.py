"""POPE's questions: by hand, and messages."""

import json

import pytest

from xlvlm_jax import data, evaluation

LINES = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "scenes/a.png", "text": "Is there a dog?", "label": "no"},
]


def write(directory, lines=LINES, split="random"):
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (directory / f"coco_pope_{split}.json").write_text(text)


def test_questions_by_hand(tmp_path):
    write(tmp_path, split="popular")
    first, second = data.load("pope", tmp_path, "popular", prompt="{question} Say yes or no.")
    assert (first.id, first.image_id) == ("1", "310196")
    assert first.image == tmp_path / "val2014" / "COCO_val2014_000000310196.jpg"
    assert first.prompt == "Is there a snowboard in the image? Say yes or no."
    assert first.references == ("yes",) * 10 and first.metadata["label"] == "yes"
    assert second.image == tmp_path / "scenes/a.png"


def test_descriptions_in_place_of_questions(tmp_path):
    write(tmp_path)
    plain, _ = data.load("pope", tmp_path, describe=True)
    assert plain.prompt == "Describe the image in detail."
    assert plain.metadata["question"] == "Is there a snowboard in the image?"
    asked, _ = data.load("pope", tmp_path, describe=True, prompt="What is it? Not: {question}")
    assert asked.prompt == "What is it? Not: Is there a snowboard in the image?"


def test_scores_of_both_protocols(tmp_path):
    write(tmp_path)
    samples = data.load("pope", tmp_path)
    measured = evaluation.Questions().measure(samples, ["yes", "no"], ["Yes.", "No!"])
    assert measured["POPE"]["official"]["accuracy"] == 0.5
    assert measured["POPE"]["plain"]["accuracy"] == 1
    assert measured["POPE"]["xl-vlms"] == {"accuracy": 1, "f1": 1}
    assert measured["scores"]["all"]["normalised"] == 1


def test_the_list_of_xl_vlms(tmp_path):
    ending = " Answer with just one word."
    listed = [
        {"filename": name, "instruction": f"{text}{ending}", "response": label, "subset": subset}
        for name, text, label, subset in [
            ("COCO_val2014_000000310196.jpg", "Is there a dog?", "yes", "random"),
            ("COCO_val2014_000000310196.jpg", "Is there a cat?", "no", "random"),
            ("b.jpg", "Is there a car?", "no", "popular"),
        ]
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(listed))
    given = {"questions": "annotations.json", "prompt": "{question}"}
    first, second = data.load("pope", tmp_path, "popular", **given)
    assert (first.prompt, first.metadata["label"]) == ("Is there a dog?", "yes")
    assert first.image == tmp_path / "images" / "COCO_val2014_000000310196.jpg"
    assert (second.id, second.prompt, second.references[0]) == ("2", "Is there a car?", "no")
    assert len(data.load("pope", tmp_path, "all", **given)) == 3
    del listed[1]["subset"]
    (tmp_path / "annotations.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"\[1\]: key 'subset' missing"):
        data.load("pope", tmp_path, **given)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{**LINES[0], "label": "No"}], "line 1: 'label' is 'No'; expected 'yes' or 'no'"),
        ([LINES[0]] * 2, "line 2: question_id 1 is a duplicate"),
        ([{"question_id": 1}], "line 1: key 'label' missing"),
        ([], "has no questions"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    write(tmp_path, lines)
    with pytest.raises(ValueError, match=message):
        data.load("pope", tmp_path)


def test_messages(tmp_path):
    with pytest.raises(ValueError, match="POPE has no split 'train'; expected one of random, pop"):
        data.load("pope", tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="no such file; pass its name"):
        data.load("pope", tmp_path)
    (tmp_path / "coco_pope_random.json").write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        data.load("pope", tmp_path)


def test_all_files_at_once(tmp_path):
    for split in ("random", "popular", "adversarial"):
        write(tmp_path, LINES[:1] if split == "random" else LINES, split)
    samples = data.load("pope", tmp_path, "all")
    assert [sample.id for sample in samples] == [
        *("random/1", "popular/1", "popular/2", "adversarial/1", "adversarial/2")
    ]
    kinds = [sample.metadata["negatives"] for sample in samples]
    assert kinds == ["random"] + ["popular"] * 2 + ["adversarial"] * 2
    write(tmp_path, [LINES[0]] * 2, "adversarial")
    with pytest.raises(ValueError, match=r"coco_pope_adversarial\.json: line 2: question_id"):
        data.load("pope", tmp_path, "all")
    (tmp_path / "coco_pope_popular.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"coco_pope_popular\.json: no such file"):
        data.load("pope", tmp_path, "all")


def test_files_of_another_task(tmp_path):
    """One line, which says what was expected."""
    karpathy = {"images": [{"cocoid": 1, "split": "test"}], "dataset": "coco"}
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(karpathy))
    expected = r"line 1: key 'question_id' missing; it has images, dataset; expected a line of POPE"
    with pytest.raises(ValueError, match=expected):
        data.load("pope", tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match=r"line 2, column 1: not JSON"):
        data.load("coco", tmp_path, file="coco_pope_random.json")
    (tmp_path / "one.json").write_text(json.dumps(LINES[0]))
    with pytest.raises(ValueError, match=r"it has question_id, image.*expected Karpathy's split"):
        data.load("coco", tmp_path, file="one.json")
    with pytest.raises(ValueError, match=r"'questions' missing; .*; expected VQAv2's questions"):
        data.load("vqav2", tmp_path, questions="one.json")
    (tmp_path / "karpathy.json").write_text(
        json.dumps(
            {
                "images": [
                    {
                        **{"cocoid": 1, "split": "test", "filepath": "", "filename": "a.jpg"},
                        "sentences": [{"raw": "a dog"}],
                    }
                ]
            }
        )
    )
    (tmp_path / "captions.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    with pytest.raises(ValueError, match=r"'categories' missing; .*; expected COCO's file of inst"):
        data.load("coco", tmp_path, "test", file="karpathy.json", objects="captions.json")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "coco_pope_random.json").write_bytes(b"\xff\xfe[")
    with pytest.raises(ValueError, match=r"coco_pope_random\.json: byte 0: not UTF-8"):
        data.load("pope", tmp_path)
