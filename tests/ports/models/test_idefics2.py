"""Idefics2 against PyTorch: every module's output, the logits, 32 greedy tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

import ports
from ports import checkpoint
from ports.models import idefics2
from ports.nn import siglip

from .. import helpers
from ..idefics2_helpers import (
    LATENTS,
    PROMPTS,
    VARIANTS,
    make_config,
    make_idefics2,
    make_inputs,
    make_processor,
    site_errors,
    torch_forward,
)

CASES = [
    *(("grouped queries", prompt) for prompt in PROMPTS),
    *((variant, "padded on the left, two, no and one image") for variant in list(VARIANTS)[1:]),
]
parametrize_cases = pytest.mark.parametrize(
    ("variant", "prompt"), CASES, ids=[": ".join(case) for case in CASES]
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[str], helpers.Pair]:
    """pair(variant) returns the checkpoint of that name in `VARIANTS`."""

    def make(directory: Path, variant: str) -> helpers.Pair:
        text, perceiver, top = VARIANTS[variant]
        return make_idefics2(directory, make_config(text, perceiver, **top))

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
    sites = [
        site
        for site in pair.vlm.sites
        if "pixel_values" in inputs or site.startswith(("model.text_model", "lm_head"))
    ]
    ours = pair.vlm.forward(inputs, sites=sites)

    errors = site_errors(pair.vlm, ours.states, states, inputs)
    assert set(errors) == set(sites)
    assert max(errors.values()) < 1e-5, errors
    valid = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(ours.logits)[valid], logits[valid], rtol=0, atol=1e-4)


@parametrize_cases
def test_32_greedy_tokens_equal_pytorchs(pair, variant, prompt):
    pair = pair(variant)
    inputs = make_inputs(*PROMPTS[prompt])
    theirs = helpers.torch_generate(pair.torch_model, inputs, 32).sequences
    ours = pair.vlm.generate(inputs, max_new_tokens=32)
    np.testing.assert_array_equal(ours.tokens, theirs[:, inputs["input_ids"].shape[1] :])


def test_the_sites_are_pytorchs_modules_but_for_activations_and_containers(small):
    inputs = make_inputs([[(20, 30)]], [4])
    _, states = torch_forward(small.torch_model, inputs)
    functions = (".act_fn", ".activation_fn", ".rotary_emb")
    modules = {site for site in states if not site.endswith(functions)}
    assert modules - {"model.vision_model.encoder"} == set(small.vlm.sites)


def test_the_sites_of_the_references_scripts_are_there(small):
    names = ("model.text_model.layers.1", "model.text_model.norm", "model.connector", "lm_head")
    assert small.vlm.check_sites(names) == names


def test_apply_takes_the_processors_arrays_as_they_are(small):
    inputs = make_inputs(*PROMPTS["padded on the left, two, no and one image"])
    assert inputs["pixel_values"].shape[:2] == (3, 2)
    expected, _ = torch_forward(small.torch_model, inputs)
    logits = jax.jit(small.vlm.apply)(small.vlm.params, inputs)
    valid = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=0, atol=1e-4)


def test_edits_of_heads_are_hooks_before_the_projection(small):
    inputs = make_inputs([[(20, 30)]], [4])
    layer = "model.text_model.layers.0"
    helpers.check_edit_of_heads(small.vlm, small.torch_model, inputs, layer)


def test_without_a_pixel_mask_all_pixels_are_the_images(small):
    inputs = make_inputs([[(37, 64)]], [5])
    masked = small.vlm.prepare(inputs)
    del inputs["pixel_attention_mask"]
    unmasked = small.vlm.prepare(inputs)
    for name, value in masked.items():
        np.testing.assert_array_equal(unmasked[name], value)
    expected, _ = torch_forward(small.torch_model, inputs)
    logits = jax.jit(small.vlm.apply)(small.vlm.params, inputs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_states_of_generated_tokens_are_those_that_predicted_them(small):
    inputs = make_inputs(*PROMPTS["padded on the left, two, no and one image"])
    options = {"output_hidden_states": True, "output_logits": True}
    theirs = helpers.torch_generate(small.torch_model, inputs, 4, **options)
    # PyTorch's hidden states: of the embeddings, after layer 0, and after the last layer's norm.
    expected = {
        "model.text_model.layers.0": [step[1][:, -1] for step in theirs.hidden_states],
        "model.text_model.norm": [step[2][:, -1] for step in theirs.hidden_states],
        "lm_head": theirs.logits,
    }
    ours = small.vlm.generate(inputs, max_new_tokens=4, sites=list(expected)).states
    for site, steps in expected.items():
        assert helpers.relative_error(ours[site], np.stack(steps, axis=1)) < 1e-5


@pytest.mark.parametrize("name", ["layers.1", "norm"])
def test_a_sweep_is_each_of_its_variants(small, name):
    inputs = make_inputs(*PROMPTS["padded on the left, two, no and one image"])
    helpers.check_sweep(small.vlm, inputs, f"model.text_model.{name}")


class TestPositions:
    def test_by_hand(self):
        # The i-th of n patches begins at i/n of the image, and 6 positions at 0, 1/6 ... 5/6.
        table = siglip.spread(4, 6)
        assert table[1, :1].tolist() == [0]
        assert table[2, :2].tolist() == [0, 3]
        assert table[3, :3].tolist() == [0, 2, 4]
        assert table[4, :4].tolist() == [0, 1, 3, 4]

    def test_are_pytorchs_for_all_sizes_of_the_real_tower(self):
        # Patches of one pixel whose embedding is the number of their position.
        config = transformers.Idefics2VisionConfig(hidden_size=1, image_size=70, patch_size=1)
        embeddings = Idefics2VisionEmbeddings(config)
        sizes = np.arange(1, 81)
        mask = (np.arange(80) < sizes[:, None])[:, :, None] & (
            np.arange(80) < sizes[::-1][:, None]
        )[:, None, :]
        with torch.no_grad():
            embeddings.patch_embedding.weight.zero_()
            embeddings.patch_embedding.bias.zero_()
            embeddings.position_embedding.weight.copy_(torch.arange(4900.0)[:, None])
            theirs = embeddings(torch.zeros(80, 3, 80, 80), torch.from_numpy(mask))
        ours = siglip.position_ids(jnp.asarray(mask), 70)
        np.testing.assert_array_equal(np.asarray(ours).reshape(80, -1), theirs[..., 0].numpy())

    def test_only_whole_patches_count(self):
        mask = np.zeros((1, 8, 11), int)
        mask[0, :7, :9] = 1
        expected = [[[1, 1, 1], [1, 1, 1], [0, 0, 0]]]
        # 8 x 11 pixels hold 2 x 3 whole patches of 3, and 7 x 9 fill all of them.
        np.testing.assert_array_equal(siglip.patch_mask(mask, 3), np.array(expected)[:, :2])
        np.testing.assert_array_equal(
            siglip.patch_mask(mask, 4), np.array([[[True, True], [False, False]]])
        )


class TestLayout:
    def test_padding_images_are_dropped(self, small):
        inputs = make_inputs([[(30, 61), (99, 14)], [], [(50, 64)]], [4, 9, 8])
        prepared = small.vlm.prepare(inputs)
        assert prepared["pixel_values"].shape == (3, 1, 3, 14 * 7, 10 * 7)
        real = inputs["pixel_values"][[0, 0, 2], [0, 1, 0]]
        np.testing.assert_array_equal(
            prepared["pixel_values"][:, 0, :, :98, :64], real[..., :98, :]
        )
        assert not prepared["pixel_values"][..., 64:].any()

    def test_is_of_few_shapes(self, small):
        random = np.random.default_rng(0)
        shapes = set()
        for height, width in random.integers(27 * 7, 31 * 7, (40, 2)):
            inputs = make_inputs([[(height, width)]], [3])
            shapes.add(small.vlm.prepare(inputs)["pixel_values"].shape)
        assert {shape[:3] for shape in shapes} == {(1, 1, 3)}
        assert {size for shape in shapes for size in shape[3:]} == {28 * 7, 30 * 7}

    def test_of_what_is_laid_out_is_the_same(self, small):
        inputs = make_inputs(*PROMPTS["padded on the left, two, no and one image"])
        once = small.vlm.prepare(inputs)
        twice = small.vlm.prepare(once)
        assert set(once) == set(twice)
        for name, value in once.items():
            np.testing.assert_array_equal(twice[name], value)

    def test_a_batch_of_padding_images_has_no_image(self, small):
        inputs = make_inputs([[], []], [5, 12])
        expected = small.vlm.forward(inputs).logits
        padding = {"pixel_values": np.zeros((2, 1, 3, 20, 20), np.float32)}
        np.testing.assert_array_equal(small.vlm.forward({**inputs, **padding}).logits, expected)


class TestInputsThatDoNotFit:
    def check(self, pair, inputs, *parts):
        for run in (pair.vlm.forward, lambda x: pair.vlm.generate(x, max_new_tokens=2)):
            with helpers.raises_line(ValueError, *parts):
                run(inputs)

    @pytest.fixture
    def inputs(self):
        return make_inputs([[(20, 30)], [(30, 20)]], [6, 6])

    def test_no_image_token_in_the_prompt(self, small, inputs):
        inputs["input_ids"][inputs["input_ids"] == helpers.IMAGE] = 7
        self.check(small, inputs, "2 images but no image token (id 101)", "put <image> into")

    def test_another_number_of_tokens_per_image(self, small):
        inputs = make_inputs([[(20, 30)]], [6], tokens_per_image=8)
        self.check(
            small,
            inputs,
            "1 images give 5 image features",
            "hold 8 image tokens",
            "expected 5 per image or crop, the processor's image_seq_len",
        )

    def test_a_picture_that_looks_like_padding(self, small, inputs):
        inputs["pixel_values"][1] = 0
        self.check(small, inputs, "1 images give 5", "hold 10", "all zero counts as padding")

    def test_image_tokens_without_an_image(self, small, inputs):
        del inputs["pixel_values"]
        self.check(small, inputs, "0 images give 0 image features", "hold 10 image tokens")

    def test_an_image_smaller_than_a_patch(self, small):
        inputs = make_inputs([[(20, 30), (30, 6)]], [6])
        self.check(small, inputs, "image 1 of the batch has 30 x 6 pixels", "a patch of 7 x 7")

    def test_a_batch_smaller_than_a_patch(self, small):
        inputs = make_inputs([[(5, 30)]], [6])
        self.check(small, inputs, "image 0 of the batch has 5 x 30 pixels", "a patch of 7 x 7")

    def test_images_that_are_not_in_rows(self, small, inputs):
        inputs["pixel_values"] = inputs["pixel_values"][:, 0]
        self.check(small, inputs, "has shape (2, 3, 30, 30)", "expected [batch, images, 3, height")

    def test_images_that_the_processor_did_not_pad(self, small, inputs):
        ragged = np.empty((2, 1), object)
        ragged[:, 0] = [np.ones((3, 20, 30)), np.ones((3, 30, 20))]
        self.check(small, {**inputs, "pixel_values": ragged}, "shape (2, 1)", "do_pad")

    def test_a_mask_of_another_size(self, small, inputs):
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"][..., :20]
        self.check(small, inputs, "has shape (2, 1, 30, 20)", "(2, 1, 30, 30)")


class TestConfigurationsThatAreNotImplemented:
    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"text": {"hidden_act": "swoosh"}}, ("activation 'swoosh', which is not", "silu")),
            ({"vision": {"hidden_act": "swoosh"}}, ("activation 'swoosh', which is not", "silu")),
            (
                {"perceiver": {"hidden_act": "swoosh"}},
                ("activation 'swoosh', which is not", "silu"),
            ),
            (
                {"perceiver": {"num_key_value_heads": 4}},
                ("perceiver_config has 6 attention heads", "4 key-value heads"),
            ),
            ({"vision": {"image_size": [215, 99]}}, ("image_size is [215, 99]", "single number")),
        ],
        ids=str,
    )
    def test_is_refused_by_name(self, changes, parts):
        with helpers.raises_line(ValueError, *parts):
            idefics2.Config.from_hf(make_config(**changes))

    def test_another_decoder(self):
        config = make_config()
        config.text_config = transformers.LlamaConfig()
        with helpers.raises_line(ValueError, "text_config.model_type is 'llama'", "'mistral'"):
            idefics2.Config.from_hf(config)

    def test_another_vision_tower(self):
        config = make_config()
        config.vision_config = transformers.SiglipVisionConfig()
        with helpers.raises_line(ValueError, "'siglip_vision_model'", "'idefics2_vision'"):
            idefics2.Config.from_hf(config)

    @pytest.mark.parametrize("model_type", ["idefics", "smolvlm_next"])
    def test_a_related_model(self, tmp_path, model_type):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with helpers.raises_line(ValueError, f"{model_type!r} is not supported", "idefics2"):
            ports.load(tmp_path)


class TestNames:
    def test_of_transformers_5_are_those_of_the_hub(self, small):
        stored = safetensors.numpy.load_file(small.directory / "model.safetensors")
        assert set(stored) == set(checkpoint.stored_shapes(small.vlm.params))

    def test_of_buffers_are_left_out(self):
        for name in (
            "model.text_model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.vision_model.embeddings.position_ids",
        ):
            assert idefics2.canonical_name(name) is None

    def test_of_a_tied_head_may_be_there(self, pair):
        tied = pair("tied embeddings, sliding window")
        assert "lm_head" not in tied.vlm.params
        table = "model.text_model.embed_tokens.weight"
        assert tied.vlm.module.tied == {"lm_head.weight": table}
        x = np.random.default_rng(0).standard_normal((3, 60), np.float32)
        table = np.asarray(tied.vlm.params["model"]["text_model"]["embed_tokens"]["embedding"])
        np.testing.assert_allclose(tied.vlm.unembed(x), x @ table.T, rtol=0, atol=1e-4)

    def test_survive_saving(self, small, tmp_path):
        checkpoint.save_params(small.vlm.params, tmp_path)
        ours = safetensors.numpy.load_file(tmp_path / "model.safetensors")
        theirs = safetensors.numpy.load_file(small.directory / "model.safetensors")
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)


class TestPhotographs:
    """The pictures in scikit-learn, 640 x 427 pixels, through the checkpoint's processor."""

    @pytest.fixture(scope="class")
    def photographs(self):
        return [Image.fromarray(pixels) for pixels in load_sample_images().images]

    @pytest.fixture(scope="class", params=[False, True], ids=["whole", "in five crops"])
    def photographed(self, request, tmp_path_factory):
        directory = tmp_path_factory.mktemp("photographed")
        pair = make_idefics2(directory)
        make_processor(do_image_splitting=request.param).save_pretrained(directory)
        return pair

    @pytest.fixture(scope="class")
    def inputs(self, photographed, photographs):
        china, flower = photographs
        upright = flower.transpose(Image.Transpose.ROTATE_90)
        prompts = ["is it <image> or <image> in the picture", photographed.vlm.render("what is it")]
        return photographed.vlm.process(prompts, [[china, upright], flower])

    def test_become_tokens_and_pixels(self, photographed, inputs):
        crops = 5 if photographed.vlm.processor.image_processor.do_image_splitting else 1
        tokens = (inputs["input_ids"] == helpers.IMAGE).sum(1)
        np.testing.assert_array_equal(tokens, [2 * crops * LATENTS, crops * LATENTS])
        assert inputs["pixel_values"].shape == (2, 2 * crops, 3, 120, 120)
        assert len(photographed.vlm.prepare(inputs)["pixel_values"]) == 3 * crops

    def test_give_pytorchs_states_and_logits(self, photographed, inputs):
        logits, states = torch_forward(photographed.torch_model, inputs)
        sites = ["model.vision_model", "model.connector", "model.text_model.layers.1"]
        ours = photographed.vlm.forward(inputs, sites=sites)
        errors = site_errors(photographed.vlm, ours.states, states, inputs)
        assert max(errors.values()) < 1e-5, errors
        valid = inputs["attention_mask"] == 1
        np.testing.assert_allclose(np.asarray(ours.logits)[valid], logits[valid], rtol=0, atol=1e-4)

    def test_give_pytorchs_tokens(self, photographed, inputs):
        theirs = helpers.torch_generate(photographed.torch_model, inputs, 32).sequences
        ours = photographed.vlm.generate(inputs, max_new_tokens=32)
        np.testing.assert_array_equal(ours.tokens, theirs[:, inputs["input_ids"].shape[1] :])

    def test_go_with_a_prompt_in_the_chat_template(self, photographed):
        rendered = "User:<image>what is it<end_of_utterance>\nAssistant:"
        assert photographed.vlm.render("what is it") == rendered

    def test_need_not_be_in_every_row(self, photographed, photographs):
        vlm, china = photographed.vlm, photographs[0]
        both = vlm.process(["what is <image>", "is it in the picture"], [[china], []])
        alone = vlm.process(["what is <image>"], [china])
        assert both["pixel_values"].shape[0] == 2
        for name in ("pixel_values", "pixel_attention_mask"):
            np.testing.assert_array_equal(vlm.prepare(both)[name], vlm.prepare(alone)[name])
