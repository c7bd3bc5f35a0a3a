"""States of training on disk: a killed run ends with the same bytes; other states are refused."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import xlvlm_jax
from xlvlm_jax.solvers.sae import METHODS, train
from xlvlm_jax.solvers.sae.checkpoint import Checkpoints, describe_rows

ROWS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
KEY = jax.random.key(0)
OPTIONS = {"max_iter": 9, "batch_size": 16, "k": 2}


class Killed(KeyboardInterrupt):
    pass


def run(directory, method="batchtopk-sae", stop=None, every=2, rows=ROWS, **options):
    """Trains with states in a directory; stops after an update, as a killed process does."""
    settings = METHODS[method](**(OPTIONS | options))
    described = {"method": method, "k": settings.k, "rows": describe_rows(rows)}

    def tell(at):
        if at.iteration == stop:
            raise Killed

    with Checkpoints(directory, described, every) as states:
        return train(rows, KEY, settings, 8, tell=tell, every=1, checkpoint=states)


@pytest.mark.parametrize("stop", [1, 4, 5, 9])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, stop):
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "states", stop=stop)
    again = run(tmp_path / "states")
    for name, value in whole.params.items():
        np.testing.assert_array_equal(again.params[name], value)
    np.testing.assert_array_equal(again.history, whole.history)


def test_it_goes_on_from_the_last_state(tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run(tmp_path, stop=5)
    told = []
    settings = METHODS["batchtopk-sae"](**OPTIONS)
    described = {"method": "batchtopk-sae", "k": 2, "rows": describe_rows(ROWS)}
    monkeypatch.chdir(tmp_path)
    with Checkpoints(Path(), described, 2) as states:
        monkeypatch.chdir("/")  # what it keeps and removes stays the same
        train(ROWS, KEY, settings, 8, tell=told.append, every=1, checkpoint=states)
    assert [at.iteration for at in told] == [5, 6, 7, 8, 9]
    states.remove()
    assert not tmp_path.exists()


def test_no_state_of_a_run_that_diverged_is_kept(tmp_path):
    """A lower learning rate then finds no unfinished run with another one."""
    given = {**OPTIONS, "checkpoint": tmp_path / "states"}
    with pytest.raises(ValueError, match="training diverged; lower learning_rate"):
        xlvlm_jax.decompose(ROWS, 8, "topk-sae", key=KEY, learning_rate=1e38, **given)
    assert not (tmp_path / "states").exists()
    with pytest.raises(ValueError, match="training diverged"):
        run(tmp_path / "kept", learning_rate=1e38, max_iter=4)
    kept = [int(path.name) for path in (tmp_path / "kept" / "states").iterdir()]
    assert not kept or max(kept) < 2


def test_one_copy_of_the_state_is_held(tmp_path, monkeypatch):
    saved, restored = [], []
    offer, restore, save = Checkpoints.offer, Checkpoints.restore, ocp.CheckpointManager.save

    def offering(self, iteration, state):
        saved.append(state)
        offer(self, iteration, state)

    def saving(self, step, *, args):
        assert args.item is saved[-1]
        return save(self, step, args=args)

    def restoring(self, state):
        restored.append((state, restore(self, state)))
        return restored[-1][1]

    monkeypatch.setattr(Checkpoints, "offer", offering)
    monkeypatch.setattr(Checkpoints, "restore", restoring)
    monkeypatch.setattr(ocp.CheckpointManager, "save", saving)
    with pytest.raises(Killed):
        run(tmp_path, stop=5)
    run(tmp_path)
    (given, first), (freed, _) = restored
    assert first is given
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(freed))


def test_another_run_is_refused(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, stop=5)
    with pytest.raises(ValueError, match=r"unfinished run with k 2, now it is 3; give the same"):
        run(tmp_path, k=3)
    changed = ROWS.copy()
    changed[0] += 1
    with pytest.raises(ValueError, match=r"the rows changed since the checkpoint in .*: they were"):
        run(tmp_path, rows=changed)
    with pytest.raises(ValueError, match=r"were \[50, 6\] \w+ and are \[51, 6\] \w+; restore them"):
        run(tmp_path, rows=np.concatenate([ROWS, ROWS[:1]]))


def test_a_damaged_state_is_named(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, stop=5)
    for file in (tmp_path / "states").rglob("*"):
        if file.is_file() and "METADATA" not in file.name.upper():
            file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"states is damaged .* to begin again") as raised:
        run(tmp_path)
    assert "\n" not in str(raised.value)


def test_rows_are_known_again():
    assert describe_rows(ROWS) == describe_rows(jax.numpy.asarray(ROWS))
    assert describe_rows(ROWS).startswith("[50, 6] ")
    assert describe_rows(ROWS) != describe_rows(ROWS[::-1].copy())
    assert json.dumps(describe_rows(ROWS))
