"""Which head counts if config.json ties it to the embeddings and the file stores one.

transformers 5 takes what is stored: it ties a head to the embeddings if config.json says so and
the two do not differ in the file. Compared with it through safetensors.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import ports
from ports import checkpoint
from ports.checkpoint import orbax_io
from ports.parallel import sharding

from .. import helpers, idefics2_helpers, molmo_helpers, qwen2_vl_helpers

FLAGS = (None, True, False)


class Family(NamedTuple):
    """A checkpoint whose flags and tensors tests change."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    head: str
    table: str
    inputs: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}
    inputs = {
        "llava": lambda: helpers.make_inputs([1], [6]),
        "idefics2": lambda: idefics2_helpers.make_inputs([[(30, 61)]], [6]),
        "qwen2_vl": lambda: qwen2_vl_helpers.make_inputs([[(1, 4, 6)]], [6]),
    }
    make = {
        "llava": helpers.make_llava,
        "idefics2": idefics2_helpers.make_idefics2,
        "qwen2_vl": qwen2_vl_helpers.make_qwen2_vl,
    }

    def family(port: str) -> Family:
        if port not in made:
            directory = make[port](tmp_path_factory.mktemp("tied") / port).directory
            tensors = safetensors.numpy.load_file(directory / "model.safetensors")
            head, table = (
                next(name for name in tensors if name.endswith(f"{part}.weight"))
                for part in ("lm_head", "embed_tokens")
            )
            tensors[table] /= 5  # or each token would predict itself
            config = json.loads((directory / "config.json").read_text())
            made[port] = Family(config, tensors, head, table, inputs[port]())
        return made[port]

    return family


def write(
    directory: Path, family: Family, stored: str, *, top: bool | None, text: bool | None = None
) -> Path:
    """Writes the checkpoint with these flags (None: without) and its head stored as `stored`."""
    config = json.loads(json.dumps(family.config))
    for part, flag in ((config, top), (config["text_config"], text)):
        part.pop("tie_word_embeddings", None)
        if flag is not None:
            part["tie_word_embeddings"] = flag
    tensors = dict(family.tensors)
    if stored == "equal":
        tensors[family.head] = tensors[family.table].copy()
    elif stored != "different":
        del tensors[family.head if stored == "absent" else family.table]
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def load_pytorch(directory: Path) -> tuple[Any, Mapping[str, Any]]:
    """Returns PyTorch's model and its report about loading."""
    kind = transformers.AutoModelForImageTextToText
    model, report = kind.from_pretrained(directory, output_loading_info=True)
    return model.eval(), report


PORTS = pytest.mark.parametrize("port", ["llava", "idefics2", "qwen2_vl"])


@PORTS
@pytest.mark.parametrize("stored", ["different", "absent"])
def test_all_flags_give_pytorchs_head(tmp_path, families, port, stored):
    """If the head is absent and not tied, PyTorch draws a random one; we refuse the checkpoint."""
    family = families(port)
    states = np.random.default_rng(0).standard_normal((3, 60), np.float32)
    for top, text in itertools.product(FLAGS, FLAGS):
        directory = write(tmp_path / "x", family, stored, top=top, text=text)
        model, report = load_pytorch(directory)
        if report["missing_keys"]:
            assert stored == "absent"
            with helpers.raises_line(ValueError, "1 missing: ", "lm_head.weight"):
                ports.load(directory)
            continue
        with torch.no_grad():
            expected = model.lm_head(torch.from_numpy(states))
        ours = ports.load(directory).unembed(states)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4, err_msg=f"{top} {text}")


@PORTS
@pytest.mark.parametrize("stored", ["equal", "different", "absent", "without embeddings"])
def test_the_logits_of_a_tied_model_are_pytorchs(tmp_path, families, port, stored):
    """Without embeddings, the head serves as both."""
    family = families(port)
    directory = write(tmp_path / "x", family, stored, top=True)
    model, report = load_pytorch(directory)
    assert not report["missing_keys"]
    with torch.no_grad():
        expected = model(**helpers.to_torch(family.inputs)).logits.numpy()
    vlm = ports.load(directory)
    logits = vlm.forward(family.inputs).logits
    assert helpers.relative_error(logits, expected) < 1e-5
    assert bool(vlm.module.tied) == (stored != "different")
    abstract = ports.load_abstract(directory).params
    assert jax.tree.map(np.shape, vlm.params) == jax.tree.map(np.shape, abstract)


def test_molmo_with_a_tied_head_is_refused(tmp_path):
    """No checkpoint of the family ties it, so the port refuses this by name."""
    for name in ("weight_tying", "tie_word_embeddings"):
        config = {**molmo_helpers.CONFIG, name: True}
        molmo_helpers.make_checkpoint(tmp_path, molmo_helpers.CONFIG)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with helpers.raises_line(ValueError, f"config has {name} True; expected False"):
            ports.load(tmp_path)


class TestAStoredHeadStays:
    """config.json says tied, but the file contains a different head."""

    @pytest.fixture
    def vlm(self, tmp_path, families) -> ports.VLM:
        return ports.load(write(tmp_path / "own", families("llava"), "different", top=True))

    def same(self, directory: Path, vlm: ports.VLM, **options: Any) -> None:
        params = ports.load(directory, **options).params
        jax.tree.map(np.testing.assert_array_equal, params, vlm.params)

    def test_when_saved(self, tmp_path, vlm):
        checkpoint.save_params(vlm.params, tmp_path / "saved")
        config = (vlm.directory / "config.json").read_text()
        (tmp_path / "saved/config.json").write_text(config)
        self.same(tmp_path / "saved", vlm)
        head = load_pytorch(tmp_path / "saved")[0].lm_head.weight.detach().numpy()
        kernel = vlm.params["language_model"]["lm_head"]["kernel"]
        np.testing.assert_array_equal(head, kernel.T)

    @pytest.mark.parametrize("stored", ["different", "equal"])
    def test_when_converted(self, tmp_path, families, stored):
        vlm = ports.load(write(tmp_path / "x", families("llava"), stored, top=True))
        (tmp_path / "converted").mkdir()
        config = (vlm.directory / "config.json").read_text()
        (tmp_path / "converted/config.json").write_text(config)
        orbax_io.save(vlm.params, tmp_path / "converted", vlm.fingerprint)
        self.same(tmp_path / "converted", vlm)
        assert ("lm_head" in vlm.params["language_model"]) == (stored == "different")

    def test_on_a_mesh(self, vlm):
        mesh = ports.make_mesh(1, 1)
        self.same(vlm.directory, vlm, mesh=mesh)
        kernel = ports.load_abstract(vlm.directory, mesh=mesh).params["language_model"]["lm_head"]
        assert kernel["kernel"].sharding.spec == jax.sharding.PartitionSpec(None, "model")


class TestUntied:
    @pytest.fixture(scope="class")
    def tied(self, llava_pair) -> helpers.Pair:
        return llava_pair("tied embeddings, class position kept")

    def test_gives_the_same_logits(self, tied):
        inputs = helpers.make_inputs([1], [6], tokens_per_image=helpers.PATCHES + 1)
        expected = tied.vlm.forward(inputs).logits
        untied = tied.vlm.untied()
        np.testing.assert_allclose(untied.forward(inputs).logits, expected, rtol=0, atol=1e-5)
        assert "language_model.lm_head" in untied.sites
        assert "lm_head" not in tied.vlm.params["language_model"]

    def test_is_placed_like_any_head_on_a_mesh(self, tied):
        vlm = ports.load(tied.directory, mesh=ports.make_mesh(1, 1)).untied()
        path = ("language_model", "lm_head", "kernel")
        kernel = vlm.params["language_model"]["lm_head"]["kernel"]
        expected = sharding.param_sharding(
            ports.make_mesh(1, 1), path, kernel.shape, vlm.module.axes
        )
        assert kernel.sharding == expected

    def test_is_refused_for_a_head_that_is_not_tied(self, small):
        with helpers.raises_line(ValueError, "the model's head is not tied"):
            small.vlm.untied()

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
    def test_an_adapter_of_a_tied_head_changes_the_head_alone(self, tmp_path, tied):
        """As in PEFT, whose base model keeps its embeddings."""
        base = transformers.AutoModelForImageTextToText.from_pretrained(tied.directory).eval()
        config = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"])
        model = peft.get_peft_model(base, config).eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 4
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        inputs = helpers.make_inputs([1], [6], tokens_per_image=helpers.PATCHES + 1)
        with torch.no_grad():
            expected = model(**helpers.to_torch(inputs)).logits.numpy()
        with helpers.raises_line(ValueError, "language_model.lm_head, but this model", "untied()"):
            tied.vlm.with_adapter(tmp_path)
        vlm = tied.vlm.untied().with_adapter(tmp_path)
        assert helpers.relative_error(vlm.forward(inputs).logits, expected) < 1e-5
        unadapted = tied.vlm.forward(inputs).logits
        assert helpers.relative_error(unadapted, expected) > 0.1
