"""Qwen2-VL against PyTorch: positions, every module's output, the logits, 32 greedy tokens."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

import ports
from ports import checkpoint
from ports.models.qwen2_vl import model as qwen2_vl

from ... import helpers
from ...qwen2_vl_helpers import (
    PROMPTS,
    VARIANTS,
    VIDEO,
    like_transformers_5,
    make_config,
    make_inputs,
    make_processor,
    make_qwen2_vl,
    original_positions,
    site_errors,
    torch_forward,
)

LEFT = "padded on the left, two, no and one image"
CASES = [
    *(("grouped queries", prompt) for prompt in PROMPTS),
    *((variant, LEFT) for variant in list(VARIANTS)[1:]),
]
parametrize_cases = pytest.mark.parametrize(
    ("variant", "prompt"), CASES, ids=[": ".join(case) for case in CASES]
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[str], helpers.Pair]:
    """pair(variant) returns the checkpoint of that name in `VARIANTS`."""

    def make(directory: Path, variant: str) -> helpers.Pair:
        text, vision, top = VARIANTS[variant]
        return make_qwen2_vl(directory, make_config(text, vision, **top))

    return helpers.made_once(tmp_path_factory, make)


@pytest.fixture(scope="module")
def small(pair) -> helpers.Pair:
    """Returns the small checkpoint, for tests that need any checkpoint."""
    return pair("grouped queries")


@parametrize_cases
def test_every_site_and_the_logits_equal_pytorchs(pair, variant, prompt):
    pair = pair(variant)
    inputs = make_inputs(*PROMPTS[prompt])
    logits, states = torch_forward(pair.torch_model, inputs)
    # A tower that ran for images and for videos was captured twice here, once there.
    seen = "pixel_values" in inputs and "pixel_values_videos" not in inputs
    vlm = like_transformers_5(pair.directory)
    sites = [site for site in vlm.sites if seen or not site.startswith("visual")]
    ours = vlm.forward(inputs, sites=sites)

    errors = site_errors(ours.states, states, inputs)
    assert set(errors) == set(sites)
    assert max(errors.values()) < 1e-5, errors
    valid = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(ours.logits)[valid], logits[valid], rtol=0, atol=1e-4)


@parametrize_cases
def test_32_greedy_tokens_equal_pytorchs(pair, variant, prompt):
    pair = pair(variant)
    inputs = make_inputs(*PROMPTS[prompt])
    theirs = helpers.torch_generate(pair.torch_model, inputs, 32).sequences
    ours = like_transformers_5(pair.directory).generate(inputs, max_new_tokens=32)
    np.testing.assert_array_equal(ours.tokens, theirs[:, inputs["input_ids"].shape[1] :])


def test_the_sites_are_pytorchs_modules_but_for_activations_and_containers(small):
    inputs = make_inputs([[(1, 4, 4)]], [4])
    _, states = torch_forward(small.torch_model, inputs)
    functions = (".act", ".act_fn", ".rotary_emb", ".rotary_pos_emb", ".mlp.1", "merger.mlp")
    modules = {site for site in states if not site.endswith(functions)}
    assert modules == set(small.vlm.sites)


def test_the_sites_of_the_references_scripts_are_there(small):
    names = ("model.layers.1", "model.norm", "visual.blocks.0", "visual.merger", "lm_head")
    assert small.vlm.check_sites(names) == names


class TestPositions:
    def test_by_hand(self, small):
        # One token before an image of 2 x 1 tokens, and two after it.
        image = helpers.IMAGE
        inputs = {
            "input_ids": np.array([[0, 7, image, image, 8, 9]]),
            "attention_mask": np.array([[0, 1, 1, 1, 1, 1]]),
            "image_grid_thw": np.array([[1, 4, 2]]),
        }
        positions = jax.jit(small.vlm.module.positions)(inputs)[0, 1:]
        assert positions.tolist() == [[0, 0, 0], [1, 1, 1], [1, 2, 1], [3, 3, 3], [4, 4, 4]]

    @pytest.mark.parametrize("prompt", [name for name in PROMPTS if name != "no image"])
    def test_like_transformers_5_are_pytorchs(self, small, prompt):
        inputs = make_inputs(*PROMPTS[prompt])
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        tensors = helpers.to_torch(inputs)
        expected, _ = small.torch_model.model.get_rope_index(
            **{name: tensors[name] for name in (*names, "attention_mask") if name in tensors}
        )
        self.check(like_transformers_5(small.directory), inputs, expected.numpy())

    @staticmethod
    def check(vlm, inputs, expected):
        ours = jax.jit(vlm.module.positions)(
            {name: inputs[name] for name in qwen2_vl.INPUTS if name in inputs}
        )
        valid = inputs["attention_mask"].astype(bool)
        np.testing.assert_array_equal(ours[valid], np.moveaxis(expected, 0, -1)[valid])

    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_are_the_originals(self, small, prompt):
        inputs = make_inputs(*PROMPTS[prompt])
        self.check(small.vlm, inputs, original_positions(inputs))

    @pytest.mark.parametrize(
        ("rule", "after"), [("original", [7, 8, 9]), ("transformers-5", [4, 5, 6])]
    )
    def test_after_more_frames_than_rows_by_hand(self, small, rule, after):
        """Two tokens of text, five frames of 1 x 2 tokens at 2 to 6, three tokens of text."""
        config = dataclasses.replace(small.vlm.module.config, video_positions=rule)
        inputs = {
            "input_ids": np.array([[5, 6, *[VIDEO] * 10, 7, 8, 9]]),
            "video_grid_thw": np.array([[5, 2, 4]]),
        }
        positions = np.asarray(qwen2_vl.Qwen2VL(config).positions(inputs))[0]
        np.testing.assert_array_equal(positions[:2], [[0] * 3, [1] * 3])
        frames = [[2 + frame, 2, 2 + column] for frame in range(5) for column in range(2)]
        np.testing.assert_array_equal(positions[2:12], frames)
        np.testing.assert_array_equal(positions[12:], [[place] * 3 for place in after])

    def test_an_unknown_rule(self, small):
        with helpers.raises_line(ValueError, "video_positions is 'x'; expected one of original"):
            ports.load(small.directory, video_positions="x")

    def test_a_rule_for_a_model_without_videos(self, llava_pair):
        directory = llava_pair("grouped queries").directory
        line = (f"{directory} has model_type llava", "which only qwen2_vl, qwen2_5_vl support")
        with helpers.raises_line(ValueError, *line):
            ports.load(directory, video_positions="transformers-5")

    def test_of_text_are_its_indices(self, small):
        inputs = make_inputs([[], []], [3, 6])
        positions = np.asarray(small.vlm.module.positions(inputs))
        expected = np.cumsum(inputs["attention_mask"], axis=1) - 1
        valid = inputs["attention_mask"].astype(bool)
        for component in range(3):
            np.testing.assert_array_equal(positions[valid][:, component], expected[valid])


def test_answers_go_on_after_the_largest_position_of_a_video(small):
    """PyTorch predicts the same answers if it is given the original code's positions."""
    inputs = make_inputs([[(5, 4, 2), (1, 4, 4)], [(6, 2, 2)]], [0, 7])
    tokens = small.vlm.generate(inputs, max_new_tokens=6).tokens
    whole = inputs | {
        "input_ids": np.concatenate([inputs["input_ids"], tokens], axis=1),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (0, 6)), constant_values=1),
        "mm_token_type_ids": np.pad(inputs["mm_token_type_ids"], ((0, 0), (0, 6))),
    }
    positions = original_positions(whole)
    assert not np.array_equal(positions[0][:, -1], like_transformers_5_last(small, whole))
    with torch.no_grad():
        tensors = helpers.to_torch(whole | {"position_ids": positions})
        expected = small.torch_model(**tensors).logits.numpy()
    np.testing.assert_array_equal(expected[:, -7:-1].argmax(-1), tokens)
    valid = whole["attention_mask"].astype(bool)
    logits = np.asarray(small.vlm.forward(whole).logits)
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=0, atol=1e-4)


def like_transformers_5_last(pair, inputs) -> np.ndarray:
    """Returns int[B], the rotary position of the last token by the other rule."""
    arrays = {name: inputs[name] for name in qwen2_vl.INPUTS if name in inputs}
    return np.asarray(like_transformers_5(pair.directory).module.positions(arrays))[:, -1, 0]


@pytest.mark.parametrize("prompt", [LEFT, "a video and an image"])
def test_apply_takes_the_processors_arrays_as_they_are(small, prompt):
    inputs = make_inputs(*PROMPTS[prompt])
    expected, _ = torch_forward(small.torch_model, inputs)
    arrays = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    vlm = like_transformers_5(small.directory)
    logits = jax.jit(vlm.apply)(vlm.params, arrays)
    valid = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=0, atol=1e-4)


def test_edits_of_heads_are_hooks_before_the_projection(small):
    inputs, vlm = make_inputs([[(1, 4, 4)]], [4]), like_transformers_5(small.directory)
    helpers.check_edit_of_heads(vlm, small.torch_model, inputs, "model.layers.0")


def test_states_of_generated_tokens_are_those_that_predicted_them(small):
    inputs = make_inputs(*PROMPTS[LEFT])
    options = {"output_hidden_states": True, "output_logits": True}
    theirs = helpers.torch_generate(small.torch_model, inputs, 4, **options)
    expected = {
        "model.layers.0": [step[1][:, -1] for step in theirs.hidden_states],
        "model.norm": [step[2][:, -1] for step in theirs.hidden_states],
        "lm_head": theirs.logits,
    }
    ours = small.vlm.generate(inputs, max_new_tokens=4, sites=list(expected)).states
    for site, steps in expected.items():
        assert helpers.relative_error(ours[site], np.stack(steps, axis=1)) < 1e-5


def test_steering_changes_image_positions_alone(small):
    inputs = make_inputs(*PROMPTS["a video and an image"])
    edits = {"model.layers.0": ports.add(np.ones(60), where="image")}
    arrays = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    steered = ports.steer(small.vlm.apply, edits, masks=True)
    # Compiled for the masks alone.
    masks = jax.jit(lambda *args: steered(*args)[1])(small.vlm.params, arrays)
    expected = np.isin(inputs["input_ids"], (helpers.IMAGE, VIDEO))
    np.testing.assert_array_equal(masks["model.layers.0"][0], expected)


@pytest.mark.parametrize("site", ["model.layers.1", "model.norm"])
def test_a_sweep_is_each_of_its_variants(small, site):
    helpers.check_sweep(small.vlm, make_inputs(*PROMPTS[LEFT]), site)


def test_padding_on_either_side_gives_the_same_answers(small):
    left = make_inputs(*PROMPTS[LEFT])
    right = helpers.pad_right(left)
    expected, answers = (small.vlm.generate(x, max_new_tokens=32).tokens for x in (left, right))
    np.testing.assert_array_equal(answers, expected)
    expected = np.asarray(small.vlm.forward(left).logits)[left["attention_mask"] == 1]
    logits = np.asarray(small.vlm.forward(right).logits)[right["attention_mask"] == 1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


class TestLayout:
    """What `VLM.prepare` returns for the processor's arrays."""

    def test_has_a_row_per_frame_and_few_lengths(self, small):
        shapes = set()
        for side in (4, 6, 8, 10):
            inputs = make_inputs([[(1, side, 4), (1, 2, 2)]], [5])
            shapes.add(small.vlm.prepare(inputs)["pixel_values"].shape)
        assert shapes == {(2, 16, 294), (2, 32, 294), (2, 48, 294)}
        inputs = make_inputs([[(3, 4, 2)]], [5])
        assert small.vlm.prepare(inputs)["pixel_values_videos"].shape == (3, 16, 294)

    def test_keeps_every_patch(self, small):
        inputs = make_inputs([[(1, 4, 6), (1, 2, 2)]], [5])
        first, second = small.vlm.prepare(inputs)["pixel_values"]
        np.testing.assert_array_equal(first[:24], inputs["pixel_values"][:24])
        np.testing.assert_array_equal(second[:4], inputs["pixel_values"][24:])
        assert not first[24:].any() and not second[4:].any()


class TestMessages:
    @pytest.fixture
    def inputs(self):
        return make_inputs([[(1, 4, 6)]], [5])

    def check(self, small, inputs, *parts):
        with helpers.raises_line(ValueError, *parts):
            small.vlm.forward(inputs)

    def test_no_image_token_in_the_prompt(self, small, inputs):
        inputs["input_ids"] = np.where(inputs["input_ids"] == helpers.IMAGE, 7, inputs["input_ids"])
        self.check(small, inputs, "1 images but no image token (id 101)")

    def test_positions_of_ones_own(self, small, inputs):
        inputs["position_ids"] = np.zeros_like(inputs["input_ids"])
        self.check(small, inputs, "position_ids are not inputs of this model family")

    def test_another_number_of_tokens(self, small, inputs):
        inputs["input_ids"][inputs["input_ids"] == helpers.IMAGE] = [7] + [helpers.IMAGE] * 5
        self.check(small, inputs, "1 images give 6 image features", "hold 5 image tokens")

    def test_video_tokens_without_a_video(self, small, inputs):
        inputs["input_ids"][0, -1] = VIDEO
        self.check(small, inputs, "0 videos give 0 video features", "1 video tokens")

    def test_a_grid_for_other_patches(self, small, inputs):
        inputs["image_grid_thw"] = np.array([[1, 4, 8]])
        self.check(small, inputs, "image_grid_thw describes 32 patches", "pixel_values has 24")

    def test_pixels_without_a_grid(self, small, inputs):
        del inputs["image_grid_thw"]
        self.check(small, inputs, "inputs have pixel_values without image_grid_thw")

    def test_an_image_smaller_than_a_square_of_patches(self, small, inputs):
        inputs["image_grid_thw"] = np.array([[1, 1, 24]])
        self.check(small, inputs, "image_grid_thw of image 0 is [1, 1, 24]", "multiples of 2")

    def test_grids_in_another_order_than_their_images(self, small):
        inputs = make_inputs([[(1, 4, 6), (1, 2, 2)]], [5])
        inputs["image_grid_thw"] = inputs["image_grid_thw"][::-1]
        self.check(small, inputs, "the 6 tokens of image 1", "not consecutive")

    def test_an_image_torn_between_two_prompts(self, small):
        inputs = make_inputs([[(1, 4, 6)], [(1, 4, 6)]], [1, 1])
        first, second = inputs["input_ids"]
        first[-1], second[second.tolist().index(helpers.IMAGE)] = helpers.IMAGE, 7
        self.check(small, inputs, "the 6 tokens of image 1", "not consecutive")

    def test_patches_of_another_size(self, small, inputs):
        inputs["pixel_values"] = inputs["pixel_values"][:, :-1]
        self.check(small, inputs, "pixel_values has shape (24, 293); expected [patches, 294]")


class TestConfiguration:
    @pytest.mark.parametrize(
        ("text", "vision", "parts"),
        [
            (
                {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
                {},
                ("'longrope'",),
            ),
            ({}, {"embed_dim": 30}, ("embed_dim is 30", "3 heads")),
            ({}, {"hidden_size": 44}, ("44", "60", "decoder's width")),
            ({}, {"hidden_act": "swoosh"}, ("swoosh",)),
            (
                {"sliding_window": 11, "layer_types": ["full_attention", "chunked_attention"]},
                {},
                ("layer_types is ['full_attention', 'chunked_attention']", "'sliding_attention'"),
            ),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_is_refused_by_name(self, text, vision, parts):
        config = make_config()
        config.text_config.use_sliding_window = True
        for name, value in text.items():
            setattr(config.text_config, name, value)
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        with helpers.raises_line(ValueError, *parts):
            qwen2_vl.Config.from_hf(config)

    def test_of_the_hub_has_the_decoders_values_at_its_top(self, small, tmp_path):
        values = json.loads((small.directory / "config.json").read_text())
        text = values.pop("text_config")
        rope = text.pop("rope_parameters")
        sections = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        flat = {**text, **values, "rope_theta": rope["rope_theta"], "rope_scaling": sections}
        flat.pop("layer_types")
        flat["vision_config"]["model_type"] = "qwen2_vl"  # as older checkpoints call it
        (tmp_path / "config.json").write_text(json.dumps(flat))
        assert ports.load_abstract(tmp_path).module.config == small.vlm.module.config

    def test_a_related_model(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe"}')
        with helpers.raises_line(ValueError, "'qwen3_vl_moe' is not supported", "qwen2_vl"):
            ports.load(tmp_path)


class TestNames:
    def test_of_transformers_5_are_those_of_the_hub(self, small):
        names = set(checkpoint.stored_shapes(small.vlm.params))
        theirs = {qwen2_vl.canonical_name(name) for name in small.torch_model.state_dict()}
        assert theirs == names

    @pytest.mark.parametrize(
        ("name", "canonical"),
        [
            ("model.visual.blocks.3.attn.qkv.weight", "visual.blocks.3.attn.qkv.weight"),
            (
                "model.language_model.layers.2.mlp.up_proj.weight",
                "model.layers.2.mlp.up_proj.weight",
            ),
            ("model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"),
            ("lm_head.weight", "lm_head.weight"),
            ("visual.rotary_pos_emb.inv_freq", None),
            ("model.rotary_emb.inv_freq", None),
        ],
    )
    def test_of_checkpoints(self, name, canonical):
        assert qwen2_vl.canonical_name(name) == canonical

    def test_written_by_transformers_load_as_well(self, small, tmp_path):
        """A file with the new names gives the same parameters as one with the hub's names."""
        stored = {k: v.numpy() for k, v in small.torch_model.state_dict().items()}
        assert any(name.startswith("model.language_model.") for name in stored)
        (tmp_path / "config.json").write_text((small.directory / "config.json").read_text())
        safetensors.numpy.save_file(stored, tmp_path / "model.safetensors")
        jax.tree.map(np.testing.assert_array_equal, ports.load(tmp_path).params, small.vlm.params)

    def test_survive_saving(self, small, tmp_path):
        checkpoint.save_params(small.vlm.params, tmp_path)
        (tmp_path / "config.json").write_text((small.directory / "config.json").read_text())
        jax.tree.map(np.testing.assert_array_equal, ports.load(tmp_path).params, small.vlm.params)


class TestPhotographs:
    """The pictures in scikit-learn, 640 x 427 pixels, through the checkpoint's processor."""

    @pytest.fixture(scope="class")
    def photographs(self):
        return [Image.fromarray(pixels) for pixels in load_sample_images().images]

    @pytest.fixture(scope="class")
    def photographed(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("photographed")
        pair = make_qwen2_vl(directory)
        make_processor().save_pretrained(directory)
        return pair

    @pytest.fixture(scope="class")
    def inputs(self, photographed, photographs):
        china, flower = photographs
        upright = flower.transpose(Image.Transpose.ROTATE_90).resize((80, 300))
        prompts = [
            "is it <|image_pad|> or <|image_pad|> in the picture",
            photographed.vlm.render("what is it"),
        ]
        return photographed.vlm.process(prompts, [[china, upright], flower])

    def test_no_tokenizer_is_not_an_empty_one(self, photographed, tmp_path):
        """transformers silently makes one without any words."""
        directory = shutil.copytree(photographed.directory, tmp_path / "copy")
        for file in directory.glob("tokenizer*"):
            file.unlink()
        vlm = ports.load_abstract(directory)
        for what in ("tokenizer", "processor"):
            with helpers.raises_line(ValueError, f"cannot load the {what}", "has no tokenizer;"):
                getattr(vlm, what)

    def test_templates_for_text_alone_get_the_image_as_text(self, photographed, tmp_path):
        directory = shutil.copytree(photographed.directory, tmp_path / "copy")
        template = "{% for m in messages %}user: {{ m.content + ' w0' }}{% endfor %}"
        (directory / "chat_template.jinja").write_text(template)
        said = ports.load_abstract(directory).render("what is it")
        assert said == "user: <|vision_start|><|image_pad|><|vision_end|>\nwhat is it w0"

    def test_become_tokens_and_patches(self, inputs):
        tokens = (inputs["input_ids"] == helpers.IMAGE).sum(1)
        grid = inputs["image_grid_thw"]
        assert len(grid) == 3
        assert len({tuple(row) for row in grid.tolist()}) == 2
        np.testing.assert_array_equal(
            tokens, [grid[:2].prod(axis=1).sum() // 4, grid[2].prod() // 4]
        )

    def test_give_pytorchs_states_and_logits(self, photographed, inputs):
        logits, states = torch_forward(photographed.torch_model, inputs)
        sites = ["visual.blocks.1", "visual.merger", "model.layers.1"]
        ours = photographed.vlm.forward(inputs, sites=sites)
        errors = site_errors(ours.states, states, inputs)
        assert max(errors.values()) < 1e-5, errors
        valid = inputs["attention_mask"] == 1
        np.testing.assert_allclose(np.asarray(ours.logits)[valid], logits[valid], rtol=0, atol=1e-4)

    def test_give_pytorchs_tokens(self, photographed, inputs):
        theirs = helpers.torch_generate(photographed.torch_model, inputs, 32).sequences
        ours = photographed.vlm.generate(inputs, max_new_tokens=32)
        np.testing.assert_array_equal(ours.tokens, theirs[:, inputs["input_ids"].shape[1] :])

    def test_become_the_arrays_of_transformers_class(self, photographed, photographs, inputs):
        """The class needs torchvision for its constructor, but not for its text and image parts."""
        ours = photographed.vlm.processor
        theirs = object.__new__(transformers.Qwen2VLProcessor)
        theirs.image_processor, theirs.tokenizer = ours.image_processor, ours.tokenizer
        theirs.video_processor = theirs.chat_template = None
        theirs.image_token, theirs.video_token = "<|image_pad|>", "<|video_pad|>"
        theirs.image_token_id, theirs.video_token_id = helpers.IMAGE, VIDEO
        texts = ["is it <|image_pad|> or <|image_pad|>", "what <|image_pad|> is in the picture"]
        images = [[photographs[0], photographs[1].resize((90, 300))], [photographs[1]]]
        expected = theirs(text=texts, images=images, padding=True, return_tensors="np")
        arrays = ours(text=texts, images=images, padding=True)
        assert set(arrays) == set(expected)
        for name, value in arrays.items():
            np.testing.assert_array_equal(value, expected[name])

    def test_that_no_prompt_asks_for(self, photographed, photographs):
        with helpers.raises_line(ValueError, "<|image_pad|> 0 times", "there are 1 images"):
            photographed.vlm.processor(text=["what is it"], images=[photographs[:1]])

    def test_that_belong_to_another_prompt(self, photographed, photographs):
        prompt = photographed.vlm.render("what is it")
        with helpers.raises_line(ValueError, "1, 1 times", "there are 2, 0 images"):
            photographed.vlm.processor(text=[prompt, prompt], images=[photographs, []])

    @pytest.mark.parametrize(("mode", "size"), [("RGB", (3, 3)), ("L", (1, 1)), ("RGBA", (30, 5))])
    def test_smaller_than_a_patch_are_enlarged(self, photographed, mode, size):
        image = Image.new(mode, size)
        inputs = photographed.vlm.process([photographed.vlm.render("what is it")], [image])
        assert inputs["image_grid_thw"][0, 1] == 2
        assert np.isfinite(photographed.vlm.forward(inputs).logits).all()

    def test_of_an_extreme_shape_are_refused_in_one_line(self, photographed, photographs):
        thin = photographs[0].resize((1000, 3))
        with helpers.raises_line(ValueError, "aspect ratio", "200", "crop it or leave it out"):
            photographed.vlm.process([photographed.vlm.render("what is it")], [thin])
