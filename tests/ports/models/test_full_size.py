"""The 7B checkpoints of the hub: names, shapes and forward pass, without allocating them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import ports
from ports import checkpoint
from ports.checkpoint import params
from ports.models import idefics2, llava
from ports.models.molmo import configuration as molmo_configuration
from ports.models.molmo import model as molmo
from ports.models.qwen2_vl import model as qwen2_vl
from ports.names import by_tensor

DATA = Path(__file__).parents[2] / "data" / "checkpoints"


class Case(NamedTuple):
    port: Any
    model: type
    tensors: int
    parameters: int
    inputs: dict[str, tuple[int, ...]]  # shapes, for images of a real size
    states: dict[str, tuple[int, ...]]  # site -> shape
    logits: tuple[int, ...]


def tokens(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {"input_ids": (batch, length), "attention_mask": (batch, length)}


CASES = {
    "llava-1.5-7b": Case(
        llava,
        llava.Llava,
        686,
        7_063_427_072,
        tokens(2, 600) | {"pixel_values": (2, 3, 336, 336)},
        {"multi_modal_projector": (2, 576, 4096), "language_model.model.layers.31": (2, 600, 4096)},
        (2, 600, 32064),
    ),
    # Photographs of 640 x 480 pixels in five crops: those of a quarter are enlarged to 504 x 378,
    # and the canvas is padded to 50 x 35 patches.
    "idefics2-8b": Case(
        idefics2,
        idefics2.Idefics2,
        763,
        8_402_768_112,
        tokens(2, 350)
        | {"pixel_values": (10, 1, 3, 490, 700), "pixel_attention_mask": (10, 1, 490, 700)},
        {
            "model.vision_model": (10, 35 * 50, 1152),
            "model.connector": (10, 64, 4096),
            "model.text_model.layers.30": (2, 350, 4096),
        },
        (2, 350, 32003),
    ),
    # 640 x 480 pixels: 34 x 46 patches, 391 tokens.
    "qwen2-vl-7b": Case(
        qwen2_vl,
        qwen2_vl.Qwen2VL,
        730,
        8_291_375_616,
        tokens(2, 416) | {"pixel_values": (2, 1792, 1176), "image_grid_thw": (2, 3)},
        {
            "visual.blocks.31": (2, 1792, 1280),
            "visual.merger": (2, 448, 3584),
            "model.layers.27": (2, 416, 3584),
        },
        (2, 416, 152064),
    ),
    # 640 x 480 pixels: 2 x 3 crops and the whole.
    "molmo-7b-d": Case(
        molmo,
        molmo.Molmo,
        585,
        8_021_025_280,
        tokens(2, 760)
        | {
            "images": (2, 7, 576, 588),
            "image_masks": (2, 7, 576),
            "image_input_idx": (2, 7, 144),
        },
        {
            "model.vision_backbone": (2, 7, 144, 3584),
            "model.transformer.blocks.27": (2, 760, 3584),
        },
        (2, 760, 152064),
    ),
}


class Model(NamedTuple):
    case: Case
    real: dict[str, Any]  # the stored configuration, and parameters by name
    module: Any
    abstract: dict


@pytest.fixture(scope="module", params=CASES)
def model(request) -> Model:
    case = CASES[request.param]
    real = json.loads((DATA / f"{request.param}.json").read_text())
    if case.port is molmo:
        config = molmo.read_config(real["config"])
    else:
        config = transformers.AutoConfig.for_model(**real["config"])
    module = case.model(case.port.Config.from_hf(config), dtype=jnp.dtype("bfloat16"))
    inputs = case.port.example_inputs(module.config)
    return Model(case, real, module, checkpoint.abstract_params(module, inputs))


@pytest.mark.parametrize("name", CASES)
def test_the_copies_are_the_shared_files(shared, name):
    original = json.loads((shared / "checkpoints" / f"{name}.json").read_text())
    assert json.loads((DATA / f"{name}.json").read_text()) == original


def test_all_names_and_shapes_are_those_of_the_real_checkpoint(model):
    expected = {name: tuple(shape) for name, shape in model.real["parameters"].items()}
    assert len(expected) == model.case.tensors
    assert checkpoint.stored_shapes(model.abstract) == expected
    total = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
    assert total == model.case.parameters


def test_each_name_maps_back_to_one_parameter(model):
    stored = {
        name: jax.ShapeDtypeStruct(tuple(shape), jnp.float16)
        for name, shape in model.real["parameters"].items()
    }
    rename = model.case.port.PORT.canonical_name
    paths = params._match(model.abstract, stored, rename, frozenset(), "here")
    by_stored = by_tensor(paths)  # the parts of a fused layer are one tensor
    assert all(len(set(names.values())) == 1 for names in by_stored.values())
    assert len(by_stored) == len(set(paths.values())) == model.case.tensors


def test_the_forward_pass_has_the_right_shape(model):
    whole = ("input_ids", "attention_mask", "image_grid_thw", "image_input_idx")
    inputs = {
        name: jax.ShapeDtypeStruct(shape, np.int32 if name in whole else np.float32)
        for name, shape in model.case.inputs.items()
    }
    capture = ports.capture(model.module.apply, list(model.case.states))
    logits, states = jax.eval_shape(capture, {"params": model.abstract}, inputs)
    assert logits.shape == model.case.logits
    assert {site: value.shape for site, value in states.items()} == model.case.states


def test_the_configuration(model):
    text, config = model.module.config.text, model.module.config
    found = {
        "head width": text.head_dim,
        "window": text.sliding_window,
        "sections": text.rope.sections,
        "biases": (text.qkv_bias, text.output_bias, text.mlp_bias),
        "theta": text.rope.theta,
        "image tokens": config.image_tokens,
        "tied": text.tie_embeddings,
    }
    none = {"window": None, "sections": None, "biases": (False,) * 3, "tied": False}
    qwen = {"biases": (True, False, False), "theta": 1e6}
    expected = {
        llava: {"theta": 10000.0, "image tokens": (32000,)},
        # Three rows after Mistral's 32,000 tokens.
        idefics2: {"window": 4096, "theta": 10000.0, "image tokens": (32001,)},
        qwen2_vl: {**qwen, "sections": (16, 24, 24), "image tokens": (151655, 151656)},
        molmo: {**qwen, "image tokens": (152066, 152067, 152064, 152065)},
    }[model.case.port]
    assert found == {"head width": 128, **none, **expected}


def test_the_defaults_of_molmo_are_those_of_the_real_tower():
    config = json.loads((DATA / "molmo-7b-d.json").read_text())["config"]
    for name in ("vision_config", "additional_vocab_size"):
        assert molmo_configuration.DEFAULTS[name] == config[name]
