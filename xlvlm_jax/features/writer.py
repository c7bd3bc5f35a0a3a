"""Features on disk: the rows of Z of every captured site, and the samples that they come from.

    features/
        manifest.json       what the run was asked for, how much is written, whether it is complete
        samples.jsonl       a JSON line a sample
        images.json         where the pictures lie that samples.jsonl names (see `pictures`)
        states/<site>/      Zarr v3, [rows, D]
        rows/sample         Zarr v3, int64[rows], the line in samples.jsonl
        rows/position       Zarr v3, int32[rows]
        rows/token          Zarr v3, int32[rows]

`states` and `rows` are Zarr groups, which zarr-python and xarray open.

A batch counts once the manifest, replaced last and atomically, counts it. Whatever a killed run
left beyond that is cut off when the run goes on, so that it ends with the bytes of a run that was
never interrupted: there are no time stamps, and `row_arrays` writes the same chunks however the
rows came. (`images.json` says where this run found its pictures, and is that of the last run.)

States in bfloat16 have the data type "bfloat16", which TensorStore (Python, C++) reads and
zarr-python does not (3.1 says "No Zarr data type found"): read them by `Features.matrix`, or
extract with float32 or float16 states.
"""

import collections
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int, Int32, Int64, Shaped

from ports.messages import few
from xlvlm_jax import atomic, pictures
from xlvlm_jax.row_arrays import (
    StoredRows,
    check_chunks,
    create_array,
    create_group,
    cut,
    open_array,
    reason,
    wait,
)
from xlvlm_jax.samples import StoredSamples

FORMAT = "xlvlm-features"
VERSION = 1
SAMPLES = "samples.jsonl"
PICTURES = "images.json"
STATE_DTYPES = ("float32", "float16", "bfloat16")

_ROW_FIELDS = {"sample": "int64", "position": "int32", "token": "int32"}


# JSON.


def _replace(path: Path, value: Any) -> None:
    atomic.write(path, json.dumps(value, indent=1) + "\n")


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{root}: no manifest.json; expected a directory of features that xlvlm extract wrote"
        )
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not JSON ({reason(error)}); extract the features again"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: format {got!r}, expected {FORMAT!r}; extract the features again")
    if state.get("version") != VERSION:
        raise ValueError(
            f"{path}: format version {state.get('version')!r}, expected {VERSION};"
            " read it with the release that wrote it, or extract the features again"
        )
    for key in ("arguments", "dtype", "sites", "samples", "rows", "bytes", "complete"):
        if key not in state:
            raise ValueError(f"{path}: key {key!r} missing; extract the features again")
        if not _is_sound(key, state[key]):
            raise ValueError(f"{path}: {key!r} can't be what it is; extract the features again")
    selection = state["arguments"].get("selection")
    if isinstance(selection, dict) and selection.get("mode") in ("token-of-interest", "class"):
        selection.setdefault("match", "first-token")  # the only rule before there was a choice
    return state


def _is_sound(key: str, value: Any) -> bool:
    if key in ("samples", "rows", "bytes"):
        return type(value) is int and value >= 0
    if key == "sites":
        return isinstance(value, list) and all(
            isinstance(site, str) and site.strip(".") and site.isprintable() for site in value
        )
    kinds = {"arguments": dict, "dtype": str, "complete": bool}
    return isinstance(value, kinds[key])


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory of features with its counts, finished or not; None without one.

    Raises ValueError for one that is damaged or of another format.
    """
    return _read_manifest(path) if (path / "manifest.json").exists() else None


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


# Reading.


def _array_path(root: Path, site: str) -> Path:
    # dots stay, so that the folder carries the module's name; a slash may not make a folder
    return root / "states" / quote(site, safe="")


@dataclass(frozen=True)
class Features:
    """Features as `FeaturesWriter` left them. Rows N; a sample has none, one or several.

    Attributes:
        path: the directory.
        manifest: what the run was asked for.
        sites: the captured sites.
        samples: a dict a sample, in the order of extraction; "image" is a path that opens from
            here, if the picture is found. Read from the disk whenever they are asked for; take
            `samples.columns` of many.
        sample_rows: int64[N], which of `samples` a row comes from.
        positions: int32[N], which position of the sample, padding not counted.
        tokens: int32[N], the token that was predicted there.
        complete: False when the run was interrupted and not finished.
    """

    path: Path
    manifest: dict[str, Any]
    sites: tuple[str, ...]
    samples: Sequence[dict[str, Any]]
    sample_rows: Int64[np.ndarray, " N"]
    positions: Int32[np.ndarray, " N"]
    tokens: Int32[np.ndarray, " N"]
    complete: bool

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        allow_incomplete: bool = False,
        images: str | os.PathLike[str] | None = None,
    ) -> "Features":
        """Open a directory of features; states are read by `matrix`, samples one by one.

        Args:
            path: the directory.
            allow_incomplete: open an unfinished run too.
            images: where the pictures lie now, if they were moved without the run.

        Raises FileNotFoundError when there is no manifest; ValueError for another format or
        version, missing or truncated files, pictures that do not lie in `images`, and, unless
        `allow_incomplete`, an unfinished run. A damaged sample raises when samples are read.
        """
        root = Path(path)
        state = _read_manifest(root)
        if not state["complete"] and not allow_incomplete:
            raise ValueError(
                f"{root}: the run is not finished ({state['samples']} samples so far); start it"
                " again with the same arguments to finish it, or open it with allow_incomplete=True"
            )
        locate = functools.partial(
            pictures.locate,
            directory=root.absolute(),
            recorded=_read_pictures(root / PICTURES),
            images=images,
        )
        samples = StoredSamples(root / SAMPLES, state["samples"], state["bytes"], locate)
        if images is not None:
            samples.find_pictures()
        rows = {field: np.zeros(0, dtype) for field, dtype in _ROW_FIELDS.items()}
        if state["sites"]:
            rows = {name: _read_array(root / "rows" / name, state["rows"]) for name in _ROW_FIELDS}
            for site in state["sites"]:
                where = _array_path(root, site)
                check_chunks(where, open_array(where), state["rows"])
        return cls(
            path=root,
            manifest=state["arguments"],
            sites=tuple(state["sites"]),
            samples=samples,
            sample_rows=rows["sample"],
            positions=rows["position"],
            tokens=rows["token"],
            complete=state["complete"],
        )

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return (
            f"Features({str(self.path)!r}, sites: {few(self.sites) or 'none'}; "
            f"{len(self.tokens):,} rows of {len(self.samples):,} samples{state})"
        )

    def matrix(self, site: str) -> Float[np.ndarray, "N D"]:
        """Z of one site, float32[N, D]. Raises ValueError for a site that was not captured."""
        self._check_site(site)
        states = _read_array(_array_path(self.path, site), len(self.tokens))
        return states.astype(np.float32, copy=False)

    def _check_site(self, site: str) -> None:
        if site not in self.sites:
            raise ValueError(
                f"{self.path}: no site {site!r}; expected one of {few(self.sites) or 'none'}"
            )

    def stored(self, site: str) -> StoredRows:
        """Z of one site where it is, on disk; for `decompose_stored`. Raises as `matrix`."""
        self._check_site(site)
        return StoredRows(_array_path(self.path, site), len(self.tokens))


def _read_array(path: Path, rows: int) -> np.ndarray:
    array = open_array(path)
    check_chunks(path, array, rows)
    return array[:rows].read().result()


def stored_samples(path: Path) -> StoredSamples:
    """The samples of a directory of features as they are stored: pictures by their names."""
    state = _read_manifest(path)
    return StoredSamples(path / SAMPLES, state["samples"], state["bytes"])


def _read_pictures(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        return {key: os.fspath(recorded[key]) for key in ("root", "from here")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path}: does not say where pictures lie; remove it and give --images"
        ) from None


# Writing.


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
                self._state = _read_manifest(self.path)
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
                    _replace(self.path / "manifest.json", self._state)
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
        root = pictures.root_of(map(os.path.abspath, paths))
        if root is not None:
            with _one_line(self.path):
                _replace(self.path / PICTURES, pictures.describe(root, self.path))
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
                arrays |= {_array_path(self.path, site): x for site, x in states.items()}
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
            _replace(self.path / "manifest.json", committed)
        self._state = committed

    def close(self) -> None:
        """Mark the run complete, and give the directory free."""
        if self._lock >= 0 and not self.complete:
            with _one_line(self.path):
                done = self._state | {"complete": True}
                _replace(self.path / "manifest.json", done)
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
        rows = [self.path / "rows" / name for name in _ROW_FIELDS]
        return rows + [_array_path(self.path, site) for site in sites]

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
            known = self._arrays.get(_array_path(self.path, site))
            if known is not None and known.shape[1] != x.shape[1]:
                raise ValueError(f"{site}: width {x.shape[1]}, expected {known.shape[1]}")

    def _create_arrays(self, states: Mapping[str, np.ndarray]) -> None:
        # what an append that failed before the first commit may have left
        shutil.rmtree(self.path / "states", ignore_errors=True)
        shutil.rmtree(self.path / "rows", ignore_errors=True)
        for group in ("states", "rows"):
            create_group(self.path / group)
        for name, dtype in _ROW_FIELDS.items():
            path = self.path / "rows" / name
            self._arrays[path] = create_array(path, dtype, (0,))
        for site, x in states.items():
            path = _array_path(self.path, site)
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
