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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ports.programs import keep_programs
from xlvlm_jax import atomic, damage, pictures
from xlvlm_jax.row_arrays import StoredRows, create_array, wait
from xlvlm_jax.solvers import kmeans, lapack, largest_norm, pca, phases, semi_nmf, streamed
from xlvlm_jax.solvers.inputs import (
    StoredMatrix,
    as_matrix,
    centred,
    check_finite,
    check_num_concepts,
    check_number,
    check_weights,
    check_whole,
    is_stored,
    read_block,
    read_rows,
    root_mean_square,
    shard_rows,
    short,
    unit_of,
)
from xlvlm_jax.solvers.loop import Result, real_dtype
from xlvlm_jax.solvers.phases import Standing, Tell
from xlvlm_jax.solvers.restarts import stability
from xlvlm_jax.solvers.streamed import Source
from xlvlm_jax.solvers.streamed.tiles import TILE_BYTES

METHODS = {"snmf": semi_nmf, "kmeans": kmeans, "pca": pca, "simple": largest_norm}
ALIASES = {"nndl": "snmf"}
# What a user calls `init` is given to the solver under the name of what it holds.
INIT = {"snmf": "init_atoms", "kmeans": "init_centroids"}
NOT_OPTIONS = ("width", "num_samples", "num_concepts", "unit", "mesh", "sample_weight")
TENSORS, DESCRIPTION = "concepts.safetensors", "concepts.json"
# A Zarr array, in place of the tensor, when they were streamed: "activations-" and the beginning of
# the digest of the components that they belong to ("activations" in directories of old).
ACTIVATIONS = "activations"
RELATIVE = "relative_alpha"  # whether alpha is in units of the rows' root mean square norm
CENTRED = ("kmeans", "pca")  # blind to what is subtracted from every row
FEW_CODED = 0.1  # of the rows: when fewer have a code of snmf, alpha is too large for them
PROJECTED_BYTES = 2**26  # of a source's rows that are projected together
# Of a column's deviation: what rounding a centroid to float32 may move it without a word.
HELD = 1e-3

Matrix = Float[Array | np.ndarray, "..."]


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Concepts:
    """Concepts, how they were found, and how much of each is in each sample they were found on.

    Attributes:
        components: float32[K, D], one row a concept. (All arrays are float64 where JAX's 64 bits
            are switched on and Z is float64.)
        activations: float32[N, K], or None for concepts that were given. As `load` finds streamed
            ones they stay on disk: a `StoredRows`, which numpy reads when it needs an array.
        method: "snmf", "kmeans", "pca" or "simple".
        options: the options of the method, defaults included.
        objective: what the method minimises, at these components and activations (for kmeans and
            simple the sum of squared distances to the nearest component).
        iterations: updates of the run that was kept.
        converged: whether its stopping rule ended it, and not max_iter.
        history: float32[iterations + 1], the objective at the start and after each update.
        mean: float32[D], what pca subtracts from every row, float64 where Z was; None for the
            other methods.
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

    @property
    def dead(self) -> Bool[np.ndarray, " K"]:
        """Which concepts of snmf no row has a code on: their atoms say nothing, do not ground them.

        False for other methods, and where the activations are not known.
        """
        if self.method != "snmf" or self.activations is None:
            return np.zeros(len(self.components), bool)
        return ~np.asarray(jnp.any(jnp.asarray(self.activations) != 0, axis=0))

    def tree_flatten(self) -> tuple[tuple, str]:
        """The numbers, and as JSON what is not: concepts may go into and out of jit and vmap."""
        described = {name: getattr(self, name) for name in _DESCRIBED if name not in _NUMBERS}
        return tuple(getattr(self, name) for name in _NUMBERS), json.dumps(described)

    @classmethod
    def tree_unflatten(cls, described: str, numbers: tuple) -> "Concepts":
        """The inverse of `tree_flatten`."""
        return cls(**dict(zip(_NUMBERS, numbers, strict=True)), **json.loads(described))

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
        components = _narrow(as_matrix(components, "components", row="concept"))
        check_finite(components, "components")
        D = components.shape[1]
        if mean is not None:
            if method != "pca":
                raise ValueError(f"{method!r} subtracts no mean; leave mean out or use 'pca'")
            mean = jnp.asarray(mean, real_dtype(components))
            if mean.shape != (D,):
                raise ValueError(
                    f"mean must have shape ({D},), one entry a column of components; "
                    f"got {mean.shape}"
                )
        return cls(components.astype(real_dtype(components)), None, method, options, mean=mean)

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
                name: _stored(np.asarray(array))
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


def _stored(array: np.ndarray) -> np.ndarray:
    """As it is written: in float32, or float64 where that is what it has."""
    return np.ascontiguousarray(array, np.float64 if array.dtype == np.float64 else np.float32)


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


_NUMBERS = (*_ARRAYS, "objective", "iterations", "converged")


@lapack.one_thread()
def decompose(
    Z: Shaped[Array | np.ndarray, "..."] | StoredMatrix,
    num_concepts: int | Sequence[int],
    method: str = "snmf",
    *,
    key: PRNGKeyArray,
    sample_weight: Shaped[Array | np.ndarray, " N"] | None = None,
    mesh: Mesh | None = None,
    progress: Tell | None = None,
    verbose: int = 0,
    **options: Any,
) -> Concepts | list[Concepts]:
    """Factor Z[N, D] into K = num_concepts concepts.

    Methods, and their options with defaults:
        "snmf" (or "nndl"): min 1/2 |Z - U V|_F^2 + alpha |U|_1, U >= 0, |V_k|_2 = 1. alpha=1.0,
            relative_alpha=False (True: alpha in units of the rows' root mean square norm),
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
        Z: real numbers[N, D], of JAX, numpy, or what numpy.asarray takes: torch, pandas, xarray,
            dask, Zarr, TensorStore. bfloat16 and float16 stay as they are, anything else becomes
            float32, in which everything is computed; for kmeans and pca the mean of float64 and
            integer rows is subtracted in float64 first. With JAX's 64 bits float64 stays float64.
            Or what reads rows, such as `Features.stored(site)`: each host then reads those of its
            own devices.
        num_concepts: K, at least 1 and at most N (for pca at most min(N, D)); or several of them,
            which are solved side by side in one program.
        key: from jax.random.key; the same key gives the same concepts on the same machine. Another
            number of cores or devices rounds products differently, which snmf, whose objective is
            not convex, may carry to another optimum (of nearly the same objective).
        sample_weight: for kmeans, what each row counts for: centroids are weighted means, the
            objective a weighted sum. A whole number is as many equal rows; a row of weight zero
            only gets its activations. None: all count the same.
        mesh: rows of Z are sharded on its "data" axis; an iteration then communicates K D + K K + K
            numbers (kmeans 2 K D + 2 K), whatever N is. Where the axis does not divide N, rows that
            count for nothing fill it up. With several hosts, Z is a global array that it divides.
        progress: called on every host with a `Standing` (num_concepts, iteration, max_iter,
            objective, error) after every 64 updates, or fewer where Z is large. The updates are the
            same; of several hosts all must give one, or none. "simple" has no updates.
        verbose: writes the iterations that it divides to standard error; 0 is silent.

    Returns:
        Concepts with float32 JAX arrays; for several K a list of them, in that order. Codes on
        fixed atoms: `project`, or init=atoms with max_iter=0.

    Traces under jit and vmap (Z and key as arguments); then nothing is looked at that needs
    numbers: rows are not checked nor scaled, stability is not computed, and `history` keeps its
    full length. Not differentiable: `project` is.

    A zero matrix, equal rows or fewer directions than concepts are no error: an atom that nothing
    needs keeps a unit norm and codes of zero, surplus centroids coincide with rows.

    Raises:
        ValueError: Z is no matrix of finite real numbers (the first bad row is named), K does not
            fit, unknown method or option, a bad option, weights that are negative or all zero or
            not for kmeans, a mesh without a "data" axis, the rows of a source are not what its
            shape says, the objective is beyond float32.
        TypeError: Z is not an array of numbers.
    """
    keep_programs()
    method = _method(method)
    options = _options(method, options)
    stored = is_stored(Z)
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
    heaviest = 1.0
    if sample_weight is not None:
        if method != "kmeans":
            raise ValueError(f"{method!r} has no weights; leave sample_weight out or use 'kmeans'")
        sample_weight, heaviest = check_weights(sample_weight, N)
    wide = Z if isinstance(Z, np.ndarray) else None
    origin = None
    if stored:
        Z = read_rows(Z, mesh)
    elif wide is not None and method in CENTRED:
        # Where deviations are small beside the mean, float32 would not tell the rows apart.
        origin = wide.mean(axis=0)
        origin = np.where(np.isfinite(origin), origin, 0)
        Z = jnp.asarray(centred(wide, origin))
    else:
        Z = _narrow(Z)
    if mesh is not None and not stored:
        Z = shard_rows(Z, mesh)
    unit = unit_of(Z, check_finite(Z, "Z"))
    arguments = {name: value for name, value in options.items() if name != RELATIVE}
    if options.get(RELATIVE):
        # The rows that fill up a mesh are zero: N is not theirs.
        scale = float(root_mean_square(Z / unit) * unit * (len(Z) / N) ** 0.5)
        arguments["alpha"] = options["alpha"] = options["alpha"] * scale
        options[RELATIVE] = False  # what is told, and used again, is the product
    if unit != 1:
        Z = Z / jnp.asarray(unit, Z.dtype)
    if "alpha" in arguments:
        arguments["alpha"] = arguments["alpha"] / unit
    if method in ("kmeans", "simple"):
        arguments["unit"] = unit
    numbers = tuple(int(number) for number in numbers)
    if (init := arguments.pop("init", None)) is not None:
        arguments[INIT[method]] = _first(init, numbers, D, origin, unit, real_dtype(Z))
        options["init"] = "given"
    arguments |= {"num_samples": N, "num_concepts": numbers}
    if sample_weight is not None:
        weights = jnp.pad(jnp.asarray(sample_weight, real_dtype(Z)), (0, len(Z) - N))
        arguments["sample_weight"] = weights
    squared_unit = unit**2 * heaviest
    tell = _teller(progress, verbose, squared_unit) if verbose or progress else None
    result = phases.solve(METHODS[method], Z, key, tell, verbose or None, mesh=mesh, **arguments)
    found = []
    for i, number in enumerate(numbers):
        one = jax.tree.map(itemgetter(i), result)
        if squared_unit != 1:
            one = _in_unit(one, method, unit, squared_unit)
        if origin is not None:
            one = _around(one, method, origin)
        found.append(_concepts(one, number, N, method, dict(options)))
    if method == "snmf" and not isinstance(result.objective, jax.core.Tracer):
        for concepts in found:
            if (share := _coded(concepts.activations)) < FEW_CODED:
                scale = float(root_mean_square(Z) * unit * (len(Z) / N) ** 0.5)
                _check_coded(share, options["alpha"], scale)
    if origin is not None and method == "kmeans":
        _check_held(found[0].components, wide)
    return found if several else found[0]


def _teller(progress: Tell | None, verbose: int, squared_unit: float) -> Tell:
    """What tells both, of Z and not of Z / unit."""

    def tell(standing: Standing) -> None:
        standing = standing._replace(objective=standing.objective * squared_unit)
        if progress is not None:
            progress(standing)
        if verbose and standing.iteration % verbose == 0 and jax.process_index() == 0:
            _, iteration, _, objective, error = standing
            text = f"iteration {iteration}: objective {objective:.6g}, compared to tol: {error:.2g}"
            print(text, file=sys.stderr)

    return tell


def _narrow(Z: Array | np.ndarray) -> Array:
    return jnp.asarray(short(Z)) if isinstance(Z, np.ndarray) else Z


def _first(
    init: Any,
    numbers: tuple[int, ...],
    D: int,
    origin: Float[np.ndarray, " D"] | None,
    unit: float,
    dtype: Any,
) -> Float[Array, "K D"]:
    """The components to start from, as the solver sees Z."""
    init = as_matrix(init, "init", row="concept")
    if len(numbers) > 1 or init.shape != (numbers[0], D):
        shape = f"({numbers[0]}, {D}), one row a concept" if len(numbers) == 1 else "one K only"
        raise ValueError(f"init must have shape {shape}; got {init.shape}")
    if origin is not None:
        init = jnp.asarray(centred(np.asarray(init, np.float64), origin))
    init = _narrow(init)
    check_finite(init, "init")
    return init.astype(dtype) / unit


def _in_unit(result: Result, method: str, unit: float, squared_unit: float) -> Result:
    """The result for Z of one for Z / unit, whose objective is in the squared unit."""
    # Squares may be beyond float32 where their roots are not.
    squares = {
        name: np.asarray(getattr(result, name), np.float64) * squared_unit
        for name in ("objective", "history")
    }
    if method in ("snmf", "pca"):
        squares["activations"] = result.activations * unit
    if method in ("kmeans", "simple"):
        squares["components"] = result.components * unit
    if result.mean is not None:
        squares["mean"] = result.mean * unit
    return result._replace(**squares)


def _around(result: Result, method: str, origin: Float[np.ndarray, " D"]) -> Result:
    """The result for Z of one for Z - 1 origin."""
    if method == "pca":
        return result._replace(mean=origin + np.asarray(result.mean, np.float64))
    around = origin + np.asarray(result.components, np.float64)
    return result._replace(components=jnp.asarray(short(around)))


def _check_coded(share: float, alpha: float, scale: float | None = None) -> None:
    """Warns when alpha leaves most rows without a code; scale: their root mean square norm."""
    if share < FEW_CODED and scale != 0:
        of_rows = "" if scale is None else f", the root mean square norm of the rows {scale:.3g}"
        warnings.warn(
            f"only {100 * share:.2g} % of the rows have a code: alpha is {alpha:g}{of_rows}; a row"
            " no longer than alpha has none: lower alpha, or let decompose take it relative to that"
            " norm with relative_alpha=True",
            stacklevel=5,
        )


def _coded(codes: Float[Array | np.ndarray, "N K"]) -> float:
    """The share of rows that have a code."""
    xp = jnp if isinstance(codes, jax.Array) else np
    return float(xp.mean(xp.any(codes != 0, axis=1), dtype=np.float32))


def _check_held(components: Float[Array, "K D"], Z: Float[np.ndarray, "N D"]) -> None:
    """Warns when float32 cannot tell centroids from others near them."""
    rounding = np.spacing(np.abs(np.asarray(components, np.float32)).max(axis=0)) / 2
    deviation = Z.std(axis=0)
    lost = rounding > HELD * np.where(deviation > 0, deviation, np.inf)
    if lost.any():
        d = int(np.argmax(lost))
        warnings.warn(
            f"column {d} of Z is around {Z[:, d].mean():.6g} with a deviation of"
            f" {deviation[d]:.3g}: clusters were found in the centred rows, but float32 rounds"
            f" centroids there by up to {rounding[d]:.2g}; subtract the column's mean first, or set"
            " JAX_ENABLE_X64=1",
            stacklevel=4,
        )


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
    for name in ("init", RELATIVE):
        arguments.pop(name, None)
    lowered = METHODS[method].solve.lower(
        Z, jax.random.key(0), num_samples=N, num_concepts=(num_concepts,), mesh=mesh, **arguments
    )
    memory = lowered.compile().memory_analysis()
    sizes = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes")
    return sum(getattr(memory, size) for size in sizes)


def streamed_memory_needed(
    shape: tuple[int, int], num_concepts: int, method: str = "snmf", **options: Any
) -> int:
    """Bytes that `decompose_stored` of Z[N, D] takes: tiles, and the few columns of every row.

    Arguments and errors as for `decompose_stored`.
    """
    method = _streamed(method)
    check_num_concepts(num_concepts, *shape, method)
    N, D = shape
    # A tile, the one that is read, and their products; activations that are being written.
    of_tiles = 4 * TILE_BYTES
    if method == "pca":
        _options(method, options)
        return of_tiles + 4 * D * 6 * num_concepts
    R = streamed.METHODS[method].columns(N, D, num_concepts)
    # The columns stay on the host while the device solves for them.
    return of_tiles + 4 * N * R + memory_needed((N, R), num_concepts, method, **options)


def _streamed(method: str) -> str:
    """The name of a method that can be streamed."""
    method = _method(method)
    if method not in streamed.METHODS:
        expected = ", ".join(streamed.METHODS)
        raise ValueError(f"{method!r} can't be streamed; expected one of {expected}, or decompose")
    return method


def _check_key(key: Any) -> None:
    if not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise ValueError(f"key must come from jax.random.key; got {key!r}, try jax.random.key(0)")


def _concepts(
    result: Result, num_concepts: int, num_samples: int, method: str, options: dict[str, Any]
) -> Concepts:
    """One of the solver's results, without what pads it."""
    traced = isinstance(result.objective, jax.core.Tracer)
    iterations = result.iterations if traced else int(result.iterations)
    if not traced and not np.isfinite(result.objective):
        raise ValueError(
            f"the objective of {method} is {float(result.objective)}: squares of Z are beyond"
            " float32; divide Z by its largest value, or leave out columns that dwarf the others"
        )
    several_starts = not traced and result.starts is not None and len(result.starts) > 1
    return Concepts(
        components=result.components[:num_concepts],
        activations=None
        if result.activations is None
        else result.activations[:num_samples, :num_concepts],
        method=method,
        options=options,
        objective=result.objective if traced else float(result.objective),
        iterations=iterations,
        converged=result.converged if traced else bool(result.converged),
        history=result.history if traced else result.history[: iterations + 1],
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

    Runs on the host: it does not trace.

    The same updates as `decompose`, each one pass over the source; see `solvers.streamed`. Memory
    beyond a few tiles of 4 MB is N (K + 44) numbers of compressed rows and 2 N K of codes.

    Args:
        source: has shape (N, D), tiles(count) and take(numbers).
        num_concepts, method, key, options: as for `decompose`; without init, relative_alpha and
            "simple".
        write: called with (first row, activations) as the last pass makes them; None keeps them in
            memory, as the result's activations.
        progress: as for `decompose`; called after every pass that is an update.

    Raises:
        ValueError: as `decompose`; NaN or Inf is found, and named, during the first pass.
    """
    keep_programs()
    method = _streamed(method)
    options = _options(method, options)
    for name, unset in (("init", None), (RELATIVE, False)):
        if options.pop(name, unset) is not unset:
            raise ValueError(f"{name} is not for stored rows; use decompose, or leave it out")
    check_num_concepts(num_concepts, *source.shape, method)
    _check_key(key)
    activations = None if write else np.empty((source.shape[0], num_concepts), np.float32)
    coded = 0.0

    def keep(start: int, rows: np.ndarray) -> None:
        nonlocal coded
        coded += len(rows) * _coded(rows)
        if write:
            write(start, rows)
        else:
            activations[start : start + len(rows)] = rows

    solve = streamed.METHODS[method].solve
    result = solve(source, key, keep, progress, num_concepts=int(num_concepts), **options)
    result = result._replace(activations=activations)
    if method == "snmf":
        _check_coded(coded / source.shape[0], options["alpha"])
    return _concepts(result, num_concepts, source.shape[0], method, options)


def project(
    Z: Shaped[Array | np.ndarray, "..."] | StoredMatrix,
    concepts: Concepts,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "N K"]:
    """Activations[N, K] of the rows of Z[N, D] on concepts, learnt or given.

    snmf solves its lasso with the atoms fixed, kmeans and simple take 1 / (1 + distance), pca the
    scores of the rows less its mean. On the rows that the concepts were learnt from it gives
    `activations` again. Types and `mesh` as for `decompose`; of what reads rows some are read at a
    time.

    Traces under jit, vmap and grad, in Z and in the concepts' arrays (codes of snmf are
    differentiated where they are, the set of those above zero held fixed); rows are then not
    checked.

    Raises:
        TypeError: Z is not an array of numbers.
        ValueError: Z is no matrix of finite real numbers, its width is not that of the concepts, or
            the rows of a source are not what its shape says.
    """
    keep_programs()
    if not is_stored(Z):
        return _project(Z, concepts, mesh, 0)
    return jnp.concatenate([part for *_, part in project_stored(Z, concepts, mesh=mesh)])


def project_stored(
    source: StoredMatrix, concepts: Concepts, *, mesh: Mesh | None = None
) -> Iterator[tuple[int, Shaped[np.ndarray, "B D"], Float[Array, "B K"]]]:
    """(first row, rows, activations) of rows that stay on disk, block by block, as `project`."""
    N, D = source.shape
    size = max(PROJECTED_BYTES // (4 * D), 1)
    for start in range(0, max(N, 1), size):
        rows = read_block(source, start, min(start + size, N))
        yield start, rows, _project(rows, concepts, mesh, start)


def distances(
    Z: Shaped[Array | np.ndarray, "..."], concepts: Concepts
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """The nearest component of each row of Z[N, D], and its distances to all: kmeans and simple.

    They tell rows apart that activations, 1 / (1 + distance), round to one. Traces and raises as
    `project`; ValueError for the other methods too.
    """
    if concepts.method not in ("kmeans", "simple"):
        raise ValueError(f"{concepts.method!r} has no distances; use concepts of kmeans or simple")
    rows = _rows_of(Z, concepts, None, 0)
    labels, squared = kmeans.assign(rows.Z, rows.components)
    return labels, rows.unit * kmeans.distance(squared)


class _Rows(NamedTuple):
    """Rows and concepts as the solvers take them: less what float64 could subtract, in a unit."""

    Z: Float[Array, "M D"]
    components: Float[Array, "K D"]
    mean: Float[Array, " D"]
    unit: float


def _project(Z: Any, concepts: Concepts, mesh: Mesh | None, first_row: int) -> Array:
    """`project` of rows that are numbered from `first_row` on."""
    method = _method(concepts.method)
    Z = as_matrix(Z, "Z", row="sample")
    rows = _rows_of(Z, concepts, mesh, first_row)
    if method == "snmf":
        nonnegative = concepts.options.get("nonnegative", True)
        alpha = concepts.options.get("alpha", 1.0) / rows.unit
        codes = semi_nmf.activations(rows.Z, rows.components, alpha, nonnegative)
        activations = rows.unit * codes
    elif method == "pca":
        activations = rows.unit * pca.activations(rows.Z, rows.components, rows.mean)
    else:
        activations = kmeans.activations(rows.Z, rows.components, rows.unit)
    return activations[: len(Z)]


def _rows_of(Z: Any, concepts: Concepts, mesh: Mesh | None, first_row: int) -> _Rows:
    method = _method(concepts.method)
    Z = as_matrix(Z, "Z", row="sample")
    D = Z.shape[1]
    components, mean = concepts.components, concepts.mean
    if components.shape[1] != D:
        raise ValueError(
            f"Z has {D} columns but the concepts have {components.shape[1]}; "
            "project states of the site and model that the concepts were learnt on"
        )
    wide, of_mean = isinstance(Z, np.ndarray), isinstance(mean, np.ndarray)
    # A mean that the rows' own type does not hold.
    longer = of_mean and mean.dtype == np.float64 and real_dtype(Z) != np.float64
    if method == "pca" and (wide or longer):
        # What is subtracted in float64 leaves what float32 can hold.
        if isinstance(Z, jax.core.Tracer):
            high = np.asarray(mean, np.float32)
            Z, mean = (Z - high) - np.asarray(mean - high, np.float32), None
        else:
            origin = np.zeros(D) if mean is None else np.asarray(mean, np.float64)
            Z, mean = jnp.asarray(centred(np.asarray(Z, np.float64), origin)), None
    elif wide and method != "snmf":
        components = np.asarray(components, np.float64)
        origin = components.mean(axis=0)
        Z, components = (jnp.asarray(centred(x, origin)) for x in (Z, components))
    Z = _narrow(Z)
    dtype = real_dtype(Z)
    components = jnp.asarray(components, dtype)
    mean = jnp.zeros(D, dtype) if mean is None else jnp.asarray(mean, dtype)
    if mesh is not None:
        Z = shard_rows(Z, mesh)
    unit = unit_of(Z, check_finite(Z, "Z", first_row))
    if unit != 1:
        Z = Z / jnp.asarray(unit, Z.dtype)
    of_rows = method in ("kmeans", "simple")
    return _Rows(Z, components / unit if of_rows else components, mean / unit, unit)


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
    if method == "snmf":
        options[RELATIVE] = False
    for name in given:
        if name not in options:
            known = f"its options are {', '.join(options)}" if options else "it has none"
            raise ValueError(
                f"method {method!r} has no option {name!r}; {known}" + _nearest(name, options)
            )
    options |= given
    if not isinstance(options.get(RELATIVE, False), bool):
        raise ValueError(f"{RELATIVE} must be True or False; got {options[RELATIVE]!r}")
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
