"""Folders of the library dictionary_learning: ae.pt, a torch dict, beside config.json.

`dict_class` of the configuration tells which class encodes. Matrices of nn.Linear are stored
[out, in], so the encoder's is transposed here and the decoder's too. A threshold below zero, which
the class has before training sets one, lets every positive value through. Its standard class scales
features to decoder rows of length one when it loads a file, and so does this reader.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ports import checkpoint
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.sae.dictionary import Dictionary, Settings
from xlvlm_jax.sae.saelens import of_tensors

WEIGHTS, CONFIG = "ae.pt", "config.json"
Arrays = dict[str, np.ndarray]


def read(directory: Path, dtype: str | None = None) -> Dictionary:
    """Reads a folder of dictionary_learning.

    Args:
        directory: holds ae.pt and config.json.
        dtype: dtype of the parameters and the computation; None for float32.

    Raises:
        ValueError: the class is unknown, or the tensors are not those of the class.
    """
    values = checkpoint.read_json(directory / CONFIG).get("trainer") or {}
    name = values.get("dict_class")
    if name not in _CLASSES:
        raise ValueError(
            f"{directory / CONFIG}: dict_class is {name!r}; expected one of {', '.join(_CLASSES)}"
        )
    stored: Any = read_pth(directory / WEIGHTS)
    if not isinstance(stored, dict):
        raise ValueError(f"{directory / WEIGHTS} is not a state dict; expected named tensors")
    arrays = {key: np.asarray(value) for key, value in stored.items()}
    architecture, convert = _CLASSES[name]
    try:
        params = convert(arrays)
    except KeyError as error:
        raise ValueError(
            f"{directory / WEIGHTS} has no {error}; expected the tensors of {name}"
        ) from None
    layer, k = values.get("layer"), arrays.get("k")
    # Of MLPs and attention too the configuration says the layer.
    of_layer = str(values.get("submodule_name") or "resid_post").startswith("resid_post")
    settings = Settings(
        architecture,
        # The class's own default, which no file stores.
        apply_b_dec_to_input=name != "JumpReluAutoEncoder",
        k=int(k) if architecture == "topk" and k is not None else None,
    )
    return of_tensors(
        params,
        settings,
        directory,
        site=f"model.layers.{layer}" if isinstance(layer, int) and of_layer else None,
        details=values,
        dtype=dtype or "float32",
    )


def _linear(arrays: Arrays, bias: str) -> Arrays:
    return {
        "W_enc": arrays["encoder.weight"].T,
        "W_dec": arrays["decoder.weight"].T,
        "b_dec": arrays[bias],
    }


def _standard(arrays: Arrays) -> Arrays:
    params = _linear(arrays, "bias")
    norms = np.linalg.norm(params["W_dec"], axis=1)
    norms = np.where(norms > 0, norms, 1)
    return params | {
        "W_enc": params["W_enc"] * norms,
        "W_dec": params["W_dec"] / norms[:, None],
        "b_enc": arrays["encoder.bias"] * norms,
    }


def _topk(arrays: Arrays) -> Arrays:
    return _linear(arrays, "b_dec") | {"b_enc": arrays["encoder.bias"]}


def _batchtopk(arrays: Arrays) -> Arrays:
    return _topk(arrays) | _threshold(arrays, arrays["encoder.bias"])


def _named(arrays: Arrays) -> Arrays:
    params = {name: arrays[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return params | _threshold(arrays, params["b_enc"])


def _threshold(arrays: Arrays, like: np.ndarray) -> Arrays:
    return {"threshold": np.broadcast_to(arrays["threshold"], like.shape).astype(np.float32)}


def _gated(arrays: Arrays) -> Arrays:
    return _linear(arrays, "decoder_bias") | {
        "b_gate": arrays["gate_bias"],
        "b_mag": arrays["mag_bias"],
        "r_mag": arrays["r_mag"],
    }


_CLASSES: dict[str, tuple[str, Callable[[Arrays], Arrays]]] = {
    "AutoEncoder": ("standard", _standard),
    "AutoEncoderTopK": ("topk", _topk),
    "BatchTopKSAE": ("batchtopk", _batchtopk),
    "MatryoshkaBatchTopKSAE": ("matryoshka_batchtopk", _named),
    "JumpReluAutoEncoder": ("jumprelu", _named),
    "GatedAutoEncoder": ("gated", _gated),
}
