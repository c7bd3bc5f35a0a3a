"""Qwen2.5-VL against PyTorch; what it shares with Qwen2-VL is tested there."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_window_index

import ports
from ports.models import qwen2_5_vl
from ports.models.qwen2_vl import vision as qwen2_vision

from .. import family, helpers
from ..qwen2_vl_helpers import (
    VIDEO,
    check_pictures,
    make_inputs,
    make_qwen2_5_vl,
    qwen2_5_vl_config,
    site_errors,
)

PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "qwen2.5-vl-7b.json"
# Two images in a row, none, and one; videos of two distances between frames beside an image.
IMAGES = make_inputs([[(1, 6, 10), (1, 4, 4)], [], [(1, 2, 8)]], [4, 9, 8])
VIDEOS = make_inputs([[(3, 4, 6), (1, 4, 4)], [(2, 2, 2)]], [5, 19]) | {
    "second_per_grid_ts": np.array([0.3, 1.7], np.float32)
}


def errors_in_order(ours, theirs, inputs):
    """Does what `site_errors` does, with the windows of PyTorch's tower put back in order."""
    index, _ = get_vision_window_index(torch.from_numpy(inputs["image_grid_thw"]), 2, 28, 7)
    back = np.argsort(index.numpy())
    for site, states in theirs.items():
        if site.startswith(("visual.blocks", "visual.merger")):
            theirs[site] = states.reshape(len(back), -1)[back].reshape(states.shape)
    return site_errors(ours, theirs, inputs)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> family.Family:
    directory = tmp_path_factory.mktemp("qwen2_5_vl") / "checkpoint"
    functions = (".act_fn", ".rotary_emb", ".rotary_pos_emb", ".mlp.1", "merger.mlp")
    return family.Family(
        qwen2_5_vl.PORT,
        make_qwen2_5_vl(directory),
        "model.layers.0",
        errors_in_order,
        functions,
    )


def test_every_site_and_the_logits_equal_pytorchs(qwen):
    family.check_sites(qwen, IMAGES)


@pytest.mark.parametrize("inputs", [VIDEOS, make_inputs([[], []], [5, 12])], ids=["videos", "none"])
def test_the_logits_equal_pytorchs(qwen, inputs):
    family.check_logits(qwen, inputs)


@pytest.mark.parametrize("inputs", [IMAGES, VIDEOS], ids=["images", "videos"])
def test_32_greedy_tokens_equal_pytorchs(qwen, inputs):
    family.check_generation(qwen, inputs)


def test_nine_frames_and_ten_share_a_program(qwen):
    videos = (make_inputs([[(t, 4, 6)], [(5, 4, 6)]], [5, 19]) for t in (4, 5))
    seconds = {"second_per_grid_ts": VIDEOS["second_per_grid_ts"]}
    family.check_pieces(qwen, *(inputs | seconds for inputs in videos))


def test_states_of_images_beside_those_of_a_video(qwen):
    """Nine images and eleven frames: each of the tower's calls without what was added to it."""
    inputs = make_inputs([[(1, 2, 2)] * 9 + [(11, 2, 2)]], [5])
    images, frames = qwen.vlm.states(inputs, sites="visual.blocks.0")["visual.blocks.0"]
    assert (len(images), len(frames)) == (9, 11)
    assert np.abs(images).max(axis=(1, 2)).all() and np.abs(frames).max(axis=(1, 2)).all()


def test_steering_is_a_hook(qwen):
    family.check_steering(qwen, IMAGES)


def test_adapters(qwen, tmp_path):
    family.check_adapters(qwen, IMAGES, tmp_path, r".*\.(q_proj|gate_proj|qkv|mlp\.2)")


def test_files(qwen, tmp_path):
    family.check_files(qwen, tmp_path)


@pytest.mark.slow
def test_eight_devices(qwen, tmp_path):
    family.check_mesh(qwen, IMAGES, tmp_path, ["visual.blocks.0", "visual.merger"])


def test_the_full_size(tmp_path):
    values = json.loads(PUBLISHED.read_text())
    # Eight divide neither the 3420 columns of the tower's MLPs nor the four key-value heads; four
    # divide both.
    family.check_full_size(qwen2_5_vl.PORT, values, tmp_path, 8_292_166_656, 1.443, 1.001)


def test_answers_go_on_inside_a_long_video(qwen):
    """By transformers' rule, text after a video of many frames is at earlier positions than its
    last frames, in `generate` as in the forward pass.
    """
    inputs = make_inputs([[(9, 2, 2)]], [1])
    arrays = {name: inputs[name] for name in qwen.port.inputs if name in inputs}
    positions = np.asarray(qwen.vlm.module.positions(arrays))
    following = np.asarray(qwen.vlm.module.next_positions(arrays))
    assert following[0] == positions[0, -1, 0] + 1 < positions.max()
    family.check_generation(qwen, inputs)


def test_positions_of_a_video_by_hand(qwen):
    """Two tokens of text, 3 frames of 1 x 2 tokens 0.6 x 4 = 2.4 positions apart, a token."""
    inputs = {
        "input_ids": np.array([[5, 6, *[VIDEO] * 6, 7]]),
        "video_grid_thw": np.array([[3, 2, 4]]),
        "second_per_grid_ts": np.array([0.6]),
    }
    times = {"transformers-5": 4, "original": 7}
    for rule, after in times.items():
        module = ports.load_abstract(qwen.pair.directory, video_positions=rule).module
        positions = np.asarray(module.positions(inputs))[0]
        assert positions[2:, 0].tolist() == [2, 2, 4, 4, 6, 6, after]
        assert positions[2:8, 1].tolist() == [2] * 6
        assert positions[2:8, 2].tolist() == [2, 3] * 3
        assert np.asarray(module.next_positions(inputs)).tolist() == [after + 1]


def test_attention_in_windows_is_attention_with_a_mask():
    """Two frames of 6 x 10 and 4 x 6 patches in a row, in windows of 4 x 4."""
    random = np.random.default_rng(0)
    index = jnp.arange(84)[None]
    second = index >= 60
    height, width = jnp.where(second, 4, 6), jnp.where(second, 6, 10)
    inside = jnp.where(second, index - 60, index)
    frame = jnp.where(second, 60, 0)
    places = qwen2_vision.patch_places(inside, height, width, frame, 2)
    query, key, value = random.standard_normal((3, 1, 84, 3, 4), np.float32)
    windows = qwen2_5_vl.sort_windows(places, 4)
    ours = qwen2_5_vl.attend_in_windows(query, key, value, windows=windows, longest=16)
    ids = np.stack([frame[0], places.row[0] // 4, places.column[0] // 4])
    same = (ids[:, :, None] == ids[:, None]).all(0)
    scores = np.einsum("thc,shc->hts", query[0], key[0]) / 2
    weights = jax.nn.softmax(np.where(same, scores, -np.inf), axis=-1)
    expected = np.einsum("hts,shc->thc", weights, value[0])
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"window_size": 7}, "window_size is 7; expected the pixels of at least one token, 14"),
        ({"hidden_size": 30}, "vision_config.hidden_size is 30; expected a multiple of 4 x its 3"),
        ({"out_hidden_size": 44}, "vision_config.out_hidden_size is 44; expected the decoder's"),
        ({"hidden_act": "swoosh"}, "'swoosh'"),
    ],
)
def test_values_that_are_not_implemented(vision, message):
    config = qwen2_5_vl_config()
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    with helpers.raises_line(ValueError, message):
        qwen2_5_vl.Config.from_hf(config)


def test_times_of_other_videos_are_refused(qwen):
    inputs = VIDEOS | {"second_per_grid_ts": np.array([0.3])}
    with helpers.raises_line(ValueError, "second_per_grid_ts has shape (1,); expected (2,)"):
        qwen.vlm.forward(inputs)


def test_pictures_through_the_processor(qwen):
    """Its files are those of Qwen2-VL."""
    check_pictures(qwen)
