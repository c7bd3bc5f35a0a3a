"""Where image tokens are in a picture: by hand, and for each family with one marked cell."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import ports
from ports.inputs import patch_layout

from .. import helpers, idefics2_helpers, qwen2_vl_helpers

MOLMO = Path(__file__).parents[2] / "data" / "molmo"


class TestGrids:
    def test_by_hand(self):
        layout = patch_layout.grid(np.array([3, 4, 5, 7, 8, 9]), 2, 3)
        assert layout.positions.tolist() == [[3, 4, 5], [7, 8, 9]]
        np.testing.assert_allclose(layout.boxes[1, 2], [2 / 3, 1 / 2, 1, 1])
        assert repr(layout) == "PatchLayout(2 x 3 cells)"

    def test_a_picture_in_the_middle_of_its_canvas(self):
        """Four columns; the picture fills the middle two and half of the outer ones."""
        boxes = patch_layout.grid_boxes(1, 4, (1 / 8, 0, 7 / 8, 1))
        np.testing.assert_allclose(boxes[0, :, 0], [0, 1 / 6, 1 / 2, 5 / 6], atol=1e-12)
        np.testing.assert_allclose(boxes[0, :, 2], [1 / 6, 1 / 2, 5 / 6, 1], atol=1e-12)
        beside = patch_layout.grid_boxes(2, 2, (0, 0, 1, 0.5))[1]
        assert ((beside[:, 3] - beside[:, 1]) == 0).all()  # in the padding: no area

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 0.4), st.floats(0.6, 1))
    def test_cells_fill_the_picture_once(self, height, width, low, high):
        boxes = patch_layout.grid_boxes(height, width, (low, low, high, high))
        area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
        assert (area >= 0).all()
        np.testing.assert_allclose(area.sum(), 1, rtol=1e-9)

    def test_pictures_and_videos_in_the_order_of_the_prompt(self):
        ids = np.array([[9, 1, 1, 5, 2, 2, 2, 2, 1]])  # 1: picture, 2: video of two frames
        grids = {1: np.array([[1, 2, 4], [1, 2, 2]]), 2: np.array([[2, 2, 4]])}
        (row,) = patch_layout.of_grids(ids, grids, merge=2)
        assert [layout.positions.tolist() for layout in row] == [
            [[1, 2]],
            [[4, 5]],
            [[6, 7]],
            [[8]],
        ]

    def test_tokens_that_are_not_whole_pictures(self):
        with helpers.raises_line(ValueError, "2 image tokens (id 1)", "next picture has 3"):
            patch_layout.runs(np.array([1, 1]), 1, iter([3]))
        with helpers.raises_line(ValueError, "next picture has none"):
            patch_layout.runs(np.array([1, 1]), 1, iter([]))


class TestCropping:
    CLIP = SimpleNamespace(
        do_center_crop=True, size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}
    )

    def test_the_middle_of_a_wide_picture(self):
        # 100 x 50 pixels become 80 x 40, of which columns 20 to 59 are left.
        assert patch_layout.seen_part(self.CLIP, 50, 100) == (0.25, 0, 0.75, 1)
        (row,) = patch_layout.in_original(
            [[patch_layout.grid(np.arange(4), 2, 2)]], [[(50, 100)]], self.CLIP
        )
        np.testing.assert_allclose(row[0].boxes[1, 0], [0.25, 0.5, 0.5, 1])

    def test_without_cropping(self):
        assert patch_layout.seen_part(SimpleNamespace(), 50, 100) == (0, 0, 1, 1)

    @pytest.mark.parametrize("shape", [(50, 100), (99, 40), (60, 60)], ids=str)
    def test_a_picture_padded_to_a_square(self, shape):
        """Where LLaVA's processor puts the picture among the padding, which is black."""
        height, width = shape
        processor = transformers.LlavaImageProcessorPil(
            do_pad=True, do_resize=False, do_center_crop=False, do_rescale=False, image_mean=None
        )
        processor.do_normalize = False
        white = Image.new("RGB", (width, height), "white")
        pixels = np.asarray(processor(white, return_tensors="np")["pixel_values"][0, 0])
        rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
        side = max(shape)
        x0, y0, x1, y1 = patch_layout.seen_part(processor, height, width)
        # The square from the picture's point of view, and the picture from the square's.
        np.testing.assert_allclose(rows[[0, -1]] + (0, 1), np.array([-y0, 1 - y0]) * height)
        np.testing.assert_allclose(columns[[0, -1]] + (0, 1), np.array([-x0, 1 - x0]) * width)
        np.testing.assert_allclose([(y1 - y0) * height, (x1 - x0) * width], side)

    def test_sizes_of_other_pictures(self):
        with helpers.raises_line(ValueError, "sizes has [0] pictures per row", "[1]"):
            patch_layout.in_original([[patch_layout.grid(np.arange(4), 2, 2)]], [[]], self.CLIP)


def _idefics2(directory: Path) -> None:
    idefics2_helpers.make_idefics2(directory)
    idefics2_helpers.make_processor().save_pretrained(directory)


def _qwen2_vl(directory: Path) -> None:
    qwen2_vl_helpers.make_qwen2_vl(directory)
    qwen2_vl_helpers.make_processor().save_pretrained(directory)


def _molmo(directory: Path) -> None:
    directory.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(MOLMO / name, directory)
    helpers.make_tokenizer(["User:", "Assistant:"], {}).save_pretrained(directory)


MAKERS = {"idefics2": _idefics2, "qwen2_vl": _qwen2_vl, "molmo": _molmo}


@pytest.fixture(scope="module", params=["llava", *MAKERS])
def family(request, tmp_path_factory) -> ports.VLM:
    if request.param == "llava":
        return request.getfixturevalue("vlm")
    directory = tmp_path_factory.mktemp("layout") / request.param
    MAKERS[request.param](directory)
    vlm = ports.load(directory)
    if request.param == "idefics2":
        vlm.processor.image_processor.do_image_splitting = True
    return vlm


SIZE = (170, 96)  # width and height in pixels
MARKS = ((0.85, 0.2), (0.43, 0.375), (0.57, 0.625))  # in the middle of cells, of all families


def _pictures() -> list[Image.Image]:
    """Returns a picture without a mark, and one per mark with a white square around it."""
    plain = Image.new("RGB", SIZE, (70, 80, 90))
    found = [plain]
    for x, y in MARKS:
        picture = plain.copy()
        x, y = x * SIZE[0], y * SIZE[1]
        ImageDraw.Draw(picture).rectangle((x - 2, y - 2, x + 2, y + 2), fill="white")
        found.append(picture)
    return found


def _embedded(vlm: ports.VLM, inputs: dict) -> np.ndarray:
    """Returns the input of the first decoder layer, [B, T, D] at the caller's positions."""
    x = vlm.module.apply({"params": vlm.params}, vlm.place(inputs), method="embed_inputs")
    return np.asarray(x)[:, -inputs["input_ids"].shape[1] :]


def test_one_marked_cell(family):
    """The box of the token whose embedding a mark changes most contains the mark."""
    pictures = _pictures()
    inputs = family.process([family.render("where?")] * len(pictures), [[p] for p in pictures])
    layouts = family.patch_layout(inputs, sizes=[[SIZE[::-1]]] * len(pictures))
    x = _embedded(family, inputs)
    for row, (mark, layout) in enumerate(zip(MARKS, layouts[1:], strict=True), start=1):
        (picture,) = layout
        change = np.abs(x[row] - x[0]).sum(axis=-1)
        if picture.latents:
            # A crop changes only if it holds the mark; all of its latents may see it.
            changed = change[picture.positions] > 0
            holds = _holds(picture.boxes, mark)
            np.testing.assert_array_equal(changed, holds)
            assert changed.any() and not changed.all()
        else:
            # LLaVA cuts the marks at the sides off.
            seen = _holds(picture.boxes, mark)
            assert seen.sum() == (0.25 < mark[0] < 0.75 or family.config.model_type != "llava")
            if seen.any():
                most = np.unravel_index(change[picture.positions].argmax(), seen.shape)
                assert seen[most], (mark, picture.boxes[most])
        for view in filter(None, (picture.whole,)):
            if not view.latents:
                most = np.unravel_index(change[view.positions].argmax(), view.positions.shape)
                assert _holds(view.boxes, mark)[most]


def _holds(boxes: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    x, y = point
    return (boxes[..., 0] <= x) & (x < boxes[..., 2]) & (boxes[..., 1] <= y) & (y < boxes[..., 3])


def test_every_image_token_has_one_cell(family):
    """Rows with one picture, two pictures and none, padded on the left."""
    pictures = [*_pictures()[:2], Image.new("RGB", (64, 200), "red")]
    one = family.render("where?")
    mark = getattr(family.processor, "image_token", None)
    two, none = (one, one) if mark is None else (mark + one, one.replace(mark, ""))
    images = [pictures[:1], pictures[1:], []]
    inputs = family.process([one, two, none], images)
    layouts = family.patch_layout(inputs)
    assert [len(row) for row in layouts] == [1, 2, 0]
    for ids, row in zip(inputs["input_ids"], layouts, strict=True):
        views = [view for each in row for view in (each, each.whole) if view is not None]
        cells = [view.positions[view.positions >= 0] for view in views]
        found = np.sort(np.concatenate([np.zeros(0, int), *cells]))
        np.testing.assert_array_equal(found, np.flatnonzero(ids == family.image_tokens[0]))
        for view in views:
            assert view.boxes.shape == (*view.positions.shape, 4)
            assert view.boxes.min() >= 0 and view.boxes.max() <= 1


def test_idefics2_without_a_processor(tmp_path):
    """Five pictures are read as one that was split; the checkpoint's processor can tell."""
    _idefics2(tmp_path / "whole")
    vlm = ports.load_abstract(tmp_path / "whole")
    picture = Image.new("RGB", (60, 40))
    mark = vlm.processor.image_token
    vlm.processor.image_processor.do_image_splitting = False
    inputs = vlm.process([mark * 5 + "what?"], [[picture] * 5])
    assert [len(row) for row in vlm.patch_layout(inputs)] == [5]
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "whole" / name).unlink(missing_ok=True)
    (row,) = ports.load_abstract(tmp_path / "whole").patch_layout(inputs)
    assert len(row) == 1 and row[0].positions.shape[0] == 4 and row[0].whole is not None


def test_arrays_that_do_not_fit(family):
    inputs = family.process([family.render("where?")], [[_pictures()[0]]])
    ids = inputs["input_ids"].copy()
    ids[0, np.flatnonzero(ids[0] == family.image_tokens[0])[0]] = 1
    with pytest.raises(ValueError, match="image"):
        family.patch_layout({**inputs, "input_ids": ids})
