"""Quantised checkpoints are refused by name, by their configuration or by their tensors."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

import ports
from ports.checkpoint import quantised, safetensors_io

from .. import helpers

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj"
CONFIGS = {
    "bitsandbytes, 4 bits": transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict(),
    "bitsandbytes, 8 bits": transformers.BitsAndBytesConfig(load_in_8bit=True).to_dict(),
    "awq, 4 bits": transformers.AwqConfig().to_dict(),
    "gptq, 8 bits": transformers.GPTQConfig(bits=8).to_dict(),
    # Their libraries make these; the entries are those that the hub's checkpoints have.
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnly"}}},
    "compressed-tensors, pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
    },
}


def uint8(*shape):
    return np.zeros(shape, np.uint8)


# What each method stores of one linear layer, beside or instead of `weight`.
TENSORS = {
    "bitsandbytes, 4 bits": {
        "weight": uint8(2520, 1),
        "weight.absmax": np.ones(79, np.float32),
        "weight.quant_map": np.ones(16, np.float32),
        "weight.quant_state.bitsandbytes__nf4": uint8(80),
    },
    "bitsandbytes, 8 bits": {"weight": np.ones((84, 60), np.int8), "SCB": np.ones(84, np.float32)},
    "AWQ or GPTQ": {
        "qweight": np.ones((60, 11), np.int32),
        "qzeros": np.ones((1, 11), np.int32),
        "scales": np.ones((1, 84), np.float16),
    },
    "GPTQ": {
        "qweight": np.ones((8, 84), np.int32),
        "qzeros": np.ones((1, 11), np.int32),
        "scales": np.ones((1, 84), np.float16),
        "g_idx": np.zeros(60, np.int32),
    },
    "fp8, in blocks": {
        "weight": np.ones((84, 60), ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.ones((1, 1), np.float32),
    },
    "compressed-tensors or fp8": {
        "weight": np.ones((84, 60), ml_dtypes.float8_e4m3fn),
        "weight_scale": np.ones((84, 1), np.float16),
    },
    "compressed-tensors": {
        "weight_packed": np.ones((84, 8), np.int32),
        "weight_scale": np.ones((84, 1), np.float16),
        "weight_shape": np.array([84, 60]),
    },
    "torchao": {
        "_weight_qdata": np.ones((84, 60), np.int8),
        "_weight_scale": np.ones((84, 1), np.float32),
    },
}


@pytest.fixture
def copy(tmp_path, small):
    """Returns a copy of the small checkpoint that a test may change."""
    return shutil.copytree(small.directory, tmp_path / "copy")


def write_q_proj(directory, tensors):
    """Writes one linear layer of the checkpoint as a quantisation method stores it."""
    file = directory / "model.safetensors"
    stored = safetensors.numpy.load_file(file)
    del stored[f"{Q_PROJ}.weight"]
    stored |= {f"{Q_PROJ}.{name}": value for name, value in tensors.items()}
    safetensors.numpy.save_file(stored, file)


@pytest.mark.parametrize("load", [ports.load, ports.load_abstract])
class TestRefusals:
    @pytest.mark.parametrize("method", CONFIGS)
    @pytest.mark.parametrize("part", ["whole", "text_config"])
    def test_by_the_configuration(self, copy, load, method, part):
        config = json.loads((copy / "config.json").read_text())
        place = config if part == "whole" else config[part]
        place["quantization_config"] = CONFIGS[method]
        (copy / "config.json").write_text(json.dumps(config))
        with helpers.raises_line(
            ValueError, f"config.json: quantised ({method}, according to quantization_config)"
        ):
            load(copy)

    def test_by_a_file_of_autogptq(self, copy, load):
        (copy / "quantize_config.json").write_text('{"bits": 4}')
        with helpers.raises_line(
            ValueError, "quantised (AWQ or GPTQ, according to quantize_config"
        ):
            load(copy)

    @pytest.mark.parametrize("method", TENSORS)
    def test_by_names_of_tensors(self, copy, load, method):
        write_q_proj(copy, TENSORS[method])
        with helpers.raises_line(
            ValueError, f"quantised ({method}, according to tensor {Q_PROJ}.", "model.deq"
        ):
            load(copy)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn])
    def test_by_dtypes_alone(self, copy, load, dtype):
        write_q_proj(copy, {"weight": np.ones((84, 60), dtype)})
        name = np.dtype(dtype).name
        with helpers.raises_line(ValueError, f"tensor {Q_PROJ}.weight is stored as {name}"):
            load(copy)


class TestFloat8:
    """Weights quantised by torch, with each kind of scales, against torch's product."""

    BLOCKS = (32, 16)  # of 84 x 60
    FINE_GRAINED = transformers.FineGrainedFP8Config(weight_block_size=BLOCKS).to_dict()

    def compressed(self, **weights):
        weights = {"num_bits": 8, "type": "float", "symmetric": True, **weights}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": weights}},
        }

    def write(self, copy, entry, name, shape):
        """Writes the checkpoint with one quantised weight; returns torch's floats, transposed."""
        generator = torch.Generator().manual_seed(0)
        weight = (100 * torch.randn(84, 60, generator=generator)).to(torch.float8_e4m3fn)
        scales = torch.rand(shape, generator=generator) / 1000
        file = copy / "model.safetensors"
        stored = safetensors.torch.load_file(file)
        stored |= {f"{Q_PROJ}.weight": weight, f"{Q_PROJ}.{name}": scales}
        stored[f"{Q_PROJ}.input_scale"] = torch.ones(1)
        safetensors.torch.save_file(stored, file)
        config = json.loads((copy / "config.json").read_text()) | {"quantization_config": entry}
        (copy / "config.json").write_text(json.dumps(config))
        if scales.ndim == 2 and scales.shape[1] > 1:
            rows, columns = self.BLOCKS
            scales = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:84, :60]
        return (weight.float() * scales).T.numpy()

    @pytest.mark.parametrize(
        ("kind", "name", "shape"),
        [
            ("fine-grained", "weight_scale_inv", (3, 4)),
            ("fine-grained", "weight_scale_inv", ()),
            ({"strategy": "tensor"}, "weight_scale", (1,)),
            ({"strategy": "channel"}, "weight_scale", (84, 1)),
            ({"strategy": "block", "block_structure": BLOCKS}, "weight_scale", (3, 4)),
        ],
    )
    def test_is_read_with_its_scales(self, copy, kind, name, shape):
        entry = self.FINE_GRAINED if kind == "fine-grained" else self.compressed(**kind)
        expected = self.write(copy, entry, name, shape)
        layer = ports.load(copy).params["language_model"]["model"]["layers_0"]["self_attn"]
        np.testing.assert_array_equal(layer["q_proj"]["kernel"], expected)
        assert Q_PROJ in ports.load_abstract(copy).sites

    def test_some_rows_alone(self, copy):
        expected = self.write(copy, self.FINE_GRAINED, "weight_scale_inv", (3, 4)).T
        tensors = quantised.readable(safetensors_io.open_directory(copy), copy)
        np.testing.assert_array_equal(tensors[f"{Q_PROJ}.weight"].read((30, 70)), expected[30:70])

    def test_scales_that_do_not_fit(self, copy):
        self.write(copy, self.FINE_GRAINED, "weight_scale_inv", (4, 4))
        with helpers.raises_line(ValueError, f"{Q_PROJ}.weight (84, 60) has scales (4, 4)"):
            ports.load(copy)


def test_a_description_needs_no_whole_weights(copy):
    (copy / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert Q_PROJ in ports.load_abstract(copy).sites
    (copy / "model.safetensors").unlink()
    assert Q_PROJ in ports.load_abstract(copy).sites


def test_integers_of_the_right_name_and_shape_are_refused(copy):
    write_q_proj(copy, {"weight": np.ones((84, 60), np.int32)})
    with helpers.raises_line(ValueError, f"1 not floating-point: {Q_PROJ}.weight (int32)"):
        ports.load(copy)
