"""Image tokens as rows: by hand, through an extraction and its files, and messages."""

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ports.inputs.patch_layout import PatchLayout, grid, grid_boxes
from xlvlm_jax import Features
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.image_cells import Cells, batch_cells, cells_of
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.features.token_positions import Positions
from xlvlm_jax.features.writer import FeaturesWriter

from .conftest import digests

LAYER = "language_model.model.layers.2"
SETTINGS = ExtractionSettings(
    sites=(LAYER,), selection=Selection("image"), batch_size=4, max_new_tokens=2
)


class TestBatchCells:
    def test_tiles_then_the_whole_picture(self):
        whole = grid([7], 1, 1)
        tiles = dataclasses.replace(grid([1, 2, 3, -1], 2, 2), whole=whole)
        cells = batch_cells([[grid([0], 1, 1), tiles]], 9, ["s"])
        assert np.flatnonzero(cells.chosen[0]).tolist() == [0, 1, 2, 3, 7]
        assert cells.grid[0, [0, 1, 3, 7]].tolist() == [
            [0, 0, 0, 0],
            [1, 0, 0, 0],
            [1, 0, 1, 0],
            [1, 1, 0, 0],
        ]
        assert cells.box[0, 3].tolist() == [0, 0.5, 0.5, 1] and cells.grid[0, 8, 0] == -1

    def test_a_cell_in_padding_is_left_out(self):
        boxes = np.array([[[0, 0, 1, 1], [1, 0, 1, 1]]])
        cells = batch_cells([[PatchLayout(np.array([[0, 1]]), boxes)]], 2, ["s"])
        assert cells.chosen.tolist() == [[True, False]]

    def test_tiles_of_which_no_cell_is_left(self):
        tiles = PatchLayout(np.zeros((0, 4), int), np.zeros((0, 4, 4)), whole=grid([1, 2], 1, 2))
        cells = batch_cells([[tiles], [grid([0], 1, 1)]], 3, ["s", "t"])
        assert cells.chosen.tolist() == [[False, True, True], [True, False, False]]
        assert cells.grid[0, 1:].tolist() == [[0, 1, 0, 0], [0, 1, 0, 1]]

    def test_the_choice_depends_on_seed_and_name_alone(self):
        layout = [grid(np.arange(3, 12), 3, 3)]
        shifted = [grid(np.arange(5, 14), 3, 3)]
        first = batch_cells([layout, layout], 20, ["a", "b"], at_most=4, seed=1)
        again = batch_cells([shifted], 30, ["b"], at_most=4, seed=1)
        other = batch_cells([layout], 20, ["a"], at_most=4, seed=2)
        assert first.chosen.sum(1).tolist() == [4, 4]
        assert (first.chosen[1, 3:12] == again.chosen[0, 5:14]).all()
        assert (first.chosen[0] != other.chosen[0]).any()
        assert (first.chosen[0] != first.chosen[1]).any()
        assert batch_cells([layout], 20, ["a"], at_most=9).chosen.sum() == 9
        named = os.fsdecode(b"caf\xe9.jpg")  # a file's name that is not UTF-8
        assert batch_cells([layout], 20, [named], at_most=4).chosen.sum() == 4
        for name in ("\ud800", named + "\ud800"):  # as JSON may have them
            assert batch_cells([layout], 20, [name], at_most=4).chosen.sum() == 4

    def test_positions_do_not_count_padding(self):
        cells = batch_cells([[grid([3, 4], 1, 2)]], 5, ["s"])
        found = cells.at(np.array([0]), np.array([2]), np.array([[0, 0, 1, 1, 1]]))
        assert found.grid.tolist() == [[0, 0, 0, 1]] and found.box.tolist() == [[0.5, 0, 1, 1]]


class TestSelection:
    def test_every_image_token_unless_some_are_chosen(self):
        ids = np.array([[0, 7, 7, 5]])
        mask, tokens = np.array([[0, 1, 1, 1]]), np.array([[8, 9]])
        positions = Positions.of_generation(ids, mask, tokens, image_token_ids=7)
        keep = Selection("image").keep(positions)
        assert np.asarray(keep).tolist() == [[False, True, True, False, False]]
        chosen = np.array([[False, False, True, False]])
        keep = Selection("image").keep(positions, chosen=chosen)
        assert np.asarray(keep).tolist() == [[False, False, True, False, False]]
        with pytest.raises(ValueError, match="image:1 needs the chosen tokens; pass chosen"):
            Selection("image", "1").keep(positions)

    def test_what_it_fills_in(self):
        assert Selection("image").how == "each" and not Selection("image").generated_only
        assert Selection.parse("image:16").describe()["seed"] == 0
        assert "seed" not in Selection.parse("image").describe()
        assert Selection("image", "16").rows_at_most(200) == 16
        assert not Selection("image", how="mean").has_cells

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("image:few", {}, "image takes a number of tokens per sample, got 'few'; e.g. image:1"),
            ("image:0", {}, "image takes a number of tokens per sample, got '0'"),
            ("image", {"generated_only": True}, "image tokens are in the prompt; set generated"),
            ("image", {"seed": 1}, "seed is 1 for image; only a number of image tokens has one"),
            ("all", {"seed": 1}, "seed is 1 for all"),
        ],
    )
    def test_messages(self, text, options, message):
        with pytest.raises(ValueError, match=message):
            Selection.parse(text, **options)


@pytest.fixture(scope="module")
def features(vlm, samples, tmp_path_factory) -> Features:
    output = tmp_path_factory.mktemp("run") / "features"
    extract(vlm, samples[:6], output, SETTINGS)
    return Features.open(output)


def test_rows_are_the_states_of_their_cells(vlm, samples, features):
    assert features.cells is not None and len(features.tokens) == 6 * 64
    sample = samples[5]  # in the second batch, which is padded
    inputs = vlm.process([vlm.render(sample.prompt)], [Image.open(sample.image)])
    states = np.asarray(vlm.states(inputs, sites=[LAYER])[LAYER][0])
    ((layout,),) = vlm.patch_layout(inputs)
    rows = np.flatnonzero(features.sample_rows == 5)
    picture, view, y, x = features.cells.grid[rows].T
    assert not picture.any() and not view.any()
    expected = states[layout.positions[y, x]]
    np.testing.assert_allclose(features.matrix(LAYER)[rows], expected, atol=1e-4, rtol=1e-4)
    assert (features.positions[rows] == layout.positions[y, x]).all()
    np.testing.assert_allclose(features.cells.box[rows], layout.boxes[y, x])
    table = features.to_pandas()
    assert table.loc[70, ["sample.id", "row", "column"]].tolist() == [samples[1].id, 0, 6]


def test_some_of_them_resume_to_the_same_bytes(vlm, samples, features, tmp_path):
    class StopHereError(Exception):
        pass

    def interrupt(done, total, rows):
        raise StopHereError

    some = dataclasses.replace(SETTINGS, selection=Selection("image", "5", seed=3))
    extract(vlm, samples[:6], tmp_path / "whole", some)
    with pytest.raises(StopHereError):
        extract(vlm, samples[:6], tmp_path / "resumed", some, progress=interrupt)
    extract(vlm, samples[:6], tmp_path / "resumed", some)
    assert digests(tmp_path / "whole") == digests(tmp_path / "resumed")
    found = Features.open(tmp_path / "whole")
    assert np.bincount(found.sample_rows).tolist() == [5] * 6
    every = {
        (s, *cell): state
        for s, cell, state in zip(
            features.sample_rows, features.cells.grid.tolist(), features.matrix(LAYER), strict=True
        )
    }
    for s, cell, state in zip(
        found.sample_rows, found.cells.grid.tolist(), found.matrix(LAYER), strict=True
    ):
        np.testing.assert_array_equal(state, every[s, *cell])


def test_older_directories_have_no_cells(tmp_path):
    with FeaturesWriter(tmp_path, {}) as writer:
        one = np.zeros(1, int)
        writer.append([{"id": "a"}], {"s": np.zeros((1, 2), np.float32)}, one, one, one)
        writer.close()
    assert Features.open(tmp_path).cells is None
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["cells"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Features.open(tmp_path).cells is None
    manifest["cells"] = "yes"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="'cells' has an invalid value"):
        Features.open(tmp_path)


def test_cells_of_some_batches_only(tmp_path):
    one, state = np.zeros(1, int), {"s": np.zeros((1, 2), np.float32)}
    with FeaturesWriter(tmp_path, {}) as writer:
        cells = Cells(np.zeros((1, 4), np.int32), np.zeros((1, 4), np.float32))
        writer.append([{"id": "a"}], state, one, one, one, cells)
        with pytest.raises(ValueError, match="cells are given for some batches only"):
            writer.append([{"id": "b"}], state, one, one, one)
        with pytest.raises(ValueError, match="cells has 0 rows, expected 1"):
            writer.append([{"id": "b"}], state, one, one, one, Cells.empty())


@pytest.mark.parametrize("first", [Cells.empty(), None])
@pytest.mark.parametrize("resumed", [False, True])
def test_cells_after_a_batch_without_rows(tmp_path, first, resumed):
    """The first batch has sites, such as one whose samples could not be read, but no rows."""
    none, one = np.zeros(0, int), np.zeros(1, int)
    cells = Cells(np.ones((1, 4), np.int32), np.ones((1, 4), np.float32))
    writer = FeaturesWriter(tmp_path, {})
    writer.append([{"id": "a"}], {"s": np.zeros((0, 2), np.float32)}, none, none, none, first)
    if resumed:
        writer.release()
        cut_off = Features.open(tmp_path, allow_incomplete=True).cells
        assert (cut_off is None) == (first is None)
        writer = FeaturesWriter(tmp_path, {})
    writer.append([{"id": "b"}], {"s": np.zeros((1, 2), np.float32)}, one, one, one, cells)
    writer.close()
    found = Features.open(tmp_path).cells
    assert found is not None
    np.testing.assert_array_equal(found.grid, cells.grid)


@pytest.mark.wrong_types  # a stand-in has the one method that is needed
def test_a_prompt_without_a_picture():
    model = SimpleNamespace(patch_layout=lambda inputs, sizes: [[]])
    with pytest.raises(ValueError, match="the prompt of sample s1 has no picture"):
        cells_of(model, {"input_ids": np.zeros((1, 3))}, [(9, 9)], ["s1"], at_most=None, seed=0)


def test_the_views_of_a_picture_in_padding_keep_their_boxes():
    layout = grid([0, 1], 1, 2, (0.25, 0, 0.75, 1))
    cells = batch_cells([[layout]], 2, ["s"])
    np.testing.assert_allclose(cells.box[0], grid_boxes(1, 2, (0.25, 0, 0.75, 1))[0])


def test_command(xlvlm, pictures, tmp_path):
    status, out, errors = xlvlm(
        *("extract", "embedded", pictures, "--site", "layers.2", "--tokens", "image:7"),
        *("--max-new-tokens", 2, "--batch-size", 4, "--num-samples", 4, "--workers", 1),
        *("--output", tmp_path / "features", "--seed", 5),
    )
    assert status == 0, errors
    assert "4 samples, 28 rows" in " ".join(out.split())
    opened = Features.open(tmp_path / "features")
    assert opened.manifest["selection"]["seed"] == 5 and len(opened.cells.box) == 28
