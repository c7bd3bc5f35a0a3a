"""Reads and writes adapters in the format of PEFT (huggingface/peft).

    adapter_config.json         rank, scale, target modules
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [R, I], lora_B.weight [O, R]

Supported is LoRA with its options for rank and scale, on linear layers, patch embeddings
(convolutions) and embeddings, plus modules and embeddings that are saved whole. Any other option is
refused by name: ignoring it would give a different model.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ports.checkpoint import safetensors_io
from ports.checkpoint.config import read_json
from ports.checkpoint.params import stored_shapes, to_kernel
from ports.intervene import lora
from ports.names import Rename, module_name, tensor_name

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXPECTED = f"{CONFIG} and {WEIGHTS}"
_PREFIX = "base_model.model."
# lora_A.weight for linear layers and convolutions, lora_embedding_A for embeddings.
_FACTOR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")

# Fields that `read` applies, and fields that only describe initialisation, training or the modules
# that PEFT should wrap (here this follows from the tensors). Any other field must be empty.
_READ = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "peft_type",
    "modules_to_save",
)
_HARMLESS = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",  # PEFT sets it to false for linear layers, the only kind in the ports
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
# Initialisations that leave the base model unchanged; the others (PiSSA, OLoRA ...) change it.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def read(
    directory: str | Path,
    params: Any,
    canonical_name: Rename,
    *,
    architecture: str | None = None,
    tied: Collection[str] = (),
) -> lora.Adapter:
    """Reads a LoRA adapter written by PEFT or `write`.

    Args:
        directory: a directory with adapter_config.json and adapter_model.safetensors.
        params: the model's tree of (abstract) parameters.
        canonical_name: the port's function: name in any known checkpoint -> name in the port.
        architecture: the model's class in PyTorch ("LlavaForConditionalGeneration"); adapters for
            another class are refused.
        tied: sites of the head and the embedding if they share weights. PEFT adapts only one of
            them, which a tied model can't represent.

    Returns:
        The adapter, with float factors.

    Raises:
        FileNotFoundError: the directory or one of the two files is missing.
        ValueError: a file is damaged, an option is not implemented, or the adapter is for another
            base model.
    """
    directory = Path(directory)
    try:
        return _read(directory, params, canonical_name, architecture, tied)
    # Configuration values of the wrong type.
    except (TypeError, AttributeError, KeyError, RecursionError, OverflowError, re.error) as error:
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"{directory}: the adapter is damaged ({said}); save it again") from error


def _read(
    directory: Path,
    params: Any,
    canonical_name: Rename,
    architecture: str | None,
    tied: Collection[str],
) -> lora.Adapter:
    values = _read_config(directory)
    base = (values.get("auto_mapping") or {}).get("base_model_class")
    if architecture and base and base != architecture:
        raise ValueError(
            f"{directory}: the adapter is for a {base!r}, but the model is a {architecture}; use "
            "the base model it was trained on"
        )
    ranks = lora.Ranks(
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        use_rslora=bool(values.get("use_rslora")),
    )
    if not (directory / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{directory} has no {WEIGHTS}; expected an adapter that peft saved as safetensors "
            "(.bin files are not supported)"
        )
    stored = safetensors_io.open_file(directory / WEIGHTS)
    parameters = stored_shapes(params)
    known = {*parameters, *(f"{site}.weight" for site in tied)}
    copied = {
        name: own
        for name in stored
        if (own := _replaced(name, values, lambda own: canonical_name(own) in known)) is not None
    }
    for kept in values.get("modules_to_save") or ():
        if not any(_is_within(own, kept) for own in copied.values()):
            raise ValueError(
                f"{directory}: {CONFIG} lists {kept!r} in modules_to_save, but {WEIGHTS} has no "
                "such tensor; the two files do not belong together"
            )
    modules = _modules([name for name in stored if name not in copied], directory)
    shapes = lora.mergeable_layers(params)
    # Of what the port leaves out (SigLIP's pooling head), the factors change nothing either.
    used = [module for module in modules if canonical_name(f"{module}.weight") is not None]
    sites = {module_name(canonical_name, module): module for module in used}
    # Of parts that the port leaves out, and of buffers.
    copied = {name: own for name, own in copied.items() if canonical_name(own) is not None}
    copied = _without_copy_of_tied(stored, copied, canonical_name, tied)
    of_copies = {
        module_name(canonical_name, own.rpartition(".")[0])
        for name, own in copied.items()
        if _is_wrapped(name, values) or canonical_name(own) not in parameters
    }
    for site in tied:
        if site in sites or site in of_copies:
            raise ValueError(
                f"{directory}: the adapter changes {site}, but this model ties its head to its "
                "embedding and peft changes only one of them; use vlm.untied().with_adapter(...)"
            )
    unknown = [module for site, module in sites.items() if site not in shapes]
    if unknown:
        raise ValueError(
            f"{directory}: {len(unknown)} of {len(modules)} modules are not linear layers, patch "
            f"embeddings or embeddings of this model, such as {unknown[0]}; use the base model "
            "that the adapter was trained on"
        )
    factors, scale = {}, {}
    for site, module in sites.items():
        down, up = (_factor(stored, *modules[module][which]) for which in "AB")
        if down.shape[-1] != ranks.rank_of(module):
            raise ValueError(
                f"{directory}: lora_A of {module} has rank {down.shape[-1]}, but {CONFIG} says "
                f"{ranks.rank_of(module)}; the two files do not belong together"
            )
        factors[site], scale[site] = lora.Factors(down, up), ranks.scale_of(module)
    weights = _weights(stored, copied, params, canonical_name, directory)
    adapter = lora.Adapter(factors, scale, weights or None)
    try:
        lora.check(adapter, shapes)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return adapter


def _replaced(
    name: str, values: Mapping[str, Any], is_parameter: Callable[[str], bool]
) -> str | None:
    """Returns the base model's tensor that a tensor of the file replaces, or None.

    Replacements are the modules_to_save, whatever their parameters are called, the base weights
    that peft stores with the factors of an embedding or a head, and embeddings and heads that it
    stores beside the adapter (save_embedding_layers). peft loads any parameter of the model.
    """
    own = name.removeprefix(_PREFIX)
    if name.endswith(".base_layer.weight"):
        return own.replace(".base_layer.", ".")
    if ".lora_" in name:
        return None
    return own if _is_wrapped(name, values) or is_parameter(own) else None


def _is_wrapped(name: str, values: Mapping[str, Any]) -> bool:
    """Returns whether peft keeps a replacement beside the base model's tensor, which another module
    that is tied to it goes on using.
    """
    own, kept = name.removeprefix(_PREFIX), values.get("modules_to_save") or ()
    return own.endswith(".base_layer.weight") or any(_is_within(own, part) for part in kept)


def _without_copy_of_tied(
    stored: Mapping[str, Any],
    copied: Mapping[str, str],
    canonical_name: Rename,
    tied: Collection[str],
) -> dict[str, str]:
    """Returns the replacements without the head's where it is the embedding's, which is tied to it.

    `tied` is (head, embedding), or empty.
    """
    names = {canonical_name(own): name for name, own in copied.items()}
    head, table = (names.get(f"{site}.weight") for site in tied) if tied else (None, None)
    if head is None or table is None or not safetensors_io.equal(stored[head], stored[table]):
        return dict(copied)
    return {name: own for name, own in copied.items() if name != head}


def _is_within(name: str, kept: str) -> bool:
    """Returns whether a tensor is in a module whose name ends in `kept`, as peft defines it."""
    return re.search(rf"{re.escape(kept)}\.", name) is not None


def _weights(
    stored: Mapping[str, Any],
    copied: Mapping[str, str],
    params: Any,
    canonical_name: Rename,
    directory: Path,
) -> dict[str, jnp.ndarray]:
    """Returns {name in the port: the adapter's replacement, laid out like the parameter}."""
    shapes, weights = stored_shapes(params), {}
    kernels = {
        tensor_name(path) for path in traverse_util.flatten_dict(params) if path[-1] == "kernel"
    }
    for name, own in copied.items():
        # No parameter is named "".
        canonical, shape = canonical_name(own) or "", tuple(stored[name].shape)
        if shapes.get(canonical) != shape:
            raise ValueError(
                f"{directory}: {own} has shape {shape}, but this model expects "
                f"{shapes.get(canonical) or 'no such tensor'}; if the vocabulary changed, merge "
                "the adapter with peft's merge_and_unload and load the merged model"
            )
        value = stored[name].read()
        weights[canonical] = to_kernel(value) if canonical in kernels else value
    return weights


def _factor(stored: Mapping[str, Any], name: str, of_embedding: bool) -> jnp.ndarray:
    """Reads a factor in the layout of `lora.Factors`: (R, I) -> (I, R) and (O, R) -> (R, O).

    Convolutions: (R, channels, ...) -> (values per patch, R) and (O, R, 1, ...) -> (R, O).
    """
    value = stored[name].read()
    value = value.T if of_embedding else to_kernel(value)
    return jnp.asarray(value.reshape(-1, value.shape[-1]))


def _read_config(directory: Path) -> dict[str, Any]:
    """Reads adapter_config.json; raises ValueError for an option that is not implemented."""
    file = directory / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{directory} has no {CONFIG}; is it an adapter directory?")
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {values.get('peft_type')!r}; expected 'LORA'")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias is {values['bias']!r}; only 'none' is implemented")
    beginning = values.get("init_lora_weights")
    if beginning not in _PLAIN_BEGINNINGS:
        raise ValueError(
            f"{file}: init_lora_weights is {beginning!r}, which changes the base model; convert "
            "the adapter with peft's path_initial_model_for_weight_conversion"
        )
    others = set(values) - {*_READ, *_HARMLESS, "bias"}
    asked = sorted(repr(name) for name in others if values[name])
    if asked:
        raise ValueError(
            f"{file}: sets {', '.join(asked)}, which is not implemented; merge the adapter with "
            "peft's merge_and_unload and load the merged model"
        )
    rank = values.get("r", 8)
    numbers = [rank, *(values.get("rank_pattern") or {}).values()]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"{file}: ranks are {numbers}; expected whole numbers above 0")
    return values


def _modules(names: Iterable[str], directory: Path) -> dict[str, dict[str, tuple[str, bool]]]:
    """Returns {module name in the file: {"A" or "B": (tensor name, is an embedding's)}}.

    Raises ValueError for tensors that are not factors, or a factor without its counterpart.
    """
    found: dict[str, dict[str, tuple[str, bool]]] = {}
    strange = []
    for name in names:
        match = _FACTOR.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        module, of_embedding, which = match.groups()
        found.setdefault(module, {})[which] = (name, bool(of_embedding))
    if strange:
        raise ValueError(
            f"{directory}: {len(strange)} tensors are not LoRA factors, such as {strange[0]}; "
            "only LoRA on linear layers, patch embeddings and embeddings is implemented"
        )
    half = [module for module, which in found.items() if set(which) != {"A", "B"}]
    if half or not found:
        what = f"only one of the two factors of {half[0]}" if half else "no factors"
        raise ValueError(f"{directory}: {WEIGHTS} holds {what}; save the adapter again")
    return found


def write(
    directory: Path,
    adapter: lora.Adapter,
    ranks: lora.Ranks,
    names: Mapping[str, str],
    *,
    base_model: str,
    base_class: tuple[str, str] | None = None,
) -> None:
    """Writes an adapter that PEFT can load.

    Args:
        directory: the directory; created if missing.
        adapter: the adapter, with float32 factors.
        ranks: the ranks and scales it was made with.
        names: site -> the module's name in transformers' model.
        base_model: Hub id or path of the base model, recorded for PEFT.
        base_class: the model's class in PyTorch and the module that defines it, if known.
    """
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": base_class
        and {"base_model_class": base_class[0], "parent_library": base_class[1]},
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": ranks.rank,
        "lora_alpha": ranks.alpha,
        "rank_pattern": dict(ranks.rank_pattern),
        "alpha_pattern": dict(ranks.alpha_pattern),
        "use_rslora": ranks.use_rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        # Full names, to match no other module: the vision tower also has a q_proj.
        "target_modules": sorted(names[site] for site in adapter.factors),
    }
    tensors = {}
    for site, factors in adapter.factors.items():
        for which, factor in zip("AB", factors, strict=True):
            tensors[f"{_PREFIX}{names[site]}.lora_{which}.weight"] = np.asarray(factor).T
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_io.write_file(directory / WEIGHTS, tensors)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def module_names(
    sites: Mapping[str, Any], transformers_name: Callable[[str], str]
) -> dict[str, str]:
    """Returns {site: the module's name in transformers' model}, the names in PEFT's files."""
    return {site: transformers_name(f"{site}.weight").removesuffix(".weight") for site in sites}
