"""Molmo2 against PyTorch: whole pictures and their crops, several pictures, videos."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

import ports
from ports import checkpoint
from ports.inputs import padding
from ports.models.molmo2 import model as molmo2
from ports.models.molmo2.crops import cut

from .. import family, helpers

PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "molmo2-4b.json"
EXPECTED = Path(__file__).parents[2] / "data" / "molmo2"
# Patches along a crop, and from a crop to the next; values of a patch.
SIDE, STEP, VALUES = 5, 3, 147
START, END, PATCH, COLUMN, LOW_START, FRAME_START, FRAME_END = range(103, 110)
TEXT = {**helpers.TEXT, "additional_vocab_size": 8}
VISION = {
    **helpers.VISION,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "image_size": [35, 35],
}
ADAPTER = {
    "hidden_size": 36,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "intermediate_size": 40,
    "text_hidden_size": 60,
    "vision_feature_layer": [-1, 0],
}
FUNCTIONS = (".activation_fn", ".act_fn", ".rotary_emb", ".rotary_emb_unscaled", "_tower")


def make_config(text=(), adapter=(), **changes):
    ids = {
        "image_start_token_id": START,
        "image_end_token_id": END,
        "image_patch_id": PATCH,
        "image_col_id": COLUMN,
        "low_res_image_start_token_id": LOW_START,
        "frame_start_token_id": FRAME_START,
        "frame_end_token_id": FRAME_END,
    }
    return transformers.Molmo2Config(
        text_config={**TEXT, **dict(text)},
        vision_config=VISION,
        adapter_config={**ADAPTER, **dict(adapter)},
        **{**ids, **changes},
    )


def pooled(index: np.ndarray, square: int = 2) -> np.ndarray:
    """Returns int[rows, columns, patches], the patches of each square of a grid, -1 outside."""
    widths = [(0, -length % square) for length in index.shape]
    index = np.pad(index, widths, constant_values=-1)
    height, width = (length // square for length in index.shape)
    squares = index.reshape(height, square, width, square).swapaxes(1, 2)
    return squares.reshape(height, width, square**2)


def tiling(rows: int, columns: int) -> np.ndarray:
    """Returns the patch numbers of overlapping crops; in an overlap, a cell takes the crop in which
    it is further from the edge.
    """
    numbers = np.arange(rows * columns * SIDE**2).reshape(rows, columns, SIDE, SIDE)
    height, width = STEP * rows + 2, STEP * columns + 2
    canvas = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            row, column = (min(max(i - 1, 0) // STEP, n - 1) for i, n in ((y, rows), (x, columns)))
            canvas[y, x] = numbers[row, column, y - STEP * row, x - STEP * column]
    return canvas


def tokens_of(grid: np.ndarray, start: int, end: int) -> list[int]:
    height, width, _ = grid.shape
    return [start, *([PATCH] * width + [COLUMN]) * height, end]


def make_inputs(rows, texts, frames=0):
    """Returns rows of pictures with these numbers of rows and columns of crops, or a video in the
    last row, as the processor would; padded on the left.
    """
    random = np.random.default_rng(0)
    ids, pooling, grids, crops = [], [], [], 0
    for row, text in zip(rows, texts, strict=True):
        ids.append(random.integers(5, 95, 2).tolist())
        for tiles in row:
            parts = np.arange(SIDE**2).reshape(SIDE, SIDE), SIDE**2 + tiling(*tiles)
            views = [pooled(part) for part in parts]
            for view, start in zip(views, (LOW_START, START), strict=True):
                ids[-1] += tokens_of(view, start, END)
                moved = np.where(view >= 0, view + crops * SIDE**2, -1)
                pooling += moved.reshape(-1, 4).tolist()
            grids.append([n for view in views for n in view.shape[:2]])
            crops += 1 + tiles[0] * tiles[1]
            ids[-1] += random.integers(5, 95, 1).tolist()
        ids[-1] += random.integers(5, 95, text).tolist()
    for frame in range(frames):
        view = pooled(frame * SIDE**2 + np.arange(SIDE**2).reshape(SIDE, SIDE), 3)
        ids[-1] += [7, *tokens_of(view, FRAME_START, FRAME_END)]
        pooling += view.reshape(-1, 9).tolist()
    ids[-1] += [9, 8] * bool(frames)
    length = max(map(len, ids))
    inputs = {
        "input_ids": np.array([[0] * (length - len(row)) + row for row in ids]),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    inputs["mm_token_type_ids"] = (inputs["input_ids"] >= START).astype(int)
    crops, names = (frames, molmo2.KINDS[1]) if frames else (crops, molmo2.KINDS[0])
    grids = [[frames, 2, 2]] if frames else grids
    if crops:
        pixels = random.standard_normal((crops, SIDE**2, VALUES)).astype(np.float32) / 12
        arrays = pixels, np.array(pooling, np.int32), np.array(grids)
        inputs |= dict(zip(names, arrays, strict=True))
    return inputs


# Two pictures in a row, none, and one, of unequal sizes.
INPUTS = make_inputs([[(1, 2), (1, 1)], [], [(2, 1)]], [4, 9, 5])


SPECIAL = {
    "<im_start>": START,
    "<im_end>": END,
    "<im_patch>": PATCH,
    "<im_col>": COLUMN,
    "<low_res_im_start>": LOW_START,
    "<frame_start>": FRAME_START,
    "<frame_end>": FRAME_END,
    "<im_low>": FRAME_END + 1,
    "<|image|>": 98,
    "<|video|>": 97,
}
# Crops of SIDE x SIDE patches.
IMAGES = {
    "size": {"height": 7 * SIDE, "width": 7 * SIDE},
    "patch_size": 7,
    "max_crops": 4,
    "overlap_margins": [1, SIDE - STEP - 1],
    "pooling_size": [2, 2],
}


def save_processor(directory: Path, **changes) -> None:
    """Writes a processor's files beside a checkpoint."""
    tokenizer = helpers.make_tokenizer(["User:", "Assistant:", "what", "is", "it"], SPECIAL)
    tokenizer.chat_template = (
        "{% for m in messages %}User: {% for p in m.content %}"
        "{{ '<|image|> ' if p.type == 'image' else p.text }}{% endfor %} {% endfor %}Assistant:"
    )
    tokenizer.save_pretrained(directory)
    images = {"image_processor_type": "Molmo2ImageProcessor", **IMAGES, **changes}
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    (directory / "processor_config.json").write_text('{"processor_class": "Molmo2Processor"}')


def site_errors(ours, theirs, inputs):
    """Returns site -> relative error over tokens, and crops and features that are not padding."""

    def renamed(site):
        return "language_model.lm_head" if site == "lm_head" else site.removeprefix("model.")

    cut = {}
    for site, states in ours.items():
        of_tower = "language_model" not in renamed(site)
        cut[renamed(site)] = states[: len(theirs[site])] if of_tower else states
    return helpers.site_errors(cut, {renamed(s): value for s, value in theirs.items()}, inputs)


# As Molmo2-O-7B: OLMo's norms, and rotary embedding that is scaled in some layers.
OLMO = {
    "qk_norm_type": "olmo",
    "norm_after": True,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e3,
    },
    "rope_scaling_layers": [1],
}


def make(directory: Path, text: dict) -> family.Family:
    model = transformers.Molmo2ForConditionalGeneration(make_config(text))
    helpers.randomise(model.eval())
    # No norm comes before the pooling and the projector: keep scores and features small.
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        projector.image_pooling_2d.q_proj.weight /= 8
        projector.image_projector.up_proj.weight /= 32
    model.save_pretrained(directory)
    pair = helpers.Pair(directory, model)
    layer = "model.language_model.layers.0"
    return family.Family(molmo2.PORT, pair, layer, site_errors, FUNCTIONS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> family.Family:
    return make(tmp_path_factory.mktemp("molmo2") / "checkpoint", {})


def test_the_decoder_of_olmo(tmp_path):
    olmo = make(tmp_path / "checkpoint", OLMO)
    assert olmo.vlm.sizes.text.unscaled_layers == (0, 2)
    family.check_sites(olmo, INPUTS)
    family.check_generation(olmo, INPUTS)


def test_every_site_and_the_logits_equal_pytorchs(made):
    family.check_sites(made, INPUTS)


def test_the_processors_own_arrays(made):
    family.check_logits(made, INPUTS)


def test_32_greedy_tokens_equal_pytorchs(made):
    family.check_generation(made, INPUTS)


def test_steering_is_a_hook(made):
    family.check_steering(made, INPUTS)


def test_adapters(made, tmp_path):
    family.check_adapters(made, INPUTS, tmp_path, r".*\.(q_proj|down_proj)")


def test_files(made, tmp_path):
    family.check_files(made, tmp_path)


def test_parameters_survive_saving(made, tmp_path):
    checkpoint.save_params(made.vlm.params, tmp_path)
    (tmp_path / "config.json").write_text((made.pair.directory / "config.json").read_text())
    loaded = transformers.Molmo2ForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, value in made.pair.torch_model.state_dict().items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)


@pytest.mark.slow
def test_eight_devices(made, tmp_path):
    family.check_mesh(made, INPUTS, tmp_path, ["model.multi_modal_projector"])


@pytest.mark.parametrize(
    "inputs",
    [make_inputs([[], []], [5, 12]), make_inputs([[], []], [4, 6], frames=3)],
    ids=["text alone", "a video"],
)
def test_other_inputs(made, inputs):
    expected, _ = made.torch_forward(inputs)
    family.assert_logits(made.vlm.forward(inputs).logits, expected, inputs)


def test_sizes_share_programs():
    """Numbers of crops and features are padded to a few sizes."""
    sizes = molmo2.Config.from_hf(make_config())
    for tiles, crops, features in (((2, 4), 10, 40), ((3, 3), 10, 48), ((1, 1), 2, 20)):
        given = make_inputs([[tiles]], [3])
        arrays = molmo2.prepare_inputs(sizes, given)
        assert padding.count_pieces(len(arrays["pixel_values"]), 1) == crops
        assert len(arrays["image_token_pooling"]) == features
        kept = len(given["image_token_pooling"])
        assert (arrays["image_token_pooling"][kept:] == -1).all()


def test_the_full_size(tmp_path):
    values = json.loads(PUBLISHED.read_text())
    # As many as the index of the published files says.
    family.check_full_size(molmo2.PORT, values, tmp_path, 4_850_869_200, 1.003)


class TestLayout:
    def test_of_pictures(self, made):
        layouts = made.vlm.patch_layout(INPUTS)
        assert [len(row) for row in layouts] == [2, 0, 1]
        first, second = layouts[0]
        assert (first.positions.shape, first.whole.positions.shape) == ((3, 4), (3, 3))
        for layout in (first, second, layouts[2][0]):
            row = INPUTS["input_ids"][0 if layout is not layouts[2][0] else 2]
            assert (row[layout.positions] == PATCH).all()
            assert (row[layout.whole.positions] == PATCH).all()
        assert first.whole.positions.max() < first.positions.min()
        assert first.positions.max() < second.whole.positions.min()
        # 5 x 8 patches: the last row of features has one row of them.
        np.testing.assert_allclose(first.boxes[0, 1], [0.25, 0, 0.5, 0.4])
        np.testing.assert_allclose(first.boxes[2, 3], [0.75, 0.8, 1, 1])
        np.testing.assert_allclose(first.whole.boxes[2, 2], [0.8, 0.8, 1, 1])

    def test_of_a_video(self, made):
        layouts = made.vlm.patch_layout(make_inputs([[]], [4], frames=3))
        assert [layout.positions.shape for layout in layouts[0]] == [(2, 2)] * 3
        np.testing.assert_allclose(layouts[0][1].boxes[1, 0], [0, 0.6, 0.6, 1])

    def test_of_text(self, made):
        assert made.vlm.patch_layout(make_inputs([[], []], [4, 5])) == [[], []]

    def test_of_another_number_of_features(self, made):
        given = {**INPUTS, "image_grids": INPUTS["image_grids"][:2]}
        with helpers.raises_line(ValueError, "image_grids has grids of 39 features", "has 60"):
            made.vlm.patch_layout(given)

    def test_without_grids(self, made):
        given = {name: value for name, value in INPUTS.items() if name != "image_grids"}
        with helpers.raises_line(ValueError, "inputs have no image_grids"):
            made.vlm.patch_layout(given)


class TestMessages:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_token_pooling": None}, "pixel_values but no image_token_pooling"),
            ({"pixel_values": None}, "expected none without the processor's pixel_values"),
            ({"pixel_values_videos": INPUTS["pixel_values"]}, "pass one of them per batch"),
            ({"pixel_values": INPUTS["pixel_values"][:, :9]}, "expected [crops, 25, 147]"),
            ({"pixel_values": INPUTS["pixel_values"][:2]}, "with numbers below 2 x 25"),
            ({"image_token_pooling": INPUTS["image_token_pooling"][:-1]}, "one per row of image"),
        ],
        ids=str,
    )
    def test_arrays_that_do_not_fit(self, made, change, message):
        given = {n: value for n, value in {**INPUTS, **change}.items() if value is not None}
        with helpers.raises_line(ValueError, message):
            made.vlm.forward(given)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text": {"use_qk_norm": False}}, "text_config.use_qk_norm is False"),
            ({"adapter": {"mlp_bias": True}}, "adapter_config.mlp_bias is True"),
            ({"image_patch_id": 111}, "image token id 111 is outside the 111 embeddings"),
        ],
        ids=str,
    )
    def test_values_that_are_not_implemented(self, changes, message):
        with helpers.raises_line(ValueError, message):
            molmo2.Config.from_hf(make_config(**changes))


class TestProcessor:
    @pytest.fixture(scope="class")
    def vlm(self, made):
        save_processor(made.pair.directory)
        return ports.load(made.pair.directory)

    @pytest.fixture(scope="class")
    def inputs(self, vlm):
        """Two photographs in one prompt, one in another, none in a third."""
        china, flower = (photo[::8, ::8] for photo in load_sample_images().images)
        prompts = ["what <|image|> is <|image|> it", vlm.render("what is it"), "is it"]
        pictures = [[china, flower.swapaxes(0, 1)], [flower[:, :30]], []]
        return vlm.process(prompts, pictures)

    def test_makes_the_arrays_of_transformers(self, inputs):
        """Those that its own class, which needs torchvision, made: see the script beside them."""
        with np.load(EXPECTED / "expected.npz") as expected:
            assert set(expected) == set(inputs)
            for name, value in expected.items():
                # They were rounded to the 256 values of a pixel.
                ours = inputs[name] * 127.5 + 127.5 if name == "pixel_values" else inputs[name]
                np.testing.assert_allclose(ours, value, rtol=0, atol=1e-4, err_msg=name)

    def test_what_is_saved_is_read_again(self, made, vlm, inputs, tmp_path):
        own = vlm.processor
        saved = {"use_single_crop_col_tokens": False, "image_use_col_tokens": True}
        changed = type(own)(own.image_processor, own.tokenizer, own.chat_template, saved)
        for written in (own, changed):
            written.save_pretrained(tmp_path)
            shutil.copy(made.pair.directory / "config.json", tmp_path)
            again = ports.load_abstract(tmp_path).processor
            assert again.image_processor == own.image_processor
            assert (again.lines, again.whole_lines) == (written.lines, written.whole_lines)
        assert not again.whole_lines

    def test_a_marked_cell(self, vlm):
        """A white spot on black: the brightest feature's box contains it, in crops and overall."""
        picture = np.zeros((70, 160, 3), np.uint8)
        picture[38:44, 104:112] = 255
        inputs = vlm.process([vlm.render("what is it")], [picture])
        ((layout,),) = vlm.patch_layout(inputs)
        patches = np.append(inputs["pixel_values"].mean(-1).ravel(), -1)
        bright = patches[inputs["image_token_pooling"]].mean(-1)
        places = np.flatnonzero(inputs["input_ids"][0] == PATCH)
        assert layout.positions.shape == (3, 6)  # three crops beside each other
        for view in (layout, layout.whole):
            values = bright[np.searchsorted(places, view.positions)]
            x0, y0, x1, y1 = view.boxes[np.unravel_index(values.argmax(), values.shape)]
            assert x0 <= 108 / 160 <= x1 and y0 <= 41 / 70 <= y1, view

    def test_makes_logits(self, made, inputs):
        expected, _ = made.torch_forward(inputs)
        family.assert_logits(made.vlm.forward(inputs).logits, expected, inputs)

    def test_makes_logits_of_a_video(self, made, vlm):
        """Of frames that are chosen, which fit the model."""
        video = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), np.uint8)
        rates = {"total_num_frames": 6, "fps": 4.0}
        prompts = ["what <|video|> is it", "is it"]
        inputs = vlm.process(prompts, [[], []], videos=[video], video_metadata=rates)
        assert inputs["video_grids"].tolist() == [[3, 3, 3]]  # two per second
        expected, _ = made.torch_forward(inputs)
        family.assert_logits(made.vlm.forward(inputs).logits, expected, inputs)

    def test_two_videos_in_a_text(self, vlm):
        with helpers.raises_line(ValueError, "contains <|video|> 2 times; expected one video per"):
            vlm.process(
                ["<|video|> <|video|>"], [[]], videos=[np.zeros((2, 9, 9, 3), np.uint8)] * 2
            )

    def test_crops_by_hand(self, vlm):
        picture = np.array([[[0, 51, 255]]], np.uint8)
        made_of = cut(picture, vlm.processor.image_processor)
        # One color: the whole and a single crop, of 3 x 3 features, of which the last are smaller.
        assert made_of.patches.shape == (2, SIDE**2, VALUES)
        colors = np.unique(made_of.patches.reshape(-1, 3), axis=0)
        np.testing.assert_allclose(colors, [[-1, -0.6, 1]], rtol=1e-6)
        assert made_of.grid == (3, 3, 3, 3)
        assert made_of.pooling[:3].tolist() == [[0, 1, 5, 6], [2, 3, 7, 8], [4, -1, 9, -1]]
        assert made_of.pooling[9].tolist() == [25, 26, 30, 31]

    def test_a_patch_is_taken_from_the_crop_where_it_is_inside(self, vlm):
        picture = np.zeros((56, 35, 3), np.uint8)
        made_of = cut(picture, vlm.processor.image_processor)
        expected = pooled(SIDE**2 + tiling(2, 1)).reshape(-1, 4)
        np.testing.assert_array_equal(made_of.pooling[9:], expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"resample": 3}, "resample is 3; expected 2"),
            ({"size": {"height": 35, "width": 42}}, "expected a square, a multiple of patch_size"),
            ({"overlap_margins": [2, 3]}, "overlap_margins is [2, 3]; expected a sum below the 5"),
        ],
        ids=str,
    )
    def test_values_that_are_not_implemented(self, made, tmp_path, change, message):
        shutil.copy(made.pair.directory / "config.json", tmp_path)
        save_processor(tmp_path, **change)
        with helpers.raises_line(ValueError, "cannot load the processor", message):
            ports.load_abstract(tmp_path).processor  # noqa: B018

    def test_grey_and_transparent_pictures(self, vlm):
        grey = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
        plain = np.repeat(grey[..., None], 3, axis=2)
        seen = np.concatenate([plain, np.full((20, 30, 1), 255, np.uint8)], axis=2)
        hidden = np.concatenate([plain, np.zeros((20, 30, 1), np.uint8)], axis=2)
        white = np.full((20, 30, 3), 255, np.uint8)

        def pixels(picture):
            return vlm.process([vlm.render("what")], [picture])["pixel_values"]

        for given in (grey, grey[..., None], Image.fromarray(grey), seen, Image.fromarray(seen)):
            np.testing.assert_array_equal(pixels(given), pixels(plain))
        for given in (hidden, Image.fromarray(hidden)):
            np.testing.assert_array_equal(pixels(given), pixels(white))

    def test_a_transparent_file_is_read_as_in_transformers(self, vlm, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        opened = transformers.image_utils.load_image(str(tmp_path / "a.png"))
        read, expected = (
            vlm.process([vlm.render("what")], [each])["pixel_values"]
            for each in (tmp_path / "a.png", opened)
        )
        np.testing.assert_array_equal(read, expected)
        np.testing.assert_array_equal(np.asarray(opened), pixels[..., :3])

    def test_an_image_of_another_kind(self, vlm):
        with helpers.raises_line(ValueError, "rejects an image: it is float64[3, 3]"):
            vlm.process([vlm.render("what")], [np.zeros((3, 3))])

    def test_images_of_another_number(self, vlm):
        with helpers.raises_line(ValueError, "contains <|image|> 0 times for 1 image"):
            vlm.process(["what"], [np.zeros((9, 9, 3), np.uint8)])
