"""LLaVA against PyTorch: every module's output, the logits, 32 greedy tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from ports import checkpoint
from ports.models import llava

from .. import helpers

CASES = [
    *(("grouped queries", prompt) for prompt in helpers.PROMPTS),
    *((variant, "none, one and two images") for variant in list(helpers.VARIANTS)[1:]),
]
parametrize_cases = pytest.mark.parametrize(
    ("variant", "prompt"), CASES, ids=[": ".join(case) for case in CASES]
)


def inputs_of(pair: helpers.Pair, prompt: str) -> dict[str, np.ndarray]:
    per_image = pair.vlm.module.config.tokens_per_image
    return helpers.make_inputs(*helpers.PROMPTS[prompt], tokens_per_image=per_image)


@parametrize_cases
def test_every_site_and_the_logits_equal_pytorchs(llava_pair, variant, prompt):
    pair = llava_pair(variant)
    inputs = inputs_of(pair, prompt)
    logits, states = helpers.torch_forward(pair.torch_model, inputs)
    sites = [
        site
        for site in pair.vlm.sites
        if "pixel_values" in inputs or site.startswith("language_model")
    ]
    ours = pair.vlm.forward(inputs, sites=sites)

    errors = helpers.site_errors(ours.states, states, inputs)
    assert set(errors) == set(sites)
    assert max(errors.values()) < 1e-5, errors
    valid = inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(np.asarray(ours.logits)[valid], logits[valid], rtol=0, atol=1e-4)


@parametrize_cases
def test_32_greedy_tokens_equal_pytorchs(llava_pair, variant, prompt):
    pair = llava_pair(variant)
    inputs = inputs_of(pair, prompt)
    theirs = helpers.torch_generate(pair.torch_model, inputs, 32).sequences
    ours = pair.vlm.generate(inputs, max_new_tokens=32)
    np.testing.assert_array_equal(ours.tokens, theirs[:, inputs["input_ids"].shape[1] :])


def test_the_sites_are_pytorchs_modules_but_for_activations_and_containers(small):
    inputs = inputs_of(small, "two images")
    _, states = helpers.torch_forward(small.torch_model, inputs)
    # The port's activations and rotary angles are functions, its towers return several arrays.
    functions = (".act", ".act_fn", ".activation_fn", ".rotary_emb")
    towers = {"vision_tower.vision_model", "vision_tower.vision_model.encoder"}
    modules = {site for site in states if not site.endswith(functions)} - towers
    assert modules == set(small.vlm.sites)


def test_edits_of_heads_are_hooks_before_the_projection(small):
    inputs = inputs_of(small, "two images")
    layer = "language_model.model.layers.0"
    helpers.check_edit_of_heads(small.vlm, small.torch_model, inputs, layer)


def test_image_features_enter_the_decoder_where_the_image_tokens_are(small):
    inputs = helpers.make_inputs([1, 2], [6, 4])

    @jax.jit
    def embed(params, inputs):
        apply = small.vlm.module.bind({"params": params})
        return apply.embed_inputs(inputs), apply.image_features(inputs["pixel_values"])

    x, features = map(np.asarray, embed(small.vlm.params, inputs))
    is_image = inputs["input_ids"] == helpers.IMAGE
    np.testing.assert_array_equal(x[is_image], np.concatenate(features))
    table = small.vlm.params["language_model"]["model"]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(x[~is_image], table[inputs["input_ids"][~is_image]])


def test_the_token_of_an_image_may_lie_outside_the_vocabulary(small):
    config = dataclasses.replace(small.vlm.module.config, image_tokens=(5000,))
    apply = jax.jit(small.vlm.module.clone(config=config).apply)
    inputs = helpers.make_inputs([1], [6])
    expected = small.vlm.forward(inputs).logits
    inputs["input_ids"] = np.where(inputs["input_ids"] == helpers.IMAGE, 5000, inputs["input_ids"])
    logits = apply({"params": small.vlm.params}, inputs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_a_batch_without_mask_has_no_padding(small):
    inputs = helpers.make_inputs([1], [6])
    expected = small.vlm.forward(inputs).logits
    del inputs["attention_mask"]
    np.testing.assert_array_equal(small.vlm.forward(inputs).logits, expected)


class TestInputsThatDoNotFit:
    def check(self, pair, inputs, *parts):
        for run in (pair.vlm.forward, lambda x: pair.vlm.generate(x, max_new_tokens=2)):
            with helpers.raises_line(ValueError, *parts):
                run(inputs)

    def test_no_image_token_in_the_prompt(self, small):
        inputs = helpers.make_inputs([1], [6])
        inputs["input_ids"][inputs["input_ids"] == helpers.IMAGE] = 7
        self.check(small, inputs, "1 images but no image token (id 101)", "put <image> into")

    def test_an_image_token_that_was_not_expanded(self, small):
        inputs = helpers.make_inputs([1], [6], tokens_per_image=1)
        self.check(small, inputs, "1 images give 9 image features", "hold 1 image tokens")

    def test_one_image_too_few(self, small):
        inputs = helpers.make_inputs([1, 1], [6, 6])
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        self.check(small, inputs, "1 images give 9 image features", "hold 18 image tokens")

    def test_image_tokens_without_an_image(self, small):
        inputs = helpers.make_inputs([1], [6])
        del inputs["pixel_values"]
        self.check(small, inputs, "0 images give 0 image features", "hold 9 image tokens")

    def test_an_image_of_another_size(self, small):
        inputs = helpers.make_inputs([1], [6])
        inputs["pixel_values"] = inputs["pixel_values"][:, :, :20, :20]
        self.check(small, inputs, "has shape (1, 3, 20, 20)", "expected [images, 3, 23, 23]")


class TestConfigurationsThatAreNotImplemented:
    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"text": {"hidden_act": "swoosh"}}, ("activation 'swoosh', which is not", "silu")),
            (
                {"vision": {"hidden_act": "swoosh"}},
                ("activation 'swoosh', which is not", "quick_gelu"),
            ),
            ({"projector_hidden_act": "swoosh"}, ("activation 'swoosh', which is not", "gelu")),
            (
                {"text": {"rope_scaling": {"rope_type": "swoosh", "factor": 2.0}}},
                ("rope_type 'swoosh'", "default, linear"),
            ),
            (
                {"text": {"num_key_value_heads": 4}},
                ("6 attention heads", "4 key-value heads"),
            ),
            ({"vision_feature_layer": -5}, ("vision_feature_layer is -5", "-3 to 2")),
            ({"vision_feature_layer": [0, 4]}, ("vision_feature_layer is 4", "-3 to 2")),
        ],
        ids=str,
    )
    def test_is_refused_by_name(self, changes, parts):
        with helpers.raises_line(ValueError, *parts):
            llava.Config.from_hf(helpers.llava_config(**changes))

    def test_another_vision_tower(self):
        config = helpers.llava_config()
        config.vision_config = helpers.transformers.Dinov2Config()
        with helpers.raises_line(ValueError, "'dinov2'; expected one of clip_vision_model, sigl"):
            llava.Config.from_hf(config)

    def test_another_decoder(self):
        config = helpers.llava_config()
        config.text_config = helpers.transformers.GemmaConfig()
        with helpers.raises_line(ValueError, "text_config.model_type is 'gemma'", "'llama' or"):
            llava.Config.from_hf(config)

    def test_a_strategy_that_drops_a_patch_of_pixtral(self):
        config = helpers.llava_config()
        config.vision_config = helpers.transformers.PixtralVisionConfig()
        with helpers.raises_line(ValueError, "'default', which drops a patch", "expected 'full'"):
            llava.Config.from_hf(config)


def test_padding_on_either_side_gives_the_same_logits(small):
    left = helpers.make_inputs([1, 0], [4, 6])
    right = helpers.pad_right(left)
    expected = np.asarray(small.vlm.forward(left).logits)[left["attention_mask"] == 1]
    logits = np.asarray(small.vlm.forward(right).logits)[right["attention_mask"] == 1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_shapes_of_initialisation_are_those_of_the_checkpoint(small):
    abstract = checkpoint.abstract_params(
        small.vlm.module, llava.example_inputs(small.vlm.module.config)
    )
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(
        lambda x: x.shape, small.vlm.params
    )
