"""Loads checkpoints: the model_type in config.json selects the port, `load` returns a `VLM`."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ports import checkpoint
from ports.checkpoint import hub, orbax_io, peft_io, quantised, safetensors_io
from ports.models import (
    causal_lm,
    gemma3,
    idefics2,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    paligemma,
    qwen2_5_vl,
    qwen3_vl,
)
from ports.models.molmo import model as molmo
from ports.models.molmo2 import model as molmo2
from ports.models.port import Port
from ports.models.qwen2_vl import model as qwen2_vl
from ports.nn import vision_language
from ports.parallel import sharding
from ports.programs import keep_programs
from ports.vlm import VLM

# One line per model family.
PORTS: dict[str, Port] = {
    "llava": llava.PORT,
    "idefics2": idefics2.PORT,
    "idefics3": idefics3.PORT,
    "smolvlm": idefics3.SMOLVLM,
    "qwen2_vl": qwen2_vl.PORT,
    "qwen2_5_vl": qwen2_5_vl.PORT,
    "qwen3_vl": qwen3_vl.PORT,
    "molmo": molmo.PORT,
    "molmo2": molmo2.PORT,
    "gemma3": gemma3.PORT,
    "paligemma": paligemma.PORT,
    "internvl": internvl.PORT,
    "llava_next": llava_next.PORT,
    "llava_onevision": llava_onevision.PORT,
}
# Models of text alone, see `load_text`.
TEXT_PORTS: dict[str, Port] = dict.fromkeys(causal_lm.MODEL_TYPES, causal_lm.PORT)


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    adapter: str | Path | None = None,
    processor: str | Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
    video_positions: str | None = None,
) -> VLM:
    """Loads a Hugging Face checkpoint.

    Args:
        path: a directory with config.json and safetensors (or Orbax parameters, as written by
            `xlvlm convert`), or a repository id on the Hub, which is downloaded to the Hub's cache.
        dtype: dtype of the parameters and the computation: "float32", "bfloat16" or "float16".
        mesh: mesh with axes "data" and "model" to shard the parameters over, tensor by tensor; it
            may span the processes of `jax.distributed`. Axes of type `Explicit`, which
            `jax.make_mesh` makes, are taken as `Auto`. Default: one device.
        adapter: a directory or Hub id of a LoRA adapter in PEFT's format, to merge into the
            parameters.
        processor: a directory or Hub id of a checkpoint whose processor and tokenizer to use;
            default: the checkpoint's own.
        generation_config: values, by transformers' names, that replace the checkpoint's
            generation_config.json, such as {"repetition_penalty": 1.1}; {} uses none of its
            values. The end-of-sequence and padding tokens are kept unless given here.
        video_positions: for Qwen2-VL and Qwen2.5-VL, the position of text after a video:
            "original", as the weights were trained (the default for Qwen2-VL), or "transformers-5"
            (for Qwen2.5-VL); see `ports.models.qwen2_vl.config.VIDEO_POSITIONS`.

    Returns:
        The model with its parameters, configuration and processor.

    Raises:
        FileNotFoundError: the directory, or a file in it, does not exist.
        ValueError: the model_type or a configuration value is not supported, the parameters do not
            match the model, the checkpoint is quantised or damaged, or the adapter is for another
            model or of an unsupported kind.

    Examples:
        >>> import ports
        >>> vlm = ports.load("embedded")
        >>> vlm.config.model_type, vlm.sites[-1]
        ('llava', 'language_model.lm_head')
    """
    keep_programs()
    directory = hub.find_directory(path)
    module, port, config, abstract = _build(directory, dtype, video_positions)
    # Reading the weights may take minutes: what else may be wrong is found before.
    vlm = VLM(module, abstract, config, port, directory, mesh)
    if generation_config is not None:
        vlm = vlm.with_generation_config(generation_config)
    if processor is not None:
        vlm = vlm.with_processor(hub.find_directory(processor, "a processor", weights=False))
    if adapter is not None:
        adapter = hub.find_directory(adapter, peft_io.EXPECTED)
    vlm.params = load_sharded(module, port, directory, abstract, jnp.dtype(dtype), mesh)
    return vlm if adapter is None else vlm.with_adapter(adapter, donate=True)


def load_text(
    path: str | Path, *, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> VLM:
    """Loads a causal language model that reads text alone, such as Llama Guard.

    What it returns runs as any `VLM` does (`forward`, `generate`, sites, edits), on arrays from its
    tokenizer; it has no processor, and so neither `render` nor `process`.

    Args:
        path: a directory, or a repository id on the Hub, as for `load`; its model_type is llama,
            mistral, qwen2 or qwen3.
        dtype, mesh: as for `load`.

    Returns:
        The model with its parameters, configuration and tokenizer.

    Raises:
        FileNotFoundError: as for `load`.
        ValueError: as for `load`.

    Examples:
        >>> import ports
        >>> try:
        ...     ports.load_text("embedded")
        ... except ValueError as error:
        ...     print(str(error).partition("config.json: ")[2])
        model_type 'llava' is not supported; supported: llama, mistral, qwen2, qwen3
    """
    keep_programs()
    directory = hub.find_directory(path)
    module, port, config, abstract = _build(directory, dtype, None, TEXT_PORTS)
    params = load_sharded(module, port, directory, abstract, jnp.dtype(dtype), mesh)
    return VLM(module, params, config, port, directory, mesh)


def load_abstract(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    video_positions: str | None = None,
) -> VLM:
    """Loads a checkpoint like `load`, but with a `jax.ShapeDtypeStruct` for every parameter.

    For anything that needs only shapes: `vlm.sites`, `jax.eval_shape(vlm.apply, vlm.params,
    inputs)`, compiling for other devices. The directory need not hold weights, and none are
    downloaded from the Hub. Of existing weights only the headers are read (and, if config.json ties
    a head that is also stored, enough of both to compare them).

    Args:
        path: as for `load`.
        dtype: as for `load`.
        mesh: as for `load`.
        video_positions: as for `load`.

    Returns:
        The model with abstract parameters.

    Raises:
        FileNotFoundError: as for `load`, except for missing weights.
        ValueError: as for `load`.

    Examples:
        >>> import jax, ports
        >>> vlm = ports.load_abstract("embedded", dtype="bfloat16")
        >>> vlm.params["language_model"]["model"]["norm"]["scale"]
        ShapeDtypeStruct(shape=(192,), dtype=bfloat16)
    """
    directory = hub.find_directory(path, weights=False)
    module, port, config, abstract = _build(directory, dtype, video_positions)
    # Of weights that are there, the headers tell whether a load would read them.
    quantised.readable(safetensors_io.open_available(directory), directory)
    params = place_abstract(module, abstract, jnp.dtype(dtype), mesh)
    return VLM(module, params, config, port, directory, mesh)


def hub_names(name: str) -> tuple[str, ...]:
    """Returns the Hub name that each port gives to a module named as in today's transformers.

    Args:
        name: of a module, as `named_modules` of transformers' model gives it.

    Returns:
        A name per port, many of them equal; `name` itself where a port does not rename it.

    Examples:
        >>> import ports
        >>> ports.hub_names("model.language_model.layers.3")[0]
        'language_model.model.layers.3'
    """
    return tuple(port.hub_name(name) for port in PORTS.values())


def _build(
    directory: Path,
    dtype: str,
    video_positions: str | None,
    among: Mapping[str, Port] = PORTS,
) -> tuple[Any, Port, Any, dict]:
    """Returns a checkpoint's Linen module, port, configuration and abstract parameters."""
    checkpoint.read_dtype(dtype)
    known = {name: port.options.get("video_positions", ()) for name, port in among.items()}
    values = dict.fromkeys(value for values in known.values() for value in values)
    if video_positions not in (None, *values):
        raise ValueError(
            f"video_positions is {video_positions!r}; expected one of {', '.join(values)}"
        )
    readers = {name: p.read_config for name, p in among.items() if p.read_config is not None}
    config = checkpoint.read_config(directory, tuple(among), readers)
    port = among[config.model_type]
    with checkpoint.making_model(directory):
        sizes: Any = port.config.from_hf(config)
    if video_positions in known[config.model_type]:
        sizes = dataclasses.replace(sizes, video_positions=video_positions)
    elif video_positions is not None:
        families = ", ".join(name for name, of_it in known.items() if of_it)
        raise ValueError(
            f"video_positions is {video_positions!r}, which only {families} support; {directory} "
            f"has model_type {config.model_type}: leave the argument out"
        )
    module = port.module(sizes, dtype=jnp.dtype(dtype))
    if checkpoint.stores_own_head(directory, port.canonical_name, module.tied):
        module = module.untied()
    with checkpoint.making_model(directory):
        abstract = checkpoint.abstract_params(module, port.example_inputs(module.config))
    return module, port, config, abstract


def load_sharded(
    module: vision_language.VisionLanguageModel,
    port: Port,
    directory: Path,
    abstract: dict,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None,
) -> dict:
    """Loads the parameters of `module`, sharded over the mesh as they are read.

    Args:
        module: the Linen module.
        port: its port.
        directory: the checkpoint.
        abstract: the tree of shapes that `module` needs.
        dtype: dtype of the parameters.
        mesh: where to place them; None for one device.

    Returns:
        A tree like `abstract`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the parameters do not match the model, or a file is damaged.
    """
    shardings = None
    if mesh is not None:
        shardings = sharding.param_shardings(mesh, abstract, module.axes, module.kv_heads)
    if orbax_io.is_saved(directory):
        return orbax_io.restore(directory, abstract, dtype, shardings)
    return checkpoint.load_params(
        directory,
        abstract,
        port.canonical_name,
        dtype=dtype,
        tied=module.tied,
        shardings=shardings,
        rearrange=functools.partial(port.rearrange, module.config),
    )


def place_abstract(
    module: vision_language.VisionLanguageModel,
    abstract: dict,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None,
) -> dict:
    """Returns the parameters of `module` as shapes, with the sharding that each would have."""
    if mesh is None:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
        abstract,
        sharding.param_shardings(mesh, abstract, module.axes, module.kv_heads),
    )
