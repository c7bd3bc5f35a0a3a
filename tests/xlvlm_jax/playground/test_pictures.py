"""Uploaded pictures: kept as long as they are used, refused if they are none."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from xlvlm_jax.playground import pictures as module
from xlvlm_jax.playground.pictures import Pictures


def png(colour: str, size: tuple[int, int] = (3, 2)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, "PNG")
    return content.getvalue()


def test_a_picture_is_kept_once_and_deleted_in_the_end():
    with Pictures() as kept:
        first = kept.add(png("red"), "a.png")
        again = kept.add(png("red"), "b.png")
        assert first.id == again.id and again.name == "b.png" and first.size == (3, 2)
        assert kept.get(first.id) == again
        assert Image.open(first.path).getpixel((0, 0)) == (255, 0, 0)
    assert not first.path.exists()


def test_the_one_used_longest_ago_goes_first(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    with Pictures() as kept:
        red, green = (kept.add(png(colour), colour) for colour in ("red", "green"))
        kept.get(red.id)
        kept.add(png("blue"), "blue")
        assert kept.get(red.id) == red
        with pytest.raises(LookupError, match="no longer here; choose it again"):
            kept.get(green.id)
        assert not green.path.exists()


def test_threads_may_add_the_same_picture_at_once(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    contents = [png(colour) for colour in ("red", "green", "blue")] * 20
    with Pictures() as kept, ThreadPoolExecutor(8) as threads:
        added = list(threads.map(lambda content: kept.add(content, "a.png"), contents))
        assert [each.id for each in added[:3]] * 20 == [each.id for each in added]
        assert len([*kept.folder.glob("*.png")]) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "x.png: the file is empty"),
        (b"hello", "x.png: not an image in a known format; choose a picture"),
        (png("red", (40, 40))[:60], "x.png: cannot be decoded"),
        (png("red", (12_001, 1)), "x.png: 12001 x 1 pixels"),
    ],
)
def test_what_is_no_picture_is_refused_and_leaves_nothing(content, said):
    with Pictures() as kept:
        with pytest.raises(ValueError, match=said) as refused:
            kept.add(content, "x.png")
        assert str(kept.folder) not in str(refused.value)
        assert not list(kept.folder.iterdir())


def test_others_are_asked_about_while_a_picture_is_converted(monkeypatch):
    reading, go_on = threading.Event(), threading.Event()
    read = module.read_image

    def slow(path):
        reading.set()
        go_on.wait(10)
        return read(path)

    with Pictures() as kept, ThreadPoolExecutor(2) as threads:
        first = kept.add(png("red"), "red")
        monkeypatch.setattr(module, "read_image", slow)
        second = threads.submit(kept.add, png("green"), "green")
        assert reading.wait(10)
        assert threads.submit(kept.get, first.id).result(5) == first
        go_on.set()
        assert kept.get(second.result(10).id).name == "green"


def test_the_upload_itself_is_kept(monkeypatch):
    monkeypatch.setattr(module, "MOST", 1)
    content = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(content, "JPEG")
    with Pictures() as kept:
        made = kept.add(content.getvalue(), "a.jpg")
        assert made.upload.read_bytes() == content.getvalue()
        kept.add(png("blue"), "blue")
        assert not made.upload.exists()
