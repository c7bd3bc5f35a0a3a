"""Where parameters are placed, and that eight devices compute what one does."""

import json
import shutil
import socket
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import transformers
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ports
from ports import checkpoint
from ports.checkpoint import orbax_io
from ports.decoding.sampling import keep_likely
from ports.models import idefics2, llava
from ports.models.molmo import model as molmo
from ports.models.qwen2_vl import model as qwen2_vl
from ports.parallel import sharding
from ports.parallel.axis_types import automatic

from .. import helpers, idefics2_helpers, molmo_helpers, qwen2_vl_helpers

MESH = sharding.abstract_mesh(2, 4)
# Of all families, of which none has a name for another thing than the others do.
AXES = {**molmo.AXES, **qwen2_vl.AXES, **idefics2.AXES, **llava.AXES}


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        # Columns of what widens, rows of what narrows: one sum a layer crosses the devices.
        (("layers_0", "self_attn", "q_proj", "kernel"), (60, 84), P(None, "model")),
        (("layers_0", "self_attn", "q_proj", "bias"), (84,), P("model")),
        (("layers_0", "self_attn", "o_proj", "kernel"), (84, 60), P("model", None)),
        (("layers_0", "self_attn", "o_proj", "bias"), (60,), P(None)),
        (("layers_0", "mlp", "gate_proj", "kernel"), (60, 96), P(None, "model")),
        (("layers_0", "mlp", "down_proj", "kernel"), (96, 60), P("model", None)),
        (("layers_0", "mlp", "fc1", "kernel"), (36, 48), P(None, "model")),
        (("layers_0", "mlp", "fc2", "kernel"), (48, 36), P("model", None)),
        (("embed_tokens", "embedding"), (104, 60), P("model", None)),
        (("lm_head", "kernel"), (60, 104), P(None, "model")),
        # Four devices do not divide the vocabulary, but the width.
        (("embed_tokens", "embedding"), (103, 60), P(None, "model")),
        (("lm_head", "kernel"), (60, 103), P("model", None)),
        # ... nor the width, nor these.
        (("lm_head", "kernel"), (61, 103), P(None, None)),
        (("mlp", "down_proj", "kernel"), (77, 60), P(None, None)),
        # Key-value heads are divided by whole heads where their number is known: two are not.
        (("language_model", "self_attn", "k_proj", "kernel"), (60, 28), P(None, None)),
        (("language_model", "self_attn", "v_proj", "bias"), (28,), P(None)),
        (("resampler", "self_attn", "k_proj", "kernel"), (60, 32), P(None, "model")),
        (("vision_tower", "self_attn", "k_proj", "kernel"), (36, 36), P(None, "model")),
        # The tower of Qwen2-VL, by the parts of a fused layer; the other "proj" is a convolution.
        (("visual", "blocks_0", "attn", "qkv", "key", "kernel"), (32, 32), P(None, "model")),
        (("visual", "blocks_0", "attn", "qkv", "value", "bias"), (32,), P("model")),
        (("visual", "blocks_0", "attn", "proj", "kernel"), (32, 32), P("model", None)),
        (("visual", "merger", "mlp_0", "kernel"), (128, 128), P(None, "model")),
        (("visual", "merger", "mlp_2", "bias"), (60,), P(None)),
        (("visual", "patch_embed", "proj", "kernel"), (3, 2, 7, 7, 32), P()),
        # Norms, convolutions and positions are everywhere.
        (("norm", "scale"), (60,), P()),
        (("patch_embedding", "kernel"), (7, 7, 3, 36), P()),
        (("class_embedding",), (36,), P()),
    ],
    ids=str,
)
def test_parameters(path, shape, spec):
    kv_heads = {("language_model",): 2, ("resampler",): 4}
    assert sharding.param_sharding(MESH, path, shape, AXES, kv_heads).spec == spec


@pytest.mark.parametrize(
    ("shape", "spec"), [((6, 32), P("data")), ((3, 32), P(None)), ((0, 32), P(None))]
)
def test_batches(shape, spec):
    assert sharding.batch_sharding(MESH, shape).spec == spec


def test_a_mesh_without_a_model_axis_replicates():
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    assert sharding.param_sharding(mesh, ("q_proj", "kernel"), (8, 8), AXES).spec == P(None, None)


@hypothesis.given(
    module=st.sampled_from([("a", *name.split(".")) for name, rule in AXES.items() if rule]),
    leaf=st.sampled_from(["kernel", "bias", "embedding"]),
    sizes=st.lists(st.integers(1, 96), min_size=2, max_size=2),
    mesh=st.tuples(st.integers(1, 4), st.integers(1, 12)),
    groups=st.integers(1, 12),
)
def test_every_sharding_divides_its_parameter(module, leaf, sizes, mesh, groups):
    sizes = sizes[-1:] if leaf == "bias" else sizes
    # As in every model, the width of key-value heads is a multiple of their number.
    sizes = [size * groups if "kv_heads" in AXES[".".join(module[1:])] else size for size in sizes]
    placed = sharding.abstract_mesh(*mesh)
    found = sharding.param_sharding(placed, (*module, leaf), tuple(sizes), AXES, {("a",): groups})
    parts = [size // own for size, own in zip(sizes, found.shard_shape(tuple(sizes)), strict=True)]
    assert sorted(parts)[:-1] == [1] * (len(parts) - 1) and parts[-1] is not None
    assert max(parts) in (1, mesh[1])


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ((2, 4), ("data", "model"), ("data", "model")),
        ((2, 4), ("model", None), ("model",)),
        ((2, 4), (None, "model", None), (None, "model")),
        ((2, 1), ("data", "model"), ("data",)),
        ((1, 1), ("data", "model"), ()),
        ((2, 4), (None, None), ()),
    ],
)
def test_shardings_as_programs_return_them(sizes, given, expected):
    mesh = sharding.abstract_mesh(*sizes)
    where = NamedSharding(mesh, P(*given))
    found = sharding.as_returned(where)
    assert found == NamedSharding(mesh, P(*expected))
    assert found.is_equivalent_to(where, len(given))


def test_a_parameter_without_a_rule():
    with helpers.raises_line(ValueError, "no sharding rule for a.gate.kernel; add 'gate' to"):
        sharding.logical_axes(("a", "gate", "kernel"), 2, AXES)
    with helpers.raises_line(
        ValueError, "a.q_proj.kernel has 3 dimensions, but its rule", "has 2: em"
    ):
        sharding.logical_axes(("a", "q_proj", "kernel"), 3, AXES)
    assert sharding.logical_axes(("a", "gate"), 1, {"gate": ("mlp",)}) == ("mlp",)


@pytest.mark.parametrize(("text", "shape"), [("2x4", (2, 4)), (" 1X8 ", (1, 8)), ("16x1", (16, 1))])
def test_meshes_as_text(text, shape):
    assert ports.parse_mesh(text) == shape


@pytest.mark.parametrize("text", ["", "8", "2x", "2x4x1", "0x8", "-1x8", "axb", "2 x 4", "٢x4"])
def test_invalid_meshes(text):
    with helpers.raises_line(ValueError, "expected DATAxMODEL such as 2x4", repr(text)):
        ports.parse_mesh(text)


def test_more_devices_than_there_are():
    count = len(jax.devices())
    with helpers.raises_line(ValueError, f"2 x {count} needs {2 * count} devices; there are"):
        ports.make_mesh(2, count)
    with helpers.raises_line(ValueError, "mesh of 0 x 1 devices; expected at least 1 x 1"):
        ports.make_mesh(0)


def explicit_mesh():
    """Returns what `jax.make_mesh` makes unless it is told of other types."""
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    assert mesh.explicit_axes == ("data", "model")
    return mesh


def test_axes_of_other_types_become_automatic():
    mesh = explicit_mesh()
    found = automatic(mesh)
    assert found == ports.make_mesh(1) and list(found.devices.flat) == list(mesh.devices.flat)
    assert automatic(found) is found and automatic(None) is None
    assert automatic(mesh.abstract_mesh).are_all_axes_auto
    assert sharding.abstract_mesh(2, 4).are_all_axes_auto


def test_inputs_on_a_mesh_without_a_data_axis(small):
    inputs = helpers.make_inputs([1, 1], [3, 5])
    mesh = jax.make_mesh((1,), ("model",))
    found, expected = (
        ports.load_abstract(small.directory, mesh=each).prepare(inputs) for each in (mesh, None)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_model_on_a_mesh_with_explicit_axes(small):
    inputs = helpers.make_inputs([1, 1], [3, 5])
    found = []
    for mesh in (ports.make_mesh(1), explicit_mesh()):
        vlm = ports.load(small.directory, mesh=mesh)
        assert vlm.mesh.are_all_axes_auto
        assert ports.load_abstract(small.directory, mesh=mesh).mesh == vlm.mesh
        site = f"{vlm.decoder}.layers.0"
        forward = vlm.forward(inputs, sites=site)
        tokens = vlm.generate(inputs, max_new_tokens=2, edits={site: ports.ablate(np.ones(60))})
        found.append((forward.logits, forward.states[site], tokens.tokens))
    jax.tree.map(np.testing.assert_array_equal, *found)
    # What else runs while such a mesh is set, JAX refuses in the middle of a program.
    line = "jax.set_mesh has set a mesh with axes of type Explicit (data, model), under which"
    with jax.set_mesh(explicit_mesh()):
        with helpers.raises_line(ValueError, line, "or set a mesh with axes of type Auto"):
            vlm.forward(inputs)
        with helpers.raises_line(ValueError, line):
            ports.load(small.directory, mesh=explicit_mesh())
    with jax.set_mesh(ports.make_mesh(1)):
        np.testing.assert_array_equal(vlm.forward(inputs).logits, found[0][0])


class TestConstrain:
    def test_does_nothing_without_a_mesh(self):
        x = np.ones((2, 3, 4))
        assert sharding.residual(x) is x

    def test_replicates_a_tree(self):
        tree = {"a": np.ones(2), "b": (np.ones((3, 4)),)}
        assert sharding.replicate(tree) is tree
        with sharding.on(ports.make_mesh(1)):
            text = jax.jit(sharding.replicate).lower(tree).as_text()
        assert text.count("sharding_constraint") == 2

    def test_needs_an_axis_for_each_dimension(self):
        with sharding.on(ports.make_mesh(1)), pytest.raises(ValueError, match="argument 2"):
            sharding.constrain(jax.numpy.ones((2, 3)), "batch")

    def test_a_whole_width_leaves_the_other_dimensions_open(self):
        with sharding.on(ports.make_mesh(1)):
            text = jax.jit(sharding.whole_width).lower(np.ones((2, 3, 4))).as_text()
        assert "sharding_constraint %arg0 <@mesh, [{?}, {?}, {}]>" in text

    def test_a_whole_vocabulary_where_its_tokens_are_ordered(self):
        """A cumulative sum along an axis that devices share would be a window as long as it."""
        key, x = jax.random.key(0), np.ones((2, 104), np.float32)
        with sharding.on(ports.make_mesh(1)):
            text = {
                name: jax.jit(
                    lambda x, name=name: keep_likely(x, ports.Sampling(key, **{name: 0.5}))
                )
                .lower(x)
                .as_text()
                for name in ("top_p", "typical_p", "min_p")
            }
        assert [name for name, of in text.items() if "sharding_constraint" in of] == [
            "top_p",
            "typical_p",
        ]
        assert '[{"data"}, {}]>' in text["top_p"]

    def test_the_mesh_ends_with_the_context(self):
        with pytest.raises(KeyError), sharding.on(ports.make_mesh(1)):
            raise KeyError
        x = np.ones((2, 3, 4))
        assert sharding.residual(x) is x


REAL = {
    "llava-1.5-7b": (llava, llava.Llava),
    "idefics2-8b": (idefics2, idefics2.Idefics2),
    "qwen2-vl-7b": (qwen2_vl, qwen2_vl.Qwen2VL),
    "molmo-7b-d": (molmo, molmo.Molmo),
}


@pytest.mark.parametrize(
    ("name", "share"),
    # Qwen2-VL and Molmo: four key-value heads are held by every device.
    [
        ("llava-1.5-7b", 1.002),
        ("idefics2-8b", 1.014),
        ("qwen2-vl-7b", 1.089),
        ("molmo-7b-d", 1.091),
    ],
)
def test_a_device_of_eight_holds_an_eighth_of_a_real_model(name, share):
    port, kind = REAL[name]
    data = Path(__file__).parents[2] / "data" / "checkpoints" / f"{name}.json"
    values = json.loads(data.read_text())["config"]
    config = (
        molmo.read_config(values) if port is molmo else transformers.AutoConfig.for_model(**values)
    )
    module = kind(port.Config.from_hf(config))
    params = checkpoint.abstract_params(module, port.example_inputs(module.config))
    placed = sharding.param_shardings(
        sharding.abstract_mesh(1, 8), params, module.axes, module.kv_heads
    )
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert sharding.parameter_bytes(params, placed) * 8 / total == pytest.approx(share, abs=1e-3)


# Small checkpoints of one layer. Eight devices divide none of the numbers of key-value heads, four
# some of those of query heads; the vocabulary is divided but in Idefics2.
TEXT = {
    "vocab_size": 104,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "head_dim": 8,
}
TOWER = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}


def make_llava(directory):
    helpers.make_llava(directory, helpers.llava_config(text=TEXT, vision=TOWER))
    sites = ["vision_tower.vision_model.encoder.layers.0", "multi_modal_projector"]
    return helpers.make_inputs([1] * 8, [3, 9, 4, 8, 5, 7, 6, 6]), "language_model.model", sites


def make_idefics2(directory):
    """Saves an Idefics2 with six query heads, whose projection alone is divided, and 103 tokens."""
    text = TEXT | {"num_attention_heads": 6, "vocab_size": 103}
    perceiver = {"hidden_size": 64, "resampler_depth": 1, "resampler_n_heads": 8}
    config = idefics2_helpers.make_config(text, perceiver, TOWER)
    idefics2_helpers.make_idefics2(directory, config)
    images = [[(21 + 3 * i, 40)] for i in range(8)]
    inputs = idefics2_helpers.make_inputs(images, [3, 9, 4, 8, 5, 7, 6, 6])
    return inputs, "model.text_model", ["model.vision_model", "model.connector"]


def make_qwen2_vl(directory):
    rope = {**qwen2_vl_helpers.ROPE, "mrope_section": [1, 1, 2]}
    config = qwen2_vl_helpers.make_config(
        TEXT | {"rope_parameters": rope},
        {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    )
    qwen2_vl_helpers.make_qwen2_vl(directory, config)
    images = [[(1, 2 + 2 * (i % 2), 4)] for i in range(8)]
    inputs = qwen2_vl_helpers.make_inputs(images, [3, 9, 4, 8, 5, 7, 6, 6])
    return inputs, "model", ["visual.blocks.0", "visual.merger"]


def make_molmo(directory):
    """Saves a Molmo with six query heads and two tables of embeddings, all divided."""
    tower = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "vit_layers": [-1],
    }
    config = molmo_helpers.CONFIG | {
        "vocab_size": 96,
        "embedding_size": 96,
        "additional_vocab_size": 16,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "vision_config": molmo_helpers.CONFIG["vision_config"] | tower,
    }
    molmo_helpers.make_checkpoint(directory, config)
    crops = [2, 1, 3, 1, 2, 2, 1, 3]
    inputs = molmo_helpers.make_inputs(config, crops, [3, 9, 4, 8, 5, 7, 6, 6])
    return inputs, "model.transformer", ["model.vision_backbone"]


PORTS = {
    "llava": (make_llava, "layers.0"),
    "idefics2": (make_idefics2, "layers.0"),
    "qwen2-vl": (make_qwen2_vl, "layers.0"),
    "molmo": (make_molmo, "blocks.0"),
}
MESHES = ("8x1", "2x4", "1x8", "explicit 2x4")


class Runs:
    """The results of one device, and of eight on each of the meshes."""

    def __init__(self, name, directory):
        make, layer = PORTS[name]
        inputs, decoder, sites = make(directory / "checkpoint")
        self.layer, self.valid = f"{decoder}.{layer}", inputs["attention_mask"] == 1
        np.savez(directory / "inputs.npz", **inputs)
        helpers.run_python(
            Path(__file__).with_name("sharded.py").read_text(),
            directory / "checkpoint",
            directory / "inputs.npz",
            directory,
            json.dumps({"steered": self.layer, "sites": [*sites, self.layer], "meshes": MESHES}),
            **helpers.EIGHT_DEVICES,
        )
        self.results = {mesh: np.load(directory / f"{mesh}.npz") for mesh in ("1", *MESHES)}


@pytest.fixture(scope="module", params=PORTS)
def runs(request, tmp_path_factory):
    return Runs(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
class TestEightDevices:
    def test_give_the_states_and_logits_of_one(self, runs, mesh):
        """Without steering, and with each row steered by its own vector and strength."""
        one, ours = runs.results["1"], runs.results[mesh]
        assert set(one) == set(ours)
        for name in set(one) - {"plain tokens", "steered tokens"}:
            rows = one[name].reshape(-1, one[name].shape[-1])
            of_prompt = name.endswith(("logits", runs.layer))
            where = runs.valid.reshape(-1) if of_prompt else None
            assert helpers.relative_error(ours[name], rows, where) < 1e-5, name

    def test_give_the_tokens_of_one(self, runs, mesh):
        one, ours = runs.results["1"], runs.results[mesh]
        for name in ("plain tokens", "steered tokens"):
            np.testing.assert_array_equal(ours[name], one[name])
        assert (ours["steered tokens"] != ours["plain tokens"])[1:].any(1).sum() >= 5


@pytest.mark.slow
def test_types_of_axes_change_no_bit(runs):
    auto, explicit = runs.results["2x4"], runs.results["explicit 2x4"]
    assert set(auto) == set(explicit)
    for name in auto:
        np.testing.assert_array_equal(explicit[name], auto[name], err_msg=name)


MORE = """
    import jax, jax.numpy as jnp, numpy as np
    import ports
    from ports.checkpoint import orbax_io
    from pathlib import Path

    directory, inputs, work = sys.argv[1:]
    inputs, work = dict(np.load(inputs)), Path(work)
    site = "language_model.model.layers.0"
    vector = np.random.default_rng(0).standard_normal(64).astype("float32")

    def gradient(vlm):
        arrays = vlm.place(inputs)
        def mean_square(v, params):
            edited = ports.steer(vlm.apply, {site: ports.add(v)})
            return jnp.mean(edited(params, arrays) ** 2)

        return jax.jit(jax.grad(mean_square))(vector, vlm.params)

    found = {}
    for name, shape in (("one", None), ("eight", (2, 4))):
        vlm = ports.load(directory, mesh=shape and ports.make_mesh(*shape))
        variants = [{site: ports.add(vector, alpha)} for alpha in (0.0, 8.0)]
        swept = vlm.sweep(inputs, variants, max_new_tokens=3, sites=[site])
        found |= {f"{name} tokens": swept.tokens, f"{name} states": swept.states[site]}
        found[f"{name} gradient"] = gradient(vlm)
    np.savez(work / "found.npz", **found)

    # Written from (2, 4), read onto (1, 8), onto one device, and in another dtype.
    orbax_io.save(vlm.params, work, "0123456789abcdef")
    other = ports.load(work, mesh=ports.make_mesh(1, 8))
    kernel = other.params["language_model"]["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (64, 12)
    for restored, dtype in ((other, "float32"), (ports.load(work, dtype="bfloat16"), "bfloat16")):
        pairs = jax.tree.map(
            lambda a, b: np.array_equal(np.asarray(a).astype(dtype), np.asarray(b)),
            vlm.params, restored.params,
        )
        assert all(jax.tree.leaves(pairs))
"""


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Returns a checkpoint of LLaVA and a file of inputs."""
    directory = tmp_path_factory.mktemp("even")
    inputs, *_ = make_llava(directory / "checkpoint")
    np.savez(directory / "inputs.npz", **inputs)
    return directory


@pytest.mark.slow
def test_sweeps_gradients_and_orbax_on_eight_devices(even, tmp_path):
    shutil.copy(even / "checkpoint" / "config.json", tmp_path)
    helpers.run_python(
        MORE, even / "checkpoint", even / "inputs.npz", tmp_path, **helpers.EIGHT_DEVICES
    )
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_array_equal(found["one tokens"], found["eight tokens"])
    assert (found["one tokens"][0] != found["one tokens"][1]).any()
    for name in ("states", "gradient"):
        one = found[f"one {name}"].reshape(-1, 64)
        assert helpers.relative_error(found[f"eight {name}"], one) < 1e-5


# Two processes with four devices each.
HOSTS = """
    import jax, numpy as np
    from jax.experimental import multihost_utils

    directory, inputs, work, address, index = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(index))
    import ports
    from ports.checkpoint import orbax_io, safetensors_io
    from pathlib import Path

    inputs = dict(np.load(inputs))
    site = "language_model.model.layers.0"
    read = []
    whole = safetensors_io.StoredTensor.read
    def counted(self, rows=None):
        value = whole(self, rows)
        read.append(value.nbytes)
        return value
    safetensors_io.StoredTensor.read = counted
    vlm = ports.load(directory, mesh=ports.make_mesh(1, 8))
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(vlm.params))
    assert sum(read) < 0.85 * size, sum(read) / size
    vector = np.random.default_rng(0).standard_normal((8, 64)).astype("float32")
    edits = {site: ports.add(vector, np.arange(8.0))}
    out = vlm.forward(inputs, sites=[site], edits=edits)
    tokens = vlm.generate(inputs, max_new_tokens=3, edits=edits).tokens
    orbax_io.save(vlm.params, Path(work), "0123456789abcdef")
    multihost_utils.sync_global_devices("saved")
    again = ports.load(work, mesh=ports.make_mesh(2, 4))
    second = again.generate(inputs, max_new_tokens=3, edits=edits).tokens
    gathered = multihost_utils.process_allgather(
        {"logits": out.logits, "states": out.states[site], "tokens": tokens, "second": second},
        tiled=True,
    )
    if index == "0":
        np.savez(work + "/found.npz", **gathered)
"""


@pytest.mark.slow
def test_two_processes_share_a_model(even, tmp_path):
    """Each process reads its own rows of the tensors; inputs, edits and Orbax span both."""
    shutil.copy(even / "checkpoint" / "config.json", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = (even / "checkpoint", even / "inputs.npz", tmp_path, address)
    hosts = [helpers.start_python(HOSTS, *arguments, i, **helpers.FOUR_DEVICES) for i in range(2)]
    for host in hosts:
        _, errors = host.communicate(timeout=600)
        assert host.returncode == 0, errors[-3000:]
    found = np.load(tmp_path / "found.npz")
    vlm = ports.load(even / "checkpoint")
    inputs = dict(np.load(even / "inputs.npz"))
    site = "language_model.model.layers.0"
    vector = np.random.default_rng(0).standard_normal((8, 64)).astype("float32")
    edits = {site: ports.add(vector, np.arange(8.0))}
    expected = vlm.forward(inputs, sites=[site], edits=edits)
    valid = inputs["attention_mask"] == 1
    assert helpers.relative_error(found["logits"], expected.logits, valid) < 1e-5
    assert helpers.relative_error(found["states"], expected.states[site], valid) < 1e-5
    tokens = vlm.generate(inputs, max_new_tokens=3, edits=edits).tokens
    np.testing.assert_array_equal(found["tokens"], tokens)
    np.testing.assert_array_equal(found["second"], tokens)


class TestOrbax:
    @pytest.fixture(scope="class")
    def saved(self, even, tmp_path_factory):
        directory = tmp_path_factory.mktemp("orbax") / "saved"
        shutil.copytree(even / "checkpoint", directory, ignore=lambda *_: ["model.safetensors"])
        vlm = ports.load(even / "checkpoint")
        orbax_io.save(vlm.params, directory, checkpoint.fingerprint(even / "checkpoint"))
        return directory

    @pytest.fixture
    def copy(self, saved, tmp_path):
        return shutil.copytree(saved, tmp_path / "copy")

    def test_is_the_checkpoint(self, saved, even):
        original, ours = ports.load(even / "checkpoint"), ports.load(saved)
        same = jax.tree.map(np.array_equal, original.params, ours.params)
        assert all(jax.tree.leaves(same))
        fingerprint = checkpoint.fingerprint(saved)
        assert fingerprint == checkpoint.fingerprint(even / "checkpoint")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_is_converted(self, saved, even, dtype):
        original, ours = (
            ports.load(even / "checkpoint", dtype=dtype),
            ports.load(saved, dtype=dtype),
        )
        same = jax.tree.map(np.array_equal, original.params, ours.params)
        assert all(jax.tree.leaves(same))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(ours.params)} == {dtype}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "has params without params.json"),
            ("{", "params.json is damaged"),
            ("[]", "params.json is damaged"),
            ("[" * 100_000, "params.json is damaged"),
            ('{"format": "ports parameters", "version": 1}', "params.json is damaged"),
            (
                '{"format": "ports parameters", "version": 2, "dtype": "float32", '
                '"fingerprint": "0"}',
                "format 'ports parameters', version 2; convert the checkpoint again",
            ),
            (
                '{"format": "ports parameters", "version": 1.0, "dtype": "float32", '
                '"fingerprint": "0"}',
                "format 'ports parameters', version 1.0; convert the checkpoint again",
            ),
        ],
    )
    def test_invalid_records(self, copy, content, message):
        (copy / "params.json").unlink()
        if content is not None:
            (copy / "params.json").write_text(content)
        for read in (ports.load, checkpoint.fingerprint):
            with helpers.raises_line(ValueError, message, "convert the checkpoint again"):
                read(copy)

    def test_no_parameters_next_to_the_record(self, copy):
        shutil.rmtree(copy / "params")
        with helpers.raises_line(ValueError, "params is damaged or incomplete"):
            ports.load(copy)

    def test_a_record_of_another_format_is_not_ours(self, even, tmp_path):
        """Mistral's repositories hold a params.json of their own."""
        directory = shutil.copytree(even / "checkpoint", tmp_path / "copy")
        for content in ('{"dim": 4096, "n_layers": 32}', "[]", "{"):
            (directory / "params.json").write_text(content)
            assert not orbax_io.is_saved(directory)
        assert checkpoint.fingerprint(directory) == checkpoint.fingerprint(even / "checkpoint")
        assert ports.load(directory).directory == directory

    @pytest.mark.parametrize("harm", ["delete", "shorten"])
    def test_damaged_parameters(self, copy, harm):
        file = max((copy / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
        if harm == "delete":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with helpers.raises_line(ValueError, "params is damaged or incomplete"):
            ports.load(copy)

    def test_another_model(self, copy):
        config = json.loads((copy / "config.json").read_text())
        config["text_config"]["intermediate_size"] = 48
        (copy / "config.json").write_text(json.dumps(config))
        with helpers.raises_line(ValueError, "does not hold this model's parameters", "up_proj"):
            ports.load(copy)
