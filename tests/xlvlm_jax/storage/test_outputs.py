"""Outputs: what may be replaced, what is removed, and where nothing can be written."""

import pytest

from xlvlm_jax.storage import outputs

SWEEP = ("trials.csv", "vectors/*.safetensors")


def tree(directory, *names):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).touch()
    return directory


def held(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_only_what_was_written_is_removed(tmp_path):
    tree(tmp_path, "trials.csv", "vectors/a.safetensors", "vectors/a.safetensors.tmp")
    outputs.require_replaceable(tmp_path, SWEEP)
    tree(tmp_path, "notes.txt", "vectors/b/a.safetensors", "features/manifest.json")
    outputs.remove_written(tmp_path, SWEEP)
    assert [name for name in held(tmp_path) if (tmp_path / name).is_file()] == [
        *("features/manifest.json", "notes.txt", "vectors/b/a.safetensors")
    ]
    outputs.remove_written(tmp_path / "missing", SWEEP)


@pytest.mark.parametrize(
    "foreign", ["features/x", "vectors/b/a.safetensors", "a.safetensors", "trials.csv/x", "empty/"]
)
def test_a_directory_with_anything_else_stays(tmp_path, foreign):
    tree(tmp_path / "out", "vectors/a.safetensors")
    if foreign == "empty/":
        (tmp_path / "out" / "empty").mkdir()
    else:
        tree(tmp_path / "out", foreign)
    with pytest.raises(FileExistsError, match=f"out holds {foreign.split('/')[0]}"):
        outputs.require_replaceable(tmp_path / "out", SWEEP)


def test_inputs_files_and_links_stay(tmp_path):
    out = tree(tmp_path / "out", "vectors/a.safetensors")
    with pytest.raises(FileExistsError, match=r"holds .*a\.safetensors; choose a new"):
        outputs.require_replaceable(out, SWEEP, [out / "vectors" / "a.safetensors"])
    outputs.require_replaceable(out, SWEEP, [tmp_path / "other", tmp_path])
    (tmp_path / "link").symlink_to(out)
    for each in (tmp_path / "link", out / "vectors" / "a.safetensors"):
        with pytest.raises(FileExistsError, match="is a file or a link"):
            outputs.require_replaceable(each, SWEEP)
    outputs.require_replaceable(tmp_path / "missing", SWEEP)


def test_what_cannot_be_written_is_told_before(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file; expected a directory"):
        outputs.require_writable(tmp_path / "file" / "run")
    outputs.require_writable(tmp_path / "a" / "b")
    assert held(tmp_path) == ["file"]

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refused)
    with pytest.raises(OSError, match=r"cannot write to this directory \(Permission denied\)"):
        outputs.require_writable(tmp_path / "a")
