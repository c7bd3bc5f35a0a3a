"""Exchanges steering vectors with XL-VLMs, whose files torch.save writes:

    steering_vector                      float[D], or [K, K, D] between clusters
    steering_vector_concept_i_to_j       concept i - concept j, as XL-VLMs computes and names it
    steering_vector_shift_of_means, steering_vector_mean_of_directions, concepts1, activations1

and those of pull request 16:

    steering_vector                      float[N, D] or [N, 1, D], a vector per sample (P2S)
    encoder.weight [H, D], encoder.bias, decoder.weight [D, H]     a network (L2S), perhaps under
                                         "steering_model"

A vector that steers from concept i to concept j is concept j - concept i. So XL-VLMs' "i_to_j" is
read as it is, and steers from j to i; written files keep its values under its names.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ports.messages import few
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.features.pth.unpickle import PthError
from xlvlm_jax.features.pth.writer import write_pth
from xlvlm_jax.steering.l2s import L2S
from xlvlm_jax.steering.sample_vectors import SampleVectors
from xlvlm_jax.steering.vectors import SteeringVector

KEY = "steering_vector"
_NETWORK = ("encoder.weight", "encoder.bias", "decoder.weight")


def import_vector(
    path: str | os.PathLike[str],
    site: str,
    *,
    key: str = KEY,
    where: Any = "all",
    model: str | None = None,
) -> SteeringVector:
    """Reads a vector of XL-VLMs; executes nothing in the file.

    Runs on the host and cannot be traced.

    Args:
        path: the .pth file.
        site: the site to steer, which the file does not name.
        key: which of its vectors.
        where: the token positions that it is meant for, see `ports.add`.
        model: the name of the model, for the record.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or has no vector of this name.
    """
    data = read_pth(path, opaque=True)
    if not isinstance(data, dict):
        raise PthError(f"{path}: holds a {type(data).__name__}; expected steering vectors")
    vectors = {name: value for name, value in data.items() if len(np.shape(value)) == 1}
    if key not in vectors:
        raise PthError(f"{path}: has no vector {key!r}; expected one of {few(vectors)}")
    vector = np.asarray(vectors[key]).astype(np.float32)
    source = {"method": "imported", "file": Path(path).name, "key": key}
    return SteeringVector(vector, site, source | ({"model": model} if model else {}), where)


def import_sample_vectors(
    path: str | os.PathLike[str],
    site: str,
    ids: Sequence[str],
    *,
    key: str = KEY,
    where: Any = "all",
    model: str | None = None,
) -> SampleVectors:
    """Reads vectors of samples (P2S) of XL-VLMs; executes nothing in the file.

    Runs on the host and cannot be traced.

    Args:
        path: the .pth file, which does not name the samples.
        site, key, where, model: as for `import_vector`.
        ids: the samples, in the file's order.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or does not have a vector for each sample under this name.
    """
    data = read_pth(path, opaque=True)
    vectors = np.asarray(data[key] if isinstance(data, dict) and key in data else 0.0)
    if vectors.ndim == 3 and vectors.shape[1] == 1:
        vectors = vectors[:, 0]
    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise PthError(
            f"{path}: {key!r} has shape {list(vectors.shape)}; expected a vector for each of "
            f"{len(ids)} samples"
        )
    if len(set(ids)) < len(ids):
        raise ValueError(f"of {len(ids)} sample ids some are the same; expected distinct ones")
    source = {"method": "imported", "file": Path(path).name, "key": key}
    source |= {"model": model} if model else {}
    return SampleVectors(vectors.astype(np.float32), tuple(ids), site, source, where)


def import_l2s(
    path: str | os.PathLike[str],
    site: str,
    *,
    context_site: str | None = None,
    where: Any = "all",
    model: str | None = None,
) -> L2S:
    """Reads a network of XL-VLMs (L2S); executes nothing in the file.

    Runs on the host and cannot be traced.

    Args:
        path: the .pt file.
        site, where, model: as for `import_vector`.
        context_site: the site whose state of the last prompt token is the input; None for `site`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or holds no network of two layers.
    """
    data = read_pth(path, opaque=True)
    data = network_in(data)
    if data is None:
        raise PthError(f"{path}: has no L2S network; expected {', '.join(_NETWORK)}")
    into, bias, out = (np.asarray(data[name]).astype(np.float32) for name in _NETWORK)
    final = np.asarray(data.get("decoder.bias", np.zeros(len(out)))).astype(np.float32)
    if into.shape[:1] != bias.shape or out.shape != (*final.shape, *bias.shape):
        raise PthError(
            f"{path}: its layers have shapes {into.shape}, {bias.shape} and {out.shape}; expected "
            "[H, D], [H] and [D, H]"
        )
    # torch keeps (out, in), Flax (in, out).
    params = {
        "hidden": {"kernel": into.T.copy(), "bias": bias},
        "shift": {"kernel": out.T.copy(), "bias": final},
    }
    width = into.shape[1]
    source = {"method": "imported", "file": Path(path).name} | ({"model": model} if model else {})
    return L2S(
        params,
        mean=np.zeros(width, np.float32),
        deviation=np.ones(width, np.float32),
        scale=1.0,
        context_site=context_site or site,
        site=site,
        source=source,
        where=where,
    )


def network_in(data: Any) -> Mapping[str, Any] | None:
    """Returns the tensors of an L2S network in the content of a file; None if it has none."""
    if isinstance(data, dict) and isinstance(data.get("steering_model"), dict):
        data = data["steering_model"]
    return data if isinstance(data, dict) and all(name in data for name in _NETWORK) else None


def export_vectors(
    vectors: Sequence[SteeringVector] | SteeringVector, path: str | os.PathLike[str]
) -> None:
    """Writes vectors as a file that XL-VLMs and torch.load can read.

    Runs on the host and cannot be traced.

    Args:
        vectors: one vector, or the fine vectors of a clustering.
        path: the file to write.

    Raises:
        ValueError: there are none, several vectors are not all fine vectors, or two lead from the
            same concept to the same other one, as those of several sites do.
    """
    if isinstance(vectors, SteeringVector):
        vectors = [vectors]
    if not len(vectors):
        raise ValueError("there are no vectors to export; expected one or more")
    if len(vectors) == 1:
        write_pth(path, {KEY: _float32(vectors[0])})
        return
    named: dict[str, Any] = {}
    for vector in vectors:
        pair = vector.source.get("from"), vector.source.get("to")
        if None in pair:
            raise ValueError(
                "several vectors of which not all are fine ones have no names in XL-VLMs' files; "
                "export each by itself"
            )
        name = f"{KEY}_concept_{pair[1]}_to_{pair[0]}"
        if name in named:
            raise ValueError(
                f"two vectors lead from concept {pair[0]} to {pair[1]}, and would have one name in "
                "XL-VLMs' files; export those of each site and clustering by themselves"
            )
        named[name] = _float32(vector)
    write_pth(path, named | _between(named))


def _between(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the array of all pairs, if each pair of concepts is there."""
    pairs = {tuple(map(int, name.split("_concept_")[1].split("_to_"))): name for name in named}
    K = 1 + max(max(pair) for pair in pairs)
    if len(pairs) < K * (K - 1):
        return {}
    width = len(next(iter(named.values())))
    between = np.zeros((K, K, width), np.float32)
    for pair, name in pairs.items():
        between[pair] = named[name]
    mean = between.mean((0, 1))
    return {KEY: between, f"{KEY}_mean_of_directions": mean}


def _float32(vector: SteeringVector) -> np.ndarray:
    return np.asarray(vector.vector, np.float32)
