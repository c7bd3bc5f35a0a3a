"""Blocks, parts and how they are merged, on one host that resumes the work of others."""

from pathlib import Path

import numpy as np
import pytest

from xlvlm_jax.features import ExtractionSettings, extract, multi_host
from xlvlm_jax.features.manifest import manifest_of
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.features.writer import FeaturesWriter

from .conftest import digests

SETTINGS = ExtractionSettings(
    ("language_model.model.norm",),
    Selection("class", "dog,cat,bird,rabbit"),
    batch_size=2,
    max_new_tokens=12,
)


class StopHereError(Exception):
    pass


@pytest.fixture(scope="module")
def whole(vlm, samples, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "features"
    extract(vlm, samples, output, SETTINGS)
    return output


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Divides ten samples into blocks of four, four and two."""
    monkeypatch.setattr(multi_host, "BATCHES", 2)


def stop_after(count):
    calls = []

    def progress(*figures):
        calls.append(figures)
        if len(calls) == count:
            raise StopHereError

    return progress


def test_blocks_by_hand(tmp_path):
    found = multi_host.blocks_of(tmp_path, num_samples=10, done=0, batch_size=2)
    spans = [(block.path.name, block.start, block.stop) for block in found]
    assert spans == [("000000000", 0, 4), ("000000004", 4, 8), ("000000008", 8, 10)]
    # What one host did alone, three batches, is not done again.
    found = multi_host.blocks_of(tmp_path, num_samples=10, done=6, batch_size=2)
    assert [(block.start, block.stop, block.done) for block in found] == [(6, 8, 0), (8, 10, 0)]


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_run_in_parts_ends_with_the_bytes_of_one(
    vlm, samples, whole, tmp_path, monkeypatch, stop
):
    """Killed after any of its batches, and again after the next."""
    monkeypatch.setattr(multi_host, "exist", lambda output: True)
    output = tmp_path / "features"
    for count in (stop, 1):
        with pytest.raises(StopHereError):
            extract(vlm, samples, output, SETTINGS, progress=stop_after(count))
    extract(vlm, samples, output, SETTINGS)
    assert digests(output) == digests(whole)


def test_a_part_that_was_not_closed_after_its_last_batch_is_complete(
    vlm, samples, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(multi_host, "exist", lambda output: True)
    output, close = tmp_path / "features", FeaturesWriter.close

    def failing(writer):
        if writer.path.parent.name == "parts":
            raise StopHereError
        close(writer)

    with monkeypatch.context() as killed, pytest.raises(StopHereError):
        killed.setattr(FeaturesWriter, "close", failing)
        extract(vlm, samples, output, SETTINGS)
    assert not manifest_of(output / "parts" / "000000000")["complete"]
    assert multi_host.blocks_of(output, 10, 0, 2)[0].complete
    extract(vlm, samples, output, SETTINGS)
    assert digests(output) == digests(whole)


def test_the_work_of_one_host_is_resumed_in_parts(vlm, samples, whole, tmp_path):
    output = tmp_path / "features"
    with pytest.raises(StopHereError):
        extract(vlm, samples, output, SETTINGS, progress=stop_after(3))
    (output / "parts").mkdir()
    with pytest.raises(StopHereError):
        extract(vlm, samples, output, SETTINGS, progress=stop_after(1))
    assert manifest_of(output)["samples"] >= 6
    extract(vlm, samples, output, SETTINGS)
    assert digests(output) == digests(whole)


@pytest.mark.parametrize("killed", range(3))
def test_a_killed_merge_is_resumed(tmp_path, monkeypatch, killed):
    """Writes rows of made-up states; they are committed batch by batch."""
    with FeaturesWriter(tmp_path, {}):
        pass
    blocks = multi_host.blocks_of(tmp_path, 10, 0, 2)
    rng = np.random.default_rng(0)
    for block in blocks:
        with FeaturesWriter(block.path, {"part": [block.start, block.stop]}) as part:
            for start in range(block.start, block.stop, 2):
                states = {"site": rng.normal(size=(3, 4))}
                rows = np.array([0, 1, 1]), np.full(3, 7), np.ones(3, int)
                part.append([{"id": start}, {"id": start + 1}], states, *rows)
            part.close()
    append, calls = FeaturesWriter.append, []

    def failing(writer, *batch):
        calls.append(batch)
        if len(calls) == killed + 1:
            raise StopHereError
        append(writer, *batch)

    monkeypatch.setattr(FeaturesWriter, "append", failing)
    with FeaturesWriter(tmp_path, {}) as writer, pytest.raises(StopHereError):
        multi_host.merge_all(writer, blocks, 2)
    with FeaturesWriter(tmp_path, {}) as writer:
        assert writer.samples_done == 2 * killed
        multi_host.merge_all(writer, multi_host.blocks_of(tmp_path, 10, writer.samples_done, 2), 2)
        writer.close()
    features = Features.open(tmp_path)
    assert [sample["id"] for sample in features.samples] == list(range(10))
    assert features.sample_rows.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    expected = np.random.default_rng(0).normal(size=(15, 4)).astype(np.float32)
    np.testing.assert_array_equal(features.matrix("site"), expected)
    assert not (tmp_path / "parts").exists()
