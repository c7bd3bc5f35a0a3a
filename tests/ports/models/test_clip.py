"""The dual encoder against transformers' CLIPModel."""

import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from ports import checkpoint
from ports.models import clip
from xlvlm_jax.demo import embedded

from .. import helpers

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 13,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
END = 49


def make_clip(directory, eos_token=END):
    """Saves a small random CLIP; returns (PyTorch's model, ours)."""
    config = transformers.CLIPConfig(
        text_config={**TEXT, "eos_token_id": eos_token},
        vision_config=helpers.VISION,
        projection_dim=20,
    )
    model = transformers.CLIPModel(config).eval()
    helpers.randomise(model)
    model.save_pretrained(directory)
    return model, clip.load_dual_encoder(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def inputs():
    """Returns two texts, the shorter padded on the right, and three images."""
    random = np.random.default_rng(0)
    return {
        "input_ids": np.array([[1, 5, 9, 30, 4, END], [1, 7, END, 0, 0, 0]]),
        "attention_mask": np.array([[1] * 6, [1] * 3 + [0] * 3]),
        "pixel_values": random.standard_normal((3, 3, 23, 23), np.float32),
    }


@pytest.fixture(scope="module")
def theirs(models, inputs):
    with torch.no_grad():
        return models[0](**helpers.to_torch(inputs))


def test_text_embeddings_equal_transformers(models, inputs, theirs):
    ours = models[1].embed_text(inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_allclose(ours, theirs.text_embeds, rtol=0, atol=1e-6)


def test_image_embeddings_equal_transformers(models, inputs, theirs):
    ours = models[1].embed_images(inputs["pixel_values"])
    np.testing.assert_allclose(ours, theirs.image_embeds, rtol=0, atol=1e-6)


def test_scores_equal_transformers(models, inputs, theirs):
    dual = models[1]
    ours = jax.jit(dual.module.apply)({"params": dual.params}, *inputs.values())
    np.testing.assert_allclose(ours, theirs.logits_per_text, rtol=0, atol=1e-4)


def test_embeddings_are_unit_vectors(models, inputs):
    images = models[1].embed_images(inputs["pixel_values"])
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 1, rtol=1e-6)


def test_old_configurations_read_out_at_the_highest_token(tmp_path, inputs):
    # They say that the end is token 2; the texts of their tokenizer end with the highest.
    model, dual = make_clip(tmp_path, eos_token=2)
    with torch.no_grad():
        theirs = model(**helpers.to_torch(inputs)).text_embeds
    ours = dual.embed_text(inputs["input_ids"], inputs["attention_mask"])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_padding_changes_no_embedding(models, inputs):
    short = models[1].embed_text(inputs["input_ids"][1:, :3], inputs["attention_mask"][1:, :3])
    padded = models[1].embed_text(inputs["input_ids"], inputs["attention_mask"])[1:]
    np.testing.assert_allclose(short, padded, rtol=0, atol=1e-6)


def test_inputs_without_learnt_positions(models):
    dual = models[1]
    ids = np.ones((1, 14), int)
    with helpers.raises_line(ValueError, "texts have 14 tokens; expected at most 13"):
        dual.embed_text(ids, ids)
    for height, width in ((7, 7), (30, 23), (23, 20)):
        with helpers.raises_line(
            ValueError, f"images are {height} x {width} pixels; expected 23 x 23"
        ):
            dual.embed_images(np.zeros((1, 3, height, width), np.float32))


def test_buffers_of_old_checkpoints_are_left_out():
    assert clip.canonical_name("text_model.embeddings.position_ids") is None
    assert clip.canonical_name("logit_scale") == "logit_scale"


def test_what_is_saved_loads_equal(tmp_path, models):
    dual = models[1]
    checkpoint.save_params(dual.params, tmp_path)
    shutil.copy(dual.directory / "config.json", tmp_path)
    again = clip.load(tmp_path)  # the name in earlier releases
    jax.tree.map(np.testing.assert_array_equal, again.params, dual.params)


def test_another_kind_of_model_is_refused(small):
    with helpers.raises_line(ValueError, "model_type 'llava' is not supported; supported: clip"):
        clip.load_dual_encoder(small.directory)


def test_a_directory_without_configuration(tmp_path):
    with helpers.raises_line(FileNotFoundError, f"{tmp_path} has no config.json"):
        clip.load_dual_encoder(tmp_path)


def test_the_processor_is_the_one_without_torch():
    dual = clip.load_dual_encoder(embedded.CLIP)
    assert type(dual.processor.image_processor).__name__ == "CLIPImageProcessorPil"
    image = Image.new("RGB", (150, 120), "red")
    pixels = dual.processor.image_processor([image], return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 112, 112)


def test_a_missing_tokenizer_or_image_processor_is_one_line(models):
    directory = models[1].directory
    with helpers.raises_line(FileNotFoundError, f"{directory} has no tokenizer; expected one of"):
        models[1].processor  # noqa: B018
