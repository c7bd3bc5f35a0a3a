"""LLaVA with other towers and decoders than CLIP and Llama, against PyTorch."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from ports.models import llava

from .. import family, helpers

FUNCTIONS = (
    *(".act", ".act_fn", ".activation_fn", ".rotary_emb", ".patch_positional_embedding"),
    *(".encoder", ".vision_model", "_tower.transformer"),
)
PUBLISHED = Path(__file__).parents[2] / "data" / "configs"
SIDE, PATCH = helpers.VISION["image_size"], helpers.VISION["patch_size"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Two images in a row, none, and one.
ROWS = ([2, 0, 1], [4, 9, 8])


def pixtral_inputs(rows: list[list[tuple[int, int]]], texts: list[int]) -> dict[str, np.ndarray]:
    """Returns what Pixtral's processor would, for images of these sizes, padded left."""
    random = np.random.default_rng(0)
    break_, end = 99, 98  # what ends a row of patches, and an image
    ids = []
    for images, text in zip(rows, texts, strict=True):
        row = [helpers.BOS, *random.integers(3, end, 2)]
        for height, width in images:
            line = [*[helpers.IMAGE] * (width // PATCH), break_]
            row += [*(line * (height // PATCH))[:-1], end]
        ids.append([*row, *random.integers(3, end, text)])
    length = max(map(len, ids))
    inputs = {
        "input_ids": np.array([[helpers.PAD] * (length - len(row)) + row for row in ids]),
        "attention_mask": np.array([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    sizes = np.array([size for images in rows for size in images])
    pixels = np.zeros((len(sizes), 3, *sizes.max(axis=0)), np.float32)
    for image, (height, width) in zip(pixels, sizes, strict=True):
        image[:, :height, :width] = random.standard_normal((3, height, width))
    return {**inputs, "pixel_values": pixels, "image_sizes": sizes}


def pixtral_errors(ours, theirs, inputs):
    """Does what `helpers.site_errors` does; PyTorch's tower has all images' patches in one row."""
    patches = inputs["image_sizes"] // PATCH
    rows, columns = patches.max(axis=0)
    ours, theirs = dict(ours), dict(theirs)
    for site, states in ours.items():
        if site.startswith("language_model"):
            continue
        states = np.asarray(states).reshape(len(patches), rows, columns, -1)
        grids = [grid[:h, :w] for grid, (h, w) in zip(states, patches, strict=True)]
        expected = theirs[site]
        if site.endswith("patch_conv"):
            pairs = zip(np.moveaxis(expected, 1, -1), patches, strict=True)
            expected = [grid[:h, :w].reshape(h * w, -1) for grid, (h, w) in pairs]
            expected = np.concatenate(expected)
        ours[site] = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids])
        theirs[site] = expected
    return helpers.site_errors(ours, theirs, inputs)


def make(name: str) -> transformers.LlavaConfig:
    text = dict(helpers.TEXT)
    options: dict = {"image_token_index": helpers.IMAGE}
    if name == "siglip and qwen2":
        # Tied, as in the smallest LLaVA-Interleave, which says so of the decoder alone.
        text |= {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 9}
        options["text_config"] = transformers.Qwen2Config(**text, max_window_layers=1)
        options["vision_config"] = transformers.SiglipVisionConfig(**helpers.VISION)
        options |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    elif name == "clip and mistral":
        text |= {"sliding_window": 9, "max_position_embeddings": 20}
        rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}
        options["text_config"] = transformers.MistralConfig(**text, rope_parameters=rope)
        options["vision_config"] = transformers.CLIPVisionConfig(**helpers.VISION)
        options["vision_feature_layer"] = -1
    else:
        options["text_config"] = transformers.LlamaConfig(**text, rope_parameters=LLAMA3)
        vision = {**helpers.VISION, "image_size": 70}
        options["vision_config"] = transformers.PixtralVisionConfig(**vision)
        options |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    return transformers.LlavaConfig(**options)


@pytest.fixture(scope="module", params=["siglip and qwen2", "clip and mistral", "pixtral"])
def case(request, tmp_path_factory) -> tuple[family.Family, dict[str, np.ndarray]]:
    directory = tmp_path_factory.mktemp("llava") / "checkpoint"
    pair = helpers.make_llava(directory, make(request.param))
    errors = helpers.site_errors
    if request.param == "pixtral":
        inputs, errors = (
            pixtral_inputs([[(21, 35), (14, 7)], [], [(40, 20)]], [4, 9, 8]),
            pixtral_errors,
        )
    else:
        per_image = pair.vlm.module.config.tokens_per_image
        inputs = helpers.make_inputs(*ROWS, tokens_per_image=per_image)
    layer = "language_model.model.layers.0"
    return family.Family(llava.PORT, pair, layer, errors, FUNCTIONS), inputs


def test_every_site_and_the_logits_equal_pytorchs(case):
    family.check_sites(*case)
    family.check_marked_cells(*case)


def test_32_greedy_tokens_equal_pytorchs(case):
    checked, inputs = case
    family.check_generation(checked, inputs)


def test_files(case, tmp_path):
    family.check_files(case[0], tmp_path)


@pytest.mark.parametrize(
    ("name", "parameters", "share"),
    [
        ("llava-1.5-13b", 13_351_494_656, 1.001),
        ("bakllava-v1", 7_566_743_552, 1.002),
        ("llava-interleave-qwen-7b", 8_141_100_576, 1.002),
        ("pixtral-12b", 12_682_739_712, 1.001),
    ],
)
def test_the_full_size(tmp_path, name, parameters, share):
    values = json.loads((PUBLISHED / f"{name}.json").read_text())
    family.check_full_size(llava.PORT, values, tmp_path, parameters, share)


def test_cells_of_pixtrals_pictures_by_hand():
    config = llava.Config.from_hf(make("pixtral"))
    inputs = pixtral_inputs([[(14, 21)], []], [2, 3])
    (layout,), none = llava.patch_layout(config, inputs, lambda: None)
    first = list(inputs["input_ids"][0]).index(helpers.IMAGE)
    # A token ends the first row.
    rows = [[first, first + 1, first + 2], [first + 4, first + 5, first + 6]]
    assert layout.positions.tolist() == rows
    np.testing.assert_allclose(layout.boxes[1, 2], [2 / 3, 0.5, 1, 1])
    assert none == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": np.array([[14, 21], [7, 7]])}, "shape (2, 2); expected (1, 2), height"),
        ({"image_sizes": np.array([[14, 14]])}, "give 4 image features, but the prompts hold 6"),
        ({"pixel_values": np.zeros((1, 14, 21))}, "shape (1, 14, 21); expected [images, 3, height"),
    ],
    ids=["sizes", "tokens", "pixels"],
)
def test_inputs_that_do_not_fit_pixtral(change, message):
    config = llava.Config.from_hf(make("pixtral"))
    inputs = pixtral_inputs([[(14, 21)]], [2]) | change
    with helpers.raises_line(ValueError, message):
        llava.prepare_inputs(config, inputs)
