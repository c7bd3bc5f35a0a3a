"""Where parameters lie, and that eight devices compute what one does."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ports
from ports import sharding

from . import helpers

MESH = jax.sharding.AbstractMesh((2, 4), ("data", "model"))


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
        # Four devices do not divide these.
        (("lm_head", "kernel"), (60, 103), P(None, None)),
        (("mlp", "down_proj", "kernel"), (77, 60), P(None, None)),
        # Norms, convolutions and positions are everywhere.
        (("norm", "scale"), (60,), P()),
        (("patch_embedding", "kernel"), (7, 7, 3, 36), P()),
        (("class_embedding",), (36,), P()),
    ],
    ids=str,
)
def test_parameters(path, shape, spec):
    assert sharding.param_sharding(MESH, path, shape).spec == spec


@pytest.mark.parametrize(
    ("shape", "spec"), [((6, 32), P("data")), ((3, 32), P(None)), ((0, 32), P(None))]
)
def test_batches(shape, spec):
    assert sharding.batch_sharding(MESH, shape).spec == spec


def test_a_mesh_without_a_model_axis_replicates():
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    assert sharding.param_sharding(mesh, ("q_proj", "kernel"), (8, 8)).spec == P(None, None)


EIGHT = """
    import jax, numpy as np
    import ports

    directory, inputs, results = sys.argv[1:]
    inputs = dict(np.load(inputs))
    for shape in ((2, 4), (8, 1)):
        vlm = ports.load(directory, mesh=ports.make_mesh(*shape))
        site = "language_model.model.layers.0"
        out = vlm.forward(inputs, sites=[site])
        generation = vlm.generate(inputs, max_new_tokens=4)
        rows = np.random.default_rng(0).standard_normal((8, 64)).astype("float32")
        edits = {site: ports.add(rows, np.arange(8.0), where="text")}
        steered = vlm.generate(inputs, max_new_tokens=4, edits=edits)
        kernel = vlm.params["language_model"]["model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
        np.savez(
            f"{results}/{shape[0]}x{shape[1]}.npz",
            logits=out.logits,
            states=out.states[site],
            tokens=generation.tokens,
            steered=steered.tokens,
            devices=len(jax.devices()),
            columns=kernel.sharding.shard_shape(kernel.shape)[1],
        )
"""


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A checkpoint of one layer whose sizes four devices divide, but for two key-value heads."""
    config = helpers.llava_config(
        text={
            "vocab_size": 104,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "head_dim": 8,
        },
        vision={"num_hidden_layers": 1},
    )
    return helpers.make_llava(tmp_path_factory.mktemp("even"), config)


@pytest.fixture(scope="module")
def batch():
    return helpers.make_inputs([1] * 8, [3, 9, 4, 8, 5, 7, 6, 6])


@pytest.fixture(scope="module")
def results(even, batch, tmp_path_factory):
    """What eight devices compute, by mesh."""
    directory = tmp_path_factory.mktemp("results")
    np.savez(directory / "inputs.npz", **batch)
    helpers.run_python(
        EIGHT,
        even.directory,
        directory / "inputs.npz",
        directory,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
        JAX_DEFAULT_MATMUL_PRECISION="highest",
    )
    return {mesh: np.load(directory / f"{mesh}.npz") for mesh in ("2x4", "8x1")}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "columns"), [("2x4", 24), ("8x1", 96)])
class TestEightDevices:
    def test_hold_a_part_each(self, results, mesh, columns):
        assert results[mesh]["devices"] == 8
        assert results[mesh]["columns"] == columns

    def test_give_the_states_and_logits_of_one(self, results, even, batch, mesh, columns):
        site = "language_model.model.layers.0"
        expected = even.vlm.forward(batch, sites=[site])
        valid = batch["attention_mask"] == 1
        ours = results[mesh]
        assert helpers.relative_error(ours["logits"], expected.logits, valid) < 1e-5
        assert helpers.relative_error(ours["states"], expected.states[site], valid) < 1e-5

    def test_give_the_tokens_of_one(self, results, even, batch, mesh, columns):
        expected = even.vlm.generate(batch, max_new_tokens=4).tokens
        np.testing.assert_array_equal(results[mesh]["tokens"], expected)

    def test_steer_as_one_does(self, results, even, batch, mesh, columns):
        """Every row by its own vector and strength, at the positions of its text."""
        rows = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
        edits = {
            "language_model.model.layers.0": ports.add(rows, np.arange(8.0), where="text"),
        }
        steered = even.vlm.generate(batch, max_new_tokens=4, edits=edits).tokens
        np.testing.assert_array_equal(results[mesh]["steered"], steered)
        assert (results[mesh]["steered"] != results[mesh]["tokens"])[1:].any(1).all()
