"""Molmo's processor: by hand, against the original's arrays and PyTorch's resize, properties."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ports.models.molmo import crops as molmo_crops
from ports.models.molmo.crops import ImageSettings, choose_tiling, cut
from ports.models.molmo.processor import Processor, read_processor

from ... import helpers

DATA = Path(__file__).parents[3] / "data" / "molmo"
SMALL = ImageSettings.from_json(json.loads((DATA / "preprocessor_config.json").read_text()))
# The real checkpoint's.
REAL = SMALL._replace(crop_size=336, max_crops=12, margins=(4, 4))
IDS = {"patch": 512, "col": 513, "start": 514, "end": 515}
CASES = range(3)


@pytest.fixture(scope="module")
def expected():
    return np.load(DATA / "expected.npz")


@pytest.fixture(scope="module")
def processor():
    words = ["User:", "Assistant:", "what", "is", "this"]
    return Processor(SMALL, helpers.make_tokenizer(words, {}), IDS, start_token=1)


class TestTiling:
    @pytest.mark.parametrize(
        ("height", "width", "tiling"),
        [
            (100, 100, (1, 1)),  # fits
            (101, 100, (2, 1)),
            (101, 101, (2, 2)),
            (100, 250, (1, 3)),
            (250, 100, (3, 1)),
            (1000, 1000, (2, 2)),  # nothing fits: the one that shrinks least, of few windows
            (10, 10, (1, 1)),
        ],
    )
    def test_by_hand(self, height, width, tiling):
        assert choose_tiling(height, width, 100, max_crops=4) == tiling


@pytest.mark.parametrize("case", CASES)
def test_crops_are_the_originals(expected, case):
    crops = cut(expected[f"{case}.image"], SMALL)
    ids = [1, *(IDS[mark] for mark in crops.tokens), *expected[f"{case}.text_ids"]]
    np.testing.assert_array_equal(ids, expected[f"{case}.input_ids"])
    np.testing.assert_array_equal(crops.masks, expected[f"{case}.image_masks"])
    np.testing.assert_allclose(crops.patches, expected[f"{case}.images"], rtol=0, atol=2e-5)
    theirs = expected[f"{case}.image_input_idx"]
    # One more for the start token in front.
    ours = np.where(crops.positions >= 0, crops.positions + 1, molmo_crops.UNUSED)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("height", "width"), [(300, 170), (40, 90), (337, 336)])
def test_resizing_is_pytorchs(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    ours, picture = molmo_crops.resize_and_pad(image, 112, 112, SMALL)
    scale = min(112 / height, 112 / width)
    size = [int(np.float32(side) * np.float32(scale)) for side in (height, width)]
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(image).movedim(-1, 0)[None].float() / 255,
        size=size,
        mode="bilinear",
        antialias=True,
    )[0].movedim(0, -1)
    theirs = (theirs.clip(0, 1).numpy() - np.float32(SMALL.mean)) / np.float32(SMALL.deviation)
    assert picture.sum() == size[0] * size[1]
    np.testing.assert_allclose(ours[picture], theirs.reshape(-1, 3), rtol=0, atol=2e-5)
    black = -np.float32(SMALL.mean) / np.float32(SMALL.deviation)
    np.testing.assert_allclose(ours[~picture], np.broadcast_to(black, ours[~picture].shape))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(14, 700),
    st.integers(14, 700),
    st.sampled_from([SMALL, SMALL._replace(max_crops=1)]),
)
def test_every_patch_token_gets_one_feature(height, width, chosen):
    crops = cut(np.zeros((height, width, 3), np.uint8), chosen)
    assert len(crops.patches) == len(crops.masks) == len(crops.positions)
    assert 2 <= len(crops.patches) <= chosen.max_crops + 1
    used = np.sort(crops.positions[crops.positions >= 0])
    tokens = np.flatnonzero(np.array(crops.tokens) == "patch")
    np.testing.assert_array_equal(used, tokens)


def test_features_are_where_their_patches_are():
    """The features of a picture that brightens from left to right and top to bottom do so too."""
    ramp = np.linspace(0, 120, 300)
    image = (ramp[:, None] + ramp)[..., None].repeat(3, -1).astype(np.uint8)
    crops = cut(image, SMALL)
    side = SMALL.crop_patches
    grid = crops.patches.mean(-1).reshape(-1, side // 2, 2, side // 2, 2).mean((2, 4))
    at = {
        position: value
        for position, value in zip(crops.positions.reshape(-1), grid.reshape(-1), strict=True)
        if position >= 0
    }
    marks = "".join({"patch": "p", "col": "c", "start": "<", "end": ">"}[t] for t in crops.tokens)
    offset = marks.index("><") + 2
    rows = marks[offset:-1].split("c")[:-1]
    width = len(rows[0]) + 1
    values = np.array(
        [[at[offset + r * width + c] for c in range(width - 1)] for r in range(len(rows))]
    )
    assert values.shape == (6, 6)  # 2 x 2 windows of 4 patches and margins of 4, pooled
    assert (np.diff(values, axis=0) > 0).all() and (np.diff(values, axis=1) > 0).all()


def test_the_real_settings():
    """640 x 480 pixels: 2 x 3 windows of 16 patches, and the whole picture."""
    crops = cut(np.zeros((480, 640, 3), np.uint8), REAL)
    assert crops.patches.shape == (7, 576, 588)
    assert crops.positions.shape == (7, 144)
    whole, tiled = 12 * 13 + 2, 20 * 29 + 2
    assert len(crops.tokens) == whole + tiled


class TestBatch:
    IMAGES = (
        Image.new("RGB", (130, 96), "red"),
        Image.new("RGB", (64, 64), "blue"),
    )

    def test_rows_are_padded_on_the_left(self, processor):
        texts = [" User: what is this Assistant:", " User: this Assistant:"]
        batch = processor(text=texts, images=[[self.IMAGES[0]], []], padding=True)
        alone = processor(text=texts[:1], images=[self.IMAGES[0]])
        text = processor(text=texts[1:])
        for name, value in alone.items():
            np.testing.assert_array_equal(batch[name][:1], value)
        length = text["input_ids"].shape[1]
        np.testing.assert_array_equal(batch["input_ids"][1, -length:], text["input_ids"][0])
        assert not batch["attention_mask"][1, :-length].any()
        assert (batch["images"][1] == -1).all()
        assert (batch["image_input_idx"][1] == -1).all()
        assert set(text) == {"input_ids", "attention_mask"}

    def test_the_start_token_stands_once(self, processor):
        own, said = (processor(text=[t], images=[self.IMAGES[0]]) for t in ("this", "<s> this"))
        for name, value in own.items():
            np.testing.assert_array_equal(said[name], value)

    def test_several_images_follow_each_other(self, processor):
        both = processor(text=[" User: this"], images=[list(self.IMAGES)])
        first, second = (processor(text=[""], images=[[image]]) for image in self.IMAGES)
        ids = [first["input_ids"][0], second["input_ids"][0, 1:]]
        np.testing.assert_array_equal(both["input_ids"][0, :-2], np.concatenate(ids))
        used = both["image_input_idx"][both["image_input_idx"] >= 0]
        assert len(set(used)) == len(used)
        assert (both["input_ids"][0, used] == IDS["patch"]).all()

    def test_the_prompt_is_molmos(self, processor):
        content = [{"type": "image"}, {"type": "text", "text": "what is this"}]
        rendered = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert rendered == " User: what is this Assistant:"

    def test_a_picture_is_turned_as_its_exif_data_says(self, processor):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 130, 3), np.uint8))
        exif = Image.Exif()
        exif[274] = 6  # orientation: the top is on the right
        stream = io.BytesIO()
        image.save(stream, "PNG", exif=exif)
        turned = processor(text=["this"], images=[Image.open(stream)])
        upright = processor(text=["this"], images=[image.transpose(Image.Transpose.ROTATE_270)])
        for name, value in upright.items():
            np.testing.assert_array_equal(turned[name], value)

    def test_a_picture_from_a_file(self, processor, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (96, 130, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        read = processor(text=["this"], images=[str(tmp_path / "a.png")])
        for name, value in processor(text=["this"], images=[pixels]).items():
            np.testing.assert_array_equal(read[name], value)


def test_settings_that_are_left_out_are_the_real_checkpoints():
    assert ImageSettings.from_json({}) == REAL


class TestMessages:
    def test_an_image_smaller_than_a_patch(self, processor):
        with helpers.raises_line(ValueError, "13 x 200 pixels", "14 x 14"):
            processor(text=["this"], images=[Image.new("RGB", (13, 200))])

    def test_an_extreme_aspect_ratio(self, processor):
        with helpers.raises_line(ValueError, "20000 x 14 pixels", "aspect ratio"):
            processor(text=["this"], images=[Image.new("RGB", (20000, 14))])

    def test_texts_without_their_images(self, processor):
        with helpers.raises_line(ValueError, "2 texts and images for 1"):
            processor(text=["this", "what"], images=[Image.new("RGB", (50, 50))], padding=True)

    def test_rows_of_different_lengths(self, processor):
        with helpers.raises_line(ValueError, "padding=True"):
            processor(text=["this", "what is"])

    def test_invalid_images(self, processor):
        with helpers.raises_line(ValueError, "float64[50, 50, 3]"):
            processor(text=["this"], images=[np.zeros((50, 50, 3))])

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"base_image_input_size": [112, 98]}, "[112, 98]"),
            ({"overlap_margins": [1, 2]}, "[1, 2]"),
            ({"image_token_length_w": 5}, "(4, 5)"),
            ({"image_padding_mask": False}, "image_padding_mask is False; expected true"),
            ({"do_normalize": False}, "do_normalize is False; expected true"),
        ],
    )
    def test_settings_that_are_not_implemented(self, change, part):
        values = json.loads((DATA / "preprocessor_config.json").read_text())
        with helpers.raises_line(ValueError, part):
            ImageSettings.from_json({**values, **change})

    def test_a_directory_without_settings(self, tmp_path):
        with helpers.raises_line(ValueError, f"{tmp_path}: cannot load the processor"):
            read_processor(tmp_path)
