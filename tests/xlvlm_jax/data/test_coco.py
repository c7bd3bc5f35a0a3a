"""COCO captions in Karpathy's layout: by hand, and messages."""

import json

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import coco


def image(number=9, split="test", **change):
    """Returns an entry as in Karpathy's file."""
    folder = "train2014" if split in ("train", "restval") else "val2014"
    sentences = [
        {"tokens": ["a", "dog"], "raw": text, "imgid": 0, "sentid": 5 * number + i}
        for i, text in enumerate(["A dog.", "A brown dog on a beach "])
    ]
    entry = {
        "filepath": folder,
        "sentids": [5 * number, 5 * number + 1],
        "filename": f"COCO_{folder}_{number:012d}.jpg",
        "imgid": 0,
        "split": split,
        "sentences": sentences,
        "cocoid": number,
    }
    return {key: value for key, value in (entry | change).items() if value is not None}


def write(directory, *images, name="dataset_coco.json"):
    (directory / name).write_text(json.dumps({"images": images, "dataset": "coco"}))
    return directory


def test_a_split_by_hand(tmp_path):
    write(tmp_path, image(9), image(25, "train"), image(30, "restval"), image(42))
    first, second = coco.load(tmp_path, "test")
    assert (first.id, first.image_id, second.id) == ("9", "9", "42")
    assert first.image == tmp_path / "val2014" / "COCO_val2014_000000000009.jpg"
    assert first.prompt == "\nProvide a one-sentence caption for the provided image."
    assert first.references == ("A dog.", "A brown dog on a beach")
    assert first.to_dict()["split"] == "test"
    (train,) = data.load("coco", tmp_path)
    assert train.image == tmp_path / "train2014" / "COCO_train2014_000000000025.jpg"


def test_another_file_and_prompt(tmp_path):
    write(tmp_path, image(9), name="other.json")
    (sample,) = coco.load(tmp_path, "test", file="other.json", prompt="Describe it.")
    assert sample.prompt == "Describe it."
    (again,) = coco.load(tmp_path / "nowhere", "test", file=tmp_path / "other.json")
    assert again.image.is_relative_to(tmp_path / "nowhere")


def test_attributes_come_with_the_samples(tmp_path):
    (tmp_path / "attributes.json").write_text('{"9": {"colour": "red"}}')
    first, second = coco.load(write(tmp_path, image(9), image(42)), "test")
    assert first.metadata == {"split": "test", "attributes": {"colour": "red"}}
    assert "attributes" not in second.metadata


def instances(directory, images=(9, 42)):
    content = {
        "images": [{"id": number} for number in images],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [{"image_id": 9, "category_id": kind} for kind in (18, 1, 18)],
    }
    (directory / "instances.json").write_text(json.dumps(content))


def test_objects_come_with_the_samples(tmp_path):
    instances(tmp_path)
    write(tmp_path, image(9), image(42))
    first, second = coco.load(tmp_path, "test", objects="instances.json")
    assert (first.metadata["objects"], second.metadata["objects"]) == (["dog", "person"], [])
    instances(tmp_path, images=[9])
    with pytest.raises(ValueError, match="does not have image 42 of split 'test'; give the inst"):
        coco.load(tmp_path, "test", objects="instances.json")
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"][2]["category_id"] = 2
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotations\[2\]: unknown image 9 or category 2"):
        coco.load(tmp_path, "test", objects="instances.json")


def test_image_ids_of_a_split(tmp_path):
    write(tmp_path, image(9), image(25, "train"), image(42))
    assert coco.image_ids(tmp_path / "dataset_coco.json", "test") == {9, 42}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([image(9), image(25, "train")], "no split 'val'; expected one of test, train"),
        ([image(9, "val"), image(9, "val")], r"images\[1\]: cocoid 9 is a duplicate"),
        ([image(9, "val", cocoid=None)], r"images\[0\]: key 'cocoid' missing; it has filepath, "),
        ([image(9, "val", cocoid="9")], r"images\[0\]: 'cocoid' must be a whole number, got \"9\""),
        ([image(9, "val", sentences=[{}])], r"images\[0\].sentences\[0\]: key 'raw' missing"),
        ([image(9, "val"), 7], r"images\[1\]: expected an object, got 7"),
        ([], "'images' is empty; expected one or more samples"),
    ],
)
def test_what_is_wrong_in_the_file_and_where(tmp_path, images, message):
    with pytest.raises(ValueError, match=rf"dataset_coco.json: {message}") as caught:
        coco.load(write(tmp_path, *images), "val")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; expected JSON"),
        (b'{"images": [\n1,,]}', r"line 2, column 3: not JSON \("),
        (b'"\xff"', "byte 1: not JSON in UTF-8"),
        (b"[1, 2]", r"expected an object, got \[1, 2\]"),
        (b'{"annotations": []}', "key 'images' missing; it has annotations"),
        (b'{"images": {}}', r"'images' must be a list, got \{\}"),
        (b"[" * 200_000, r"not readable JSON \(maximum recursion"),
        (b'{"images": ' + b"1" * 5000 + b"}", r"not readable JSON \(Exceeds the limit"),
        ('{"images": "caf\xe9"}'.encode("latin-1"), "byte 15: not JSON in UTF-8"),
    ],
)
def test_files_in_another_layout(tmp_path, content, message):
    (tmp_path / "dataset_coco.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"dataset_coco.json: {message}"):
        coco.load(tmp_path, "val")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_files_with_a_byte_order_mark_are_read(tmp_path, encoding):
    text = json.dumps({"images": [image(9)]})
    (tmp_path / "dataset_coco.json").write_text(text, encoding=encoding)
    assert [sample.id for sample in coco.load(tmp_path, "test")] == ["9"]


def test_an_image_without_captions_has_no_references(tmp_path):
    (sample,) = coco.load(write(tmp_path, image(9, sentences=[])), "test")
    assert sample.references == ()


def test_attributes_that_are_not_objects(tmp_path):
    (tmp_path / "attributes.json").write_text('{"9": "red"}')
    with pytest.raises(ValueError, match=r"attributes.json: '9' must be an object, got \"red\""):
        coco.load(write(tmp_path, image(9)), "test")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset_coco.json: no such file; pass its name"):
        coco.load(tmp_path)


def test_an_unknown_data_set(tmp_path):
    with pytest.raises(
        ValueError, match="unknown data set 'flickr'; expected one of coco, vqav2, fold"
    ):
        data.load("flickr", tmp_path)
