"""Checkpoints to parameters and back: names, dtypes, shards, strictness, memory."""

import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers

import ports
from ports import checkpoint
from ports.models import llava, llava_like

from .. import helpers


def tensors_of(pair) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(pair.directory / "model.safetensors")


def write(directory: Path, pair, tensors) -> Path:
    """Writes a checkpoint with the configuration of `pair` and these tensors."""
    directory.mkdir(exist_ok=True)
    shutil.copy(pair.directory / "config.json", directory)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def assert_same_params(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_name_and_a_layout_follow_from_the_flax_path():
    abstract = {
        "model": {
            "layers_3": {
                "q_proj": {"kernel": jax.ShapeDtypeStruct((2, 5), float)},
                "layer_norm1": {"scale": jax.ShapeDtypeStruct((2,), float)},
            },
            "patch_embedding": {"kernel": jax.ShapeDtypeStruct((7, 6, 3, 4), float)},
            "embed_tokens": {"embedding": jax.ShapeDtypeStruct((9, 2), float)},
            "class_embedding": jax.ShapeDtypeStruct((4,), float),
        }
    }
    assert checkpoint.stored_shapes(abstract) == {
        "model.layers.3.q_proj.weight": (5, 2),
        "model.layers.3.layer_norm1.weight": (2,),
        "model.patch_embedding.weight": (4, 3, 7, 6),
        "model.embed_tokens.weight": (9, 2),
        "model.class_embedding": (4,),
    }


class TestNames:
    def renamed(self, tmp_path, small, rename):
        tensors = {rename(name): value for name, value in tensors_of(small).items()}
        return ports.load(write(tmp_path / "renamed", small, tensors)).params

    def test_those_of_the_hub(self, tmp_path, small):
        params = self.renamed(tmp_path, small, llava_like.canonical_name)
        assert_same_params(params, small.vlm.params)

    def test_those_of_the_modules_in_transformers_5(self, tmp_path, small):
        # What state_dict() has, and save_pretrained(save_original_format=False) writes.
        names = {llava_like.canonical_name(name): name for name in small.torch_model.state_dict()}
        params = self.renamed(tmp_path, small, lambda name: names[llava_like.canonical_name(name)])
        assert any(name.startswith("model.language_model.layers.") for name in names.values())
        assert_same_params(params, small.vlm.params)

    def test_buffers_of_old_checkpoints_are_left_out(self, tmp_path, small):
        tensors = tensors_of(small)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(10)[None]
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(7)
        params = ports.load(write(tmp_path / "old", small, tensors)).params
        assert_same_params(params, small.vlm.params)

    def test_a_tied_head_may_be_stored(self, tmp_path, llava_pair):
        pair = llava_pair("tied embeddings, class position kept")
        tensors = tensors_of(pair)
        assert not any("lm_head" in name for name in tensors)
        tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
        params = ports.load(write(tmp_path / "tied", pair, tensors)).params
        assert_same_params(params, pair.vlm.params)


def test_shards_with_an_index_are_one_checkpoint(tmp_path, small):
    small.torch_model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_params(ports.load(tmp_path).params, small.vlm.params)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float64", "float32"),
        ("float32", "bfloat16"),
        ("float16", "bfloat16"),
        ("float32", "float16"),
    ],
)
def test_stored_dtypes_are_converted(tmp_path, small, stored, dtype):
    stored = np.dtype(stored)
    tensors = {name: value.astype(stored) for name, value in tensors_of(small).items()}
    params = ports.load(write(tmp_path / "x", small, tensors), dtype=dtype).params
    expected = jax.tree.map(
        lambda x: np.asarray(x).astype(stored).astype(jnp.dtype(dtype)), small.vlm.params
    )
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    assert_same_params(params, expected)


def test_bfloat16_computes_nearly_the_same(small):
    inputs = helpers.make_inputs([1], [6])
    vlm = ports.load(small.directory, dtype="bfloat16")
    out = vlm.forward(inputs, sites=["language_model.model.layers.1"])
    assert out.states["language_model.model.layers.1"].dtype == jnp.bfloat16
    expected = np.asarray(small.vlm.forward(inputs).logits)
    assert np.abs(np.asarray(out.logits, np.float32) - expected).max() < 0.1 * expected.std()


class TestSaving:
    @pytest.fixture
    def saved(self, tmp_path, small):
        checkpoint.save_params(small.vlm.params, tmp_path / "saved")
        shutil.copy(small.directory / "config.json", tmp_path / "saved")
        return tmp_path / "saved"

    def test_what_is_saved_loads_equal(self, saved, small):
        assert_same_params(ports.load(saved).params, small.vlm.params)

    def test_pytorch_gives_the_same_logits_from_it(self, saved, small):
        model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
            saved, output_loading_info=True
        )
        assert not any(report.values())
        inputs = helpers.make_inputs([1], [6])
        logits, _ = helpers.torch_forward(model.eval(), inputs)
        expected, _ = helpers.torch_forward(small.torch_model, inputs)
        np.testing.assert_array_equal(logits, expected)

    @pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
    def test_in_half_precision(self, tmp_path, small, dtype):
        checkpoint.save_params(small.vlm.params, tmp_path, dtype=dtype)
        tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
        assert {value.dtype for value in tensors.values()} == {np.dtype(dtype)}


class TestStrictness:
    def test_everything_that_is_wrong_is_listed_at_once(self, tmp_path, small):
        tensors = tensors_of(small)
        del tensors["multi_modal_projector.linear_1.bias"]
        del tensors["language_model.model.norm.weight"]
        tensors["language_model.model.layers.2.mlp.up_proj.weight"] = np.ones(2, np.float32)
        tensors["novel.weight"] = np.ones(3, np.float32)
        tensors["multi_modal_projector.linear_2.bias"] = np.ones(61, np.float32)
        directory = write(tmp_path / "wrong", small, tensors)
        with helpers.raises_line(
            ValueError,
            f"{directory} does not hold this model's parameters",
            "2 missing: language_model.model.norm.weight, multi_modal_projector.linear_1.bias",
            "2 unexpected: language_model.model.layers.2.mlp.up_proj.weight, novel.weight",
            "1 with the wrong shape: multi_modal_projector.linear_2.bias (61,) instead of (60,)",
        ):
            ports.load(directory)

    def test_long_lists_are_cut(self, tmp_path, small):
        tensors = tensors_of(small)
        gone = sorted(name for name in tensors if name.startswith("language_model.model.layers."))
        kept = {name: value for name, value in tensors.items() if name not in gone}
        with helpers.raises_line(
            ValueError,
            f"{len(gone)} missing: {', '.join(gone[:5])} and {len(gone) - 5} more",
        ):
            ports.load(write(tmp_path / "half", small, kept))

    def test_a_parameter_that_is_stored_under_two_names(self, tmp_path, small):
        tensors = tensors_of(small)
        tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"] + 1
        with helpers.raises_line(ValueError, "1 unexpected", "lm_head.weight"):
            ports.load(write(tmp_path / "twice", small, tensors))

    def test_a_transposed_matrix(self, tmp_path, small):
        tensors = tensors_of(small)
        name = "multi_modal_projector.linear_1.weight"
        tensors[name] = np.ascontiguousarray(tensors[name].T)
        with helpers.raises_line(ValueError, f"{name} (36, 60) instead of (60, 36)"):
            ports.load(write(tmp_path / "transposed", small, tensors))

    def test_a_truncated_file(self, tmp_path, small):
        directory = write(tmp_path / "short", small, tensors_of(small))
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        with helpers.raises_line(ValueError, f"{file}: truncated, tensor", "download"):
            ports.load(directory)

    def test_a_missing_shard(self, tmp_path, small):
        small.torch_model.save_pretrained(tmp_path, max_shard_size="60KB")
        gone = sorted(tmp_path.glob("*.safetensors"))[1]
        gone.unlink()
        with helpers.raises_line(FileNotFoundError, f"{tmp_path} has no {gone.name}"):
            ports.load(tmp_path)


# What liuhaotian/llava-v1.5-7b says; its model_type is also that of converted checkpoints.
ORIGINAL_LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_hidden_layers": 32,
}


class TestOriginalLlava:
    @pytest.mark.parametrize("load", [ports.load, ports.load_abstract])
    @pytest.mark.parametrize(
        ("changes", "advice"),
        [
            ({}, "use the one converted for transformers, llava-hf/llava-1.5-7b-hf"),
            ({"hidden_size": 5120}, "llava-hf/llava-1.5-13b-hf, or convert it"),
            ({"model_type": "llava_llama"}, "llava-hf/llava-1.5-7b-hf"),
            ({"image_aspect_ratio": "anyres"}, "of LLaVA-NeXT (1.6), which is not supported"),
            ({"architectures": None}, "the original LLaVA's format (mm_vision_tower)"),
        ],
    )
    def test_is_refused_by_name(self, tmp_path, load, changes, advice):
        (tmp_path / "config.json").write_text(json.dumps(ORIGINAL_LLAVA | changes))
        with helpers.raises_line(ValueError, "the original LLaVA's format", advice):
            load(tmp_path)


LOAD = """
    from pathlib import Path
    import jax, numpy as np, transformers
    import ports

    def kilobytes(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    ports.load(sys.argv[1])  # a small one: everything is imported and started
    before = kilobytes("VmRSS")
    vlm = ports.load(sys.argv[2])
    jax.block_until_ready(vlm.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(vlm.params))
    print((kilobytes("VmHWM") - before) * 1024 / size)
"""


@pytest.fixture(scope="module")
def sizeable(tmp_path_factory):
    """sizeable(dtype) returns a random checkpoint of 33 million parameters."""
    config = helpers.llava_config(
        text={"hidden_size": 516, "intermediate_size": 1536, "num_hidden_layers": 13}
    )
    sizes = llava.Config.from_hf(config)
    abstract = checkpoint.abstract_params(llava.Llava(sizes), llava.example_inputs(sizes))

    @functools.cache
    def build(dtype: str) -> Path:
        directory = tmp_path_factory.mktemp("sizeable")
        config.save_pretrained(directory)
        random = np.random.default_rng(0)
        tensors = {
            name: random.random(shape, np.float32).astype(dtype)
            for name, shape in checkpoint.stored_shapes(abstract).items()
        }
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory

    return build


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory's peak from /proc")
@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_loading_peaks_below_1_3_times_the_parameters(small, sizeable, stored):
    ratio = float(helpers.run_python(LOAD, small.directory, sizeable(stored)))
    print(f"{stored} loaded as float32: peak {ratio:.3f} x the parameters")
    assert 0.9 < ratio < 1.3


class TestFingerprint:
    def test_is_that_of_a_copy(self, tmp_path, small):
        copy = shutil.copytree(small.directory, tmp_path / "copy")
        assert checkpoint.fingerprint(copy) == checkpoint.fingerprint(small.directory)
        # What is never loaded does not count, as the weights in Mistral's own format.
        shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")
        (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
        assert checkpoint.fingerprint(copy) == checkpoint.fingerprint(small.directory)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_changes_with_what_the_model_is(self, tmp_path, small, name):
        copy = shutil.copytree(small.directory, tmp_path / "copy")
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1
        (copy / name).write_bytes(data)
        assert checkpoint.fingerprint(copy) != checkpoint.fingerprint(small.directory)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_finite(dtype, bad):
    values = np.full(300_000, -3.5, jnp.dtype(dtype)).reshape(-1, 100)
    assert checkpoint.is_finite(values)
    values[-1, 7] = bad
    assert not checkpoint.is_finite(values)


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (1e5, "float16")]
)
def test_weights_that_are_not_finite_are_named(tmp_path, small, value, dtype):
    """The last value is finite in the file, but beyond the range of float16."""
    tensors = tensors_of(small)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = value
    write(tmp_path / "bad", small, tensors)
    with pytest.raises(ValueError, match=rf"tensor '{name}' holds NaN or Inf as {dtype}; "):
        ports.load(tmp_path / "bad", dtype=dtype)
