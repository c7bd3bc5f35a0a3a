"""The official dictionaries of Gemma and Qwen, in the files that they are published as.

    Gemma Scope 2   SITE/layer_N_width_W_l0_S/params.safetensors beside config.json
    Gemma Scope     RELEASE/layer_N/width_Wk/average_l0_N/params.npz alone; or embedding/...
    Qwen-Scope      SAE-Res-MODEL-WnK-L0_k/layerN.sae.pt, matrices transposed

None of them takes b_dec off its input. The end of the first Gemma Scope's RELEASE, which alone
tells the site, is "res" for the states behind a layer, "att" for the outputs of the heads side by
side, before they are mixed, "mlp" for what the MLP adds, behind its norm, and "transcoders", which
predict that from the MLP's normalised input, without the gains of that norm (Lieberum et al. 2024,
arXiv 2408.05147).
"""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ports import checkpoint
from ports.checkpoint import safetensors_io
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.sae.dictionary import Dictionary, Settings
from xlvlm_jax.sae.saelens import of_tensors

PARAMS, OLD_PARAMS, CONFIG = "params.safetensors", "params.npz", "config.json"
_TRANSCODERS = ("transcoder", "transcoder_all", "affine_transcoder")
_GEMMA_SITE = re.compile(r"embedding|layer_\d+")
# A clone's folder, or that of the Hub's cache: models--google--gemma-scope-2b-pt-res.
_GEMMA_RELEASE = re.compile(r"(?:models--.+--)?gemma-scope-.+-(res|att|mlp|transcoders)")
_GEMMA_SITES = {
    "res": "model.layers.{}",
    "att": "model.layers.{}.self_attn.o_proj.input",
    "mlp": "model.layers.{}.post_feedforward_layernorm",
    # No module puts it out: TransformerLens' name, as in SAELens.
    "transcoders": "blocks.{}.ln2.hook_normalized",
}
_QWEN_FILE = re.compile(r"layer(\d+)\.sae\.pt$")
_QWEN_FOLDER = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d+)")


def is_qwen(path: Path) -> bool:
    """Returns whether a file is named as one of Qwen-Scope's."""
    return _QWEN_FILE.search(path.name) is not None


def read_gemma_2(directory: Path, dtype: str | None = None) -> Dictionary:
    """Reads a directory of Gemma Scope 2: a dictionary or an (affine) transcoder.

    Raises:
        ValueError: the tensors or the configuration are not those of Gemma Scope 2.
    """
    file = directory / CONFIG
    values = checkpoint.read_json(file) if file.is_file() else {}
    if values.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(
            f"{file}: architecture is {values['architecture']!r}; expected 'jump_relu'"
        )
    stored = safetensors_io.open_file(directory / PARAMS)
    params = {_upper(name): np.asarray(tensor.read()) for name, tensor in stored.items()}
    skip = params.pop("affine_skip_connection", None)
    if skip is not None:
        params["W_skip"] = skip.T  # stored [D, out]
    architecture = "jumprelu"
    # SITE tells it where the configuration does not.
    kind = values.get("type") or directory.absolute().parent.name
    if kind in _TRANSCODERS or skip is not None:
        architecture = "jumprelu_transcoder" if skip is None else "jumprelu_skip_transcoder"
    return of_tensors(
        params,
        Settings(architecture, apply_b_dec_to_input=False),
        directory,
        site=values.get("hf_hook_point_in"),
        details=values,
        dtype=dtype or "float32",
    )


def read_gemma(directory: Path, dtype: str | None = None) -> Dictionary:
    """Reads a directory of the first Gemma Scope; without its release's name, as one of "res".

    Raises:
        ValueError: the file is damaged, or the arrays are not those of Gemma Scope.
    """
    file = directory / OLD_PARAMS
    try:
        with np.load(file, allow_pickle=False) as arrays:
            params = {_upper(name): arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{file} is not a file of arrays ({error}); fetch it again") from None
    parts = directory.absolute().parts
    named = [part for part in parts[-3:] if _GEMMA_SITE.fullmatch(part)]
    site = named[-1] if named else ""
    releases = list(filter(None, map(_GEMMA_RELEASE.fullmatch, parts)))
    kind = releases[-1][1] if releases else "res"
    layer = site.removeprefix("layer_") if site.startswith("layer_") else None
    details: dict[str, Any] = {}
    if kind == "transcoders" and layer is not None:
        details = {"metadata": {"hook_name_out": _GEMMA_SITES["mlp"].format(layer)}}
    if site == "embedding" and {"W_enc", "W_dec", "b_dec"} <= params.keys():
        # Learnt on embeddings before Gemma scales them by the root of the width. SAELens scales the
        # matrices alone, which leaves b_dec too small for the scaled states.
        scale = np.float32(math.sqrt(params["W_enc"].shape[0]))
        params["W_enc"] = params["W_enc"] / scale
        params |= {name: params[name] * scale for name in ("W_dec", "b_dec")}
    return of_tensors(
        params,
        Settings(
            "jumprelu_transcoder" if kind == "transcoders" else "jumprelu",
            apply_b_dec_to_input=False,
        ),
        directory,
        site=None if layer is None else _GEMMA_SITES[kind].format(layer),
        details=details,
        dtype=dtype or "float32",
    )


def read_qwen(file: Path, dtype: str | None = None) -> Dictionary:
    """Reads a file of Qwen-Scope; its folder's name gives k.

    Raises:
        ValueError: the folder's name has no k, or the tensors are not those of Qwen-Scope.
    """
    found = _QWEN_FOLDER.search(file.resolve().parent.name)
    if found is None:
        raise ValueError(
            f"{file} is in a folder named {file.resolve().parent.name!r}; expected the name of its "
            "repository, SAE-Res-MODEL-WnK-L0_k, which alone says k"
        )
    stored: Any = read_pth(file)
    if not isinstance(stored, dict) or not {"W_enc", "W_dec"} <= set(stored):
        raise ValueError(f"{file} has no W_enc and W_dec; expected a file of Qwen-Scope")
    params = {name: np.asarray(value) for name, value in stored.items()}
    params |= {name: params[name].T for name in ("W_enc", "W_dec")}
    layer = _QWEN_FILE.search(file.name)
    return of_tensors(
        params,
        Settings("topk", apply_b_dec_to_input=False, k=int(found[2])),
        file,
        site=None if layer is None else f"model.layers.{layer[1]}",
        details={"model_name": found[1]},
        dtype=dtype or "float32",
    )


def _upper(name: str) -> str:
    return "W_" + name.removeprefix("w_") if name.startswith("w_") else name
