"""Scenes on disk: the layouts of Karpathy's file and of VQAv2."""

import json

import numpy as np
import pytest
from PIL import Image

from xlvlm_jax import data
from xlvlm_jax.data import scenes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    calls = []
    scenes.write(root, train=4, val=3, test=2, progress=lambda *done: calls.append(done))
    assert calls == [(k, 9) for k in range(1, 10)]
    return root


def _json(path):
    return json.loads(path.read_text())


def test_karpathy_layout(written):
    content = _json(written / "dataset_coco.json")
    assert set(content) == {"images", "dataset", "scenes"} and content["dataset"] == "coco"
    counts = {"train": 4, "val": 3, "test": 2}
    assert content["scenes"] == {**counts, "seed": 0, "companions": 0.0}
    images = content["images"]
    assert [image["split"] for image in images] == ["train"] * 4 + ["val"] * 3 + ["test"] * 2
    assert [image["imgid"] for image in images] == list(range(9))
    assert len({image["cocoid"] for image in images}) == 9
    first = images[0]
    assert first["filepath"] == "train2014"
    assert first["filename"] == "COCO_train2014_000000000001.jpg" and first["cocoid"] == 1
    assert {image["filepath"] for image in images[4:]} == {"val2014"}
    sentence_ids = [k for image in images for k in image["sentids"]]
    assert sentence_ids == list(range(5 * 9))
    for image in images:
        assert (written / image["filepath"] / image["filename"]).is_file()
        assert image["sentids"] == [sentence["sentid"] for sentence in image["sentences"]]
        for sentence in image["sentences"]:
            assert set(sentence) == {"tokens", "raw", "imgid", "sentid"}
            assert sentence["tokens"] == sentence["raw"].replace(",", "").split()
            assert sentence["imgid"] == image["imgid"]
    raw = [sentence["raw"] for sentence in first["sentences"]]
    assert raw == scenes.captions(scenes.sample_scene("train", 0))


@pytest.mark.parametrize(("folder", "pictures"), [("train2014", 4), ("val2014", 5)])
def test_vqa_layout(written, folder, pictures):
    asked = _json(written / f"v2_OpenEnded_mscoco_{folder}_questions.json")
    answered = _json(written / f"v2_mscoco_{folder}_annotations.json")
    assert asked["task_type"] == "Open-Ended" and asked["data_subtype"] == folder
    assert len({question["image_id"] for question in asked["questions"]}) == pictures
    assert [q["question_id"] for q in asked["questions"]] == [
        a["question_id"] for a in answered["annotations"]
    ]
    for question, annotation in zip(asked["questions"], answered["annotations"], strict=True):
        assert set(question) == {"image_id", "question", "question_id"}
        assert question["image_id"] == annotation["image_id"]
        assert question["question"].lower().startswith(annotation["question_type"])
        assert annotation["answer_type"] in ("yes/no", "number", "other")
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        given = [answer["answer"] for answer in annotation["answers"]]
        assert max(set(given), key=given.count) == annotation["multiple_choice_answer"]
        assert {a["answer_confidence"] for a in annotation["answers"]} <= {"yes", "maybe", "no"}


def test_attributes_are_kept_beside_the_pictures(written):
    truths = _json(written / "attributes.json")
    assert len(truths) == 9
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        for index in range(count):
            scene = scenes.sample_scene(split, index)
            assert truths[str(scenes.image_id(split, index))] == scenes.attributes(scene)


def test_boxes_are_those_of_the_drawing(written):
    instances = _json(written / "instances_train2014.json")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    found = instances["annotations"]
    assert len({instance["id"] for instance in found}) == len(found)
    for index in range(4):
        scene = scenes.sample_scene("train", index)
        _, masks = scenes.draw_with_masks(scene)
        here = [each for each in found if each["image_id"] == scenes.image_id("train", index)]
        assert [names[each["category_id"]] for each in here] == [scene.kind] * scene.count
        for instance, mask in zip(here, masks, strict=True):
            x, y, width, height = instance["bbox"]
            assert instance["area"] == mask.sum() == mask[y : y + height, x : x + width].sum()


def test_training_sees_what_the_files_hold(written):
    stored = Image.open(written / "val2014" / f"COCO_val2014_{scenes.image_id('test', 1):012d}.jpg")
    assert stored.mode == "RGB"
    seen = scenes.training_image(scenes.sample_scene("test", 1))
    np.testing.assert_array_equal(np.asarray(stored), seen)


def test_same_seed_same_bytes(written, tmp_path):
    scenes.write(tmp_path / "again", train=4, val=3, test=2)
    scenes.write(tmp_path / "other", train=1, seed=1)

    def files(root):
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    first, again = files(written), files(tmp_path / "again")
    assert first == again
    assert not [name for name in first if name.name.endswith(".tmp")]
    picture = next(name for name in files(tmp_path / "other") if name.suffix == ".jpg")
    assert files(tmp_path / "other")[picture] != first[picture]

    scenes.write(tmp_path / "other", train=1, seed=1)  # the same again
    scenes.require_drawn(tmp_path / "other")
    scenes.require_drawn(tmp_path / "missing")
    with pytest.raises(FileExistsError, match=r"other has another data set .*overwrite=True"):
        scenes.write(tmp_path / "other", train=1, seed=2)
    assert files(tmp_path / "other")[picture] != first[picture]
    scenes.write(tmp_path / "other", train=1, seed=0, overwrite=True)
    assert files(tmp_path / "other")[picture] == first[picture]


@pytest.mark.parametrize("content", ['{"images": [], "dataset": "coco"}', "[]", '{"images": ['])
def test_a_data_set_from_elsewhere_is_not_replaced(tmp_path, content):
    index = tmp_path / "dataset_coco.json"
    index.write_text(content)
    with pytest.raises(FileExistsError, match="has another data set"):
        scenes.write(tmp_path, train=1)
    assert index.read_text() == content
    assert list(tmp_path.iterdir()) == [index]


def test_vqav2_as_it_is_distributed_is_not_replaced(tmp_path):
    questions = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions.write_text("{}")
    with pytest.raises(FileExistsError, match=r"another data set \(v2_Open.*overwrite=True"):
        scenes.write(tmp_path, train=1)
    with pytest.raises(FileExistsError, match="data set that was not drawn, and only drawn scenes"):
        scenes.require_drawn(tmp_path)  # with --overwrite of the command
    assert questions.read_text() == "{}" and list(tmp_path.iterdir()) == [questions]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("not a directory")
    with pytest.raises(OSError, match=r"cannot write scenes to .*taken: Not a directory"):
        scenes.write(tmp_path / "taken", train=1)


def test_a_negative_number_of_scenes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="val must be 0 to 100000 scenes, got -1"):
        scenes.write(tmp_path, val=-1)


def test_index_files_grow_as_scenes_are_drawn_and_appear_at_the_end(tmp_path):
    """Annotations are not kept in memory: before the last scene, most of them are on disk."""
    indices = []

    def look(done, _):
        if done in (1, 60):
            indices.append(sum(path.stat().st_size for path in tmp_path.glob("*.tmp")))
        assert not list(tmp_path.glob("*.json"))

    scenes.write(tmp_path, train=60, progress=look)
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 8 and not list(tmp_path.glob("*.tmp"))
    assert indices[1] - indices[0] > 0.5 * sum(path.stat().st_size for path in files)
    for path in files:  # as the whole would be written at once
        assert path.read_text() == json.dumps(json.loads(path.read_text()))


def test_scenes_that_are_interrupted_leave_no_index(tmp_path):
    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scenes.write(tmp_path, train=3, progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"train2014", "val2014"}


def test_pictures_that_are_replaced_have_no_captions_of_others(tmp_path):
    def stop(done, _):
        raise KeyboardInterrupt

    scenes.write(tmp_path, train=2)
    with pytest.raises(KeyboardInterrupt):
        scenes.write(tmp_path, train=2, seed=1, overwrite=True, progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"train2014", "val2014"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_instances_are_read_as_cocos(written, split):
    folder = "train2014" if split == "train" else "val2014"
    objects = f"instances_{folder}.json"
    samples = data.load("coco", written, split, objects=objects)
    assert [s.metadata["objects"] for s in samples] == [
        [s.metadata["attributes"]["kind"]] for s in samples
    ]
    for image in _json(written / objects)["images"]:
        stored = Image.open(written / folder / image["file_name"])
        assert stored.size == (image["width"], image["height"])
