"""InternVL against PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from ports.models import internvl

from .. import family, helpers

PUBLISHED = Path(__file__).parents[2] / "data" / "configs" / "internvl3-8b.json"
# 4 x 4 patches, of which 2 x 2 become a token.
VISION = {**helpers.VISION, "image_size": 29}
TOKENS = 4
TEXT = {name: value for name, value in helpers.TEXT.items() if name != "eos_token_id"}


def make_config(kind: str = "qwen3", vision: dict | None = None) -> transformers.InternVLConfig:
    decoders = {"qwen3": transformers.Qwen3Config, "qwen2": transformers.Qwen2Config}
    return transformers.InternVLConfig(
        text_config=decoders[kind](**TEXT),
        vision_config={**VISION, **(vision or {})},
        image_token_id=helpers.IMAGE,
        tie_word_embeddings=kind == "qwen2",
        vision_feature_layer=-1 if kind == "qwen3" else 1,
    )


def make_inputs(tiles: list[int], texts: list[int]) -> dict[str, np.ndarray]:
    """Returns what the processor would, for rows of these numbers of tiles."""
    inputs = helpers.make_inputs(tiles, texts, tokens_per_image=TOKENS)
    shape = (sum(tiles), 3, VISION["image_size"], VISION["image_size"])
    return {**inputs, "pixel_values": np.random.default_rng(0).standard_normal(shape, np.float32)}


# Two images in a row, none, and one, padded on the left.
INPUTS = make_inputs([3, 0, 1], [4, 9, 8])
VARIANTS = {
    "qwen3": {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": True},
    "qwen2": {"use_mean_pooling": False},
}
FUNCTIONS = (".act", ".act_fn", ".activation_fn", ".rotary_emb", "dropout", "_tower", ".encoder")


@pytest.fixture(scope="module", params=VARIANTS)
def intern(request, tmp_path_factory) -> family.Family:
    directory = tmp_path_factory.mktemp("internvl") / "checkpoint"
    config = make_config(request.param, VARIANTS[request.param])
    model = transformers.InternVLForConditionalGeneration(config)
    # What is not there is the identity in PyTorch.
    absent = {
        "qwen3": ("_tower.layernorm",),
        "qwen2": (".attention.q_norm", ".attention.k_norm"),
    }[request.param]
    return family.Family(
        internvl.PORT,
        helpers.make_pair(directory, model),
        "language_model.model.layers.0",
        helpers.site_errors,
        FUNCTIONS + absent,
    )


def test_every_site_and_the_logits_equal_pytorchs(intern):
    family.check_sites(intern, INPUTS)
    family.check_marked_cells(intern, INPUTS)


def test_32_greedy_tokens_equal_pytorchs(intern):
    family.check_generation(intern, INPUTS)


@pytest.mark.parametrize("intern", ["qwen2"], indirect=True)
def test_nine_tiles_and_ten_share_a_program(intern):
    family.check_pieces(intern, make_inputs([5, 4], [4, 9]), make_inputs([5, 5], [4, 9]))


@pytest.mark.parametrize("intern", ["qwen2"], indirect=True)
def test_questions_share_a_picture(intern, monkeypatch):
    inputs = make_inputs([2, 2], [18, 21])
    family.check_questions(intern, inputs, monkeypatch, (0, 1, 1, 0))


@pytest.mark.parametrize("intern", ["qwen3"], indirect=True)
def test_steering_is_a_hook(intern):
    family.check_steering(intern, INPUTS)


@pytest.mark.parametrize("intern", ["qwen3"], indirect=True)
def test_adapters(intern, tmp_path):
    family.check_adapters(intern, INPUTS, tmp_path, r".*\.(q_proj|down_proj|linear_1)")


@pytest.mark.slow
@pytest.mark.parametrize("intern", ["qwen3"], indirect=True)
def test_eight_devices(intern, tmp_path):
    family.check_mesh(intern, INPUTS, tmp_path, ["multi_modal_projector"])


def test_files(intern, tmp_path):
    family.check_files(intern, tmp_path)


def test_the_full_size(tmp_path):
    values = json.loads(PUBLISHED.read_text())
    family.check_full_size(internvl.PORT, values, tmp_path, 7_944_373_760, 1.092)


def test_shuffling_by_hand():
    patches = np.arange(16)[None, :, None]
    joined = internvl.shuffle(patches, 4, 2)[0]
    assert joined.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3; expected 1 over a number that"),
        ({"downsample_ratio": 1 / 3}, "the 4 patches of a side"),
        ({"vision_feature_select_strategy": "full"}, "'full'; expected 'default', without the"),
        ({"vision_feature_layer": [1, 2]}, "vision_feature_layer is [1, 2]; expected a layer"),
        ({"image_size": (29, 36)}, "vision_config.image_size is [29, 36]; expected a square"),
        ({"norm_type": "swoosh"}, "norm_type is 'swoosh'; expected layer_norm or rms_norm"),
        ({"use_mask_token": True}, "vision_config.use_mask_token is true"),
        ({"hidden_act": "swoosh"}, "'swoosh'"),
    ],
    ids=str,
)
def test_values_that_are_not_implemented(change, message):
    config = make_config()
    for name, value in change.items():
        setattr(config if hasattr(config, name) else config.vision_config, name, value)
    with helpers.raises_line(ValueError, message):
        internvl.Config.from_hf(config)
