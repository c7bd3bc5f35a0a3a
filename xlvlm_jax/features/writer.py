"""Writes features batch by batch, so that a run that was killed goes on where it stopped."""

import collections
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int, Shaped

from xlvlm_jax.features.manifest import (
    FORMAT,
    PICTURES,
    ROW_FIELDS,
    SAMPLES,
    STATE_DTYPES,
    VERSION,
    array_path,
    read_manifest,
)
from xlvlm_jax.features.samples import StoredSamples
from xlvlm_jax.storage import atomic, pictures
from xlvlm_jax.storage.zarr_rows import (
    check_chunks,
    create_array,
    create_group,
    cut,
    open_array,
    reason,
    wait,
)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that is there whole or not at all."""
    atomic.write(path, json.dumps(value, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists, keys strings."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the manifest must hold JSON values only: {reason(error)}") from None


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every entry that holds no further keys."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


class FeaturesWriter:
    """Writes features batch by batch; goes on where an interrupted run stopped.

        with FeaturesWriter(path, arguments) as writer:
            for batch in batches(samples[writer.samples_done :]):
                writer.append(...)
            writer.close()

    Leaving the `with` block without `close()` keeps what was committed and lets another run go on.

    Args:
        path: a directory that is absent, empty, or holds an unfinished run of the same manifest.
        manifest: what the run was asked for, JSON values; a run goes on only under the same one.
        dtype: of the states on disk, one of STATE_DTYPES.

    Raises:
        ValueError: another manifest (each differing key is named), a directory that holds something
            else, another writer at work in it.
        OSError: the directory can't be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], manifest: Mapping[str, Any], *, dtype: str = "float32"
    ) -> None:
        if dtype not in STATE_DTYPES:
            raise ValueError(f"states are one of {', '.join(STATE_DTYPES)}; got dtype {dtype!r}")
        self.path = Path(path)
        self._arrays: dict[Path, ts.TensorStore] = {}
        self._lock = -1
        arguments = _plain(dict(manifest))
        with _one_line(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        try:
            if (self.path / "manifest.json").exists():
                self._state: dict[str, Any] = read_manifest(self.path)
                self._refuse_other(arguments, dtype)
                if not self.complete:
                    with _one_line(self.path):
                        self._cut_off()
            else:
                self._refuse_strangers()
                self._state = {
                    "format": FORMAT,
                    "version": VERSION,
                    "arguments": arguments,
                    "dtype": dtype,
                    "sites": [],
                    "samples": 0,
                    "rows": 0,
                    "bytes": 0,
                    "complete": False,
                }
                with _one_line(self.path):
                    (self.path / SAMPLES).touch()
                    write_json(self.path / "manifest.json", self._state)
        except BaseException:
            self.release()
            raise

    @property
    def samples_done(self) -> int:
        """How many samples are committed; a resumed run begins with the next one."""
        return self._state["samples"]

    @property
    def rows_done(self) -> int:
        """How many rows are committed."""
        return self._state["rows"]

    @property
    def complete(self) -> bool:
        """Whether the run was closed; a complete one takes no more samples."""
        return self._state["complete"]

    def place_pictures(self, paths: Sequence[str | os.PathLike[str]]) -> Path | None:
        """Records where the pictures of the whole run lie, for whoever opens or moves it.

        Args:
            paths: of all pictures of the run, in any order.

        Returns:
            The root that `append` takes their names relative to (`pictures.name_in`); None for a
            run that an earlier version began, whose names are as they were typed.
        """
        if self.samples_done and not (self.path / PICTURES).exists():
            return None
        root = pictures.root_of(os.path.abspath(path) for path in paths)
        if root is not None:
            with _one_line(self.path):
                write_json(self.path / PICTURES, pictures.describe(root, self.path))
        return root

    def append(
        self,
        samples: Sequence[Mapping[str, Any]],
        states: Mapping[str, Shaped[np.ndarray, "_ _"]],
        sample_index: Int[np.ndarray, " _"],
        positions: Int[np.ndarray, " _"],
        tokens: Int[np.ndarray, " _"],
    ) -> None:
        """Commit one batch: on return it is on disk, and a kill before that leaves nothing of it.

        Args:
            samples: a dict of JSON values for each sample, with or without rows.
            states: {site: [rows, D]}, the same sites in each batch; {} will do where rows = 0.
            sample_index: [rows], which of `samples` each row comes from.
            positions: [rows]. tokens: [rows].

        Raises ValueError for shapes, sites or an index that don't fit, OSError when writing fails.
        """
        if self.complete or self._lock < 0:
            raise ValueError(f"{self.path}: the run is closed and takes no more samples")
        rows = len(tokens)
        self._check_batch(len(samples), states, rows, sample_index, positions)
        lines = "".join(json.dumps(_plain(dict(sample))) + "\n" for sample in samples).encode()
        done = self._state
        fields = {
            "sample": np.asarray(sample_index, np.int64) + done["samples"],
            "position": positions,
            "token": tokens,
        }
        with _one_line(self.path):
            if states and not done["sites"]:
                self._create_arrays(states)
            if rows:
                arrays = {self.path / "rows" / name: values for name, values in fields.items()}
                arrays |= {array_path(self.path, site): x for site, x in states.items()}
                self._write_rows(arrays, rows)
            with open(self.path / SAMPLES, "rb+") as file:
                file.truncate(done["bytes"])  # of an append that failed
                file.seek(done["bytes"])
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            committed = done | {
                "sites": done["sites"] or list(states),
                "samples": done["samples"] + len(samples),
                "rows": done["rows"] + rows,
                "bytes": done["bytes"] + len(lines),
            }
            write_json(self.path / "manifest.json", committed)
        self._state = committed

    def close(self) -> None:
        """Mark the run complete, and give the directory free."""
        if self._lock >= 0 and not self.complete:
            with _one_line(self.path):
                done = self._state | {"complete": True}
                write_json(self.path / "manifest.json", done)
                self._state = done
        self.release()

    def __enter__(self) -> "FeaturesWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    # One writer at a time: the kernel drops the lock of a process that dies.

    def _acquire(self) -> None:
        lock = self.path / ".lock"
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
                os.close(descriptor)
                raise ValueError(
                    f"{self.path}: in use by another writer (process {pid});"
                    " wait for it to end, or give another directory"
                ) from None
            # the last writer may have removed the file between our opening and locking it
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._lock = descriptor

    def release(self) -> None:
        """Give the directory free without marking the run complete; another one can go on."""
        if self._lock >= 0:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    # What stands in the directory already.

    def _refuse_strangers(self) -> None:
        ours = {".lock", "manifest.json.tmp", SAMPLES}
        if others := sorted(file.name for file in self.path.iterdir() if file.name not in ours):
            raise ValueError(
                f"{self.path}: holds {others[0]!r} and no manifest.json; give an empty directory"
            )

    def _refuse_other(self, arguments: dict[str, Any], dtype: str) -> None:
        there = dict(_leaves(self._state["arguments"] | {"states on disk": self._state["dtype"]}))
        now = dict(_leaves(arguments | {"states on disk": dtype}))
        absent = "nothing"
        differing = [
            f"{key}: expected {json.dumps(there[key]) if key in there else absent},"
            f" got {json.dumps(now[key]) if key in now else absent}"
            for key in sorted({*there, *now})
            if key not in there or key not in now or there[key] != now[key]
        ]
        if differing:
            raise ValueError(
                f"{self.path}: begun with other arguments ({'; '.join(differing)});"
                " give the same ones to go on, or another directory"
            )

    def _cut_off(self) -> None:
        """Remove what was written after the last commit."""
        (self.path / "manifest.json.tmp").unlink(missing_ok=True)
        samples = StoredSamples(self.path / SAMPLES, self._state["samples"], self._state["bytes"])
        collections.deque(samples, maxlen=0)  # raises for one that can't be read
        os.truncate(self.path / SAMPLES, self._state["bytes"])
        if not self._state["sites"]:
            shutil.rmtree(self.path / "states", ignore_errors=True)
            shutil.rmtree(self.path / "rows", ignore_errors=True)
            return
        for stale in self.path.glob("*/**/*.__lock"):  # TensorStore's, of a write that never ended
            stale.unlink()
        for path in self._array_paths(self._state["sites"]):
            array = open_array(path)
            check_chunks(path, array, self._state["rows"])
            cut(array, self._state["rows"])
            self._arrays[path] = open_array(path)

    # Rows.

    def _array_paths(self, sites: Sequence[str]) -> list[Path]:
        rows = [self.path / "rows" / name for name in ROW_FIELDS]
        return rows + [array_path(self.path, site) for site in sites]

    def _check_batch(
        self,
        num_samples: int,
        states: Mapping[str, np.ndarray],
        rows: int,
        sample_index: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        sites = self._state["sites"]
        if rows and not states:
            raise ValueError(f"{rows} rows and no states; expected an array a site")
        if states and sites and list(states) != sites:
            raise ValueError(f"expected states of {', '.join(sites)}; got {', '.join(states)}")
        lengths = {"sample_index": len(sample_index), "positions": len(positions)}
        lengths |= {site: len(x) for site, x in states.items()}
        for name, length in lengths.items():
            if length != rows:
                raise ValueError(f"{name} has {length} rows, expected {rows}, one a token")
        if rows and not 0 <= np.min(sample_index) <= np.max(sample_index) < num_samples:
            raise ValueError(f"sample_index must lie in 0..{num_samples - 1}, one of the batch")
        for site, x in states.items():
            if np.ndim(x) != 2:
                raise ValueError(f"states of site {site!r} must be [rows, D], got {np.shape(x)}")
            if not site.strip("."):  # would name the folder itself, or the one above
                raise ValueError(f"{site!r} is no site; expected a module's name")
            known = self._arrays.get(array_path(self.path, site))
            if known is not None and known.shape[1] != x.shape[1]:
                raise ValueError(f"{site}: width {x.shape[1]}, expected {known.shape[1]}")

    def _create_arrays(self, states: Mapping[str, np.ndarray]) -> None:
        # what an append that failed before the first commit may have left
        shutil.rmtree(self.path / "states", ignore_errors=True)
        shutil.rmtree(self.path / "rows", ignore_errors=True)
        for group in ("states", "rows"):
            create_group(self.path / group)
        for name, dtype in ROW_FIELDS.items():
            path = self.path / "rows" / name
            self._arrays[path] = create_array(path, dtype, (0,))
        for site, x in states.items():
            path = array_path(self.path, site)
            self._arrays[path] = create_array(path, self._state["dtype"], (0, x.shape[1]))

    def _write_rows(self, arrays: Mapping[Path, np.ndarray], rows: int) -> None:
        start = self._state["rows"]
        end = start + rows
        resized = {
            path: self._arrays[path].resize(exclusive_max=[end, *self._arrays[path].shape[1:]])
            for path in arrays
        }
        writes = []
        for path, future in resized.items():
            array = self._arrays[path] = wait(future)
            values = np.asarray(arrays[path]).astype(array.dtype.numpy_dtype)
            writes.append(array[start:end].write(values))
        for write in writes:
            wait(write)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn what the file system says into one line that names the directory."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write features to {path}: {reason(error)};"
            " give a directory that can be written and has room"
        ) from error
