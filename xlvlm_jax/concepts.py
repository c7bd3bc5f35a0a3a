"""From a matrix of states to concepts, and from new states to their activations.

Z[N, D] ~ activations[N, K] components[K, D]: a row of Z is a sample, a row of components a concept.
This file checks the input, calls the solver of the method, and keeps the result on disk.
"""

import difflib
import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, Shaped
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ports.programs import keep_programs
from xlvlm_jax import atomic, damage, pictures
from xlvlm_jax.row_arrays import StoredRows, create_array, wait
from xlvlm_jax.solvers import kmeans, lapack, largest_norm, pca, phases, semi_nmf, streamed
from xlvlm_jax.solvers.inputs import (
    StoredMatrix,
    as_matrix,
    check_finite,
    check_num_concepts,
    check_number,
    check_whole,
    read_rows,
    shard_rows,
)
from xlvlm_jax.solvers.loop import Result
from xlvlm_jax.solvers.phases import Standing, Tell
from xlvlm_jax.solvers.restarts import stability
from xlvlm_jax.solvers.streamed import Source

METHODS = {"snmf": semi_nmf, "kmeans": kmeans, "pca": pca, "simple": largest_norm}
ALIASES = {"nndl": "snmf"}
# What a user calls `init` is given to the solver under the name of what it holds.
INIT = {"snmf": "init_atoms", "kmeans": "init_centroids"}
NOT_OPTIONS = ("width", "num_samples", "num_concepts", "mesh")
TENSORS, DESCRIPTION = "concepts.safetensors", "concepts.json"
# A Zarr array, in place of the tensor, when they were streamed: "activations-" and the beginning of
# the digest of the components that they belong to ("activations" in directories of old).
ACTIVATIONS = "activations"
BLOCK_ROWS = 2**16  # that are projected at once where the rows are on disk

Matrix = Float[Array | np.ndarray, "..."]


@dataclass(frozen=True)
class Concepts:
    """Concepts, how they were found, and how much of each is in each sample they were found on.

    Attributes:
        components: float32[K, D], one row a concept.
        activations: float32[N, K], or None for concepts that were given. As `load` finds streamed
            ones they stay on disk: a `StoredRows`, which numpy reads when it needs an array.
        method: "snmf", "kmeans", "pca" or "simple".
        options: the options of the method, defaults included.
        objective: what the method minimises, at these components and activations (for kmeans and
            simple the sum of squared distances to the nearest component).
        iterations: updates of the run that was kept.
        converged: whether its stopping rule ended it, and not max_iter.
        history: float32[iterations + 1], the objective at the start and after each update.
        mean: float32[D], what pca subtracts from every row; None for the other methods.
        stability: float32[K], the mean cosine of each concept with its match in the other starts
            (snmf, and kmeans with n_init > 1); 1 is found every time. None where there was one.
        words: for each concept the words it is read as, once grounded.
        images: for each concept the files of the images that show it, once grounded. On disk they
            are named so that they are found after a move (see `pictures`).
        through_norm: whether the words were read through the model's final norm; None if unknown.
        source: where Z came from, free for the caller; its "features" are found after a move too.
    """

    components: Matrix
    activations: Matrix | None = None
    method: str = "snmf"
    options: dict[str, Any] = field(default_factory=dict)
    objective: float | None = None
    iterations: int = 0
    converged: bool = True
    history: Matrix | None = None
    mean: Matrix | None = None
    stability: Matrix | None = None
    words: list[list[str]] | None = None
    images: list[list[str]] | None = None
    through_norm: bool | None = None
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_components(
        cls,
        components: Shaped[Array | np.ndarray, "..."],
        method: str = "snmf",
        *,
        mean: Shaped[Array | np.ndarray, "..."] | None = None,
        **options: Any,
    ) -> "Concepts":
        """Concepts from components[K, D] that were not learnt here, to `project` on.

        Components are taken as they are: snmf codes are relative to the atoms' norms, and pca
        scores are not divided by them. `mean[D]` is what pca subtracts; zero when it is not given.

        Raises:
            ValueError: components are no finite matrix; mean is not [D] or the method is not pca;
                unknown method or option.
        """
        method = _method(method)
        options = _options(method, options)
        components = as_matrix(components, "components", row="concept")
        check_finite(components, "components")
        D = components.shape[1]
        if mean is not None:
            if method != "pca":
                raise ValueError(f"{method!r} subtracts no mean; leave mean out or use 'pca'")
            mean = jnp.asarray(mean, jnp.float32)
            if mean.shape != (D,):
                raise ValueError(
                    f"mean must have shape ({D},), one entry a column of components; "
                    f"got {mean.shape}"
                )
        return cls(components.astype(jnp.float32), None, method, options, mean=mean)

    def save(self, directory: str | Path) -> None:
        """Write concepts.safetensors and concepts.json into a directory, made if it is missing.

        Each file is written under a temporary name and renamed, tensors first; the description
        holds their digest, so that `load` refuses a pair of which only one was renewed. Streamed
        activations that lie in the directory stay there and are not written again; the description
        names their folder, so that no death leaves components with the activations of others.
        """
        directory = Path(directory)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        stored = self.activations if isinstance(self.activations, StoredRows) else None
        if stored is not None and stored.path.parent.resolve() == directory.resolve():
            arrays["activations"] = None
        else:
            stored = None
        tensors = save_tensors(
            {
                name: np.ascontiguousarray(array, dtype=np.float32)
                for name, array in arrays.items()
                if array is not None
            }
        )
        described = {name: getattr(self, name) for name in _DESCRIBED}
        described["source"] = pictures.store_features(self.source, directory)
        if self.images is not None:
            root = pictures.root_of(path for paths in self.images for path in paths)
            described["pictures"] = pictures.describe(root, directory)
            described["images"] = [
                [pictures.name_in(root, path) for path in paths] for paths in self.images
            ]
        described |= {"num_concepts": len(self.components)}
        digest = hashlib.sha256(tensors).hexdigest()
        described |= {"tensors_sha256": digest}
        folder = None
        if stored is not None:
            folder = stored.path.name
            if folder == _UNFINISHED:
                folder = f"{ACTIVATIONS}-{digest[:12]}"
                shutil.rmtree(directory / folder, ignore_errors=True)
                stored.path.rename(directory / folder)
            described |= {"rows_on_disk": len(stored), "activations_on_disk": folder}
        description = (json.dumps(described, indent=2) + "\n").encode()
        directory.mkdir(parents=True, exist_ok=True)
        atomic.write(directory / TENSORS, tensors)
        atomic.write(directory / DESCRIPTION, description)
        before = (directory / ACTIVATIONS, *directory.glob(f"{ACTIVATIONS}-*"))
        for other in before:  # what another description named
            if other.is_dir() and other.name != folder:
                shutil.rmtree(other)

    @classmethod
    def load(cls, directory: str | Path) -> "Concepts":
        """Read what `save` wrote; arrays are numpy's, streamed activations stay on disk.

        Raises:
            FileNotFoundError: the directory holds no concepts.
            ValueError: a file is damaged, or the two are not of one save.
        """
        directory = Path(directory)
        for name in (TENSORS, DESCRIPTION):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"no concepts in {directory}: {name} is missing; run `xlvlm decompose` first"
                )
        tensors = (directory / TENSORS).read_bytes()
        try:
            described = json.loads((directory / DESCRIPTION).read_text())
            digest = described["tensors_sha256"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{directory / DESCRIPTION} is not a description of concepts ({error}); "
                "decompose again"
            ) from error
        if digest != hashlib.sha256(tensors).hexdigest():
            raise ValueError(
                f"{directory}: {TENSORS} and {DESCRIPTION} are not of one save; decompose again"
            )
        known = {name: described[name] for name in _DESCRIBED if name in described}
        with damage.reported(directory, "concepts", "decompose again"):
            arrays = load_tensors(tensors)
            if described.get("rows_on_disk") is not None:
                folder = described.get("activations_on_disk", ACTIVATIONS)
                stored = StoredRows(directory / folder, described["rows_on_disk"])
                arrays["activations"] = stored
            if known.get("images") is not None:
                found = pictures.find_all(
                    [name for names in known["images"] for name in names],
                    directory,
                    described.get("pictures"),
                )
                paths = iter(found)
                known["images"] = [[next(paths) for _ in names] for names in known["images"]]
            known["source"] = pictures.restore_features(known.get("source") or {}, directory)
            return cls(**arrays, **known)


def on_host(concepts: Concepts) -> Concepts:
    """Concepts with their arrays as numpy's; activations that lie on several hosts are gathered.

    Every host calls it.
    """
    arrays = {name: getattr(concepts, name) for name in _ARRAYS}
    gathered = {
        name: multihost_utils.process_allgather(value, tiled=True)
        if isinstance(value, jax.Array) and not value.is_fully_addressable
        else np.asarray(value)
        for name, value in arrays.items()
        if value is not None
    }
    return replace(concepts, **gathered)


class StoredActivations:
    """The activations of concepts that are being found, written into the concepts' directory.

    A context: `Concepts.save` with its `rows` gives them their place there; when it ends, nothing
    is left of those that were not saved.
    """

    def __init__(self, directory: str | Path, num_samples: int, num_concepts: int):
        self._partial = Path(directory) / _UNFINISHED
        self._num_samples = num_samples
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        atomic.unfinished.add(self._partial)
        self._array = create_array(self._partial, "float32", (num_samples, num_concepts))

    def write(self, start: int, rows: Float[np.ndarray, "B K"]) -> None:
        """The activations of the rows from `start` on."""
        wait(self._array[start : start + len(rows)].write(rows))

    def rows(self) -> StoredRows:
        """All of them, once they are written."""
        return StoredRows(self._partial, self._num_samples)

    def __enter__(self) -> "StoredActivations":
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        atomic.unfinished.discard(self._partial)


_UNFINISHED = f"{ACTIVATIONS}.tmp"
_ARRAYS = ("components", "activations", "history", "mean", "stability")
_DESCRIBED = (
    "method",
    "options",
    "objective",
    "iterations",
    "converged",
    "words",
    "images",
    "through_norm",
    "source",
)


@lapack.one_thread()
def decompose(
    Z: Shaped[Array | np.ndarray, "..."] | StoredMatrix,
    num_concepts: int | Sequence[int],
    method: str = "snmf",
    *,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
    progress: Tell | None = None,
    verbose: int = 0,
    **options: Any,
) -> Concepts | list[Concepts]:
    """Factor Z[N, D] into K = num_concepts concepts.

    Methods, and their options with defaults:
        "snmf" (or "nndl"): min 1/2 |Z - U V|_F^2 + alpha |U|_1, U >= 0, |V_k|_2 = 1. alpha=1.0,
            nonnegative=True (False: codes of any sign), tol=1e-6, max_iter=1000, n_init=None starts
            (8 up to 64 concepts, 2 beyond), init=None (start from atoms [K, D] instead).
            Source: Ding, Li and Jordan 2010; Mairal et al. 2009; see solvers/semi_nmf.py.
        "kmeans": centroids; activations 1 / (1 + distance). tol=1e-4, max_iter=300, n_init=1
            starts, init=None (start from centroids [K, D] instead of k-means++). Source: Lloyd
            1982; Arthur and Vassilvitskii 2007.
        "pca": orthonormal components of the centred rows; activations are scores, of any sign.
            tol=1e-5, max_iter=100. Source: Halko, Martinsson and Tropp 2011.
        "simple": the K rows of largest norm; activations as for kmeans. No options.

    Args:
        Z: float, bfloat16, float16 or integer[N, D], of numpy or JAX. bfloat16 and float16 stay as
            they are, anything else becomes float32; sums are float32 always. Or what reads rows,
            such as `Features.stored(site)`: each host then reads those of its own devices.
        num_concepts: K, at least 1 and at most N (for pca at most min(N, D)); or several of them,
            which are solved side by side in one program.
        key: from jax.random.key; the same key gives the same concepts.
        mesh: rows of Z are sharded on its "data" axis; an iteration then communicates K D + K K + K
            numbers, whatever N is. Where the axis does not divide N, rows that count for nothing
            fill it up. With several hosts, Z is a global array that the axis divides.
        progress: called on every host with a `Standing` (num_concepts, iteration, max_iter,
            objective, error) after every 64 updates, or fewer where Z is large. The updates are the
            same; of several hosts all must give one, or none. "simple" has no updates.
        verbose: writes the iterations that it divides to standard error; 0 is silent.

    Returns:
        Concepts with float32 JAX arrays; for several K a list of them, in that order. Codes on
        fixed atoms: `project`, or init=atoms with max_iter=0.

    A zero matrix, equal rows or fewer directions than concepts are no error: an atom that nothing
    needs keeps a unit norm and codes of zero, surplus centroids coincide with rows.

    Raises:
        ValueError: Z is no matrix of finite real numbers (the first bad row is named), K does not
            fit, unknown method or option, a bad option, a mesh without a "data" axis.
    """
    keep_programs()
    method = _method(method)
    options = _options(method, options)
    stored = isinstance(Z, StoredMatrix)
    Z = Z if stored else as_matrix(Z, "Z", row="sample")
    N, D = Z.shape
    several = isinstance(num_concepts, Sequence | np.ndarray)
    numbers = tuple(num_concepts) if several else (num_concepts,)
    if not numbers:
        raise ValueError("num_concepts is empty; expected a number of concepts, or some of them")
    for number in numbers:
        check_num_concepts(number, N, D, method)
    _check_key(key)
    check_whole("verbose", verbose, 0)
    if stored:
        Z = read_rows(Z, mesh)
    elif mesh is not None:
        Z = shard_rows(Z, mesh)
    check_finite(Z, "Z")

    arguments = dict(options)
    if (init := arguments.pop("init", None)) is not None:
        init = as_matrix(init, "init", row="concept")
        if len(numbers) > 1 or init.shape != (numbers[0], D):
            shape = f"({numbers[0]}, {D}), one row a concept" if len(numbers) == 1 else "one K only"
            raise ValueError(f"init must have shape {shape}; got {init.shape}")
        check_finite(init, "init")
        arguments[INIT[method]] = init.astype(jnp.float32)
        options["init"] = "given"
    numbers = tuple(int(number) for number in numbers)
    arguments |= {"num_samples": N, "num_concepts": numbers}
    tell = _teller(progress, verbose) if verbose else progress
    result = phases.solve(METHODS[method], Z, key, tell, verbose or None, mesh=mesh, **arguments)
    found = [
        _concepts(jax.tree.map(itemgetter(i), result), number, N, method, dict(options))
        for i, number in enumerate(numbers)
    ]
    return found if several else found[0]


def _teller(progress: Tell | None, verbose: int) -> Tell:
    def tell(standing: Standing) -> None:
        if progress is not None:
            progress(standing)
        if standing.iteration % verbose == 0 and jax.process_index() == 0:
            _, iteration, _, objective, error = standing
            text = f"iteration {iteration}: objective {objective:.6g}, compared to tol: {error:.2g}"
            print(text, file=sys.stderr)

    return tell


def memory_needed(
    shape: tuple[int, int],
    num_concepts: int,
    method: str = "snmf",
    *,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    **options: Any,
) -> int:
    """Bytes of a device that `decompose` of Z[N, D] takes, Z among them, as the compiler counts.

    The program is compiled and not run; no Z is needed. Arguments and errors as for `decompose`.
    """
    method = _method(method)
    check_num_concepts(num_concepts, *shape, method)
    N, D = shape
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data", None))
    rows = N if mesh is None else N + -N % mesh.shape["data"]
    Z = jax.ShapeDtypeStruct((rows, D), dtype, sharding=sharding)
    arguments = _options(method, options)
    arguments.pop("init", None)
    lowered = METHODS[method].solve.lower(
        Z, jax.random.key(0), num_samples=N, num_concepts=(num_concepts,), mesh=mesh, **arguments
    )
    memory = lowered.compile().memory_analysis()
    sizes = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes")
    return sum(getattr(memory, size) for size in sizes)


def _check_key(key: Any) -> None:
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError(f"key must come from jax.random.key; got {key!r}, try jax.random.key(0)")


def _concepts(
    result: Result, num_concepts: int, num_samples: int, method: str, options: dict[str, Any]
) -> Concepts:
    """One of the solver's results, without what pads it."""
    iterations = int(result.iterations)
    several_starts = result.starts is not None and len(result.starts) > 1
    return Concepts(
        components=result.components[:num_concepts],
        activations=None
        if result.activations is None
        else result.activations[:num_samples, :num_concepts],
        method=method,
        options=options,
        objective=float(result.objective),
        iterations=iterations,
        converged=bool(result.converged),
        history=result.history[: iterations + 1],
        mean=result.mean,
        stability=stability(np.asarray(result.starts)[:, :num_concepts])
        if several_starts
        else None,
    )


@lapack.one_thread()
def decompose_stored(
    source: Source,
    num_concepts: int,
    method: str = "snmf",
    *,
    key: PRNGKeyArray,
    write: Callable[[int, Float[np.ndarray, "B K"]], None] | None = None,
    progress: Tell | None = None,
    **options: Any,
) -> Concepts:
    """`decompose` of rows that stay where they are, such as `Features.stored(site)`.

    The same updates as `decompose`, each one pass over the source; see `solvers.streamed`. Memory
    beyond a few tiles of 4 MB is N (K + 44) numbers of compressed rows and 2 N K of codes.

    Args:
        source: has shape (N, D), tiles(count) and take(numbers).
        num_concepts, method, key, options: as for `decompose`; without init and "simple".
        write: called with (first row, activations) as the last pass makes them; None keeps them in
            memory, as the result's activations.
        progress: as for `decompose`; called after every pass that is an update.

    Raises:
        ValueError: as `decompose`; NaN or Inf is found, and named, during the first pass.
    """
    keep_programs()
    method = _method(method)
    if method not in streamed.METHODS:
        expected = ", ".join(streamed.METHODS)
        raise ValueError(f"{method!r} can't be streamed; expected one of {expected}, or decompose")
    options = _options(method, options)
    if options.pop("init", None) is not None:
        raise ValueError("init is not for stored rows; use decompose, or leave it out")
    check_num_concepts(num_concepts, *source.shape, method)
    _check_key(key)
    activations = None
    if write is None:
        activations = np.empty((source.shape[0], num_concepts), np.float32)

        def write(start: int, rows: np.ndarray) -> None:
            activations[start : start + len(rows)] = rows

    solve = streamed.METHODS[method].solve
    result = solve(source, key, write, progress, num_concepts=int(num_concepts), **options)
    result = result._replace(activations=activations)
    return _concepts(result, num_concepts, source.shape[0], method, options)


def project(
    Z: Shaped[Array | np.ndarray, "..."], concepts: Concepts, *, mesh: Mesh | None = None
) -> Float[Array, "N K"]:
    """Activations[N, K] of the rows of Z[N, D] on concepts, learnt or given.

    snmf solves its lasso with the atoms fixed, kmeans and simple take 1 / (1 + distance), pca the
    scores of the rows less its mean. On the rows that the concepts were learnt from it gives
    `activations` again. Types and `mesh` as for `decompose`.

    Raises:
        ValueError: Z is no matrix of finite real numbers, or its width is not that of the concepts.
    """
    keep_programs()
    method = _method(concepts.method)
    Z = as_matrix(Z, "Z", row="sample")
    N, D = Z.shape
    components = jnp.asarray(concepts.components, jnp.float32)
    if components.shape[1] != D:
        raise ValueError(
            f"Z has {D} columns but the concepts have {components.shape[1]}; "
            "project states of the site and model that the concepts were learnt on"
        )
    if mesh is not None:
        Z = shard_rows(Z, mesh)
    check_finite(Z, "Z")
    if method == "snmf":
        nonnegative = concepts.options.get("nonnegative", True)
        alpha = concepts.options.get("alpha", 1.0)
        activations = semi_nmf.activations(Z, components, alpha, nonnegative)
    elif method == "pca":
        mean = jnp.zeros(D) if concepts.mean is None else jnp.asarray(concepts.mean)
        activations = pca.activations(Z, components, mean)
    else:
        activations = kmeans.activations(Z, components)
    return activations[:N]


def project_stored(
    source: Source, concepts: Concepts
) -> Iterator[tuple[int, Shaped[np.ndarray, "B D"], Float[np.ndarray, "B K"]]]:
    """(first row, rows, activations) of rows that stay on disk, block by block, as `project`."""
    for start, rows in source.tiles(BLOCK_ROWS):
        yield start, rows, np.asarray(project(rows, concepts))


def _method(name: str) -> str:
    names = (*METHODS, *ALIASES)
    if name not in names:
        raise ValueError(
            f"unknown method {name!r}; expected one of {', '.join(names)}" + _nearest(name, names)
        )
    return ALIASES.get(name, name)


def _options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's defaults overlaid with the given options, checked."""
    solver = METHODS[method]
    # A method without updates has no plan, but for its one program.
    parameters = inspect.signature(getattr(solver, "plan", solver.solve)).parameters.values()
    renamed = {INIT.get(method): "init"}
    options = {
        renamed.get(parameter.name, parameter.name): parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in NOT_OPTIONS
    }
    for name in given:
        if name not in options:
            known = f"its options are {', '.join(options)}" if options else "it has none"
            raise ValueError(
                f"method {method!r} has no option {name!r}; {known}" + _nearest(name, options)
            )
    options |= given
    for name, lowest in {"alpha": 0, "tol": 0}.items():
        if name in options:
            check_number(name, options[name], lowest)
            options[name] = float(options[name])
    for name, lowest in {"max_iter": 0, "n_init": 1}.items():
        if options.get(name) is not None:
            check_whole(name, options[name], lowest)
            options[name] = int(options[name])
    return options


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=2)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
