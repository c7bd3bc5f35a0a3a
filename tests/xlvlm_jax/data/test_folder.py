"""Folders of images, with and without captions: by hand, and messages."""

import json

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import folder


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "cats").mkdir()
    for name in ("dog.jpg", "cats/two.PNG", "a.webp", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def test_images_by_name_without_captions(pictures):
    samples = data.load("folder", pictures)
    assert [sample.id for sample in samples] == ["a.webp", "cats/two.PNG", "dog.jpg"]
    assert samples[1].image == pictures / "cats" / "two.PNG"
    assert samples[1].references == ()
    assert samples[1].prompt == "\nProvide a one-sentence caption for the provided image."


def test_captions_in_json(pictures):
    captions = {"dog.jpg": "a dog ", "cats/two.PNG": ["two cats", "cats, asleep"]}
    (pictures / "captions.json").write_text(json.dumps(captions))
    references = {sample.id: sample.references for sample in folder.load(pictures)}
    assert references == {
        "a.webp": (),
        "cats/two.PNG": ("two cats", "cats, asleep"),
        "dog.jpg": ("a dog",),
    }


@pytest.mark.parametrize("head", ["", "file,caption\n", "\ufefffile,caption\n"])
def test_captions_in_csv(pictures, head):
    lines = 'dog.jpg,a dog\n\ncats/two.PNG,two cats\ncats/two.PNG,"cats, asleep"\n'
    (pictures / "captions.csv").write_text(head + lines, encoding="utf-8")
    references = {sample.id: sample.references for sample in folder.load(pictures)}
    assert references["dog.jpg"] == ("a dog",)
    assert references["cats/two.PNG"] == ("two cats", "cats, asleep")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", "file,caption\ndog.jpg,ein Hündchen\n"),
        ("captions.json", '{"dog.jpg": "ein Hündchen"}'),
    ],
)
def test_files_with_a_byte_order_mark_are_read(pictures, name, text, encoding):
    (pictures / name).write_text(text, encoding=encoding)
    references = {sample.id: sample.references for sample in folder.load(pictures)}
    assert references["dog.jpg"] == ("ein Hündchen",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", '{"cow.jpg": "a cow"}', r"c.json: 'cow.jpg': .* has no image 'cow.jpg'"),
        ("c.json", '{"dog.jpg": 3}', "c.json: 'dog.jpg' must have a caption or a list of captions"),
        ("c.json", "[]", "c.json: expected an object, file: caption or captions"),
        ("c.csv", "dog.jpg,a dog\ncow.jpg,a cow\n", r"c.csv: line 2: .* has no image 'cow.jpg'"),
        ("c.csv", "dog.jpg,a dog, asleep\n", "c.csv: line 1: expected 2 columns, .* got 3; put a"),
        ("c.csv", b"dog.jpg,\xff\n", "c.csv: not a CSV file in UTF-8"),
        ("c.csv", b"\xff\xfed", "c.csv: not a CSV file in UTF-16"),
        ("c.json", b'{"dog.jpg": "caf\xe9"}', "c.json: byte 16: not JSON in UTF-8"),
    ],
)
def test_what_is_wrong_in_the_captions_and_where(pictures, name, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (pictures / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        folder.load(pictures, captions=name)


@pytest.mark.parametrize("name", ["none.json", "none.csv"])
def test_a_named_captions_file_must_exist(pictures, name):
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file"):
        folder.load(pictures, captions=name)


def test_folders_without_images(tmp_path):
    with pytest.raises(ValueError, match=r"has no images; expected files \.jpg, \.jpeg"):
        folder.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory; expected a folder of images"):
        folder.load(tmp_path / "nowhere")


def test_a_folder_has_no_splits(pictures):
    with pytest.raises(ValueError, match="a folder of images has no splits, got 'test'; pass the"):
        data.load("folder", pictures, "test")
