"""Atomic writes: the new content, or the old."""

import os

import pytest

from xlvlm_jax.storage import atomic


def test_the_new_content_replaces_the_old(tmp_path):
    atomic.write(tmp_path / "a", "old")
    atomic.write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    atomic.write(tmp_path / "a", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"):
        atomic.write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_missing_directory_is_made(tmp_path):
    atomic.write(tmp_path / "b" / "c" / "a", "new")
    assert (tmp_path / "b" / "c" / "a").read_text() == "new"


def test_an_error_of_the_block_does_not_name_the_output(tmp_path):
    with pytest.raises(OSError, match=r"Input/output error$"), atomic.writing(tmp_path / "a"):
        raise OSError(5, "Input/output error")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize("size", [1, 2**20])
def test_a_full_disk_names_the_output(tmp_path, size):
    (tmp_path / "a.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"):
        atomic.write(tmp_path / "a", bytes(size))
