"""Transcoders and crosscoders: by hand, on planted features, killed and gone on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.solvers.matching import match_any
from xlvlm_jax.solvers.sae import METHODS, train
from xlvlm_jax.solvers.sae.checkpoint import Checkpoints, describe_rows
from xlvlm_jax.solvers.sae.crosscoder import ReLUCrosscoder, TopKCrosscoder
from xlvlm_jax.solvers.sae.side_by_side import SideBySide, side_by_side
from xlvlm_jax.solvers.sae.start import per_column, start
from xlvlm_jax.solvers.sae.transcoder import TopKTranscoder

KEY = jax.random.key(0)
N, D, K = 2000, 16, 24
OWN = np.repeat(["first", "second", "shared"], 8)
SHORT = {"max_iter": 300, "batch_size": 256, "learning_rate": 1e-2}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def planted():
    """Rows of two sources in units far from one another, of which each has features of its own."""
    rng = np.random.default_rng(0)
    atoms = unit(rng.normal(size=(K, D))), unit(rng.normal(size=(K, D)))
    codes = np.zeros((N, K))
    for row in codes:
        row[rng.choice(K, 2, replace=False)] = rng.uniform(1, 2, 2)
    both = [
        scale * ((codes * (other != OWN)) @ A + rng.normal(size=D))
        for scale, other, A in zip((50, 0.1), ("second", "first"), atoms, strict=True)
    ]
    return [rows.astype(np.float32) for rows in both], atoms, codes


(FIRST, SECOND), (ATOMS, THEIRS), CODES = planted()
ROWS, WIDTHS = side_by_side(FIRST, SECOND)


class Stored:
    """Reads rows, as features on disk do."""

    def __init__(self, rows):
        self.rows, self.shape = rows, rows.shape

    def read(self, start, stop):
        return self.rows[start:stop]


class TestSideBySide:
    def test_rows_of_both(self):
        assert ROWS.shape == (N, 2 * D) and WIDTHS == (D, D)
        np.testing.assert_array_equal(ROWS, np.concatenate([FIRST, SECOND], axis=1))
        both, widths = side_by_side(Stored(FIRST), SECOND[:, :3])
        assert isinstance(both, SideBySide) and widths == (D, 3) and both.shape == (N, D + 3)
        np.testing.assert_array_equal(both.read(3, 7), ROWS[3:7, : D + 3])

    def test_other_numbers_of_rows(self):
        with pytest.raises(ValueError, match="Z and target have 2000 and 1999 rows; expected the"):
            side_by_side(FIRST, SECOND[1:])


def test_each_source_has_its_scale():
    begun = start(ROWS, None, WIDTHS)
    for part, scale in zip((FIRST, SECOND), begun.scale, strict=True):
        norms = np.linalg.norm((part - part.mean(axis=0)) * scale, axis=1)
        assert norms.mean() == pytest.approx(4, rel=1e-5)
    factor = per_column((2.0, 3.0), (1, 2))
    assert factor.tolist() == [2, 3, 3] and per_column(2.0, (3,)) == 2


class TestTranscoder:
    def test_planted_features_are_read_and_written(self):
        """From the states of one site to what the same codes are in another."""
        target = (0.1 * CODES @ THEIRS + 1).astype(np.float32)
        source = (50 * CODES @ ATOMS - 20).astype(np.float32)
        rows, widths = side_by_side(source, target)
        found = train(rows, KEY, TopKTranscoder(k=2, **SHORT), K, widths=widths).params
        h = source @ found["W_enc"] + found["b_enc"]
        codes = np.where(h >= np.sort(h, axis=1)[:, -2:-1], np.maximum(h, 0), 0)
        left = target - codes @ found["W_dec"] - found["b_dec"]
        assert 1 - (left**2).sum() / ((target - target.mean(axis=0)) ** 2).sum() > 0.75
        assert match_any(found["W_dec"], THEIRS)[2].mean() > 0.75
        np.testing.assert_allclose(np.linalg.norm(found["W_dec"], axis=1), 1, rtol=1e-5)

    def test_a_skip_connection_takes_what_is_linear(self):
        rng = np.random.default_rng(1)
        source = rng.normal(size=(500, 4)).astype(np.float32)
        linear = rng.normal(size=(4, 3)).astype(np.float32)
        rows, widths = side_by_side(source, source @ linear + 2)
        settings = METHODS["transcoder"](skip=True, l1=10.0, **SHORT)
        found = train(rows, KEY, settings, 5, widths=widths).params
        np.testing.assert_allclose(found["W_skip"], linear.T, atol=2e-2)
        assert found["W_skip"].shape == (3, 4)


class TestCrosscoder:
    @pytest.mark.parametrize("method", ["batchtopk-crosscoder", "crosscoder"])
    def test_features_of_one_source_are_told_from_shared_ones(self, method):
        options = {"k": 2} if method != "crosscoder" else {"l1": 0.1}
        found = train(ROWS, KEY, METHODS[method](**options, **SHORT), K, widths=WIDTHS)
        params, scales = found.params, found.settings.input_scale
        norms = [
            np.linalg.norm(part, axis=1) * scale
            for part, scale in zip(np.split(params["W_dec"], 2, axis=1), scales, strict=True)
        ]
        np.testing.assert_allclose(norms[0] + norms[1], 1, rtol=1e-4)
        whole = np.concatenate(
            [ATOMS * (OWN != "second")[:, None], THEIRS * (OWN != "first")[:, None]], axis=1
        )
        _, matched, cosines = match_any(whole, params["W_dec"] * per_column(scales, WIDTHS))
        good = np.asarray(cosines) > 0.8
        assert good.mean() > 0.7
        share = norms[1][np.asarray(matched)]
        for name, low, high in (("first", 0, 0.2), ("second", 0.8, 1), ("shared", 0.4, 0.6)):
            inside = share[good & (name == OWN)]
            assert len(inside) > 4 and inside.min() >= low and inside.max() <= high, name

    def test_by_hand(self):
        """Of equal h, that of two sources weighs more; the codes are h."""
        settings = TopKCrosscoder(k=1)
        params = {
            "W_dec": jnp.float32([[1, 0], [0.6, 0.8]]),
            "sources": jnp.eye(2),
        }
        np.testing.assert_allclose(settings.weights(params), [1, 1.4], rtol=1e-6)
        codes, _ = settings.codes(jnp.float32([[2, 1.5], [2, 1.4]]), params)
        assert codes.tolist() == [[0, 1.5], [2, 0]]
        penalty = ReLUCrosscoder(l1=0.5).penalty(codes, codes, params, 4)
        assert float(penalty) == pytest.approx(0.5 * (1.5 * 1.4 + 2) / 2 / 2)


class Killed(KeyboardInterrupt):
    pass


def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    method = "batchtopk-crosscoder"
    rows, widths = side_by_side(Stored(FIRST[:50]), Stored(SECOND[:50, :5]))
    settings = METHODS[method](max_iter=9, batch_size=16, k=2)

    def run(directory, stop=None):
        def tell(at):
            if at.iteration == stop:
                raise Killed

        described = {"method": method, "rows": describe_rows(rows)}
        with Checkpoints(tmp_path / directory, described, 2) as states:
            return train(
                rows, KEY, settings, 8, tell=tell, every=1, checkpoint=states, widths=widths
            )

    whole = run("whole")
    with pytest.raises(Killed):
        run("states", stop=5)
    again = run("states")
    for name, value in whole.params.items():
        np.testing.assert_array_equal(again.params[name], value)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "widths", "message"),
    [
        ({}, None, "rows have 1 sources; expected 2 for topk_transcoder"),
        ({"input_scale": 2.0}, WIDTHS, r"input_scale is 2.0; expected 2 of them, one per source"),
        ({"input_scale": (2.0, 0)}, WIDTHS, "input_scale must be positive; got 0"),
        ({"k": 25}, WIDTHS, "k=25 is larger than num_concepts=24"),
    ],
)
def test_what_is_refused(options, widths, message):
    settings = TopKTranscoder(**({"k": 2} | options))
    with pytest.raises(ValueError, match=message) as raised:
        train(ROWS, KEY, settings, K, widths=widths)
    assert "\n" not in str(raised.value)
