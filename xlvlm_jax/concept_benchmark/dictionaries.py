"""Dictionaries to score: learnt here by a method's name, or read from the files of any tool.

M rows, K concepts, D width.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from ports import VLM
from ports.checkpoint import safetensors_io
from xlvlm_jax import sae
from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.concepts.methods import ALIASES, METHODS, TRAINED, method_named
from xlvlm_jax.concepts.reconstruction import reconstruct
from xlvlm_jax.concepts.record import TENSORS, Concepts
from xlvlm_jax.concepts.stage import layer_of
from xlvlm_jax.storage.same_model import require_model

RANDOM = "random"
# Transcoders and crosscoders learn from two matrices, of which there is one here.
LEARNT = (*METHODS, *(name for name in TRAINED if not method_named(name).takes_target), RANDOM)
# How each method is trained, besides its number of concepts.
SNMF = {"relative_alpha": True, "alpha": 0.1, "n_init": 1, "max_iter": 100}
AUTOENCODER = {"max_iter": 1000, "batch_size": 512, "learning_rate": 2e-3, "dead_after": 50_000}


class Entry(NamedTuple):
    """A line of the benchmark: a method that is learnt for each seed, or files.

    Attributes:
        name: of the line.
        paths: files of the dictionary, one per seed or a single one; empty for a method.
        method: the method that is learnt; None for files.
    """

    name: str
    paths: tuple[Path, ...] = ()
    method: str | None = None


def parse_entry(text: str) -> Entry:
    """Parses a method's name, PATH, or NAME=PATH,PATH of dictionaries with different seeds.

    Args:
        text: as a user writes it.

    Raises:
        ValueError: it is neither the name of a method nor a path that exists, or the name cannot be
            that of a directory.

    Examples:
        >>> from xlvlm_jax.concept_benchmark import parse_entry
        >>> parse_entry("nndl").method
        'snmf'
    """
    if text in (*LEARNT, *ALIASES):
        return Entry(text, method=ALIASES.get(text, text))
    # Paths may hold "=" too, as those of runs/lr=1e-3 do.
    name, found = "", _paths(text)
    before, given, after = text.partition("=")
    if given and not all(path.exists() for path in found):
        named = _paths(after)
        if "/" not in before or all(path.exists() for path in named):
            name, found = before, named
    missing = [path for path in found if not path.exists()]
    if missing or not found:
        what = f"there is no file or directory {missing[0]}" if missing else "there is no path"
        raise ValueError(
            f"{text!r} is not a method and {what}; expected one of {', '.join(LEARNT)}, or "
            "[NAME=]PATH[,PATH] of dictionaries"
        )
    first = found[0].resolve()
    name = name or (first.name if first.is_dir() else first.stem)
    if name in ("", ".", "..") or name != Path(name).name:
        raise ValueError(
            f"{name!r} names a dictionary and its directory; expected a name without slashes"
        )
    return Entry(name, found)


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(path) for path in text.split(",") if path)


def learn(
    method: str, rows: Float[np.ndarray, "M D"], num_concepts: int, k: int, *, seed: int = 0
) -> Concepts:
    """Learns a dictionary from states.

    Args:
        method: one of `decompose`, or "random": a TopK autoencoder that is not trained.
        rows: float[M, D].
        num_concepts: K.
        k: active concepts per state, for sparse autoencoders.
        seed: random seed.

    Raises:
        ValueError: the method is unknown, or as for `decompose`.
    """
    if method == RANDOM:
        return random_dictionary(rows, num_concepts, k, seed=seed)
    how = method_named(method)
    options: dict[str, Any] = {"snmf": SNMF}.get(how.name, {})
    if how.has_encoder:
        options = dict(AUTOENCODER) if how.name == "relu-sae" else AUTOENCODER | {"k": k}
        options["batch_size"] = min(options["batch_size"], len(rows))
    return decompose(rows, num_concepts, how.name, key=jax.random.key(seed), **options)


def random_dictionary(
    rows: Float[np.ndarray, "M D"], num_concepts: int, k: int, *, seed: int = 0
) -> Concepts:
    """Returns a TopK autoencoder with random directions, the null of the benchmark.

    The codes of a state are its k largest products with the directions, less the mean state, and
    the decoder has the same directions, at the length that explains most of the rows.

    Args:
        rows: float[M, D].
        num_concepts: K.
        k: active concepts per state.
        seed: random seed.

    Raises:
        ValueError: k is not in 1..K.
    """
    random = np.random.default_rng(seed)
    directions = random.standard_normal((num_concepts, rows.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    mean = rows.mean(axis=0, dtype=np.float64)

    def made(scale: float) -> sae.Dictionary:
        params = {"W_enc": directions.T, "W_dec": directions * scale, "b_dec": mean}
        params["b_enc"] = np.zeros(num_concepts)
        return sae.Dictionary.of(params, sae.Settings("topk", k=k))

    some = rows[random.permutation(len(rows))[:4096]]
    drawn = np.asarray(made(1).reconstruct(some), np.float64) - mean
    scale = max(float(np.sum(drawn * (some - mean)) / np.sum(drawn**2)), 0.0)
    return Concepts.from_dictionary(made(scale))


def read(path: Path, encode_as: str = "snmf") -> Concepts:
    """Reads a dictionary: concepts, a sparse autoencoder, or arrays.

    Args:
        path: a directory of concepts, one of SAELens or Gemma Scope, a file of Qwen-Scope, a .npy
            matrix float[K, D] of components, or a .safetensors file with `components` (and `mean`)
            or with `W_enc`, `W_dec`, `b_enc`, `b_dec`; codes that count are those above
            `threshold`, the `k` largest, or all that are positive.
        encode_as: how states are encoded on bare components: "snmf", "kmeans", "simple" or "pca".

    Raises:
        FileNotFoundError: there is no dictionary.
        ValueError: arrays are missing, do not fit together or are not finite, or the file is
            damaged.
    """
    if path.suffix == ".npy":
        try:
            components = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a matrix of numbers ({error})") from None
        return _of_components(path, {"components": components}, encode_as)
    if path.suffix == ".safetensors":
        stored = safetensors_io.open_file(path)
        arrays = {name: np.asarray(tensor.read()) for name, tensor in stored.items()}
        if "W_dec" not in arrays:
            return _of_components(path, arrays, encode_as)
        k = arrays.pop("k", None)
        k = None if k is None else int(k.reshape(-1)[0])
        architecture = "topk" if k else "jumprelu" if "threshold" in arrays else "standard"
        settings = sae.Settings(architecture, k=k)
        try:
            return Concepts.from_dictionary(sae.Dictionary.of(arrays, settings))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if (path / TENSORS).is_file():
        return Concepts.load(path)
    return Concepts.from_dictionary(sae.load(path))


def _of_components(path: Path, arrays: dict[str, np.ndarray], encode_as: str) -> Concepts:
    if "components" not in arrays:
        raise ValueError(
            f"{path} has {', '.join(arrays) or 'no arrays'}; expected components, or W_enc, W_dec, "
            "b_enc and b_dec"
        )
    options: dict[str, Any] = {}
    if method_named(encode_as).has_mean:
        options["mean"] = arrays.get("mean")
    try:
        return Concepts.from_components(arrays["components"], encode_as, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def check(concepts: Concepts, vlm: VLM, site: str, name: str) -> None:
    """Checks that a dictionary is one of the site's states.

    Args:
        concepts: the dictionary.
        vlm: the model.
        site: the site.
        name: its name, for the message.

    Raises:
        ValueError: it has another width, is not finite, has features of two sites, or was learnt on
            another model or at another layer.
    """
    concepts.require_one_site("the benchmark")
    components = np.asarray(concepts.components)
    width = vlm.site_shapes[site][-1]
    if components.ndim != 2 or components.shape[1] != width:
        raise ValueError(
            f"{name}: components have shape {components.shape}, but states at {site!r} have width "
            f"{width}; expected [K, {width}], of this site"
        )
    if not np.isfinite(components).all():
        raise ValueError(f"{name}: components have values that are not finite; learn it again")
    require_model(concepts.source, vlm, f"{name} was learnt on the states of")
    learnt = concepts.source.get("site")
    layers = layer_of(str(learnt or "")), layer_of(site)
    if None not in layers and layers[0] != layers[1]:
        raise ValueError(
            f"{name} was learnt at {learnt!r}, but the benchmark's states are of {site!r}; choose "
            "that site with --site"
        )


def digest_of(concepts: Concepts) -> str:
    """Returns a digest of everything that encodes and decodes."""
    described = json.dumps([concepts.method, concepts.options], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode())
    arrays: dict[str, Any] = {"components": concepts.components, "mean": concepts.mean}
    if concepts.dictionary is not None:
        arrays |= concepts.dictionary.params
        digest.update(repr(concepts.dictionary.settings).encode())
    for name, values in sorted(arrays.items()):
        if values is not None:
            digest.update(name.encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def remade(
    concepts: Concepts, codes: Float[np.ndarray, "M K"], rows: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "M D"]:
    """Returns the reconstructions of rows from codes, on the host."""
    return np.asarray(reconstruct(concepts, codes, rows), np.float32)


def check_names(entries: Sequence[Entry]) -> None:
    """Checks that no two entries share a name.

    Raises:
        ValueError: two do.
    """
    names = [entry.name for entry in entries]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two dictionaries are called {twice[0]!r}; name them, as NAME=PATH")
