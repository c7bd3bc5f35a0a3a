"""Gemma 3 against PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from ports.models import gemma3

from .. import family, helpers

PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "gemma-3-4b.json"
# 9 x 9 patches, averaged by twos: the last row and column are left out.
VISION = {**helpers.VISION, "image_size": 64}
TOKENS = 16
TEXT = {
    **helpers.TEXT,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 9,
    "query_pre_attn_scalar": 11,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    # transformers ignores them.
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
}


def make_config(**text) -> transformers.Gemma3Config:
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**(TEXT | text)),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=TOKENS,
        image_token_index=helpers.IMAGE,
    )


def make_inputs(images: list[int], texts: list[int]) -> dict[str, np.ndarray]:
    """Returns what the processor would: images longer than the window, and token types."""
    inputs = helpers.make_inputs(images, texts, tokens_per_image=TOKENS)
    if "pixel_values" in inputs:
        shape = (sum(images), 3, VISION["image_size"], VISION["image_size"])
        inputs["pixel_values"] = np.random.default_rng(0).standard_normal(shape, np.float32)
    types = (inputs["input_ids"] == helpers.IMAGE).astype(np.int64)
    return {**inputs, "token_type_ids": types}


# Two images in a row, none, and one, padded on the left.
INPUTS = make_inputs([2, 0, 1], [4, 9, 8])


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> family.Family:
    directory = tmp_path_factory.mktemp("gemma3") / "checkpoint"
    model = transformers.Gemma3ForConditionalGeneration(make_config())
    functions = (".act_fn", ".activation_fn", ".rotary_emb", ".encoder", ".avg_pool")
    return family.Family(
        gemma3.PORT,
        helpers.make_pair(directory, model),
        "language_model.model.layers.0",
        helpers.site_errors,
        functions,
    )


def test_every_site_and_the_logits_equal_pytorchs(gemma):
    family.check_sites(gemma, INPUTS)
    family.check_marked_cells(gemma, INPUTS)
    family.check_rounding(gemma, INPUTS)


def test_the_logits_without_images_equal_pytorchs(gemma):
    family.check_logits(gemma, make_inputs([0, 0], [5, 12]))


def test_32_greedy_tokens_equal_pytorchs(gemma):
    family.check_generation(gemma, INPUTS)


def test_questions_share_no_picture_longer_than_the_window(gemma):
    family.check_apart(gemma, make_inputs([1, 1], [18, 21]))


def test_steering_is_a_hook(gemma):
    family.check_steering(gemma, INPUTS)


def test_adapters(gemma, tmp_path):
    family.check_adapters(gemma, INPUTS, tmp_path, r".*\.(q_proj|gate_proj|fc1)")


def test_files(gemma, tmp_path):
    family.check_files(gemma, tmp_path)


@pytest.mark.slow
def test_eight_devices(gemma, tmp_path):
    family.check_mesh(gemma, INPUTS, tmp_path, ["multi_modal_projector"])


def test_the_full_size(tmp_path):
    values = json.loads(PUBLISHED.read_text())
    # Eight devices do not divide its four key-value heads.
    family.check_full_size(gemma3.PORT, values, tmp_path, 4_300_079_472, 1.305)


def test_blocks_by_hand(gemma):
    image = helpers.IMAGE
    ids = np.array([[0, image, image, 7, image, image], [5, 6, 7, 8, 9, 10]])
    blocks = gemma.vlm.module.blocks({"input_ids": ids})
    assert blocks.tolist() == [[-1, 1, 1, -1, 2, 2], [-1] * 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_tokens_per_image": 25}, "mm_tokens_per_image is 25; expected a square to which 9 x"),
        ({"mm_tokens_per_image": 100}, "mm_tokens_per_image is 100"),
        ({"use_bidirectional_attention": True}, "text_config.use_bidirectional_attention is true"),
        ({"hidden_activation": "swoosh"}, "'swoosh'"),
    ],
    ids=str,
)
def test_values_that_are_not_implemented(change, message):
    config = make_config()
    for name, value in change.items():
        setattr(config if name.startswith("mm_") else config.text_config, name, value)
    with helpers.raises_line(ValueError, message):
        gemma3.Config.from_hf(config)
