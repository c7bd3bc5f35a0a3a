"""`Concepts`: what a method found, and its directory on disk."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int, Shaped
from safetensors.numpy import load as load_tensors

from ports.messages import counted
from ports.tables import html_table, kind
from xlvlm_jax import sae
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.solvers.linalg import real_dtype
from xlvlm_jax.solvers.validation import (
    as_matrix,
    check_finite,
    narrow,
)
from xlvlm_jax.storage import atomic, damaged, pictures, versions
from xlvlm_jax.storage.tensors import as_bytes
from xlvlm_jax.storage.zarr_rows import StoredRows, create_array, wait

TENSORS, DESCRIPTION = "concepts.safetensors", "concepts.json"
# Name of a Zarr array that replaces the tensor for streamed activations: "activations-" and the
# start of the digest of the components they belong to ("activations" in old directories).
ACTIVATIONS = "activations"
TILE_NUMBERS = 2**22  # of activations that are read together
Matrix = Float[Array | np.ndarray, "..."]
MAPS = "maps.safetensors"  # over pictures, see `stored_maps`
UNFINISHED = f"{ACTIVATIONS}.tmp"
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
_NUMBERS = (*_ARRAYS, "objective", "iterations", "converged", "dictionary")


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, repr=False)
class Concepts:
    """Concepts, how they were found, and how strongly each is active in each training sample.

    Attributes:
        components: float32[K, D], one row per concept. (All arrays are float64 in JAX's 64-bit mode
            if Z is float64.)
        activations: float32[N, K], or None for concepts that were given. Streamed activations stay
            on disk after `load`: a `StoredRows`, which numpy reads when it needs an array.
        method: "snmf", "kmeans", "pca", "simple", or the name of a sparse autoencoder.
        options: the options of the method, including defaults.
        objective: what the method minimises, at these components and activations (for kmeans and
            simple the sum of squared distances to the nearest component). Under jit or vmap, this
            and the next two are arrays.
        iterations: number of updates in the run that was kept.
        converged: whether the stopping rule ended it, rather than max_iter; True for methods
            without one: simple, and sparse autoencoders, whose number of updates is given.
        history: float32[iterations + 1], the objective at the start and after each update; of
            sparse autoencoders float32[iterations], the loss of each update's batch, in the
            objective's unit.
        mean: float32[D], what pca subtracts from every row, float64 if Z was; None for the other
            methods.
        stability: float32[K], the mean cosine of each concept with its match in the other starts
            (snmf, and kmeans with n_init > 1); 1 if found every time. None with a single start.
        words: for each concept the words it is read as, once grounded.
        images: for each concept the files of the images that show it, once grounded. On disk their
            names are such that they are found after a move (see `pictures`).
        through_norm: whether the words were read through the model's final norm; None if unknown.
        source: where Z came from, JSON values; its "features" are found after a move too. Of a
            transcoder, "target" is the same of the states that its components are directions of; of
            a crosscoder, "other" is that of the source whose components these are not.
        dictionary: the sparse autoencoder that encodes rows, whose features the concepts are; None
            for the other methods. On disk the directory is one of SAELens too.

    Examples:
        >>> import numpy as np, tempfile, xlvlm_jax
        >>> concepts = xlvlm_jax.Concepts.from_components(np.eye(3), "kmeans")
        >>> concepts.save(folder := tempfile.mkdtemp())
        >>> xlvlm_jax.Concepts.load(folder).components.shape
        (3, 3)
    """

    components: Matrix
    activations: Matrix | StoredRows | None = None
    method: str = "snmf"
    options: dict[str, Any] = field(default_factory=dict)
    objective: float | Float[Array, "..."] | None = None
    iterations: int | Int[Array, "..."] = 0
    converged: bool | Bool[Array, "..."] = True
    history: Matrix | None = None
    mean: Matrix | None = None
    stability: Matrix | None = None
    words: list[list[str]] | None = None
    images: list[list[str]] | None = None
    through_norm: bool | None = None
    source: dict[str, Any] = field(default_factory=dict)
    dictionary: sae.Dictionary | None = None

    def __repr__(self) -> str:
        return f"Concepts({self._in_short()})"

    def _repr_html_(self) -> str:
        from xlvlm_jax.concepts.display import concepts_html

        title = self._in_short()
        if np.ndim(self.components) != 2:  # several solutions, from vmap
            return html_table([], title=title)
        shown = (self.activations, self.words, self.images)
        return concepts_html(*shown, num_concepts=len(self.components), title=title)

    def _in_short(self) -> str:
        shape = getattr(self.activations, "shape", ())
        rows = f" of {counted(shape[-2], 'row')}" if len(shape) > 1 else ""
        return f"{self.method}: {kind(self.components)} components{rows}"

    @property
    def dead(self) -> Bool[np.ndarray, " K"]:
        """Whether no row has a nonzero code on a concept, whose atom is then meaningless.

        bool[K], for snmf and sparse autoencoders; do not ground these. False for other methods and
        if the activations are unknown.

        Raises:
            ValueError: the method is unknown.
        """
        how = method_named(self.method)
        if not (how.is_sparse or how.has_encoder) or self.activations is None:
            return np.zeros(len(self.components), bool)
        if isinstance(self.activations, StoredRows):  # may not fit into memory
            tiles = self.activations.tiles(max(TILE_NUMBERS // len(self.components), 1))
            return ~np.logical_or.reduce([np.any(tile != 0, axis=0) for _, tile in tiles])
        if isinstance(self.activations, np.ndarray):  # where they are, without a copy
            return ~np.asarray(self.activations.any(axis=0))
        return ~np.asarray(jnp.any(self.activations != 0, axis=0))

    def tree_flatten(self) -> tuple[tuple, str]:
        """Returns the numbers, and the rest as JSON, so that concepts pass through jit and vmap."""
        described = {name: getattr(self, name) for name in _DESCRIBED if name not in _NUMBERS}
        return tuple(getattr(self, name) for name in _NUMBERS), json.dumps(described)

    @classmethod
    def tree_unflatten(cls, described: str, numbers: tuple) -> "Concepts":
        """Inverts `tree_flatten`."""
        made = object.__new__(cls)  # not by __init__: JAX also puts in what is not an array
        for name, value in (*zip(_NUMBERS, numbers, strict=True), *json.loads(described).items()):
            object.__setattr__(made, name, value)
        return made

    @classmethod
    def from_components(
        cls,
        components: Shaped[Array | np.ndarray, "..."],
        method: str = "snmf",
        *,
        mean: Shaped[Array | np.ndarray, "..."] | None = None,
        **options: Any,
    ) -> "Concepts":
        """Returns concepts with given components, to `project` on.

        Components are used as they are: snmf codes are relative to the atoms' norms, and pca scores
        are not divided by them.

        Args:
            components: real numbers[K, D].
            method: one of `decompose`.
            mean: real numbers[D], what pca subtracts; None for zero. float64 from numpy keeps its
                digits.
            **options: options of the method.

        Raises:
            ValueError: components are not a finite matrix, mean is not [D], not finite or the
                method is not pca, or the method or an option is unknown.
        """
        how = method_named(method)
        if how.has_encoder:
            raise ValueError(
                f"{how.name!r} encodes with more than its components; use Concepts.from_dictionary"
            )
        options = how.options(options)
        components = narrow(as_matrix(components, "components", row="concept"))
        check_finite(components, "components")
        D = components.shape[1]
        if mean is not None:
            if not how.has_mean:
                raise ValueError(f"{how.name!r} does not subtract a mean; omit mean or use 'pca'")
            if not (isinstance(mean, np.ndarray) and mean.dtype == np.float64):
                mean = jnp.asarray(mean, real_dtype(components))
            if not np.isfinite(np.asarray(mean)).all():
                raise ValueError("mean has NaN or Inf; give the mean of finite rows")
            if mean.shape != (D,):
                raise ValueError(
                    f"mean must have shape ({D},), one entry per column of components; got "
                    f"{mean.shape}"
                )
        return cls(components.astype(real_dtype(components)), None, how.name, options, mean=mean)

    @classmethod
    def from_dictionary(
        cls,
        dictionary: sae.Dictionary,
        *,
        source: Mapping[str, Any] | None = None,
        side: int = 0,
    ) -> "Concepts":
        """Returns the features of a sparse autoencoder as concepts, to `project` on.

        They are grounded, mapped, scored and steered by like any others.

        Args:
            dictionary: such as `sae.load` reads from files of SAELens, Gemma Scope or Qwen-Scope.
            source: where it comes from; "site", "model" and "fingerprint" are compared with those
                of features. The site is the file's own unless it is given. Components of a
                transcoder are directions at the site that it writes, "target" in `source`.
            side: of a crosscoder, the source whose decoder gives the components: 0 or 1.

        Raises:
            ValueError: codes depend on other positions (temporal), or the dictionary does not have
                this side.

        Examples:
            >>> import numpy as np, xlvlm_jax
            >>> from xlvlm_jax import sae
            >>> W = {"W_enc": np.eye(2), "W_dec": np.eye(2), "b_enc": [-1, -1], "b_dec": [0, 0]}
            >>> dictionary = sae.Dictionary.of(W, sae.Settings("standard"))
            >>> concepts = xlvlm_jax.Concepts.from_dictionary(dictionary)
            >>> xlvlm_jax.project(np.float32([[3, 0.5]]), concepts).tolist()
            [[2.0, 0.0]]
        """
        settings = dictionary.settings
        if settings.architecture == "temporal":
            raise ValueError(
                f"{dictionary.method!r} encodes whole sequences, so its features are not concepts "
                "of rows; use its encode and decode"
            )
        sides = len(settings.widths) if settings.is_crosscoder else 1
        if not 0 <= side < sides:
            expected = f"0 to {sides - 1}" if sides > 1 else "0, as only crosscoders have two"
            raise ValueError(f"side is {side}; expected {expected}")
        site: dict[str, Any] = {} if dictionary.site is None else {"site": dictionary.site}
        if settings.is_transcoder and (target := dictionary.target_site) is not None:
            site["target"] = {"site": target}
        return cls(
            jnp.asarray(components_of(dictionary, side), jnp.float32),
            method=dictionary.method,
            source=site | dict(source or {}),
            dictionary=dictionary,
        )

    @property
    def written(self) -> Mapping[str, Any]:
        """Where components are directions: `source`, but of a transcoder its "target"."""
        return self.source.get("target") or self.source

    def require_one_site(self, what: str) -> None:
        """Checks that the concepts encode and describe states of the same site and model.

        Args:
            what: needs such concepts, for the message.

        Raises:
            ValueError: they do not, as those of transcoders and crosscoders.
        """
        settings = self.dictionary and self.dictionary.settings
        if settings and (settings.is_transcoder or settings.is_crosscoder):
            raise ValueError(
                f"{self.method!r} has features of two sites or models; {what} needs concepts of "
                "one, such as topk-sae"
            )

    def with_components(
        self,
        components: Float[Array | np.ndarray, "K D"],
        mean: Float[Array | np.ndarray, " D"] | None = None,
    ) -> "Concepts":
        """Returns the same concepts in other directions, which encode as these do.

        Args:
            components: float[K, D].
            mean: what pca subtracts; None for what it subtracts here.

        Returns:
            Concepts without activations. Those of a sparse autoencoder encode with columns that
            moved with the components, in proportion to their lengths.

        Raises:
            ValueError: the concepts are of a transcoder or crosscoder.
        """
        self.require_one_site("moving components")
        dictionary = self.dictionary
        if dictionary is not None:
            dictionary = dictionary.moved(components)
        mean = self.mean if mean is None else mean
        return replace(
            self, components=components, activations=None, mean=mean, dictionary=dictionary
        )

    def save(self, directory: str | Path) -> None:
        """Writes concepts.safetensors and concepts.json to a directory, created if missing.

        A sparse autoencoder is written there too, as SAELens does: `sae.load` and SAELens read the
        directory.

        Each file is written under a temporary name and renamed, tensors first. The description
        holds their digest, so that `load` refuses a pair of which only one was renewed. Streamed
        activations in this directory stay there and are not written again; the description names
        their folder, so that an interrupted save never pairs components with foreign activations.
        Maps of other concepts that an earlier run left there are removed.
        """
        directory = Path(directory)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        stored = self.activations if isinstance(self.activations, StoredRows) else None
        if stored is not None and stored.path.parent.resolve() == directory.resolve():
            arrays["activations"] = None
        else:
            stored = None
        tensors = as_bytes(
            {
                name: _stored(np.asarray(array))
                for name, array in arrays.items()
                if array is not None
            }
        )
        described: dict[str, Any] = {"version": versions.VERSION}
        described |= {name: getattr(self, name) for name in _DESCRIBED}
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
        directory.mkdir(parents=True, exist_ok=True)
        had_dictionary = _names_dictionary(directory / DESCRIPTION)
        if self.dictionary is not None:
            sae.save(self.dictionary, directory)
            described |= {"dictionary_sha256": _digest_of_dictionary(directory)}
        folder = None
        if stored is not None:
            folder = stored.path.name
            if folder == UNFINISHED:
                folder = f"{ACTIVATIONS}-{digest[:12]}"
                shutil.rmtree(directory / folder, ignore_errors=True)
                stored.path.rename(directory / folder)
            described |= {"rows_on_disk": len(stored), "activations_on_disk": folder}
        description = (json.dumps(described, indent=2) + "\n").encode()
        atomic.write(directory / TENSORS, tensors)
        atomic.write(directory / DESCRIPTION, description)
        if self.dictionary is None and had_dictionary:  # of an earlier save
            for file in _files_of_dictionary(directory):
                file.unlink(missing_ok=True)
        _remove_other_maps(directory / MAPS, self)
        before = (directory / ACTIVATIONS, *directory.glob(f"{ACTIVATIONS}-*"))
        for other in before:  # folders that an earlier description named
            if other.is_dir() and other.name != folder:
                shutil.rmtree(other)

    @classmethod
    def load(cls, directory: str | Path) -> "Concepts":
        """Reads what `save` wrote; arrays are numpy arrays, streamed activations stay on disk.

        Raises:
            FileNotFoundError: the directory has no concepts.
            ValueError: a file is damaged, or the two come from different saves.
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
            versions.require(directory / DESCRIPTION, described, "decompose again")
            digest = described["tensors_sha256"]
        except versions.UnknownVersionError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{directory / DESCRIPTION} is not a description of concepts ({error}); decompose "
                "again"
            ) from error
        if digest != hashlib.sha256(tensors).hexdigest():
            raise ValueError(
                f"{directory}: {TENSORS} and {DESCRIPTION} come from different saves; decompose "
                "again"
            )
        known = {name: described[name] for name in _DESCRIBED if name in described}
        with damaged.reported(directory, "concepts", "decompose again"):
            arrays: dict[str, Any] = load_tensors(tensors)
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
            if (digest := described.get("dictionary_sha256")) is not None:
                if digest != _digest_of_dictionary(directory):
                    raise ValueError("its sparse autoencoder comes from another save")
                known["dictionary"] = sae.load(directory)
            return cls(**arrays, **known)


def components_of(dictionary: sae.Dictionary, side: int = 0) -> Float[Array, "K D"]:
    """Returns the directions of a dictionary's features, of a crosscoder those of one source."""
    if dictionary.settings.is_crosscoder:
        return sae.decoders(dictionary)[side]
    return dictionary.components


def on_host(concepts: Concepts) -> Concepts:
    """Converts arrays to numpy, gathering activations that are spread over several hosts.

    All hosts must call it.
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


def digest_of_components(concepts: Concepts) -> str:
    """Returns a digest of the components, which maps of the concepts name."""
    components = np.ascontiguousarray(concepts.components, np.float32)
    return hashlib.sha256(components.tobytes()).hexdigest()[:16]


def _remove_other_maps(path: Path, concepts: Concepts) -> None:
    if not path.exists():
        return
    try:
        with safetensors.safe_open(path, "numpy") as file:
            digest = (file.metadata() or {}).get("digest")
    except safetensors.SafetensorError:
        return  # damaged: its reader says so
    if digest != digest_of_components(concepts):
        path.unlink()


def _digest_of_dictionary(directory: Path) -> str:
    """Returns the digest of the files of the sparse autoencoder in a directory."""
    digest = hashlib.sha256()
    for file in _files_of_dictionary(directory):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _names_dictionary(description: Path) -> bool:
    """Returns whether concepts were saved here with a sparse autoencoder of their own."""
    try:
        return "dictionary_sha256" in json.loads(description.read_text("utf-8"))
    except (OSError, TypeError, ValueError):
        return False


def _files_of_dictionary(directory: Path) -> list[Path]:
    from xlvlm_jax.sae.saelens import CONFIG, WEIGHTS  # imports Flax

    return [directory / name for name in (CONFIG, WEIGHTS)]


def _stored(array: np.ndarray) -> np.ndarray:
    """Returns the array as it is written: in float64 if it is float64, else in float32."""
    return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)


class StoredActivations:
    """Writes the activations of concepts into their directory while they are being computed.

    A context manager: `Concepts.save` with its `rows` makes them part of the directory; on exit,
    unsaved activations are deleted, and the directory if it is new and nothing was saved.
    """

    def __init__(self, directory: str | Path, num_samples: int, num_concepts: int):
        self._partial = Path(directory).absolute() / UNFINISHED  # whatever is current later
        self._num_samples = num_samples
        self._is_new = not self._partial.parent.exists()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        atomic.unfinished.add(self._partial)
        self._array = create_array(self._partial, "float32", (num_samples, num_concepts))

    def write(self, start: int, rows: Float[np.ndarray, "B K"]) -> None:
        """Writes the activations of the rows from `start`."""
        wait(self._array[start : start + len(rows)].write(rows))

    def rows(self) -> StoredRows:
        """Returns all activations, once they are written."""
        return StoredRows(self._partial, self._num_samples)

    def __enter__(self) -> "StoredActivations":
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._is_new:
            with contextlib.suppress(OSError):  # it holds what was saved
                self._partial.parent.rmdir()
        atomic.unfinished.discard(self._partial)
