"""Photographs through the processors of families with LLaVA's layout, without torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from sklearn.datasets import load_sample_images
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import ports
from ports.models import internvl, pixtral_processor

from .. import helpers
from . import test_gemma3, test_internvl, test_llava_parts, test_paligemma

WORDS = ["User:", "Assistant:", "what", "is", "in", "the", "picture"]
TEMPLATE = (
    "{% for m in messages %}User: {% for part in m.content %}"
    "{{ 'MARK ' if part.type == 'image' else part.text }}{% endfor %} {% endfor %}Assistant:"
)
SPECIAL = {"<image>": helpers.IMAGE, "<a>": 99, "<b>": 98}
SMALL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}, **SMALL}


def template(mark: str) -> str:
    return TEMPLATE.replace("MARK", mark)


def gemma3() -> tuple[Any, Any]:
    tokenizer = helpers.make_tokenizer(
        WORDS, SPECIAL, boi_token="<a>", eoi_token="<b>", image_token="<image>"
    )
    pan = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 100}
    images = Gemma3ImageProcessorPil(
        **square(64),
        **pan,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    processor = transformers.Gemma3Processor(
        images, tokenizer, template("<a>"), image_seq_length=test_gemma3.TOKENS
    )
    return test_gemma3.make_config(), processor


def paligemma() -> tuple[Any, Any]:
    tokenizer = helpers.make_tokenizer(WORDS, SPECIAL, image_token="<image>")
    images = SiglipImageProcessorPil(**square(helpers.VISION["image_size"]))
    images.image_seq_length = helpers.PATCHES
    processor = transformers.PaliGemmaProcessor(images, tokenizer, template("<image>"))
    return test_paligemma.make_config(1), processor


def siglip() -> tuple[Any, Any]:
    tokenizer = helpers.make_tokenizer(WORDS, SPECIAL)
    images = SiglipImageProcessorPil(**square(helpers.VISION["image_size"]))
    # Files of before 2025: what is missing follows from config.json.
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    return test_llava_parts.make("siglip and qwen2"), processor


def pixtral() -> tuple[Any, Any]:
    tokenizer = helpers.make_tokenizer(WORDS, {"[IMG]": 101, "[IMG_BREAK]": 99, "[IMG_END]": 98})
    images = PixtralImageProcessorPil(size={"longest_edge": 60}, patch_size=7)
    settings = {"patch_size": 7}
    processor = pixtral_processor.Processor(images, tokenizer, template("[IMG]"), settings)
    return test_llava_parts.make("pixtral"), processor


def intern() -> tuple[Any, Any]:
    tokenizer = helpers.make_tokenizer(
        WORDS,
        SPECIAL,
        context_image_token="<image>",
        start_image_token="<a>",
        end_image_token="<b>",
    )
    images = GotOcr2ImageProcessorPil(
        **square(test_internvl.VISION["image_size"]), min_patches=1, max_patches=6
    )
    processor = internvl.Processor(images, tokenizer, template("<image>"), test_internvl.TOKENS)
    return test_internvl.make_config(), processor


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gemma3": gemma3,
    "paligemma": paligemma,
    "siglip": siglip,
    "pixtral": pixtral,
    "internvl": intern,
}


def save(name: str, directory: Path) -> tuple[Any, Any]:
    """Writes the configuration and the processor of a family, and returns them."""
    config, processor = MAKERS[name]()
    config.save_pretrained(directory)
    processor.save_pretrained(directory)
    return config, processor


SCRIPT = """
import sys
import numpy as np
from sklearn.datasets import load_sample_images
import ports

china, flower = load_sample_images().images
for directory in sys.argv[1:]:
    vlm = ports.load_abstract(directory)
    prompts = [vlm.render("what is in the picture")] * 2
    inputs = vlm.process(prompts, [china, flower.transpose(1, 0, 2)])
    prepared = vlm.prepare(inputs)  # which checks that images and tokens match
    np.savez(f"{directory}/arrays.npz", **inputs)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, tuple[Any, Path, dict[str, np.ndarray]]]:
    """Returns family -> (processor, directory, arrays of two photographs made without torch)."""
    root = tmp_path_factory.mktemp("processors")
    made = {name: save(name, root / name)[1] for name in MAKERS}
    helpers.run_python(SCRIPT, *(root / name for name in MAKERS))
    return {
        name: (processor, root / name, dict(np.load(root / name / "arrays.npz")))
        for name, processor in made.items()
    }


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "siglip"])
def test_the_arrays_are_those_of_transformers(found, name):
    processor, directory, ours = found[name]
    china, flower = load_sample_images().images
    prompt = ports.load_abstract(directory).render("what is in the picture")
    images = [[china], [flower.transpose(1, 0, 2)]]
    theirs = processor(text=[prompt] * 2, images=images, padding=True, return_tensors="np")
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "paligemma"])
def test_texts_alone(found, name):
    """PaliGemma's processor requires a picture."""
    vlm = ports.load_abstract(found[name][1])
    # This tokenizer does not write <s> itself.
    arrays = vlm.process(["<s> what is", "what"], [[], []])
    assert "pixel_values" not in vlm.prepare(arrays)
    what, is_ = vlm.tokenizer.convert_tokens_to_ids(["what", "is"])
    assert arrays["input_ids"].tolist() == [[1, what, is_], [0, 0, what]]


class TestCropsOfGemma:
    def test_are_images(self, found):
        processor, directory, arrays = found["gemma3"]
        # Its files ask for crops, but transformers' processor makes them only if its caller asks.
        assert len(arrays["pixel_values"]) == 2
        vlm = ports.load_abstract(directory)
        images = [[image] for image in load_sample_images().images]
        prompts = [vlm.render("what is in the picture")] * 2
        options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 100}
        cut = vlm.process(prompts, images, **options)
        # 640 x 427 pixels: two crops beside the whole.
        assert len(vlm.prepare(cut)["pixel_values"]) == 6
        assert ((cut["input_ids"] == helpers.IMAGE).sum(1) == 3 * test_gemma3.TOKENS).all()
        given = {"text": prompts, "images": images, "padding": True, "return_tensors": "np"}
        for name, value in processor(**given, **options).items():
            np.testing.assert_array_equal(cut[name], value)

    def test_have_layouts(self, found):
        vlm = ports.load_abstract(found["gemma3"][1])
        picture = load_sample_images().images[:1]
        options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 100}
        (layouts,) = vlm.patch_layout(vlm.process([vlm.render("what")], picture, **options))
        assert [layout.positions.shape for layout in layouts] == [(4, 4)] * 3


class TestOptions:
    def test_videos_of_a_family_without_them(self, found):
        vlm = ports.load_abstract(found["paligemma"][1])
        with helpers.raises_line(ValueError, "videos are not inputs of this", "pass frames as"):
            vlm.process(["what"], [[]], videos=[np.zeros((2, 9, 9, 3), np.uint8)])

    def test_those_that_our_processors_do_not_know(self, found):
        vlm = ports.load_abstract(found["internvl"][1])
        with helpers.raises_line(ValueError, "the processor has no option max_patches"):
            vlm.process(["what"], [[]], max_patches=2)


def test_cells_of_internvls_tiles(found):
    """White spots on black: the brightest tokens' boxes hold them, in the tiles and the whole."""
    vlm = ports.load_abstract(found["internvl"][1])
    marks = [(0.72, 0.3), (0.2, 0.9)]  # of a wide picture and of a tall one
    pictures = []
    for (x, y), (width, height) in zip(marks, [(300, 200), (90, 260)], strict=True):
        picture = np.zeros((height, width, 3), np.uint8)
        column, row = int(x * width), int(y * height)
        picture[row - 4 : row + 4, column - 4 : column + 4] = 255
        pictures.append(picture)
    inputs = vlm.process([vlm.render("what")] * 2, pictures)
    assert inputs["tile_grids"].tolist() == [[2, 3], [3, 1]]
    side, config = round(test_internvl.TOKENS**0.5), test_internvl.VISION
    cut = config["image_size"] // config["patch_size"] * config["patch_size"]
    tiles = inputs["pixel_values"].mean(1)[:, :cut, :cut]
    bright = tiles.reshape(len(tiles), side, cut // side, side, cut // side).mean((2, 4)).ravel()
    places = np.flatnonzero(inputs["input_ids"].ravel() == helpers.IMAGE)
    for number, ((x, y), (layout,)) in enumerate(zip(marks, vlm.patch_layout(inputs), strict=True)):
        for view in (layout, layout.whole):
            row = number * inputs["input_ids"].shape[1]
            values = bright[np.searchsorted(places, view.positions + row)]
            x0, y0, x1, y1 = view.boxes[np.unravel_index(values.argmax(), values.shape)]
            assert x0 <= x <= x1 and y0 <= y <= y1, view
    # The arrays of transformers say no more than that there are tiles.
    del inputs["tile_grids"]
    assert [len(row) for row in vlm.patch_layout(inputs)] == [7, 4]


def test_the_channels_of_internvls_arrays_may_come_first(found):
    vlm = ports.load_abstract(found["internvl"][1])
    tall = np.random.default_rng(0).integers(0, 256, (90, 30, 3), np.uint8)
    prompts = [vlm.render("what")]
    expected = vlm.process(prompts, [tall])
    assert expected["tile_grids"].tolist() == [[3, 1]]
    found = vlm.process(prompts, [tall.transpose(2, 0, 1)])
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_rows_of_pixtral_by_hand(found):
    _, _, arrays = found["pixtral"]
    # 60 x 40 pixels: 9 x 6 patches, and the same upright.
    assert arrays["image_sizes"].tolist() == [[42, 63], [63, 42]]
    for row, (height, width) in zip(arrays["input_ids"], [(6, 9), (9, 6)], strict=True):
        first = list(row).index(helpers.IMAGE)
        line = [helpers.IMAGE] * width + [99]
        written = [*(line * height)[:-1], 98]
        assert row[first : first + len(written)].tolist() == written
        assert (row == helpers.IMAGE).sum() == height * width


def test_tiles_of_internvl_by_hand(found):
    processor, _, arrays = found["internvl"]
    # 3 x 2 tiles and the whole; 2 x 3 and the whole.
    assert len(arrays["pixel_values"]) == 14
    images = load_sample_images().images
    alone = processor.image_processor(images=images, crop_to_patches=True, return_tensors="np")
    np.testing.assert_array_equal(arrays["pixel_values"][:7], alone["pixel_values"][:7])
    ids = arrays["input_ids"][0]
    first = list(ids).index(99)
    count = 7 * test_internvl.TOKENS
    assert ids[first : first + count + 2].tolist() == [99, *[helpers.IMAGE] * count, 98]
