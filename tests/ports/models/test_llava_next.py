"""LLaVA-NeXT and LLaVA-OneVision against PyTorch: pictures in tiles, several pictures, videos."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

import ports
from ports.models import llava_next, llava_onevision

from .. import family, helpers

PUBLISHED = Path(__file__).parents[2] / "data" / "configs"
SIDE, VIDEO = 28, 100  # pixels per side of a tile of 4 x 4 patches; id of the video token
VISION = {**helpers.VISION, "image_size": SIDE}
CANVASES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE]]
TEXT = {name: value for name, value in helpers.TEXT.items() if name != "head_dim"}
FUNCTIONS = (".activation_fn", ".act_fn", ".act", ".rotary_emb", "_tower", ".encoder", "_model")


def make_config(kind: str, **changes):
    if kind == "next":
        values = {
            "text_config": transformers.MistralConfig(**TEXT, sliding_window=40),
            "vision_config": transformers.CLIPVisionConfig(**VISION),
        }
        config = transformers.LlavaNextConfig
    else:
        values = {
            "text_config": transformers.Qwen2Config(**TEXT),
            "vision_config": transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
            "video_token_index": VIDEO,
            "vision_aspect_ratio": "anyres_max_2",
        }
        config = transformers.LlavaOnevisionConfig
    values |= {"image_token_index": helpers.IMAGE, "image_grid_pinpoints": CANVASES}
    return config(**(values | changes))


KINDS = {
    "next": (transformers.LlavaNextForConditionalGeneration, llava_next),
    "onevision": (transformers.LlavaOnevisionForConditionalGeneration, llava_onevision),
}


def site_errors(ours, theirs, inputs):
    """Returns site -> relative error over the tiles that are not padding, and over the tokens."""
    cut = {}
    for site, states in ours.items():
        of_tiles = not site.startswith("language_model") and states.ndim == theirs[site].ndim
        cut[site] = states[: len(theirs[site])] if of_tiles else states
    return helpers.site_errors(cut, theirs, inputs)


def save_processor(kind: str, directory: Path) -> None:
    """Writes a processor's files beside a checkpoint."""
    words = ["User:", "Assistant:", "what", "is", "it"]
    tokenizer = helpers.make_tokenizer(words, {"<image>": helpers.IMAGE, "<video>": VIDEO})
    template = (
        "{% for m in messages %}User: {% for p in m.content %}"
        "{{ '<image> ' if p.type == 'image' else p.text }}{% endfor %} {% endfor %}Assistant:"
    )
    if kind == "onevision":
        images = LlavaOnevisionImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=CANVASES
        )
        llava_onevision.Processor(images, tokenizer, template).save_pretrained(directory)
        return
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=CANVASES,
    )
    transformers.LlavaNextProcessor(
        images,
        tokenizer,
        chat_template=template,
        patch_size=7,
        image_token="<image>",
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(directory)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> family.Family:
    model, module = KINDS[request.param]
    directory = tmp_path_factory.mktemp("tiles") / request.param
    pair = helpers.make_pair(directory, model(make_config(request.param)))
    layer = "language_model.model.layers.0"
    return family.Family(module.PORT, pair, layer, site_errors, FUNCTIONS)


def make_inputs(config, rows, texts, frames=0):
    """Returns rows of pictures of these sizes and, in the last row, a video; padded on the left."""
    random = np.random.default_rng(0)
    sizes = [size for row in rows for size in row]
    several = [len(row) > 1 for row in rows for _ in row]
    onevision = isinstance(config, llava_onevision.Config)
    whole = [onevision and each for each in several]
    pictures = list(zip(sizes, whole, strict=True))
    counts = [1 if w else 1 + int(np.prod(config.tiles(s))) for s, w in pictures]
    lengths = iter(
        len((config.whole(0, 0) if w else config.features(s, 0, 0)).rows) for s, w in pictures
    )
    video = [VIDEO] * (len(config.video(frames, 0, 0).rows) if frames else 0)
    ids = []
    for row, text in zip(rows, texts, strict=True):
        ids.append(random.integers(5, 95, 2).tolist())
        for _ in row:
            ids[-1] += [helpers.IMAGE] * next(lengths) + random.integers(5, 95, 1).tolist()
        ids[-1] += random.integers(5, 95, text).tolist()
    ids[-1] = ids[-1][:2] + video + ids[-1][2:]
    length = max(map(len, ids))
    inputs = {
        "input_ids": np.array([[0] * (length - len(row)) + row for row in ids]),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    if sizes:
        pixels = np.zeros((len(sizes), max(counts), 3, SIDE, SIDE), np.float32)
        for i, count in enumerate(counts):
            pixels[i, :count] = random.standard_normal((count, 3, SIDE, SIDE))
        inputs |= {"pixel_values": pixels, "image_sizes": np.array(sizes)}
        if onevision:
            inputs["batch_num_images"] = np.array([len(row) for row in rows if row])
    if frames:
        shape = (1, frames, 3, SIDE, SIDE)
        inputs["pixel_values_videos"] = random.standard_normal(shape).astype(np.float32)
    return inputs


@pytest.fixture(scope="module")
def inputs(made):
    """Returns rows of two pictures, none and one, of different sizes."""
    rows = [[(30, 50), (100, 21)], [], [(64, 64)]]
    return make_inputs(made.vlm.sizes, rows, [4, 9, 5])


def test_very_long_pictures(made):
    """Of a wide one, no row of patches remains; of a tall one, only the rows' ends."""
    inputs = make_inputs(made.vlm.sizes, [[(3, 1000)], [(1000, 3)]], [4, 9])
    side = made.vlm.sizes.vision.side
    wide, tall = (inputs["input_ids"] == helpers.IMAGE).sum(1) - side**2
    assert wide == 0 < tall
    expected, _ = made.torch_forward(inputs)
    family.assert_logits(made.vlm.forward(inputs).logits, expected, inputs)
    layouts = [layout for row in made.vlm.patch_layout(inputs) for layout in row]
    assert [layout.positions.size for layout in layouts] == [0, 0]
    assert [layout.whole.positions.size for layout in layouts] == [side**2] * 2


def test_every_site_and_the_logits_equal_pytorchs(made, inputs):
    family.check_sites(made, inputs)


def test_32_greedy_tokens_equal_pytorchs(made, inputs):
    family.check_generation(made, inputs)


def test_questions_share_a_picture(made, monkeypatch):
    inputs = make_inputs(made.vlm.sizes, [[(30, 50)], [(64, 64)]], [18, 21])
    if made.port is llava_next.PORT:  # the decoder's window is shorter than a picture
        family.check_apart(made, inputs)
    else:
        family.check_questions(made, inputs, monkeypatch, (0, 1, 1, 0))


def test_steering_is_a_hook(made, inputs):
    family.check_steering(made, inputs)


def test_adapters(made, inputs, tmp_path):
    family.check_adapters(made, inputs, tmp_path, r".*\.(q_proj|down_proj|linear_1)")


def test_files(made, tmp_path):
    family.check_files(made, tmp_path)


@pytest.mark.slow
def test_eight_devices(made, inputs, tmp_path):
    family.check_mesh(made, inputs, tmp_path, ["multi_modal_projector"])


def test_no_image(made):
    given = make_inputs(made.vlm.sizes, [[], []], [5, 12])
    expected, _ = made.torch_forward(given)
    family.assert_logits(made.vlm.forward(given).logits, expected, given)


def test_the_processors_own_arrays(made, inputs):
    """`apply` prepares them itself, or says that it cannot if they are traced."""
    expected, _ = made.torch_forward(inputs)
    arrays = {name: inputs[name] for name in made.port.inputs if name in inputs}
    family.assert_logits(made.vlm.apply(made.vlm.params, arrays), expected, inputs)
    with helpers.raises_line(ValueError, "the images' sizes are traced", "vlm.place(inputs)"):
        jax.jit(made.vlm.apply)(made.vlm.params, arrays)


def test_videos_and_pictures(made):
    if made.port is llava_next.PORT:
        pytest.skip("LLaVA-NeXT has no videos")
    given = make_inputs(made.vlm.sizes, [[(30, 50)], [(40, 40)]], [4, 6], frames=3)
    expected, _ = made.torch_forward(given)
    family.assert_logits(made.vlm.forward(given).logits, expected, given)
    layouts = made.vlm.patch_layout(given)
    # The three frames, of half as many cells a side, then the picture, resized from 8 x 8.
    assert [layout.positions.shape for layout in layouts[1]] == [(2, 2)] * 3 + [(5, 5)]


@pytest.mark.parametrize(
    ("name", "port", "parameters", "share"),
    [
        ("llava-v1.6-mistral-7b", llava_next.PORT, 7_566_747_648, 1.001),
        ("llava-onevision-qwen2-7b-ov", llava_onevision.PORT, 8_030_348_832, 1.091),
    ],
)
def test_the_full_size(tmp_path, name, port, parameters, share):
    values = json.loads((PUBLISHED / f"{name}.json").read_text())
    family.check_full_size(port, values, tmp_path, parameters, share)


class TestMessages:
    def test_sizes_that_are_missing(self, made, inputs):
        given = {name: value for name, value in inputs.items() if name != "image_sizes"}
        with helpers.raises_line(ValueError, "image_sizes has shape none; expected (3, 2)"):
            made.vlm.forward(given)

    def test_another_number_of_tokens(self, made, inputs):
        ids = inputs["input_ids"].copy()
        ids[0, np.flatnonzero(ids[0] == helpers.IMAGE)[0]] = 7
        with helpers.raises_line(ValueError, "image tokens", "sizes of the images"):
            made.vlm.forward({**inputs, "input_ids": ids})

    def test_too_few_tiles(self, made, inputs):
        given = {**inputs, "pixel_values": inputs["pixel_values"][:, :2]}
        with helpers.raises_line(ValueError, "pixel_values has 2 tiles per image"):
            made.vlm.forward(given)

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            ("next", {"image_grid_pinpoints": [[28, 30]]}, "image_grid_pinpoints has [28, 30]"),
            ("next", {"vision_feature_select_strategy": "full"}, "gives 17 features for 16"),
            ("onevision", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio is 'pad'"),
            ("onevision", {"vision_feature_select_strategy": "default"}, "15 features for 16"),
        ],
    )
    def test_values_that_are_not_implemented(self, kind, changes, message):
        with helpers.raises_line(ValueError, message):
            KINDS[kind][1].Config.from_hf(make_config(kind, **changes))


class TestPhotographs:
    """The photographs in scikit-learn, through the processor, without torch."""

    @pytest.fixture(scope="class")
    def vlm(self, made):
        kind = "next" if made.port is llava_next.PORT else "onevision"
        save_processor(kind, made.pair.directory)
        return ports.load(made.pair.directory)

    def test_become_tiles_and_logits(self, made, vlm):
        picture = load_sample_images().images[0]  # 427 x 640
        inputs = vlm.process([vlm.render("what is it"), "what <image>"], [picture, picture[:, :50]])
        expected, _ = made.torch_forward(inputs)
        family.assert_logits(vlm.forward(inputs).logits, expected, inputs)

    def test_have_a_layout(self, vlm):
        """A white cell on black: the brightest token's box contains it, in tiles and overall."""
        picture = Image.new("RGB", (160, 70))
        ImageDraw.Draw(picture).rectangle((104, 40, 112, 46), fill="white")
        inputs = vlm.process([vlm.render("what is it")], [picture])
        ((layout,),) = vlm.patch_layout(inputs)
        prepared = vlm.prepare(inputs)
        patches = prepared["pixel_values"].reshape(-1, 3, 4, 7, 4, 7).mean((1, 3, 5)).reshape(-1)
        # A feature's brightness is that of the patches it is made of; ends of rows have none.
        table = np.append(patches, patches.min())
        bright = (table[prepared["feature_rows"]] * prepared["feature_weights"]).sum(1)
        places = np.flatnonzero(inputs["input_ids"][0] == helpers.IMAGE)
        for view in (layout, layout.whole):
            values = bright[np.searchsorted(places, view.positions)]
            x0, y0, x1, y1 = view.boxes[np.unravel_index(values.argmax(), values.shape)]
            assert x0 <= 108 / 160 <= x1 and y0 <= 43 / 70 <= y1, view

    def test_boxes_are_of_the_whole_picture_whatever_is_said_of_cropping(self, vlm, monkeypatch):
        """The processor crops tiles, which then have the size of the crop already."""
        own = vlm.processor.image_processor
        monkeypatch.setattr(own, "do_center_crop", True)
        monkeypatch.setattr(own, "size", {"shortest_edge": 28})
        monkeypatch.setattr(own, "crop_size", {"height": 28, "width": 28})
        inputs = vlm.process([vlm.render("what is it")], [Image.new("RGB", (160, 70))])
        ((ours,),) = vlm.patch_layout(inputs, sizes=[[(70, 160)]])
        ((expected,),) = vlm.patch_layout(inputs)
        np.testing.assert_array_equal(ours.boxes, expected.boxes)
        assert ours.boxes[..., 2].max() == 1.0
