"""States of an unfinished training run on disk, so that a killed run ends with the same bytes.

run.json   what the run is: method, options, number of features, key, rows
states/    the last state, by Orbax; each host writes its own shards
"""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped

from xlvlm_jax.solvers.sae.batches import take_rows
from xlvlm_jax.solvers.sae.training import State
from xlvlm_jax.solvers.validation import StoredMatrix
from xlvlm_jax.storage import atomic

RUN, STATES = "run.json", "states"
_LOOKED_AT = 64  # rows of Z by which it is known again


def describe_rows(Z: Shaped[Array | np.ndarray, "N D"] | StoredMatrix) -> str:
    """Returns the shape of Z and a digest of rows from all over it."""
    N, D = Z.shape
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, N - 1, min(_LOOKED_AT, N)).astype(int)).tolist():
        rows = take_rows(Z, np.array([number]))
        digest.update(np.ascontiguousarray(rows).tobytes())
    return f"[{N}, {D}] {digest.hexdigest()[:16]}"


class Checkpoints:
    """Keeps the last state of a run in a directory, and removes it once it is not needed.

    Args:
        directory: where; made if it does not exist.
        run: what the run is, JSON values by name. "rows" is that of `describe_rows`.
        every: number of updates between states.

    Raises:
        ValueError: the directory holds another run.
    """

    def __init__(self, directory: Path, run: dict[str, Any], every: int):
        import orbax.checkpoint as ocp

        self.directory = directory.absolute()  # independent of later changes of the working one
        self._begin(json.loads(json.dumps(run)))
        options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=1)
        self._manager = ocp.CheckpointManager(self.directory / STATES, options=options)
        self._every, self._handlers = every, ocp.args
        self._is_closed = False

    def _begin(self, run: dict[str, Any]) -> None:
        file = self.directory / RUN
        if not any((self.directory / STATES).glob("*")):
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                atomic.write(file, json.dumps(run, indent=1) + "\n")
            return
        try:
            before = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            before = {}
        for name in before | run:
            if before.get(name) == run.get(name):
                continue
            again = f"or delete {self.directory} to begin again"
            if name == "rows" and "rows" in before:
                raise ValueError(
                    f"the rows changed since the checkpoint in {self.directory}: they were "
                    f"{before[name]} and are {run.get(name)}; restore them, {again}"
                )
            raise ValueError(
                f"{self.directory} holds an unfinished run with {name} {before.get(name)!r}, now "
                f"it is {run.get(name)!r}; give the same options, {again}"
            )

    def restore(self, state: State) -> State:
        """Returns the kept state, placed as `state` is; `state` itself if none is kept.

        The buffers of `state` are freed before: memory may have room for one of them alone.

        Raises:
            ValueError: it is damaged.
        """
        last = self._manager.latest_step()
        if last is None:
            return state
        template = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
        )
        jax.tree.map(lambda leaf: leaf.delete(), state)
        try:
            kept: Any = self._manager.restore(last, args=self._handlers.StandardRestore(template))
            return kept
        except Exception as error:  # Orbax and TensorStore raise many kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.directory / STATES} is damaged ({first[:200]}); delete {self.directory} to "
                "begin again"
            ) from error

    def offer(self, iteration: int, state: State) -> None:
        """Keeps the state of every `every`-th update, and of the last, while the loss is finite."""
        due = iteration % self._every == 0 or iteration == len(state.history)
        if due and np.isfinite(np.asarray(state.history)[:iteration]).all():
            # Written in the background, but from the host's memory. On a CPU, where that is the
            # buffers, the next update can't take them over.
            self._manager.save(iteration, args=self._handlers.StandardSave(state))

    def close(self) -> None:
        """Waits until the last state is written."""
        if not self._is_closed:
            self._manager.wait_until_finished()
            self._manager.close()
        self._is_closed = True

    def forget(self) -> None:
        """Removes the states and what the run is, and the directory if it holds nothing else."""
        self.close()
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / STATES, ignore_errors=True)
            (self.directory / RUN).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.directory.rmdir()

    def remove(self) -> None:
        """Removes the directory, after the result is saved."""
        self.close()
        if jax.process_index() == 0:
            shutil.rmtree(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
