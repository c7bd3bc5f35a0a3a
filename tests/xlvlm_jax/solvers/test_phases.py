"""Progress: what is reported, and that reporting changes nothing."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from xlvlm_jax import decompose

KEY = jax.random.key(0)


def planted(N=60, D=30, K=4):
    rng = np.random.default_rng(1)
    Z = rng.exponential(size=(N, K)) @ rng.normal(size=(K, D))
    return (Z + 0.3 * rng.normal(size=(N, D))).astype("float32")


# Wide enough that k-means begins in few columns.
SIZES = {"snmf": (60, 30), "kmeans": (120, 80), "pca": (700, 600)}
OPTIONS = {"snmf": {"max_iter": 40, "n_init": 1}, "kmeans": {}, "pca": {"tol": 1e-7}}


@pytest.mark.parametrize("method", SIZES)
def test_the_same_concepts_are_found(method):
    Z, options = planted(*SIZES[method]), OPTIONS[method]
    told = []
    alone = decompose(Z, 4, method, key=KEY, **options)
    watched = decompose(Z, 4, method, key=KEY, progress=told.append, **options)
    assert watched.options == alone.options
    assert watched.iterations == alone.iterations == told[-1].iteration > 0
    assert watched.converged == alone.converged
    np.testing.assert_array_equal(watched.history, alone.history)
    np.testing.assert_array_equal(watched.activations, alone.activations)
    # Of k-means the sum of two arrays is rounded once or twice.
    np.testing.assert_allclose(watched.components, alone.components, rtol=1e-6, atol=1e-6)


def test_iterations_and_objectives_are_those_of_the_history():
    told = []
    one = decompose(
        planted(), 4, key=KEY, progress=told.append, verbose=5, tol=0.0, max_iter=18, n_init=1
    )
    assert [standing.iteration for standing in told] == [5, 10, 15, 18]
    for standing in told:
        assert (standing.num_concepts, standing.max_iter) == (4, 18)
    for standing in told[:-1]:
        assert standing.objective == one.history[standing.iteration]
    # After the last update the rows are coded once more; what is told on the way is float32's.
    assert one.history[18] == one.objective <= told[-1].objective * (1 + 1e-6)


def test_it_is_written_to_standard_error(capsys):
    decompose(planted(), 4, key=KEY, verbose=5, tol=0.0, max_iter=18, n_init=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"iteration {i}" for i in (5, 10, 15)]
    assert "objective " in lines[0]


def test_several_numbers_of_concepts_are_distinguished():
    told = []
    found = decompose(planted(), [2, 4], "kmeans", key=KEY, progress=told.append)
    for concepts in found:
        mine = [at for at in told if at.num_concepts == len(concepts.components)]
        assert mine[-1].iteration == concepts.iterations
        assert concepts.converged and mine[-1].error <= 1e-4


def test_on_a_mesh():
    method, told = "kmeans", []
    Z = planted(*SIZES[method])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    alone = decompose(Z, 4, method, key=KEY, **OPTIONS[method])
    spread = decompose(Z, 4, method, key=KEY, mesh=mesh, progress=told.append, **OPTIONS[method])
    assert told[-1].iteration == spread.iterations
    assert spread.objective == pytest.approx(alone.objective, rel=1e-4)
    assert spread.activations.shape == (len(Z), 4)


def test_the_simplest_concepts_have_no_updates():
    told = []
    assert len(decompose(planted(), 3, "simple", key=KEY, progress=told.append).components) == 3
    assert told == []


def test_verbose_is_a_whole_number():
    with pytest.raises(ValueError, match="verbose"):
        decompose(planted(), 3, key=KEY, verbose=-1)
