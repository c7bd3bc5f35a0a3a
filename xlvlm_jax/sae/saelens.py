"""SAELens directories: cfg.json and sae_weights.safetensors, of every age.

What an option does when an SAE runs is in `dictionary`; here is what the files mean. Missing keys
have SAELens' defaults. Files from before version 6 have no architecture in their own terms: topk is
an activation function there.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports import checkpoint
from ports.checkpoint import safetensors_io
from xlvlm_jax.sae.dictionary import FOLDED, METHODS, Details, Dictionary, Settings
from xlvlm_jax.storage import atomic

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
DTYPES = ("float32", "bfloat16", "float16", "float64")
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# Architectures as trained that SAELens does not run, and as what they are written.
_TRAINED = {
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "batchtopk_transcoder": "jumprelu_transcoder",
    "batchtopk_skip_transcoder": "jumprelu_skip_transcoder",
}
_RESCALING = ("topk", "abstopk")  # codes may be in units of the decoder's norms
VERSION = "6.54.12"  # whose form is written


def read(directory: Path, dtype: str | None = None) -> Dictionary:
    """Reads a SAELens directory.

    Args:
        directory: holds cfg.json and sae_weights.safetensors.
        dtype: dtype of the parameters and the computation; None for that of cfg.json, as in
            SAELens.

    Returns:
        The dictionary.

    Raises:
        ValueError: a value is unknown, or the tensors do not fit the configuration.
    """
    values = checkpoint.read_json(directory / CONFIG)
    if "dtype" not in values:
        raise ValueError(f"{directory / CONFIG} has no dtype; add the one of the weights")
    values = _modern(values, directory / CONFIG)
    stored = safetensors_io.open_file(directory / WEIGHTS)
    params = {name: np.asarray(tensor.read()) for name, tensor in stored.items()}
    _drop_scaling(params, directory)
    settings = _settings(values, params, directory / CONFIG)
    site = values.get("hook_name") or (values.get("metadata") or {}).get("hook_name")
    return of_tensors(
        params, settings, directory, site=site, details=values, dtype=dtype or values["dtype"]
    )


def of_tensors(
    params: Mapping[str, Any],
    settings: Settings,
    where: Path,
    *,
    site: str | None,
    details: Mapping[str, Any],
    dtype: str,
) -> Dictionary:
    """Makes a dictionary of a file's tensors; errors name the file.

    Raises:
        ValueError: as for `Dictionary.of`, or the dtype is unknown.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{where}: dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if name == "float64" and not jax.config.values["jax_enable_x64"]:
        name = "float32"  # as JAX does, with a warning for each array
    try:
        return Dictionary.of(params, settings, site, Details(dict(details)), jnp.dtype(name))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _modern(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Returns the values of a configuration in the form of version 6."""
    version = values.get("sae_lens_version") or (values.get("metadata") or {}).get(
        "sae_lens_version"
    )
    if version and _major(str(version)) >= 6:
        if "architecture" not in values:
            raise ValueError(f"{file} has no architecture; expected one of {', '.join(METHODS)}")
        return values
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    values.setdefault("architecture", "standard")
    k = (values.get("activation_fn_kwargs") or {}).get("k")
    if values.get("activation_fn") == "topk" and k is not None:
        values |= {"architecture": "topk", "k": k}
    normaliser = values.get("normalize_activations")
    if not normaliser or normaliser is True:
        values["normalize_activations"] = "expected_average_only_in" if normaliser else "none"
    if "hook_z" in (values.get("hook_name") or ""):
        values.setdefault("reshape_activations", "hook_z")
    return values


def _major(version: str) -> int:
    head = version.split(".", 1)[0]
    return int(head) if head.isdigit() else 0


def _drop_scaling(params: dict[str, np.ndarray], directory: Path) -> None:
    """Drops a scaling factor of ones, which old versions stored; refuses any other."""
    factor = params.pop("scaling_factor", None)
    if factor is not None and not np.allclose(factor.astype(np.float32), 1):
        raise ValueError(
            f"{directory / WEIGHTS} has a scaling_factor that is not one; fold it into the decoder "
            "with the SAELens version that wrote it"
        )


def _settings(values: Mapping[str, Any], params: dict[str, np.ndarray], file: Path) -> Settings:
    """Returns the constants; completes the threshold of what was stored as trained."""
    architecture = values["architecture"]
    if architecture not in METHODS:
        raise ValueError(
            f"{file}: architecture is {architecture!r}; expected one of {', '.join(METHODS)}"
        )

    def flag(name: str, default: bool) -> bool:
        return _typed(values, name, bool, default, file)

    def whole(name: str, default: int) -> int:
        return _typed(values, name, int, default, file)

    settings = Settings(
        architecture,
        apply_b_dec_to_input=flag("apply_b_dec_to_input", True),
        rescale_acts_by_decoder_norm=flag("rescale_acts_by_decoder_norm", False),
        hook_z=values.get("reshape_activations", "none") == "hook_z",
    )
    if settings.is_transcoder and settings.apply_b_dec_to_input:
        raise ValueError(
            f"{file}: apply_b_dec_to_input is true, but a transcoder's b_dec has the width of its "
            "output; expected false"
        )
    normaliser = values.get("normalize_activations") or "none"
    if normaliser not in FOLDED:
        settings = dataclasses.replace(settings, normalize_activations=normaliser)
    if settings.is_crosscoder:
        settings = dataclasses.replace(
            settings,
            widths=values.get("widths") or (),
            scales=values.get("scales") or (),
        )
    if architecture.startswith(("topk", "abstopk")):
        return dataclasses.replace(settings, k=whole("k", 100))
    if architecture in _TRAINED:
        scalar = params.pop("topk_threshold", None)
        if scalar is not None and "threshold" not in params and "W_dec" in params:
            params["threshold"] = np.full(len(params["W_dec"]), float(scalar), np.float32)
        # Its default there, where it is false elsewhere.
        rescale = flag("rescale_acts_by_decoder_norm", True)
        return dataclasses.replace(settings, rescale_acts_by_decoder_norm=rescale)
    settings = dataclasses.replace(settings, rescale_acts_by_decoder_norm=False)
    if architecture == "matching_pursuit":
        limit = values.get("max_iterations")
        limit = None if limit is None else whole("max_iterations", 0)
        return dataclasses.replace(
            settings,
            residual_threshold=float(values.get("residual_threshold", 1e-2)),
            max_iterations=limit,
            stop_on_duplicate_support=flag("stop_on_duplicate_support", True),
            signed=flag("signed", False),
        )
    if architecture == "temporal":
        k = values.get("kval_topk") if values.get("sae_diff_type", "topk") == "topk" else None
        return dataclasses.replace(
            settings,
            k=None if k is None else whole("kval_topk", 0),
            num_heads=whole("n_heads", 8),
            tied_weights=flag("tied_weights", True),
            scale=float(values.get("activation_normalization_factor", 1.0)),
        )
    return settings


def _typed(values: Mapping[str, Any], name: str, kind: type, default: Any, file: Path) -> Any:
    """Returns a value of a configuration, or the default if it is missing.

    Raises:
        ValueError: it is of another type, such as "false", which would count as true.
    """
    value = values.get(name, default)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        expected = "true or false" if kind is bool else "a whole number"
        raise ValueError(f"{file}: {name} is {value!r:.40}; expected {expected}")
    return value


def save(dictionary: Dictionary, directory: str | Path) -> None:
    """Writes a dictionary as a SAELens directory, which SAELens and `load` read.

    A dictionary with one threshold for all is written as jumprelu, which SAELens runs; what it was
    trained as is in `metadata`. Crosscoders and topk transcoders are written in the same form, but
    only `load` reads them: SAELens has none. Codes in units of the decoder's norms are an option of
    topk and abstopk in SAELens; elsewhere the norms are folded into the weights.

    Args:
        dictionary: the dictionary.
        directory: where to; made if it does not exist.
    """
    directory = Path(directory)
    if not dictionary.settings.architecture.startswith(_RESCALING):
        dictionary = dictionary.folded()
    settings, params = dictionary.settings, dict(dictionary.params)
    known = dictionary.details.values.get("metadata") or {}
    metadata = {"sae_lens_version": VERSION, **known}
    if dictionary.site is not None:
        metadata["hook_name"] = dictionary.site
    architecture = settings.architecture
    if architecture in _TRAINED:
        metadata["training_architecture"] = architecture
        architecture = _TRAINED[architecture]
    K, out = params["W_dec"].shape
    values: dict[str, Any] = {
        "architecture": architecture,
        "d_in": dictionary.width,
        "d_sae": K,
        "dtype": str(params["W_dec"].dtype),
        "device": "cpu",
        "apply_b_dec_to_input": settings.apply_b_dec_to_input and not settings.is_transcoder,
        "normalize_activations": settings.normalize_activations,
        "reshape_activations": "hook_z" if settings.hook_z else "none",
        "metadata": metadata,
    }
    if settings.is_transcoder:
        values["d_out"] = out
    if settings.is_crosscoder:
        values |= {"widths": list(settings.widths), "scales": list(settings.scales)}
    if architecture.startswith(_RESCALING):
        values |= {
            "k": settings.k,
            "rescale_acts_by_decoder_norm": settings.rescale_acts_by_decoder_norm,
        }
    if architecture == "matching_pursuit":
        values |= {
            name: getattr(settings, name)
            for name in ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
        }
        if settings.signed:
            values["signed"] = True  # SAELens ignores it, as it does all keys that it lacks
    if architecture == "temporal":
        layers = [name for name in params if name.endswith(".k_ctx.weight")]
        values |= {
            "n_heads": settings.num_heads,
            "n_attn_layers": len(layers),
            "bottleneck_factor": K // params[layers[0]].shape[0],
            "sae_diff_type": "relu" if settings.k is None else "topk",
            "kval_topk": settings.k,
            "tied_weights": settings.tied_weights,
            "activation_normalization_factor": settings.scale,
        }
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(value) for name, value in params.items()}
    safetensors_io.write_file(directory / WEIGHTS, arrays)
    atomic.write(directory / CONFIG, json.dumps(values, indent=1) + "\n")
