"""Small random Qwen2-VL checkpoints, inputs with images and videos of all sizes, comparisons.

The later Qwens use the same inputs and comparisons.

Sizes are odd on purpose: heads of 10, where time, height and width rotate 1, 2 and 2 frequencies.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import ports
from ports.models.qwen2_vl import model as qwen2_vl
from ports.models.qwen2_vl import processor as qwen2_vl_processor

from . import helpers

VIDEO, START, END = 100, 99, 98  # token ids
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 2, 2]}
TEXT = {**helpers.TEXT, "head_dim": None, "rope_parameters": ROPE}
VISION = {
    "depth": 2,
    "embed_dim": 36,
    "num_heads": 3,
    "mlp_ratio": 2,
    "patch_size": 7,
    "hidden_size": TEXT["hidden_size"],
}
PATCH_VALUES = 3 * 2 * 7 * 7
# Windows of 4 x 4 patches, of which only one image is a multiple; a full block between others.
VISION_2_5 = {
    "depth": 3,
    "hidden_size": 36,
    "num_heads": 3,
    "intermediate_size": 50,
    "out_hidden_size": TEXT["hidden_size"],
    "patch_size": 7,
    "window_size": 28,
    "fullatt_block_indexes": [1],
}
TEXT_3 = {
    **helpers.TEXT,
    # Time turns three frequencies, height and width two each, in turn.
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [3, 2, 2],
        "mrope_interleaved": True,
    },
}
# Positions of 5 x 5 for images of 2 to 10 patches; features of two blocks go to both layers.
VISION_3 = {
    "depth": 3,
    "hidden_size": 36,
    "num_heads": 3,
    "intermediate_size": 50,
    "out_hidden_size": TEXT_3["hidden_size"],
    "patch_size": 7,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 1],
}

# Name -> changes to (the text configuration, the vision configuration, the whole configuration).
VARIANTS: dict[str, tuple[dict, dict, dict]] = {
    "grouped queries": ({}, {}, {}),
    "tied embeddings, other sections": (
        {
            "num_key_value_heads": 6,
            "rope_parameters": {**ROPE, "rope_theta": 500.0, "mrope_section": [3, 1, 1]},
        },
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
    ),
    "sliding window": (
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
        {},
        {},
    ),
}

# Name -> (grids of the images and videos in each row, text tokens in each row). A grid with more
# than one frame is a video.
PROMPTS: dict[str, tuple[list[list[tuple[int, int, int]]], list[int]]] = {
    "images of several sizes": ([[(1, 4, 6), (1, 2, 2), (1, 10, 4)]], [7]),
    "padded on the left, two, no and one image": (
        [[(1, 6, 2), (1, 4, 4)], [], [(1, 2, 8)]],
        [4, 9, 8],
    ),
    "a video and an image": ([[(3, 4, 2), (1, 4, 4)], [(2, 2, 2)]], [5, 9]),
    "no image": ([[], []], [5, 12]),
}


def make_config(
    text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, **top: Any
) -> transformers.Qwen2VLConfig:
    """Returns the small configuration with changes to its parts."""
    return transformers.Qwen2VLConfig(
        text_config={k: v for k, v in {**TEXT, **(text or {})}.items() if k != "head_dim"},
        vision_config={**VISION, **(vision or {})},
        image_token_id=helpers.IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **top,
    )


def make_qwen2_vl(
    directory: Path, config: transformers.Qwen2VLConfig | None = None, **options: Any
) -> helpers.Pair:
    """Saves a random Qwen2-VL; options go to save_pretrained."""
    model = transformers.Qwen2VLForConditionalGeneration(config or make_config())
    return helpers.make_pair(directory, model, **options)


def _later(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": helpers.IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def qwen2_5_vl_config() -> transformers.Qwen2_5_VLConfig:
    """Returns the small configuration of Qwen2.5-VL."""
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    return transformers.Qwen2_5_VLConfig(**_later(text, VISION_2_5))


def make_qwen2_5_vl(directory: Path) -> helpers.Pair:
    """Saves a random Qwen2.5-VL."""
    model = transformers.Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_config())
    return helpers.make_pair(directory, model)


def qwen3_vl_config() -> transformers.Qwen3VLConfig:
    """Returns the small configuration of Qwen3-VL."""
    return transformers.Qwen3VLConfig(**_later(TEXT_3, VISION_3))


def make_qwen3_vl(directory: Path) -> helpers.Pair:
    """Saves a random Qwen3-VL."""
    model = transformers.Qwen3VLForConditionalGeneration(qwen3_vl_config())
    return helpers.make_pair(directory, model)


def make_inputs(
    images: Sequence[Sequence[tuple[int, int, int]]],
    texts: Sequence[int],
    *,
    seed: int = 0,
    apart: bool = False,
) -> dict[str, np.ndarray]:
    """Returns what the processor would, for these images and text tokens per row, padded left; with
    text between the frames of a video if they are `apart`.
    """
    random = np.random.default_rng(seed)
    rows = []
    for grids, text in zip(images, texts, strict=True):
        row = [helpers.BOS]
        for t, h, w in grids:
            token = VIDEO if t > 1 else helpers.IMAGE
            for _ in range(t if apart else 1):
                count = t * h * w // 4 // (t if apart else 1)
                row += [*random.integers(3, END, 2), START, *[token] * count, END]
        rows.append([*row, *random.integers(3, END, text)])
    length = max(map(len, rows))
    ids = np.array([[helpers.PAD] * (length - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": np.array([[0] * (length - len(r)) + [1] * len(r) for r in rows]),
        "mm_token_type_ids": (ids == helpers.IMAGE) + 2 * (ids == VIDEO),
    }
    for pixels, grid, is_kind in (
        ("pixel_values", "image_grid_thw", lambda t: t == 1),
        ("pixel_values_videos", "video_grid_thw", lambda t: t > 1),
    ):
        grids = np.array([g for row in images for g in row if is_kind(g[0])])
        if len(grids):
            shape = (grids.prod(axis=1).sum(), PATCH_VALUES)
            inputs |= {grid: grids, pixels: random.standard_normal(shape, np.float32)}
    return inputs


@functools.cache
def like_transformers_5(directory: Path) -> ports.VLM:
    """Returns the port with positions after videos as in the installed transformers."""
    return ports.load(directory, video_positions="transformers-5")


def original_positions(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the original code's int[3, B, T]: text starts after all positions before it."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    grids = {
        token: iter(inputs.get(name, ()))
        for token, name in ((helpers.IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw"))
    }
    out = np.zeros((3, *ids.shape), np.int64)
    for row in range(len(ids)):
        places: list[list[int]] = []
        columns = np.flatnonzero(mask[row])
        while len(places) < len(columns):
            token = ids[row, columns[len(places)]]
            begin = max((max(place) for place in places), default=-1) + 1
            t, h, w = next(grids[token]) if token in grids else (1, 2, 2)
            places += [
                [begin + i for i in at] for at in np.ndindex(int(t), int(h) // 2, int(w) // 2)
            ]
        out[:, row, columns] = np.transpose(places)
    return out


def torch_forward(model: Any, inputs: Mapping[str, np.ndarray]) -> Any:
    """Does what `helpers.torch_forward` does, with this port's names."""
    return helpers.torch_forward(model, inputs, qwen2_vl.canonical_name)


def site_errors(
    ours: Mapping[str, Any], theirs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns site -> relative error at the tokens, and at the patches of images.

    The port has one padded row per frame; PyTorch has all patches one after the other.
    """
    errors = {}
    for site, states in ours.items():
        # PyTorch's tower puts out its states beside what the merger makes of them.
        states, expected = np.asarray(states), theirs["visual.merger" if site == "visual" else site]
        if "visual" in site:
            grids = inputs["image_grid_thw"]
            sizes = np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])
            expected = expected.reshape(len(expected), -1)
            # The merger joins squares of four patches.
            sizes = sizes * len(expected) // sizes.sum()
            states = np.concatenate([row[:n] for row, n in zip(states, sizes, strict=True)])
            errors[site] = helpers.relative_error(states, expected)
        else:
            tokens = inputs["attention_mask"].astype(bool)
            if site.endswith("embed_tokens"):
                tokens &= ~np.isin(inputs["input_ids"], (helpers.IMAGE, VIDEO))
            errors[site] = helpers.relative_error(states, expected, tokens)
    return errors


def make_processor() -> qwen2_vl_processor.Processor:
    """Returns a processor: images of 14 x 14 to 56 x 70 pixels, a tokenizer of whole words."""
    special = {
        "<|vision_start|>": START,
        "<|vision_end|>": END,
        "<|video_pad|>": VIDEO,
        "<|image_pad|>": helpers.IMAGE,
    }
    words = ["user:", "assistant:", "what", "is", "in", "the", "picture"]
    return qwen2_vl_processor.Processor(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=7, size={"shortest_edge": 14 * 14, "longest_edge": 56 * 70}
        ),
        tokenizer=helpers.make_tokenizer(words, special),
        chat_template=(
            "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
            "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' "
            "else part.text }}{% endfor %} {% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        ),
    )


def check_pictures(qwen: Any) -> None:
    """Checks that a picture becomes as many tokens as its grid says, with the right boxes."""
    make_processor().save_pretrained(qwen.pair.directory)
    vlm = ports.load_abstract(qwen.pair.directory)
    picture = np.random.default_rng(0).integers(0, 60, (40, 60, 3), np.uint8)
    picture[3:7, 48:52] = 255
    inputs = vlm.process([vlm.render("what is it")], [picture])
    grid = inputs["image_grid_thw"][0]
    is_image = inputs["input_ids"] == helpers.IMAGE
    assert is_image.sum() == grid.prod() // 4
    ((layout,),) = vlm.patch_layout(inputs)
    np.testing.assert_array_equal(layout.positions.ravel(), np.flatnonzero(is_image[0]))
    assert layout.positions.shape == (grid[1] // 2, grid[2] // 2)
    # The white corner is where the brightest token's box is.
    tokens = inputs["pixel_values"].reshape(layout.positions.size, -1).mean(1)
    (place,) = np.argwhere(layout.positions == np.flatnonzero(is_image[0])[tokens.argmax()])
    x0, y0, x1, y1 = layout.boxes[tuple(place)]
    assert x0 < 50 / 60 < x1 and y0 < 5 / 40 < y1
