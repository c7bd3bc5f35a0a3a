"""`xlvlm inspect`: its output for the embedded model and for a configuration without weights."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

import ports
from ports import inspection
from xlvlm_jax.cli import inspect
from xlvlm_jax.demo import embedded

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"


@pytest.fixture(scope="module")
def vlm():
    return ports.load_abstract(embedded.LLAVA)


def test_the_embedded_model_by_hand(vlm):
    site = "language_model.model.layers.3"
    result = inspection.inspect(vlm, batch_size=3, image_size=(50, 70), new_tokens=5, sites=[site])
    needs = result.needs
    assert (needs.prompt_tokens, needs.image_tokens, needs.bucket) == (81, 64, 88)
    # 8 layers, keys and values, 2 heads of width 32, float32.
    assert needs.cache == 3 * (88 + 5) * 8 * 2 * 2 * 32 * 4
    assert needs.states == 3 * 88 * 192 * 4
    assert needs.logits == 3 * 88 * 708 * 4
    assert needs.parameters == 4 * sum(result.parts.values()) == 4 * 4_244_208
    assert result.sites["language_model.model.layers.{0-7}.mlp.up_proj"] == (8, 384)
    assert result.prompt == "USER: <image>\nDescribe the image. ASSISTANT:"
    assert result.fits


def test_parts_and_sites_are_those_of_the_loaded_model(vlm):
    loaded = ports.load(embedded.LLAVA)
    result = inspection.inspect(vlm, batch_size=1)
    assert sum(result.parts.values()) == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    assert sum(count for count, _ in result.sites.values()) == len(loaded.sites)


def test_the_configuration_alone_suffices(tmp_path):
    shutil.copy(embedded.LLAVA / "config.json", tmp_path)
    result = inspection.inspect(ports.load_abstract(tmp_path, dtype="bfloat16"), batch_size=2)
    assert result.prompt is None
    assert result.needs.image_size is None
    assert result.needs.image_tokens == 64
    assert result.needs.parameters == 2 * 4_244_208
    out = io.StringIO()
    inspect.show(result, Console(file=out, width=100))
    assert "prompt: unknown" in out.getvalue()
    assert "fits" in out.getvalue()


@pytest.mark.parametrize(
    ("name", "parameters", "image_tokens", "site"),
    [
        ("llava-1.5-7b", 7.063e9, 576, "language_model.model.layers.{0-31}"),
        ("idefics2-8b", 8.403e9, 64, "model.text_model.layers.{0-31}"),
        ("qwen2-vl-7b", 8.291e9, 64, "model.layers.{0-27}"),
        ("molmo-7b-d", 8.021e9, 2 * (12 * 13 + 2), "model.transformer.blocks.{0-27}"),
    ],
)
def test_models_of_seven_billion_parameters(tmp_path, name, parameters, image_tokens, site):
    """From the hub's config.json alone."""
    config = json.loads((CHECKPOINTS / f"{name}.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    vlm = ports.load_abstract(tmp_path, dtype="bfloat16")
    result = inspection.inspect(vlm, batch_size=1)
    assert sum(result.parts.values()) == pytest.approx(parameters, rel=1e-3)
    assert result.needs.parameters == 2 * sum(result.parts.values())
    assert result.needs.image_tokens == image_tokens
    assert site in result.sites
    # Keys and values of every layer, two bytes each.
    text = vlm.sizes.text
    a_position = text.num_layers * 2 * text.num_kv_heads * text.head_dim * 2
    assert result.needs.cache == (result.needs.bucket + 20) * a_position


def test_an_unknown_site(vlm):
    with pytest.raises(ValueError, match=r"no site matches 'layers\.99'"):
        inspection.inspect(vlm, sites=["layers.99"])


def test_logits_of_all_positions_are_not_among_what_generation_needs(vlm):
    needs = inspection.inspect(vlm, batch_size=64).needs
    # The widest output is that of the embeddings, the tower's or an MLP's; the vocabulary is wider.
    assert needs.logits > needs.largest
    assert needs.largest >= 64 * needs.bucket * 384 * 4
    assert needs.total == needs.parameters + needs.cache + needs.states + needs.largest


class TestVerdict:
    """On devices of an accelerator: the memory of one counts, and what is on it."""

    @pytest.fixture
    def on_devices(self, monkeypatch):
        """on_devices(bytes) makes the devices say that they have so much memory each."""

        def make(size: int) -> None:
            device = SimpleNamespace(
                device_kind="chip", platform="tpu", memory_stats=lambda: {"bytes_limit": size}
            )
            monkeypatch.setattr(jax, "devices", lambda: [device] * 8)
            monkeypatch.setattr(jax, "local_devices", lambda: [device] * 8)

        return make

    @pytest.mark.parametrize("mesh", [None, (8, 1), (1, 2), (2, 2)])
    def test_by_hand(self, vlm, on_devices, mesh):
        needs = inspection.inspect(vlm, batch_size=8, mesh=mesh).needs
        data, model = mesh or (1, 1)
        sharded = inspection.inspect(vlm, batch_size=8, mesh=(1, model)).placement
        rest = needs.cache + needs.states + needs.largest
        own = sharded.device_bytes + rest // (data * model)
        assert own >= needs.parameters / model
        for size, fits in ((own - 8, False), (own + 8, True)):
            on_devices(size)
            result = inspection.inspect(vlm, batch_size=8, mesh=mesh)
            assert result.fits is fits and result.device_bytes == size
            out = io.StringIO()
            inspect.show(result, Console(file=out, width=100))
            assert " GB each: " + ("fits" if fits else "does not fit") in out.getvalue()

    def test_cpu_devices_share_the_hosts_memory(self, vlm):
        result = inspection.inspect(vlm, batch_size=8, mesh=(2, 4))
        total = 8 * result.placement.total
        assert result.shared_memory
        assert not result._replace(device_bytes=total - 1).fits
        assert result._replace(device_bytes=total).fits


class TestMesh:
    def test_the_embedded_model_by_hand(self, vlm):
        """Two key-value heads over four devices; 708 words and 384 columns are divided."""
        result = inspection.inspect(vlm, batch_size=1, mesh=(2, 4))
        placement = result.placement
        assert placement.mesh == (2, 4)
        assert 0.25 < placement.share < 0.31
        assert placement.device_bytes == pytest.approx(placement.share * result.needs.parameters)
        notes = [line.split(":")[0] for line in placement.notes]
        assert "key-value heads" in notes
        out = io.StringIO()
        inspect.show(result, Console(file=out, width=100))
        assert "mesh 2 x 4: parameters 0.00" in out.getvalue()
        assert "2 can't be divided evenly over 4 devices" in out.getvalue()

    def test_what_is_divided_evenly_is_not_listed(self, vlm):
        assert inspection.inspect(vlm, batch_size=1, mesh=(8, 1)).placement.notes == ()
        assert inspection.inspect(vlm, batch_size=1).placement is None
