"""Benchmarks of the solvers: what they measure, by hand, and the page that they make."""

import json
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from benchmarks import memory
from benchmarks.solvers import __main__ as main
from benchmarks.solvers import matrices, pace, page, peers, resources


def test_bytes_exchanged_in_an_update_of_k_means():
    N, D, K = 256, 48, 16
    row = resources.process(resources.Case("kmeans", N, D, K, devices=2))
    assert row["devices"] == 2 and not row["one_step"]
    # Totals and counts of each cluster, as pairs of float32.
    assert row["update_bytes"] == 4 * (2 * K * D + 2 * K)
    assert row["Z"] == 4 * N * D and row["update_seconds"] > 0 and row["beyond"] >= 0
    texts = resources.cells(row)
    assert texts[:3] == ["kmeans", "[256, 48], 16", "2"] and texts[4] == "6.27 kB"


def test_one_device_exchanges_nothing():
    row = resources.measure(resources.Case("pca", 320, 48, 16))
    # The covariance of 48 columns, in one step.
    assert row["one_step"] and row["update_bytes"] == row["other_bytes"] == 0
    assert resources.cells(row)[3].endswith("(one step)") and resources.cells(row)[4] == ""


def test_an_update_of_pca_by_its_plan():
    """A block reads Z once and is multiplied twice; no updates if the first span is everything."""
    rng = np.random.default_rng(0)
    for shape, K, expected in (((700, 300), 40, (2, 128)), ((64, 4096), 40, (2, 64))):
        Z = jnp.asarray(rng.normal(size=shape), jnp.float32)
        update, problem, state, *counts = pace.updating("pca", Z, K)
        assert tuple(counts) == expected
        assert (state is None) == (shape[0] == 64)
        after = update(problem, state)
        found = np.sum(np.asarray(after.scores[:, :K], np.float64) ** 2)
        assert found == pytest.approx(
            -matrices.minus_explained(np.asarray(Z), after.basis[:, :K].T), rel=1e-4
        )


def test_updates_to_an_objective():
    """By hand: minus what is explained is within the goal from update 2 on."""
    reached = {0: -90.0, 1: -95.0, 2: -100.0, 3: -100.0}

    def explained(result):
        return reached[result.iterations]

    def ours(max_iter):
        return SimpleNamespace(iterations=max_iter, history=np.arange(max_iter + 1))

    assert main.updates_to(-100.0, ours, ours(3), explained) == 2
    assert main.updates_to(-89.0, ours, ours(3), explained) == 0
    assert main.updates_to(-120.0, ours, ours(3), explained) == 3


def test_a_case_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"method='pca', N=8, .* ended with 1: ValueError"):
        resources.process(resources.Case("pca", 8, 4, 9))


def test_cases_of_a_whole_run():
    made = list(resources.cases(["snmf", "kmeans", "pca"]))
    assert len(set(made)) == len(made)
    for case in made:
        assert case.N % case.devices == 0
        assert case.method != "pca" or case.K in (20, 256)


def test_peak_of_a_call():
    held = np.ones(8_000_000)
    memory.forget_peak()
    before = memory.resident()
    with memory.watched() as peaks:
        more = np.ones(4_000_000)
        time.sleep(4 * memory.PAUSE)
        del more
    # 32 MB more than before, whatever was there; a few MB for threads.
    assert 30e6 < peaks["peak"] - before.now < 45e6
    assert 30e6 < peaks["anonymous"] - before.anonymous < 45e6
    del held


def test_planted_blocks_do_not_depend_on_the_number_of_rows():
    blocks = dict(matrices.planted_blocks(10, 6, 3, size=4))
    assert [len(rows) for rows in blocks.values()] == [4, 4, 2] and list(blocks) == [0, 4, 8]
    assert all(rows.dtype == np.float32 for rows in blocks.values())
    again = dict(matrices.planted_blocks(12, 6, 3, size=4))
    np.testing.assert_array_equal(blocks[4], again[4])


@pytest.mark.parametrize("mean", [0, 1000])
def test_inertia_against_float64(mean, monkeypatch):
    monkeypatch.setattr(matrices, "SCORES", 90)  # several blocks
    rng = np.random.default_rng(0)
    Z = (mean + rng.normal(size=(50, 7))).astype(np.float32)
    centroids = mean + rng.normal(size=(9, 7))
    squared = ((Z[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    np.testing.assert_allclose(matrices.inertia(Z, centroids), squared.min(1).sum(), rtol=1e-9)


@pytest.mark.parametrize(("with_one", "chosen"), [(0.9, 1), (1.1, 2)])
def test_faster_number_of_threads(with_one, chosen, monkeypatch):
    times, most = [3.0, 1.0, with_one], [2, 2, 1]  # the first call also loads libraries
    ran = []

    def peer() -> int:
        ran.append(max(library["num_threads"] for library in threadpool_info()))
        return ran[-1]

    monkeypatch.setattr(peers, "seconds", lambda call: (times[len(ran)], call()))
    with threadpool_limits(2):
        call, spent, result = peers.faster(peer)
        assert ran == most and (spent, result) == (min(1.0, with_one), chosen)
        assert call() == chosen


def test_a_call_that_takes_long_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(peers, "seconds", lambda call: (peers.PATIENCE + 1, call()))
    ran = []
    call, spent, _ = peers.faster(lambda: ran.append(1))
    assert ran == [1] and spent == peers.PATIENCE + 1
    call()
    assert ran == [1, 1]


ROW = {
    "method": "kmeans",
    "data": "planted",
    "N": 100,
    "D": 8,
    "K": 4,
    "peer": "KMeans",
    "seconds": 0.5,
    "compile_seconds": 1.0,
    "peer_seconds": 1.0,
    "times_faster": 2.0,
    "seconds_to_peer": 0.25,
    "times_faster_to_peer": 4.0,
    "objective": 1.0,
    "peer_objective": 1.0,
    "objective_ratio": 1.0,
    "iterations": 3,
    "iterations_to_peer": 2,
    "runs": 5,
    "update_seconds": 0.01,
    "limit_seconds": 0.005,
    "share_of_limit": 0.5,
    "beyond_Z": 0.25,
}


def results(path, rows, **machine):
    path.write_text(json.dumps({"machine": {"cores": 2, **machine}, "rows": rows}))
    return path


def written(monkeypatch, tmp_path, *files):
    """Runs the page's command on files of results; returns the page."""
    absent = (f"--{name}={tmp_path / name}.json" for name in ("growth", "resources", "parts"))
    arguments = ["page", "--output", str(tmp_path), *absent, "--results", *map(str, files)]
    monkeypatch.setattr("sys.argv", arguments)
    page.main()
    return (tmp_path / "solvers.md").read_text()


def test_page_of_several_runs(monkeypatch, tmp_path):
    of_disk = {
        "method": "pca",
        "N": 9,
        "D": 5,
        "K": 2,
        "on_disk": True,
        "iterations": 7,
        "passes": 4,
        "seconds": 2.0,
    }
    of_disk |= {f"{kind}_gigabytes": 0.5 for kind in ("peak", "anonymous", "file")}
    in_memory = resources.Case("kmeans", 1000, 512, 20, 8)._asdict() | {
        "one_step": False,
        "Z": 2_048_000,
        "update_seconds": 0.002,
        "update_bytes": 163_840,
        "column_seconds": 0.001,
        "column_bytes": 15_520,
        "beyond": 1_024_000,
    }
    results(tmp_path / "resources.json", [in_memory, of_disk])
    fitted = {"method": "pca", "of": "N", "seconds": [0.001, 0.002], "r2": 1, "exponent": 1.0}
    results(tmp_path / "growth.json", [fitted | {"beyond_Z": [0.1, 0.2]}])
    part = {"method": "pca", "N": 9, "D": 5, "K": 2, "part": "axes", "seconds": 0.001}
    results(tmp_path / "parts.json", [part | {"of_update": 0.5, "of_rate": None}])
    first = results(tmp_path / "a.json", [ROW, ROW | {"peer": "faiss"}], jax="1", sklearnex=None)
    pca = {"method": "pca, from numpy", "peer": "PCA", "objective_ratio": 0.99}
    again = ROW | {"seconds_to_peer": 0.1, "objective_ratio": 1.01}
    second = results(tmp_path / "b.json", [ROW | pca, again], sklearnex="2")
    text = written(monkeypatch, tmp_path, first, second)
    # The case that was measured twice is that of the last file.
    assert "| kmeans | [100, 8], 4 | planted | KMeans | 1.00 | 0.10 |" in text
    assert text.count("| kmeans | [100, 8], 4 | planted |") == 2
    assert "jax 1, sklearnex 2" in text and "became faster" not in text
    assert (
        "in 2 of 3 cases: kmeans [100, 8], 4, planted (KMeans); pca, from numpy [100, 8], 4, "
        "planted (PCA)." in text
    )
    assert (
        "| kmeans | [1000, 512], 20 | 8 | 2.0; in columns 1.0 | 164 kB; in columns 15.5 kB | "
        "1.02 MB | 50 % |" in text
    )
    assert "| pca | [9, 5], 2 | 0.50 | 0.50 | 0.50 | 7 | 4 | 2.0 |" in text
    for plot in ("solvers.svg", "resources.svg"):
        assert (tmp_path / plot).read_text().startswith("<?xml")
    # Without their results, all other tables stay as they are on the page.
    for name in ("growth", "resources", "parts"):
        (tmp_path / f"{name}.json").unlink()
    assert written(monkeypatch, tmp_path, first, second) == text
    # And so do cases that were not measured again.
    slower = results(tmp_path / "c.json", [ROW | {"peer": "faiss", "peer_seconds": 3.0}])
    again = written(monkeypatch, tmp_path, slower)
    assert "| kmeans | [100, 8], 4 | planted | faiss | 3.00 |" in again
    of_others = [line for line in text.splitlines() if line.startswith(("| kmeans", "| pca"))]
    assert sum(line in again for line in of_others) == len(of_others) - 1


def test_page_without_results(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"no results for '\| method \| grows"):
        written(monkeypatch, tmp_path, results(tmp_path / "a.json", [ROW]))
    assert not (tmp_path / "solvers.md").exists()
    other = results(tmp_path / "b.json", [{"method": "kmeans"}])
    with pytest.raises(SystemExit, match=r"b.json: no results of benchmarks.solvers .*--output"):
        written(monkeypatch, tmp_path, other)
