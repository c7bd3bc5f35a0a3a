"""Idefics3 and SmolVLM against PyTorch: sites, logits, tokens, and pictures cut into tiles."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from sklearn.datasets import load_sample_images

import ports
from ports.models import idefics3

from .. import family, helpers
from ..idefics3_helpers import (
    KINDS,
    SIDE,
    VISION,
    WHOLE,
    make_config,
    make_idefics3,
    make_inputs,
    save_processor,
)

PUBLISHED = Path(__file__).parents[2] / "data" / "configs"
# Two images in a row, of which one ends within a patch, none, and one.
IMAGES = make_inputs([[(SIDE, SIDE), (30, 40)], [], [(SIDE, SIDE)]], [4, 9, 8], 4)


def site_errors(ours, theirs, inputs):
    """Returns site -> relative error at all patches, and at the tokens."""
    tokens = inputs["attention_mask"].astype(bool)
    errors = {}
    for site, states in ours.items():
        of_text = site.startswith("model.text_model") or site == "lm_head"
        errors[site] = helpers.relative_error(states, theirs[site], tokens if of_text else None)
    return errors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind) returns the family's small checkpoint."""

    pair = helpers.made_once(tmp_path_factory, make_idefics3)
    functions = (".activation_fn", ".act_fn", ".rotary_emb", ".encoder")
    return lambda kind: family.Family(
        KINDS[kind][2], pair(kind), "model.text_model.layers.0", site_errors, functions
    )


@pytest.fixture(scope="module")
def small(made) -> family.Family:
    return made("idefics3")


def test_every_site_and_the_logits_equal_pytorchs(small):
    family.check_sites(small, IMAGES)


def test_32_greedy_tokens_equal_pytorchs(small):
    family.check_generation(small, IMAGES)


def test_questions_share_a_picture(small, monkeypatch):
    inputs = make_inputs([[(SIDE, SIDE)], [(30, 40)]], [18, 21], 4)
    family.check_questions(small, inputs, monkeypatch, (0, 1, 1, 0))


def test_no_image(small):
    family.check_logits(small, make_inputs([[], []], [5, 12], 4))


def test_smolvlm_is_the_same_model(made):
    inputs = make_inputs([[(SIDE, SIDE)], [], [(SIDE, SIDE), (20, SIDE)]], [4, 9, 8], 9)
    family.check_sites(made("smolvlm"), inputs)
    family.check_generation(made("smolvlm"), inputs)


def test_steering_is_a_hook(small):
    family.check_steering(small, IMAGES)


def test_adapters(small, tmp_path):
    family.check_adapters(small, IMAGES, tmp_path, r".*\.(q_proj|down_proj|fc1|proj)")


@pytest.mark.parametrize("kind", KINDS)
def test_files(made, tmp_path, kind):
    family.check_files(made(kind), tmp_path)


@pytest.mark.slow
def test_eight_devices(small, tmp_path):
    family.check_mesh(small, IMAGES, tmp_path, ["model.vision_model", "model.connector"])


@pytest.mark.parametrize(
    ("kind", "name", "parameters", "share"),
    [
        ("idefics3", "idefics3-8b", 8_462_086_384, 1.002),
        ("smolvlm", "smolvlm2-2b", 2_246_784_880, 1.006),
    ],
)
def test_the_full_size(tmp_path, kind, name, parameters, share):
    values = json.loads((PUBLISHED / f"{name}.json").read_text())
    family.check_full_size(KINDS[kind][2], values, tmp_path, parameters, share)


def test_the_shuffle_by_hand():
    """4 x 4 patches numbered row by row: each token is a square of 2 x 2 of them."""
    patches = jnp.arange(16.0).reshape(1, 16, 1)
    tokens = np.asarray(idefics3.shuffle(patches, 2))[0].tolist()
    assert tokens == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


class TestLayout:
    """What `VLM.prepare` returns for the processor's arrays."""

    def test_drops_padding_images(self, small):
        prepared = small.vlm.prepare(IMAGES)
        assert prepared["pixel_values"].shape == (3, 1, 3, SIDE, SIDE)
        np.testing.assert_array_equal(prepared["pixel_values"][2, 0], IMAGES["pixel_values"][2, 0])

    def test_padding_images_change_nothing(self, small):
        inputs = make_inputs([[(SIDE, SIDE)] * 9], [4], 4)
        assert len(small.vlm.prepare(inputs)["pixel_values"]) == 10
        logits, _ = small.torch_forward(inputs)
        family.assert_logits(small.vlm.forward(inputs).logits, logits, inputs)


class TestMessages:
    def test_another_number_of_tokens(self, small):
        inputs = {**IMAGES, "input_ids": np.where(IMAGES["input_ids"] == 101, 7, 7)}
        with helpers.raises_line(ValueError, "3 images but no image token (id 101)"):
            small.vlm.forward(inputs)

    def test_an_image_that_is_not_square(self, small):
        inputs = {**IMAGES, "pixel_values": IMAGES["pixel_values"][..., :30]}
        inputs["pixel_attention_mask"] = IMAGES["pixel_attention_mask"][..., :30]
        with helpers.raises_line(ValueError, "6 x 4 patches; expected a square", "scale_factor, 3"):
            small.vlm.forward(inputs)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"scale_factor": 4}, "scale_factor is 4; expected a divisor of the tower's 6"),
            ({"text_config": transformers.GemmaConfig()}, "text_config.model_type is 'gemma'"),
            (
                {"vision_config": {**VISION, "hidden_act": "swoosh"}},
                "'swoosh', which is not implemented",
            ),
        ],
    )
    def test_values_that_are_not_implemented(self, changes, message):
        with helpers.raises_line(ValueError, message):
            idefics3.Config.from_hf(make_config("idefics3", **changes))


class TestPhotographs:
    """The photographs in scikit-learn, cut by the processor into tiles of 44 x 44 pixels."""

    @pytest.fixture(scope="class", params=KINDS)
    def photographed(self, request, made):
        kind = made(request.param)
        save_processor(request.param, kind.pair.directory)
        return kind, ports.load(kind.pair.directory)

    def test_become_tiles_and_logits(self, photographed):
        kind, vlm = photographed
        picture = load_sample_images().images[0]  # 427 x 640: 1 x 2 tiles of 2 x 2
        inputs = vlm.process([vlm.render("what is it"), "what <image>"], [picture, picture[:, :50]])
        tiles = inputs["pixel_attention_mask"].any((2, 3)).sum(1)
        tokens = (inputs["input_ids"] == helpers.IMAGE).sum(1)
        np.testing.assert_array_equal(tokens, tiles * vlm.module.config.tokens_per_image)
        assert tiles.tolist() == [5, 3]
        tags = [n for n in inputs["input_ids"][0] if 90 <= n <= 93 or n == WHOLE]
        assert tags == [90, 91, 92, 93, WHOLE]
        logits, _ = kind.torch_forward({k: v for k, v in inputs.items() if "type" not in k})
        family.assert_logits(vlm.forward(inputs).logits, logits, inputs)

    def test_have_a_layout_of_tiles_and_of_the_whole(self, photographed):
        """A white cell on black: the bright patches are those whose boxes contain it."""
        _, vlm = photographed
        picture = np.zeros((80, 160, 3), np.uint8)
        picture[52:56, 70:74] = 255
        inputs = vlm.process([vlm.render("what is it")], [picture])
        ((layout,),) = vlm.patch_layout(inputs)
        side = round(vlm.module.config.tokens_per_image**0.5)
        tiles = (inputs["pixel_attention_mask"].any((2, 3)).sum() - 1) // 2
        assert layout.positions.shape == (tiles * side, 2 * side)
        assert layout.whole.positions.shape == (side, side)
        # The brightest token of the tiles, and of the whole, by pixels alone.
        scale, cut = vlm.module.config.scale * 7, vlm.module.config.vision.side * 7
        pixels = inputs["pixel_values"][0].max(1)[:, :cut, :cut]
        bright = pixels.reshape(-1, side, scale, side, scale).mean((2, 4)).reshape(len(pixels), -1)
        positions = np.flatnonzero(inputs["input_ids"][0] == helpers.IMAGE).reshape(bright.shape)
        for cells, images in ((layout, slice(0, -1)), (layout.whole, slice(-1, None))):
            brightest = positions[images].reshape(-1)[bright[images].argmax()]
            (place,) = np.argwhere(cells.positions == brightest)
            x0, y0, x1, y1 = cells.boxes[tuple(place)]
            assert x0 <= 72 / 160 <= x1 and y0 <= 54 / 80 <= y1
        assert sorted(layout.positions.ravel()) == sorted(positions[:-1].ravel())
