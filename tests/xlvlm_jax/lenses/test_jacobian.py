"""The Jacobian lens: against dense Jacobians, files of ours and of jlens, messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ports
from xlvlm_jax import lenses


def test_the_average_of_a_dense_jacobian():
    random = np.random.default_rng(0)
    A, x = random.standard_normal((3, 3)), jnp.asarray(random.standard_normal((2, 4, 3)))
    weights = jnp.asarray([[0.0, 1, 1, 1], [0, 0, 1, 1]])

    def function(x):  # later positions see earlier ones
        return jnp.tanh(jnp.cumsum(x @ A.T, axis=1)) * x

    dense = np.asarray(jax.jacobian(function)(x))  # [B, T, D, B, T, D]
    expected = np.zeros((3, 3))
    for b in range(2):
        chosen = np.flatnonzero(weights[b])
        block = dense[b][chosen][:, :, b][:, :, chosen]
        expected += block.sum(axis=0).mean(axis=1) / 2
    for at_once in (1, 2, 8):
        found = lenses.average_jacobian(function, x, weights, at_once=at_once)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    traced = jax.jit(lambda x: lenses.average_jacobian(function, x, weights))(x)
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def inputs(vlm):
    return vlm.process([vlm.render("What is it?")], [Image.new("RGB", (64, 64), "red")])


@pytest.fixture(scope="module")
def lens(vlm, inputs):
    return lenses.fit_jacobian_lens(vlm, [inputs, inputs], layers=[5, 6], skip=60)


def test_of_a_model_it_is_the_dense_one(vlm, inputs, lens):
    """The last positions alone are moved, by each coordinate: columns of the dense Jacobian."""
    placed = vlm.place(inputs)
    chosen = (placed["attention_mask"] == 1) & (vlm.places(placed).index >= 60)
    site, last = vlm.layers[5], vlm.layers[-1]
    zeros = jnp.zeros((*chosen.shape, 192))

    def final(shift):
        apply = ports.capture(ports.steer(vlm.apply, {site: ports.add(shift)}), [last])
        return apply(vlm.params, placed)[1][last]

    def column(j):
        # Moved everywhere at once: the sum over source positions.
        one = chosen[..., None] * jax.nn.one_hot(j, 192)
        moved = jax.jvp(final, (zeros,), (one,))[1]
        return (chosen[..., None] * moved).sum((0, 1)) / chosen.sum()

    dense = np.asarray(jax.jit(lambda j: jax.lax.map(column, j))(jnp.arange(192))).T
    assert lens.num_prompts == 2 and set(lens.jacobians) == {5, 6}
    scale = np.abs(dense).max()
    np.testing.assert_allclose(lens.jacobians[5] / scale, dense / scale, atol=1e-5)


def test_it_reads_states_in_its_own_way(vlm, inputs, lens):
    carried = lens.carried(vlm)
    assert set(carried) == {vlm.layers[5], vlm.layers[6]}
    plain = lenses.logit_lens(vlm, inputs, k=1)
    read = lenses.logit_lens(vlm, inputs, k=1, carried=carried)
    np.testing.assert_array_equal(read.tokens[-1], plain.tokens[-1])
    assert (read.probabilities[5:7] != plain.probabilities[5:7]).any()


def test_files(vlm, lens, tmp_path):
    lens.save(tmp_path / "of/lens.safetensors")
    back = lenses.load_jacobian_lens(tmp_path / "of/lens.safetensors")
    assert back.num_prompts == 2 and back.source["fingerprint"] == vlm.fingerprint
    for number, matrix in lens.jacobians.items():
        np.testing.assert_array_equal(back.jacobians[number], matrix)


def test_a_published_file(tmp_path):
    """As jlens saves: float16 matrices by layer, with torch.save."""
    torch = pytest.importorskip("torch")
    matrices = {layer: torch.randn(6, 6).half() for layer in (0, 2)}
    whole = {"J": matrices, "n_prompts": 7, "source_layers": [0, 2], "d_model": 6}
    torch.save(whole, tmp_path / "lens.pt")
    read = lenses.load_jacobian_lens(tmp_path / "lens.pt")
    assert repr(read) == "JacobianLens(2 layers of width 6, 7 prompts)"
    np.testing.assert_array_equal(read.jacobians[2], matrices[2].float().numpy())
    torch.save({"sums": matrices}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="has no 'J', a dict of matrices"):
        lenses.load_jacobian_lens(tmp_path / "checkpoint.pt")


@pytest.mark.wrong_types
def test_messages(vlm, inputs, lens, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a Jacobian lens"):
        lenses.load_jacobian_lens(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bad.safetensors.*fit it again"):
        lenses.load_jacobian_lens(tmp_path / "bad.safetensors")
    lenses.JacobianLens({0: np.ones((2, 3), "float32")}, 1).save(tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"matrices have shapes \[\(2, 3\)\]; expected one"):
        lenses.load_jacobian_lens(tmp_path / "wide.safetensors")
    lenses.JacobianLens({0: np.full((2, 2), np.nan, "float32")}, 1).save(
        tmp_path / "nan.safetensors"
    )
    with pytest.raises(ValueError, match="matrix of layer 0 holds NaN or Inf"):
        lenses.load_jacobian_lens(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"a matrix \(2, 2\) for layer 0; the model has 8 layers"):
        lenses.JacobianLens({0: np.eye(2, dtype="float32")}, 1).carried(vlm)
    with pytest.raises(ValueError, match="another model"):
        lenses.JacobianLens(lens.jacobians, 1, {"fingerprint": "other"}).carried(vlm)
    with pytest.raises(ValueError, match="expected some of 0 to 6"):
        lenses.fit_jacobian_lens(vlm, [inputs], layers=[7])
    with pytest.raises(ValueError, match="skip is -1; expected a number of positions, 0 or more"):
        lenses.fit_jacobian_lens(vlm, [inputs], skip=-1)
    with pytest.raises(ValueError, match="no more than 500 tokens"):
        lenses.fit_jacobian_lens(vlm, [inputs], skip=500)
    with pytest.raises(ValueError, match="no batches"):
        lenses.fit_jacobian_lens(vlm, [])
