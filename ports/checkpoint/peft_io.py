"""Adapters on disk, in the format of PEFT (huggingface/peft): `read` and `write`.

    adapter_config.json         rank, scale, which modules
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [R, I], lora_B.weight [O, R]

Of PEFT's many methods this is LoRA with its variations of rank and scale, of linear layers, patch
embeddings (convolutions) and embeddings, and modules that are saved whole. What else a
configuration may ask for is refused by name: an adapter that is read without it would be another
model.
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
# lora_A.weight of linear layers and convolutions, lora_embedding_A of embeddings.
_FACTOR = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_(embedding_)?([AB])(?(2)|\.weight)")

# Fields that `read` obeys, and those that say how an adapter was begun or trained, or which modules
# PEFT is to make room in (here the file's tensors tell). Any other field must be empty.
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
    "fan_in_fan_out",  # PEFT itself sets it to false for linear layers, and the ports have no other
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
# These ways to begin leave the base model as it is; the others (PiSSA, OLoRA ...) change it.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def read(
    directory: str | Path,
    params: Any,
    canonical_name: Rename,
    *,
    architecture: str | None = None,
    tied: Collection[str] = (),
) -> lora.Adapter:
    """Reads a LoRA adapter that PEFT, or `write`, has written.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        params: the model's tree of (abstract) parameters.
        canonical_name: the port's, a tensor's name in any known checkpoint -> its name in the port.
        architecture: the model's class in PyTorch ("LlavaForConditionalGeneration"); an adapter
            that names another is refused.
        tied: sites of head and embedding if they share their weights: PEFT adapts the one and
            leaves the other, for which the model has no room.

    Raises:
        FileNotFoundError: the directory, or one of the two files, is missing.
        ValueError: a damaged file, something that is not implemented, or an adapter for another
            base model.
    """
    directory = Path(directory)
    try:
        return _read(directory, params, canonical_name, architecture, tied)
    # Values of other kinds than a configuration has.
    except (TypeError, AttributeError, KeyError, RecursionError, OverflowError, re.error) as error:
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"{directory}: a damaged adapter ({said}); save it again") from error


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
        raise ValueError(f"{directory}: an adapter for a {base!r}; the model is a {architecture}")
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
            "(its .bin files are not read)"
        )
    stored = safetensors_io.open_file(directory / WEIGHTS)
    copied = {name: own for name in stored if (own := _copied(name, values)) is not None}
    for kept in values.get("modules_to_save") or ():
        if not any(_is_within(own, kept) for own in copied.values()):
            raise ValueError(
                f"{directory}: {CONFIG} asks for modules_to_save {kept!r}, of which {WEIGHTS} "
                "holds no tensor; the two files do not belong together"
            )
    modules = _modules([name for name in stored if name not in copied], directory)
    shapes = lora.mergeable_layers(params)
    sites = {module_name(canonical_name, module): module for module in modules}
    of_copies = {module_name(canonical_name, own.rpartition(".")[0]) for own in copied.values()}
    for site in tied:
        if site in sites or site in of_copies:
            raise ValueError(
                f"{directory}: adapts {site}, but head and embedding of this model are one (tied), "
                "of which peft changes only one; use vlm.untied().with_adapter(...)"
            )
    unknown = [module for site, module in sites.items() if site not in shapes]
    if unknown:
        raise ValueError(
            f"{directory}: {len(unknown)} of {len(modules)} modules are no linear layers, patch "
            f"embeddings or embeddings of this model, such as {unknown[0]}; it is an adapter for "
            "another base model"
        )
    factors, scale = {}, {}
    for site, module in sites.items():
        down, up = (_factor(stored, *modules[module][which]) for which in "AB")
        if down.shape[-1] != ranks.rank_of(module):
            raise ValueError(
                f"{directory}: lora_A of {module} has rank {down.shape[-1]}, {CONFIG} says "
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


def _copied(name: str, values: Mapping[str, Any]) -> str | None:
    """The base model's tensor whose place one of the file takes; None for any other tensor.

    Those are the modules_to_save, and the base weights that peft stores beside the factors of an
    embedding or a head.
    """
    name = name.removeprefix(_PREFIX)
    if name.endswith(".base_layer.weight"):
        return name.replace(".base_layer.", ".")
    leaf = name.rpartition(".")[2]
    if leaf not in ("weight", "bias") or ".lora_" in name:
        return None
    kept = values.get("modules_to_save") or ()
    return name if any(_is_within(name, part) for part in kept) else None


def _is_within(name: str, kept: str) -> bool:
    """Whether a tensor is in a module whose name ends so, which is how peft understands it."""
    return re.search(rf"{re.escape(kept)}\.", name) is not None


def _weights(
    stored: Mapping[str, Any],
    copied: Mapping[str, str],
    params: Any,
    canonical_name: Rename,
    directory: Path,
) -> dict[str, jnp.ndarray]:
    """Tensor's name in the port -> the adapter's own, laid out as the parameter."""
    shapes, weights = stored_shapes(params), {}
    kernels = {
        tensor_name(path) for path in traverse_util.flatten_dict(params) if path[-1] == "kernel"
    }
    for name, own in copied.items():
        # "" is the name of no parameter.
        canonical, shape = canonical_name(own) or "", tuple(stored[name].shape)
        if shapes.get(canonical) != shape:
            raise ValueError(
                f"{directory}: {own} {shape} takes the place of {shapes.get(canonical) or 'none'} "
                "in this model; for another vocabulary merge the adapter with peft's "
                "merge_and_unload, and load what it saves"
            )
        value = stored[name].read()
        weights[canonical] = to_kernel(value) if canonical in kernels else value
    return weights


def _factor(stored: Mapping[str, Any], name: str, of_embedding: bool) -> jnp.ndarray:
    """A stored factor as `lora.Factors` has it: (R, I) -> (I, R) and (O, R) -> (R, O).

    Convolutions: (R, channels, ...) -> (values of a patch, R) and (O, R, 1, ...) -> (R, O).
    """
    value = stored[name].read()
    value = value.T if of_embedding else to_kernel(value)
    return jnp.asarray(value.reshape(-1, value.shape[-1]))


def _read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json's values; ValueError for one that is not implemented."""
    file = directory / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{directory} has no {CONFIG}; is it an adapter's directory?")
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
        raise ValueError(f"{file}: asks for {', '.join(asked)}, which is not implemented")
    rank = values.get("r", 8)
    numbers = [rank, *(values.get("rank_pattern") or {}).values()]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"{file}: ranks are {numbers}; expected whole numbers above 0")
    return values


def _modules(names: Iterable[str], directory: Path) -> dict[str, dict[str, tuple[str, bool]]]:
    """Module as the file calls it -> {"A", "B": (tensor's name, whether of an embedding)}.

    ValueError for tensors that are no factors, or no pairs of them.
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
            f"{directory}: {len(strange)} tensors are no factors of LoRA, such as {strange[0]}; "
            "only LoRA of linear layers, patch embeddings and embeddings is implemented"
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
    """Writes an adapter so that PEFT loads it.

    Args:
        directory: is made if need be.
        adapter: float32 factors.
        ranks: which the adapter was made with.
        names: site -> the module's name in transformers' model.
        base_model: what PEFT is told to have been adapted, a hub id or a path.
        base_class: the model's class in PyTorch and the module it is in, if known.
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
        # Whole names, so that no other module is meant: a vision tower has a q_proj too.
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
    """Site -> the module's name in transformers' model, which PEFT's files use."""
    return {site: transformers_name(f"{site}.weight").removesuffix(".weight") for site in sites}
