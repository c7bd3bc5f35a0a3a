"""Training of sparse autoencoders: planted atoms, updates by hand, and the methods' parts."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.xlvlm_jax.solvers.helpers import Compilations
from xlvlm_jax.solvers.matching import match_any
from xlvlm_jax.solvers.sae import METHODS, train, training
from xlvlm_jax.solvers.sae.archetypal import Archetypal
from xlvlm_jax.solvers.sae.batchtopk import BatchTopK
from xlvlm_jax.solvers.sae.jumprelu import exceeds, jump
from xlvlm_jax.solvers.sae.matryoshka import Matryoshka
from xlvlm_jax.solvers.sae.start import start
from xlvlm_jax.solvers.sae.topk import TopK
from xlvlm_jax.solvers.sae.training import Given, _begin, update

KEY = jax.random.key(0)
N, D, K, ACTIVE = 2000, 16, 24, 2


def planted(seed=0):
    """Returns rows that are sums of two unit atoms, shifted and scaled, and the atoms."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(K, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((N, K))
    for row in codes:
        row[rng.choice(K, ACTIVE, replace=False)] = rng.uniform(1, 2, ACTIVE)
    rows = 50 * (codes @ atoms + rng.normal(size=D))
    return rows.astype(np.float32), atoms


ROWS, ATOMS = planted()
SHORT = {"max_iter": 300, "batch_size": 256, "learning_rate": 1e-2}
# Minimum explained variance, and minimum mean cosine between planted and found atoms.
LEAST = {
    "topk-sae": (0.9, 0.85),
    "batchtopk-sae": (0.85, 0.75),
    "jumprelu-sae": (0.85, 0.75),
    "relu-sae": (0.88, 0.85),
    "matryoshka-sae": (0.75, 0.7),
    "archetypal-sae": (0.8, 0.75),
}


def codes_of(params, rows, k=None):
    """Returns codes for rows that are not scaled, by SAELens' names; see sae.dictionary."""
    h = (rows - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
    if "threshold" in params:
        return np.where(h > params["threshold"], np.maximum(h, 0), 0)
    if k is not None:
        h = np.where(h >= np.sort(h, axis=1)[:, -k][:, None], h, 0)
    return np.maximum(h, 0)


def explained(params, rows, codes):
    left = rows - codes @ params["W_dec"] - params["b_dec"]
    return 1 - (left**2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("method", LEAST)
def test_planted_atoms_are_found(method):
    """By every method, and the parameters are for rows that are not scaled."""
    options = {} if method == "relu-sae" else {"k": ACTIVE}
    found = train(ROWS, KEY, METHODS[method](**options, **SHORT), K)
    k = ACTIVE if method in ("topk-sae", "archetypal-sae") else None
    codes = codes_of(found.params, ROWS, k)
    variance, cosine = LEAST[method]
    assert explained(found.params, ROWS, codes) > variance
    assert match_any(found.params["W_dec"], ATOMS)[2].mean() > cosine
    if method not in ("relu-sae", "archetypal-sae"):
        near = 0.25 if method == "jumprelu-sae" else 0.05  # its k is a penalty's
        assert (codes != 0).sum(axis=1).mean() == pytest.approx(ACTIVE, rel=near)
    if method != "archetypal-sae":
        np.testing.assert_allclose(np.linalg.norm(found.params["W_dec"], axis=1), 1, rtol=1e-5)
    assert len(found.history) == 300 and found.history[-1] < 0.7 * found.history[0]


def test_the_same_key_gives_the_same_bytes():
    settings = TopK(k=2, max_iter=5, batch_size=64)
    one, two = (train(ROWS, KEY, settings, K) for _ in range(2))
    other = train(ROWS, jax.random.key(1), settings, K)
    for name, value in one.params.items():
        np.testing.assert_array_equal(value, two.params[name])
        assert not np.array_equal(value, other.params[name]) or name == "b_enc"


def test_each_update_is_waited_for(waited_for):
    values = waited_for(training)
    train(ROWS, KEY, TopK(k=2, max_iter=5, batch_size=64), K)
    assert [int(state.iteration) for state, _ in values[-1:]] == [5] and len(values) == 5


def test_the_start_is_freed_before_the_first_update(monkeypatch):
    """Else a second copy of the parameters would be held to the end."""
    begun, alive = [], []
    begin = TopK.begin

    def beginning(self, start, key, num_concepts):
        params, fixed = begin(self, start, key, num_concepts)
        begun.extend(map(weakref.ref, [*params.values(), start.rows]))
        return params, fixed

    def tell(_):
        alive.append(sum(each() is not None for each in begun))

    monkeypatch.setattr(TopK, "begin", beginning)
    train(ROWS, KEY, TopK(k=2, max_iter=5, batch_size=64), K, tell=tell, every=1)
    assert len(begun) == 5 and alive == [0] * 5


def test_one_update_by_hand():
    """One row, one feature along it, no offset: the loss is what one code leaves."""
    rows = np.float32([[0, 2.0]])
    found = train(rows, KEY, TopK(k=1, max_iter=1, input_scale=1.0, learning_rate=0.1), 1)
    # The median is the row itself, so nothing is left to explain.
    assert found.history.tolist() == [0.0]
    np.testing.assert_allclose(found.params["b_dec"], [0, 2], atol=1e-6)


def test_the_schedule():
    settings = TopK(max_iter=100, learning_rate=2.0, warm_up=0.1, decay=0.2)
    rates = [float(settings.rate(jnp.int32(i))) for i in range(100)]
    np.testing.assert_allclose(rates[:3], [0.2, 0.4, 0.6], rtol=1e-6)
    np.testing.assert_allclose(rates[9:81], 2, rtol=1e-6)
    np.testing.assert_allclose(rates[-2:], [0.2, 0.1], rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1 / 32])
def test_dead_features_are_revived(weight):
    """Features that encode nothing stay dead without the last term of the loss."""
    settings = TopK(k=2, aux_weight=weight, dead_after=500, **SHORT)
    begun = start(ROWS, None)
    params, fixed = settings.begin(begun, KEY, K)
    half = np.arange(K) < K // 2
    params |= {
        "W_enc": jnp.where(half, 0, params["W_enc"]),
        "b_enc": jnp.where(half, -0.1, params["b_enc"]),
    }
    given = Given(fixed, jnp.float32(begun.scale))
    state = _begin(params, settings=settings, mesh=None)
    for number in range(150):
        rows = ROWS[256 * number % 1536 :][:256]
        state, figures = update(state, given, jnp.asarray(rows), settings=settings)
    if weight:
        assert figures.dead < 0.2
    else:
        assert figures.dead >= 0.5 and np.all(np.asarray(state.idle)[: K // 2] == 500)


def test_what_is_told():
    told = []
    settings = TopK(k=2, max_iter=40, batch_size=64)
    found = train(ROWS, KEY, settings, K, tell=told.append, every=16)
    assert [at.iteration for at in told] == [16, 32, 40]
    assert told[-1].objective == found.history[-1] and told[0].max_iter == 40
    assert set(told[0].figures) == {"L0", "explained variance", "dead share"}
    assert 0 < told[-1].figures["L0"] <= 2 and told[-1].figures["explained variance"] < 1
    # What was chosen is in the settings of the result.
    assert found.settings.learning_rate > 0 and found.settings.batch_size == 64
    again = train(ROWS, KEY, found.settings, K)
    np.testing.assert_array_equal(again.params["W_enc"], found.params["W_enc"])


def test_rounded_products_lead_to_the_same():
    exact, rounded = (
        train(ROWS, KEY, TopK(k=ACTIVE, products=products, **SHORT | {"max_iter": 40}), K)
        for products in ("float32", "bfloat16")
    )
    assert rounded.params["W_enc"].dtype == np.float32
    assert not np.array_equal(exact.params["W_enc"], rounded.params["W_enc"])
    assert match_any(exact.params["W_dec"], rounded.params["W_dec"])[2].mean() > 0.95


class TestCodes:
    H = jnp.float32([[3, 1, -2], [0.5, 2, 2.5]])

    def test_topk(self):
        codes, cut = TopK(k=2).codes(self.H, {})
        assert codes.tolist() == [[3, 1, 0], [0, 2, 2.5]] and cut == 0
        assert TopK(k=3).codes(self.H, {})[0].tolist() == [[3, 1, 0], [0.5, 2, 2.5]]

    def test_batchtopk(self):
        codes, cut = BatchTopK(k=1).codes(self.H, {})
        assert codes.tolist() == [[3, 0, 0], [0, 0, 2.5]] and cut == 2.5
        assert BatchTopK(k=3).codes(self.H, {})[1] == 0.5  # never negative
        assert BatchTopK(k=1).codes(-jnp.abs(self.H), {})[1] == 0

    def test_matryoshka(self):
        settings = Matryoshka(k=1, prefixes=(1,))
        assert settings.sizes(3) == (1, 3) and Matryoshka().sizes(32) == (2, 4, 8, 16, 32)
        parts = settings.reconstructions(jnp.float32([[1, 2, 3]]), jnp.eye(3), jnp.ones(3))
        assert parts.tolist() == [[[2, 1, 1]], [[2, 3, 4]]]

    def test_jumprelu(self):
        theta, width = jnp.float32([2.9, 1.5, 0.1]), jnp.float32(0.25)
        assert jump(self.H, theta, width).tolist() == [[3, 0, 0], [0, 2, 2.5]]
        # Only the first value of the first feature is within eps / 2 of its threshold.
        slopes = jax.grad(lambda h, t: jump(h, t, width).sum(), (0, 1))(self.H, theta)
        assert slopes[0].tolist() == [[1, 0, 0], [0, 1, 1]]
        np.testing.assert_allclose(slopes[1], [-1 / 0.25, 0, 0], rtol=1e-6)
        slopes = jax.grad(lambda h, t: exceeds(h, t, width).sum(), (0, 1))(self.H, theta)
        assert not slopes[0].any()
        np.testing.assert_allclose(slopes[1], [-1 / (0.25 * 2.9), 0, 0], rtol=1e-6)

    def test_archetypal_atoms_are_in_the_hull(self):
        rows = ROWS[:200]
        settings = Archetypal(k=2, max_iter=30, batch_size=64, learning_rate=1e-2, points=40)
        found = train(rows, KEY, settings, K).params
        atoms = found["W_dec"] + found["b_dec"]
        from scipy.optimize import nnls

        for atom in atoms[:5]:
            # Weights that sum to one and give the atom.
            system = np.concatenate([rows.T / 50, 10 * np.ones((1, 200))])
            left = nnls(system, np.concatenate([atom / 50, [10]]))[1]
            assert left < 1e-3


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("topk-sae", {"k": 25}, "k=25 is larger than num_concepts=24, the number of features"),
        ("topk-sae", {"k": 0}, "k must be a whole number of at least 1; got 0"),
        ("jumprelu-sae", {"k": 25}, "k=25 is larger than num_concepts=24"),
        ("jumprelu-sae", {"k": 2, "bandwidth": 0}, "bandwidth must be positive; got 0"),
        ("relu-sae", {"l1": -1.0}, "l1 must be a finite number of at least 0"),
        ("matryoshka-sae", {"k": 2, "prefixes": (4, 2)}, r"prefixes are \(4, 2\); expected rising"),
        ("archetypal-sae", {"k": 2, "points": 5}, "points must be a whole number of at least 24"),
        ("topk-sae", {"k": 2, "batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ("topk-sae", {"k": 2, "warm_up": 2}, "are shares of the updates, from 0 to 1"),
        ("topk-sae", {"k": 2, "learning_rate": 0}, "learning_rate must be positive"),
        ("topk-sae", {"k": 2, "products": "int8"}, "products is 'int8'; expected one of float32"),
        ("topk-sae", {"k": 2, "batch_size": 2**28}, "make 2\\^31 codes or more per batch"),
    ],
)
def test_what_is_refused(method, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        train(ROWS, KEY, METHODS[method](**options), K)
    assert "\n" not in str(raised.value)


def test_a_run_that_diverges_says_so():
    """It ends before its loss is told, not with the last update."""
    settings, told = TopK(k=2, max_iter=8, batch_size=64, learning_rate=1e38), []
    with pytest.raises(ValueError, match=r"the loss is \S+ at update \d: .* lower learning_rate"):
        train(ROWS, KEY, settings, K, tell=told.append, every=1)
    assert len(told) < 4 and all(np.isfinite(at.objective) for at in told)


def test_rows_of_another_scale_share_a_program():
    settings = TopK(k=2, max_iter=2, batch_size=64)
    first = train(ROWS, KEY, settings, K)
    with Compilations() as compiled:
        second = train(3 * ROWS, jax.random.key(1), settings, K)
    assert "update" not in "".join(compiled.names), compiled.names
    assert first.settings.input_scale > 2 * second.settings.input_scale


def test_as_many_points_as_asked_for(monkeypatch):
    monkeypatch.setattr(training, "SAMPLE_ROWS", 16)
    assert Archetypal(points=100).rows_to_start(4) == 100
    assert Archetypal().rows_to_start(4) == 16 and Archetypal().rows_to_start(40) == 80


def test_settings_are_constants_of_programs():
    assert hash(TopK(k=2)) == hash(TopK(k=2)) != hash(dataclasses.replace(TopK(k=2), k=3))
