"""Qwen3-VL against PyTorch; what it shares with Qwen2-VL is tested there."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from ports.models import qwen3_vl
from ports.models.qwen2_vl import vision as qwen2_vision

from .. import family, helpers
from ..qwen2_vl_helpers import (
    VIDEO,
    check_pictures,
    make_inputs,
    make_qwen3_vl,
    qwen3_vl_config,
    site_errors,
)

PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "qwen3-vl-8b.json"
# Two images in a row, none, and one; videos with text between their frames beside an image.
IMAGES = make_inputs([[(1, 6, 10), (1, 4, 4)], [], [(1, 2, 8)]], [4, 9, 8])
VIDEOS = make_inputs([[(3, 4, 6), (1, 4, 4)], [(2, 2, 2)]], [5, 19], apart=True)
LAYER = "model.language_model.layers.0"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> family.Family:
    directory = tmp_path_factory.mktemp("qwen3_vl") / "checkpoint"
    # The tower has several outputs, and features for the decoder among them; PyTorch's table of
    # positions puts out the four neighbours of each patch.
    functions = (".act_fn", ".rotary_emb", ".rotary_pos_emb", ".visual", ".pos_embed")
    own = tuple(f"model.language_model.deepstack.{i}" for i in (0, 1))
    pair = make_qwen3_vl(directory)
    return family.Family(qwen3_vl.PORT, pair, LAYER, site_errors, functions, own)


def test_every_site_and_the_logits_equal_pytorchs(qwen):
    family.check_sites(qwen, IMAGES)


@pytest.mark.parametrize("inputs", [VIDEOS, make_inputs([[], []], [5, 12])], ids=["videos", "none"])
def test_the_logits_equal_pytorchs(qwen, inputs):
    family.check_logits(qwen, inputs)


@pytest.mark.parametrize("inputs", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_32_greedy_tokens_equal_pytorchs(qwen, inputs):
    family.check_generation(qwen, inputs)


def test_questions_share_a_picture(qwen, monkeypatch):
    inputs = make_inputs([[(1, 4, 4)], [(1, 4, 8)]], [18, 21])
    family.check_questions(qwen, inputs, monkeypatch, (0, 1, 1, 0))


def test_layers_are_before_the_addition_of_features_and_deepstack_after_it(qwen):
    sites = [LAYER, "model.language_model.deepstack.0", "model.language_model.layers.1"]
    states = qwen.vlm.forward(IMAGES, sites=qwen.vlm.sites).states
    before, after, _ = (np.asarray(states[site]) for site in sites)
    with torch.no_grad():
        inner = qwen.pair.torch_model.model
        pixels, grid = (
            helpers.to_torch(IMAGES)[name] for name in ("pixel_values", "image_grid_thw")
        )
        deep = inner.visual(pixels, grid_thw=grid, return_dict=True).deepstack_features[0]
    added = np.zeros_like(before)
    added[IMAGES["input_ids"] == helpers.IMAGE] = deep.numpy()
    tokens = IMAGES["attention_mask"] == 1
    assert np.abs(added).max() > 0.1
    assert helpers.relative_error(after, before + added, tokens) < 1e-5


def test_steering_is_a_hook(qwen):
    family.check_steering(qwen, IMAGES)


def test_adapters(qwen, tmp_path):
    family.check_adapters(qwen, IMAGES, tmp_path, r".*\.(q_proj|qkv|linear_fc2)")


def test_files(qwen, tmp_path):
    family.check_files(qwen, tmp_path)


@pytest.mark.slow
def test_eight_devices(qwen, tmp_path):
    sites = ["model.visual.blocks.0", "model.visual.deepstack_merger_list.0"]
    family.check_mesh(qwen, IMAGES, tmp_path, sites)


def test_the_full_size(tmp_path):
    values = json.loads(PUBLISHED.read_text())
    family.check_full_size(qwen3_vl.PORT, values, tmp_path, 8_767_123_696, 1.004)


def test_positions_are_interpolated_as_in_transformers():
    """Frames of 6 x 2 and 2 x 8 patches, from 5 x 5 positions."""
    grid = torch.tensor([[1, 6, 2], [1, 2, 8]])
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid, 5, "bilinear", align_corners=True, spatial_merge_size=2
    )
    table = np.random.default_rng(0).standard_normal((5, 5, 3)).astype(np.float32)
    expected = (table.reshape(25, 3)[indices] * weights.numpy()[..., None]).sum(1)
    index = jnp.arange(28)[None]
    second = index >= 12
    places = qwen2_vision.patch_places(
        jnp.where(second, index - 12, index),
        jnp.where(second, 2, 6),
        jnp.where(second, 8, 2),
        jnp.where(second, 12, 0),
        2,
    )
    ours = qwen3_vl.interpolate(jnp.asarray(table), places)
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-6)
    # By hand: the corner, and the middle of the first row of two patches.
    np.testing.assert_allclose(ours[0, 0], table[0, 0], rtol=0, atol=1e-6)


def test_frames_of_a_video_are_images_in_the_positions_by_hand(qwen):
    """A token, a frame of 1 x 2, a token (the next time), a frame, a token."""
    inputs = {
        "input_ids": np.array([[5, VIDEO, VIDEO, 6, VIDEO, VIDEO, 7]]),
        "video_grid_thw": np.array([[2, 2, 4]]),
    }
    positions = np.asarray(qwen.vlm.module.positions(inputs))[0]
    assert positions[:, 0].tolist() == [0, 1, 1, 3, 4, 4, 6]
    assert positions[:, 1].tolist() == [0, 1, 1, 3, 4, 4, 6]
    assert positions[:, 2].tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"num_position_embeddings": 26}, "num_position_embeddings is 26; expected the square"),
        ({"deepstack_visual_indexes": [1, 0]}, "deepstack_visual_indexes is [1, 0]; expected asc"),
        ({"deepstack_visual_indexes": [1, 3]}, "deepstack_visual_indexes is [1, 3]; expected asc"),
        ({"out_hidden_size": 44}, "vision_config.out_hidden_size is 44; expected the decoder's"),
    ],
)
def test_values_that_are_not_implemented(vision, message):
    config = qwen3_vl_config()
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    with helpers.raises_line(ValueError, message):
        qwen3_vl.Config.from_hf(config)


def test_more_features_than_layers_are_refused():
    config: Any = qwen3_vl_config()
    config.text_config.num_hidden_layers = 1
    with helpers.raises_line(ValueError, "has 2 blocks; expected at most one for each of the dec"):
        qwen3_vl.Config.from_hf(config)


def test_pictures_through_the_processor(qwen):
    """Its files are those of Qwen2-VL."""
    check_pictures(qwen)
