"""Writes features batch by batch, so that a killed run can be resumed."""

import collections
import contextlib
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

from xlvlm_jax.features.image_cells import Cells
from xlvlm_jax.features.manifest import (
    CELL_FIELDS,
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

# Arguments that runs of earlier releases do not tell, also "finetuned." of these.
_TOLD_SINCE_0_2 = ("processor", "processor digest", "steering.digests")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    atomic.write(path, json.dumps(value, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Returns the value as JSON would return it: tuples become lists, keys strings."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the manifest must hold JSON values only: {reason(error)}") from None


def _line(sample: Mapping[str, Any]) -> str:
    """Returns the sample's line in samples.jsonl.

    JSON has no NaN and no infinity, which earlier releases wrote for missing values: they are null.
    """
    try:
        text = json.dumps(dict(sample))
        if "NaN" in text or "Infinity" in text:
            text = json.dumps(json.loads(text, parse_constant=lambda _: None))
        return text + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"sample {sample.get('id')!r} must hold JSON values only: {reason(error)}"
        ) from None


def _recorded(file: Path) -> tuple[Any, dict[str, str]]:
    """Returns the root of a run's pictures and their digests; none of what an earlier version, or a
    damaged file, does not say."""
    with contextlib.suppress(FileNotFoundError, ValueError, RecursionError):
        recorded = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(recorded, dict) and isinstance(recorded.get("digests"), dict):
            return recorded.get("root"), recorded["digests"]
    return None, {}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every entry without further keys."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


class FeaturesWriter:
    """Writes features batch by batch, resuming an interrupted run.

        with FeaturesWriter(path, arguments) as writer:
            for batch in batches(samples[writer.samples_done :]):
                writer.append(...)
            writer.close()

    Leaving the `with` block without `close()` keeps what was committed, so that the run can be
    resumed.

    Args:
        path: a directory that does not exist, is empty, or has an unfinished run of the same
            manifest.
        manifest: arguments of the run, JSON values; a run is only resumed with the same ones.
        dtype: dtype of the states on disk, one of STATE_DTYPES.

    Raises:
        ValueError: the manifest differs (each differing key is named), the directory has other
            contents, or another writer uses it.
        OSError: the directory can't be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], manifest: Mapping[str, Any], *, dtype: str = "float32"
    ) -> None:
        if dtype not in STATE_DTYPES:
            raise ValueError(f"states are one of {', '.join(STATE_DTYPES)}; got dtype {dtype!r}")
        self.path = Path(path).absolute()  # independent of later changes of the working directory
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
                    "cells": False,
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
        """Number of committed samples; a resumed run starts with the next one."""
        return self._state["samples"]

    @property
    def rows_done(self) -> int:
        """Number of committed rows."""
        return self._state["rows"]

    @property
    def complete(self) -> bool:
        """Whether the run was closed; a complete run takes no more samples."""
        return self._state["complete"]

    def record_pictures(self, paths: Sequence[str | os.PathLike[str]]) -> Path | None:
        """Records where the pictures of the whole run are, for whoever opens or moves it.

        Args:
            paths: paths of all pictures of the run, in any order.

        Returns:
            The root that `append` takes their names relative to (`pictures.name_in`); None for a
            run that an earlier version started, whose names are as typed.

        Raises:
            ValueError: the run was started with other pictures; a complete run is checked too.
            OSError: the record can't be written.
        """
        file = self.path / PICTURES
        if self.samples_done and not file.exists():
            return None
        root = pictures.root_of(os.path.abspath(path) for path in paths)
        if root is None:
            return None
        digests = pictures.digests_of(paths)
        then, before = _recorded(file) if self.samples_done else (None, {})
        if pictures.are_others(before, digests, len(set(paths))):
            raise ValueError(
                f"{self.path}: started with the pictures in {then}; those in {root} are others, "
                "use the same ones to resume, or another directory"
            )
        if not self.complete:
            described = {**(pictures.describe(root, self.path) or {}), "digests": digests | before}
            with _one_line(self.path):
                write_json(file, described)
        return root

    def append(
        self,
        samples: Sequence[Mapping[str, Any]],
        states: Mapping[str, Shaped[np.ndarray, "_ _"]],
        sample_index: Int[np.ndarray, " _"],
        positions: Int[np.ndarray, " _"],
        tokens: Int[np.ndarray, " _"],
        cells: Cells | None = None,
    ) -> None:
        """Commits one batch: on return it is on disk; a kill before that leaves no trace of it.

        Args:
            samples: a dict of JSON values per sample, with or without rows.
            states: {site: [rows, D]}, the same sites in every batch; may be {} if rows = 0.
            sample_index: int[rows], index into `samples` of each row.
            positions: int[rows].
            tokens: int[rows].
            cells: for rows that are image tokens, where they lie; in every batch with rows or in
                none.

        Raises:
            ValueError: shapes, sites or an index do not fit, a number is too large for its field, a
                sample is not JSON, or a state is not a float, or finite but too large for the dtype
                on disk.
            OSError: writing fails.
        """
        if self.complete or self._lock < 0:
            raise ValueError(f"{self.path}: the run is closed and takes no more samples")
        rows = len(tokens)
        self._check_batch(len(samples), states, tokens, sample_index, positions, cells)
        self._check_range(states)
        lines = "".join(map(_line, samples)).encode()
        done, has_cells = self._state, cells is not None
        fields = {
            "sample": np.asarray(sample_index, np.int64) + done["samples"],
            "position": positions,
            "token": tokens,
        }
        with _one_line(self.path):
            if states and not done["sites"]:
                self._create_arrays(states)
            if has_cells and not done["cells"] and (states or done["sites"]):
                self._create_cells()
            if rows:
                arrays = {self.path / "rows" / name: values for name, values in fields.items()}
                arrays |= {array_path(self.path, site): x for site, x in states.items()}
                if cells is not None:
                    placed = dict(zip(CELL_FIELDS, cells, strict=True))
                    arrays |= {self.path / "rows" / name: x for name, x in placed.items()}
                self._write_rows(arrays, rows)
            with open(self.path / SAMPLES, "rb+") as file:
                file.truncate(done["bytes"])  # remains of a failed append
                file.seek(done["bytes"])
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            committed = done | {
                "sites": done["sites"] or list(states),
                "samples": done["samples"] + len(samples),
                "rows": done["rows"] + rows,
                "bytes": done["bytes"] + len(lines),
                # As the arrays are, with or without rows.
                "cells": done["cells"] or (has_cells and bool(states or done["sites"])),
            }
            write_json(self.path / "manifest.json", committed)
        self._state = committed

    def close(self) -> None:
        """Marks the run as complete, and releases the directory."""
        if self._lock >= 0 and not self.complete:
            with _one_line(self.path):
                done = self._state | {"complete": True}
                write_json(self.path / "manifest.json", done)
                self._state = done
        self.release()

    def remove(self) -> None:
        """Removes what the run wrote, and the directory if it is then empty and can be removed."""
        for name in ("states", "rows", "parts"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.release()
        # A file system that refuses must not hide why the run is removed.
        with contextlib.suppress(OSError):
            for name in ("manifest.json", SAMPLES, PICTURES):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

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
                    f"{self.path}: in use by another writer (process {pid}); wait for it to end, "
                    "or use another directory"
                ) from None
            # the last writer may have removed the file between our opening and locking it
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        self._lock = descriptor

    def release(self) -> None:
        """Releases the directory without marking the run as complete; it can be resumed."""
        if self._lock >= 0:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1

    # Existing contents of the directory.

    def _refuse_strangers(self) -> None:
        ours = {".lock", "manifest.json.tmp", SAMPLES}
        if others := sorted(file.name for file in self.path.iterdir() if file.name not in ours):
            raise ValueError(
                f"{self.path}: has {others[0]!r} but no manifest.json; use an empty directory"
            )

    def _refuse_other(self, arguments: dict[str, Any], dtype: str) -> None:
        there = dict(_leaves(self._state["arguments"] | {"states on disk": self._state["dtype"]}))
        now = dict(_leaves(arguments | {"states on disk": dtype}))
        absent = "nothing"
        differing = [
            f"{key}: expected {json.dumps(there[key]) if key in there else absent},"
            f" got {json.dumps(now[key]) if key in now else absent}"
            for key in sorted({*there, *now})
            if (key not in there or key not in now or there[key] != now[key])
            and (key in there or key.removeprefix("finetuned.") not in _TOLD_SINCE_0_2)
        ]
        if differing:
            raise ValueError(
                f"{self.path}: started with other arguments ({'; '.join(differing)}); use the "
                "same ones to resume, or another directory"
            )

    def _cut_off(self) -> None:
        """Removes what was written after the last commit."""
        (self.path / "manifest.json.tmp").unlink(missing_ok=True)
        samples = StoredSamples(self.path / SAMPLES, self._state["samples"], self._state["bytes"])
        collections.deque(samples, maxlen=0)  # raises for one that can't be read
        os.truncate(self.path / SAMPLES, self._state["bytes"])
        if not self._state["sites"]:
            shutil.rmtree(self.path / "states", ignore_errors=True)
            shutil.rmtree(self.path / "rows", ignore_errors=True)
            return
        for stale in self.path.glob("*/**/*.__lock"):  # TensorStore's, from an interrupted write
            stale.unlink()
        for path in self._array_paths(self._state["sites"]):
            array = open_array(path)
            check_chunks(path, array, self._state["rows"])
            cut(array, self._state["rows"])
            self._arrays[path] = open_array(path)

    # Rows.

    def _array_paths(self, sites: Sequence[str]) -> list[Path]:
        fields = (*ROW_FIELDS, *(CELL_FIELDS if self._state["cells"] else ()))
        rows = [self.path / "rows" / name for name in fields]
        return rows + [array_path(self.path, site) for site in sites]

    def _check_batch(
        self,
        num_samples: int,
        states: Mapping[str, np.ndarray],
        tokens: np.ndarray,
        sample_index: np.ndarray,
        positions: np.ndarray,
        cells: Cells | None,
    ) -> None:
        rows = len(tokens)
        sites = self._state["sites"]
        has_cells, before = cells is not None, self._state["cells"]
        if rows and has_cells != before and (before or self._state["rows"]):
            raise ValueError("cells are given for some batches only; expected all or none")
        if rows and not states:
            raise ValueError(f"{rows} rows but no states; expected one array per site")
        if states and sites and sorted(states) != sorted(sites):
            raise ValueError(f"expected states of {', '.join(sites)}; got {', '.join(states)}")
        lengths = {"sample_index": len(sample_index), "positions": len(positions)}
        lengths |= {site: len(x) for site, x in states.items()}
        lengths |= {} if cells is None else {"cells": len(cells.grid), "boxes": len(cells.box)}
        for name, length in lengths.items():
            if length != rows:
                raise ValueError(f"{name} has {length} rows, expected {rows}, one per token")
        if rows and not 0 <= np.min(sample_index) <= np.max(sample_index) < num_samples:
            raise ValueError(
                f"sample_index must be in 0..{num_samples - 1}, the samples of the batch"
            )
        for name, values, dtype in (
            ("sample_index", sample_index, ROW_FIELDS["sample"]),
            ("positions", positions, ROW_FIELDS["position"]),
            ("tokens", tokens, ROW_FIELDS["token"]),
        ):
            _check_integers(name, values, dtype)
        for site, x in states.items():
            if np.dtype(x.dtype).kind in "iub":
                raise ValueError(f"states of site {site!r} are {x.dtype}; expected floats")
            if np.ndim(x) != 2:
                raise ValueError(f"states of site {site!r} must be [rows, D], got {np.shape(x)}")
            if not site.strip("."):  # would name the folder itself, or its parent
                raise ValueError(f"{site!r} is not a site; expected a module's name")
            known = self._arrays.get(array_path(self.path, site))
            if known is not None and known.shape[1] != x.shape[1]:
                raise ValueError(f"{site}: width {x.shape[1]}, expected {known.shape[1]}")

    def _check_range(self, states: Mapping[str, np.ndarray]) -> None:
        kind = ts.dtype(self._state["dtype"]).numpy_dtype
        for site, x in states.items():
            if x.dtype == kind:
                continue
            lost = np.isfinite(x) & ~np.isfinite(_narrowed(x, kind))
            if lost.any():
                row, column = np.argwhere(lost)[0].tolist()
                raise ValueError(
                    f"{site}: row {self.rows_done + row} has {x[row, column]:.6g}, too large for "
                    f"{self._state['dtype']}; store the states as bfloat16 or float32"
                )

    def _create_arrays(self, states: Mapping[str, np.ndarray]) -> None:
        # remains of an append that failed before the first commit
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

    def _create_cells(self) -> None:
        for name, dtype in CELL_FIELDS.items():
            path = self.path / "rows" / name
            shutil.rmtree(path, ignore_errors=True)  # remains of a failed append
            self._arrays[path] = create_array(path, dtype, (0, 4))

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
            values = _narrowed(np.asarray(arrays[path]), array.dtype.numpy_dtype)
            writes.append(array[start:end].write(values))
        for write in writes:
            wait(write)


def _check_integers(name: str, values: np.ndarray, dtype: str) -> None:
    """Raises ValueError for values that a field of this dtype would store as others."""
    if not np.size(values):
        return
    least, most, bounds = np.min(values), np.max(values), np.iinfo(dtype)
    if not bounds.min <= int(least) <= int(most) <= bounds.max:
        raise ValueError(
            f"{name} are from {least} to {most}; expected {bounds.min} to {bounds.max} ({dtype})"
        )


def _narrowed(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(kind, copy=False)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Converts a file system error to one line that names the directory."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write features to {path}: {reason(error)}; use a writable directory with "
            "enough space"
        ) from error
