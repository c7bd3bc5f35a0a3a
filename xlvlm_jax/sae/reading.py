"""Finds out what a path holds, and reads it."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

from xlvlm_jax.sae import dictionary_learning, overcomplete, saelens, scopes
from xlvlm_jax.sae.dictionary import Dictionary
from xlvlm_jax.storage.damaged import reported

_READERS: dict[tuple[str, ...], Callable[[Path, str | None], Dictionary]] = {
    (saelens.CONFIG, saelens.WEIGHTS): saelens.read,
    (scopes.PARAMS,): scopes.read_gemma_2,
    (scopes.OLD_PARAMS,): scopes.read_gemma,
    (dictionary_learning.WEIGHTS, dictionary_learning.CONFIG): dictionary_learning.read,
}


def load(path: str | os.PathLike[str], *, dtype: str | None = None) -> Dictionary:
    """Loads a sparse autoencoder from the files of its trainer.

    Nothing is executed and PyTorch is not needed.

    Args:
        path: a directory of SAELens (cfg.json, sae_weights.safetensors; those that `save` writes
            too), of Gemma Scope 2 (params.safetensors) or the first (params.npz), of
            dictionary_learning (ae.pt, config.json), a file of Qwen-Scope (layerN.sae.pt) in its
            folder, or one of overcomplete (.pt or .pth): a model, or a state dict with its class
            and k in a JSON file of the same name, such as {"class": "TopKSAE", "top_k": 32}.
        dtype: "float32", "bfloat16", "float16" or, with jax_enable_x64, "float64"; None for the
            dtype that cfg.json names, as in SAELens (float32 for its float64 without
            jax_enable_x64), and float32 for the others.

    Returns:
        The dictionary. How many of its features are active on your states can differ from the k in
        its file: look at `(dictionary.encode(states) != 0).sum(-1)`.

    Raises:
        FileNotFoundError: the path does not exist, or holds none of these files.
        ValueError: a value is unknown, or the tensors do not fit together or are not finite.

    Examples:
        >>> import numpy as np, tempfile
        >>> from xlvlm_jax import sae
        >>> params = {"W_enc": np.eye(2), "W_dec": np.eye(2), "b_enc": [-1, -1], "b_dec": [0, 0]}
        >>> dictionary = sae.Dictionary.of(params, sae.Settings("standard"))
        >>> sae.save(dictionary, folder := tempfile.mkdtemp())
        >>> sae.load(folder)
        Dictionary(relu-sae: 2 features of width 2)
    """
    if dtype == "float64" and not jax.config.values["jax_enable_x64"]:
        raise ValueError("dtype is 'float64', which JAX only computes with jax_enable_x64; set it")
    place = Path(path)
    with reported(place, "sparse autoencoder", "fetch it again, or correct its configuration"):
        return _read(place, dtype)


def _read(place: Path, dtype: str | None) -> Dictionary:
    if place.is_file() and scopes.is_qwen(place):
        return scopes.read_qwen(place, dtype)
    if place.is_file() and place.suffix in overcomplete.SUFFIXES:
        return overcomplete.read(place, dtype)
    if place.is_dir():
        for names, read in _READERS.items():
            if all((place / name).is_file() for name in names):
                return read(place, dtype)
    expected = (
        f"{saelens.CONFIG} and {saelens.WEIGHTS} (SAELens), {scopes.PARAMS} or {scopes.OLD_PARAMS} "
        f"(Gemma Scope), {dictionary_learning.WEIGHTS} and {dictionary_learning.CONFIG} "
        "(dictionary_learning), or a file layerN.sae.pt (Qwen-Scope), .pt or .pth (overcomplete)"
    )
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist; expected a folder with {expected}")
    raise FileNotFoundError(f"{place} holds no sparse autoencoder; expected {expected}")
