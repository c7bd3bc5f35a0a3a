"""Files of the library overcomplete: a model or its state dict, as torch.save writes them.

    h = x W_e^T + b_e                 of a linear encoder, with a BatchNorm folded in if it has one
    D = n(W) exp(m)                   n the normalisation; of archetypal ones
        (A C + R) exp(m)              A with rows that sum to one, R with rows no longer than delta

with codes by class: relu(h) for SAE, the k largest for TopKSAE, those that reach a threshold for
BatchTopKSAE and JumpSAE; MpSAE takes k atoms of largest product one after the other, whatever its
sign. There is no b_dec. overcomplete normalises D when a model is put into eval mode, so D is
normalised here; that of a model that was saved in eval mode is used as it is.

A file of a whole model says all that is needed. A state dict has no class and no k: those are in a
JSON file of the same name beside it, by the names of the class's arguments,

    {"class": "TopKSAE", "top_k": 32}

with "k" for MpSAE, "running_threshold" for BatchTopKSAE, and where they are not the default
"normalization" ("l2", "max_l2", "l1", "max_l1", "identity") and "delta" (1.0).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ports import checkpoint
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.features.pth.torch_globals import StoredArray
from xlvlm_jax.features.pth.unpickle import Opaque, StoredTensor
from xlvlm_jax.sae.dictionary import Dictionary, Settings
from xlvlm_jax.sae.saelens import of_tensors

SUFFIXES = (".pt", ".pth")
MODULE = "overcomplete.sae"
EPS = 1e-8  # of its normalisations
NORM_EPS = 1e-5  # of BatchNorm1d
DEEPEST = 4  # modules inside each other
Arrays = dict[str, np.ndarray]


class _Model(NamedTuple):
    """A model or a state dict, in one form."""

    name: str  # of the class
    arrays: Arrays  # by torch's dotted names
    options: dict[str, Any]  # by the names of the class's arguments
    dictionary: np.ndarray | None  # D where it is known


def read(file: Path, dtype: str | None = None) -> Dictionary:
    """Reads a file of overcomplete.

    Args:
        file: a whole model, or a state dict with a JSON file of the same name.
        dtype: dtype of the parameters and the computation; None for float32.

    Raises:
        FileNotFoundError: the JSON file is missing.
        ValueError: the class or its encoder cannot be read, or tensors are missing or do not fit.
    """
    stored: Any = read_pth(file, opaque=True)
    model = _whole(stored, file) if isinstance(stored, Opaque) else _state_dict(stored, file)
    if model.name not in _CLASSES:
        raise ValueError(
            f"{file} is a {model.name} of overcomplete; expected one of {', '.join(_CLASSES)}"
        )
    architecture, convert = _CLASSES[model.name]
    try:
        params, constants = convert(model)
        decoder = _dictionary_of(model) if model.dictionary is None else model.dictionary
        if architecture != "matching_pursuit":
            params |= _encoder(model.arrays, decoder)
    except KeyError as error:
        raise ValueError(
            f"{file} has no {error}, which a {model.name} needs; where the file is a state dict, "
            f"{file.with_suffix('.json').name} says its class and the arguments that it was made "
            "with"
        ) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    params |= {"W_dec": decoder, "b_dec": np.zeros(decoder.shape[-1:], np.float32)}
    if architecture in ("jumprelu", "batchtopk"):
        # Codes that equal the threshold are active there, and not here.
        cut = np.broadcast_to(np.float32(params["threshold"]), decoder.shape[:1])
        params["threshold"] = np.nextafter(cut, np.float32(-np.inf))
    settings = Settings(architecture, apply_b_dec_to_input=False, **constants)
    details = {"class": model.name, **model.options}
    return of_tensors(params, settings, file, site=None, details=details, dtype=dtype or "float32")


def _state_dict(stored: Any, file: Path) -> _Model:
    if not isinstance(stored, dict) or not any(
        str(name).startswith("dictionary.") for name in stored
    ):
        raise ValueError(
            f"{file} is neither a model of overcomplete nor its state dict; expected tensors named "
            "dictionary.*"
        )
    beside = file.with_suffix(".json")
    if not beside.is_file():
        raise FileNotFoundError(
            f"{file} is a state dict, which does not say how many features are active; write "
            f'{beside.name} beside it, such as {{"class": "TopKSAE", "top_k": 32}}'
        )
    options = dict(checkpoint.read_json(beside))
    arrays = {str(name): np.asarray(value) for name, value in stored.items()}
    return _Model(str(options.pop("class", None)), arrays, options, None)


def _whole(stored: Opaque, file: Path) -> _Model:
    module, _, name = stored.name.rpartition(".")
    state = _state(stored)
    if not module.startswith(MODULE) or not state:
        raise ValueError(f"{file} is a {stored.name[:80]}; expected a model of {MODULE}")
    arrays: Arrays = {}
    _collect(stored, "", arrays, set(), DEEPEST)
    options = {key: state[key] for key in ("top_k", "k") if isinstance(state.get(key), int)}
    threshold = state.get("running_threshold")
    if isinstance(threshold, StoredTensor | StoredArray):
        options["running_threshold"] = float(np.asarray(threshold))
    held = _state(_part(state, "_modules").get("dictionary"))
    if isinstance(held.get("delta"), int | float):
        options["delta"] = float(held["delta"])
    normalise = held.get("normalization")
    if isinstance(normalise, Opaque):
        options["normalization"] = normalise.name.rpartition(".")[2].removeprefix("normalize_")
    fused = held.get("_fused_dictionary") if held.get("training") is False else None
    known = isinstance(fused, StoredTensor)
    return _Model(name, arrays, options, np.asarray(fused, np.float32) if known else None)


def _collect(module: Any, prefix: str, arrays: Arrays, seen: set[int], depth: int) -> None:
    """Adds the tensors of a module and of those inside it, each once, by torch's dotted names."""
    state = _state(module)
    if not depth or id(module) in seen:
        return
    seen.add(id(module))
    for part in ("_parameters", "_buffers"):
        for name, value in _part(state, part).items():
            if isinstance(value, StoredTensor | StoredArray):
                arrays[f"{prefix}{name}"] = np.asarray(value)
    for name, inner in _part(state, "_modules").items():
        if name != "tied_to":  # the dictionary once more
            _collect(inner, f"{prefix}{name}.", arrays, seen, depth - 1)


def _state(module: Any) -> Mapping[str, Any]:
    """Returns the attributes of a stored module; none of what is no module."""
    state = module.state if isinstance(module, Opaque) else None
    return state if isinstance(state, Mapping) else {}


def _part(state: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = state.get(name)
    return part if isinstance(part, Mapping) else {}


def _encoder(arrays: Arrays, decoder: np.ndarray) -> Arrays:
    """Returns W_enc and b_enc of a linear encoder, or of one that is tied to the dictionary."""
    names = {name.removeprefix("encoder.") for name in arrays if name.startswith("encoder.")}
    norm = {f"final_block.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    linear = {"final_block.0.weight", "final_block.0.bias"}
    known = linear | norm | {"final_block.1.num_batches_tracked", "weight", "bias"}
    if names - known or (names & norm and not norm <= names):
        raise ValueError(
            "its encoder is not linear (it has "
            f"{', '.join(sorted(names - known or names & norm))}); expected the encoder 'linear', "
            "'mlp_bn_1' or a tied one"
        )
    K = len(decoder)
    if not names & linear:
        weight = arrays.get("encoder.weight", decoder)
        return {"W_enc": weight.T, "b_enc": arrays.get("encoder.bias", np.zeros(K, np.float32))}
    weight, bias = (arrays[f"encoder.final_block.0.{name}"] for name in ("weight", "bias"))
    if norm <= names:
        gain, shift, mean, var = (
            arrays[f"encoder.final_block.1.{name}"].astype(np.float64)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / np.sqrt(var + NORM_EPS)
        weight, bias = weight * scale[:, None], (bias - mean) * scale + shift
    return {"W_enc": weight.T, "b_enc": bias}


def _dictionary_of(model: _Model) -> np.ndarray:
    """Returns D, normalised as eval mode does."""
    arrays = {
        name.removeprefix("dictionary."): value.astype(np.float64)
        for name, value in model.arrays.items()
        if name.startswith("dictionary.")
    }
    if "C" in arrays:
        A = np.maximum(arrays["W"], 0)
        A = A / (A.sum(axis=1, keepdims=True) + EPS)
        lengths = np.linalg.norm(arrays["Relax"], axis=1, keepdims=True)
        delta = float(model.options.get("delta", 1.0))
        short = np.minimum(delta / np.where(lengths > 0, lengths, 1), 1)
        D = A @ arrays["C"] + arrays["Relax"] * short
    else:
        name = model.options.get("normalization", "l2")
        if name not in _NORMALISED:
            raise ValueError(f"normalization is {name!r}; expected one of {', '.join(_NORMALISED)}")
        D = arrays["_weights"]
        D = D / _NORMALISED[name](D)
    return (D * np.exp(arrays["multiplier"])).astype(np.float32)


def _lengths(order: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda D: np.linalg.norm(D, order, axis=1, keepdims=True)


_NORMALISED: dict[str, Callable[[np.ndarray], Any]] = {
    "l2": lambda D: _lengths(2)(D) + EPS,
    "max_l2": lambda D: _lengths(2)(D).max(),
    "l1": lambda D: _lengths(1)(D) + EPS,
    "max_l1": lambda D: _lengths(1)(D).max(),
    "identity": lambda D: 1.0,
}


def _relu(model: _Model) -> tuple[Arrays, dict[str, Any]]:
    return {}, {}


def _topk(model: _Model) -> tuple[Arrays, dict[str, Any]]:
    return {}, {"k": int(model.options["top_k"])}


def _batchtopk(model: _Model) -> tuple[Arrays, dict[str, Any]]:
    return {"threshold": np.asarray(model.options["running_threshold"], np.float32)}, {}


def _jump(model: _Model) -> tuple[Arrays, dict[str, Any]]:
    return {"threshold": np.exp(model.arrays["thresholds"].astype(np.float32))}, {}


def _pursuit(model: _Model) -> tuple[Arrays, dict[str, Any]]:
    if any(name.startswith("encoder.") for name in model.arrays):
        raise ValueError("it encodes before the pursuit; expected the encoder 'identity'")
    constants = {"residual_threshold": 0.0, "stop_on_duplicate_support": False, "signed": True}
    return {}, {"max_iterations": int(model.options["k"]), **constants}


_CLASSES: dict[str, tuple[str, Callable[[_Model], tuple[Arrays, dict[str, Any]]]]] = {
    "SAE": ("standard", _relu),
    "TopKSAE": ("topk", _topk),
    "RATopKSAE": ("topk", _topk),
    "BatchTopKSAE": ("batchtopk", _batchtopk),
    "JumpSAE": ("jumprelu", _jump),
    "RAJumpSAE": ("jumprelu", _jump),
    "MpSAE": ("matching_pursuit", _pursuit),
}
