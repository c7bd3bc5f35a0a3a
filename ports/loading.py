"""Loads checkpoints: config.json's model_type picks the port, `load` makes its `VLM`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ports import checkpoint
from ports.checkpoint import hub, orbax_io, quantised, safetensors_io
from ports.models import idefics2, llava
from ports.models.molmo import model as molmo
from ports.models.port import Port
from ports.models.qwen2_vl import model as qwen2_vl
from ports.nn import vision_language
from ports.parallel import sharding
from ports.programs import keep_programs
from ports.vlm import VLM

# A line for each family of models.
PORTS: dict[str, Port] = {
    "llava": llava.PORT,
    "idefics2": idefics2.PORT,
    "qwen2_vl": qwen2_vl.PORT,
    "molmo": molmo.PORT,
}
_DTYPES = ("float32", "bfloat16", "float16")


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    adapter: str | Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
    video_positions: str = "original",
) -> VLM:
    """Loads a Hugging Face checkpoint.

    Args:
        path: a directory that holds config.json and safetensors (or Orbax parameters, which
            `xlvlm convert` writes), or the id of a repository on the hub, which is then downloaded
            into its usual cache.
        dtype: of the parameters and the computation: "float32", "bfloat16" or "float16".
        mesh: places the parameters on its devices (axes "data" and "model"), tensor by tensor;
            it may span the processes of `jax.distributed`. Default: one device.
        adapter: a directory or hub id with a LoRA adapter in PEFT's format, merged into the
            parameters.
        generation_config: values by transformers' names instead of those of the checkpoint's
            generation_config.json, such as {"repetition_penalty": 1.1}; {} leaves those out. The
            tokens that end and fill rows stay, unless it names others.
        video_positions: of Qwen2-VL, where text after a video begins: "original", as the weights
            were trained, or "transformers-5" (see `ports.models.qwen2_vl.model.VIDEO_POSITIONS`).

    Raises:
        FileNotFoundError: no such directory, or a file is missing in it.
        ValueError: a model_type or a configuration value without a port, parameters that do not
            match the model's, a quantised checkpoint, a damaged file, or an adapter for another
            model or of a kind that is not implemented.
    """
    keep_programs()
    directory = hub.find_directory(path)
    module, port, config, abstract = _build(directory, dtype, video_positions)
    params = load_params(module, port, directory, abstract, jnp.dtype(dtype), mesh)
    vlm = VLM(module, params, config, port, directory, mesh)
    if generation_config is not None:
        vlm = vlm.with_generation_config(generation_config)
    return vlm if adapter is None else vlm.with_adapter(adapter, donate=True)


def load_abstract(
    path: str | Path,
    *,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    video_positions: str = "original",
) -> VLM:
    """As `load`, but every parameter is a `jax.ShapeDtypeStruct`: of weights only headers are read
    (and where config.json ties a head that is stored, as much as tells whether it is another one).

    For what needs shapes alone: `vlm.sites`, `jax.eval_shape(vlm.apply, vlm.params, inputs)`,
    compiling for other devices. The directory need hold no weights, and from the hub none are got.
    """
    directory = hub.find_directory(path, weights=False)
    module, port, config, abstract = _build(directory, dtype, video_positions)
    # Of weights that are there, the headers tell whether a load would read them.
    quantised.readable(safetensors_io.open_available(directory), directory)
    params = place_abstract(module, abstract, jnp.dtype(dtype), mesh)
    return VLM(module, params, config, port, directory, mesh)


def hub_names(name: str) -> tuple[str, ...]:
    """What each port calls a module that today's transformers gives a name: as the hub does."""
    return tuple(port.hub_name(name) for port in PORTS.values())


def _build(directory: Path, dtype: str, video_positions: str) -> tuple[Any, Port, Any, dict]:
    """The Linen module of a checkpoint, its port, the configuration as read, and the parameters
    that the module needs, abstract.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    known = {name: port.options.get("video_positions", ()) for name, port in PORTS.items()}
    values = dict.fromkeys(value for values in known.values() for value in values)
    if video_positions not in values:
        raise ValueError(
            f"video_positions is {video_positions!r}; expected one of {', '.join(values)}"
        )
    readers = {name: p.read_config for name, p in PORTS.items() if p.read_config is not None}
    config = checkpoint.read_config(directory, tuple(PORTS), readers)
    port = PORTS[config.model_type]
    with checkpoint.making_model(directory):
        sizes: Any = port.config.from_hf(config)
    if video_positions in known[config.model_type]:
        sizes = dataclasses.replace(sizes, video_positions=video_positions)
    elif video_positions != next(iter(values)):
        families = ", ".join(name for name, of_it in known.items() if of_it)
        raise ValueError(
            f"video_positions is {video_positions!r}, which is for {families}; {directory} is a "
            f"{config.model_type}: leave it out"
        )
    module = port.module(sizes, dtype=jnp.dtype(dtype))
    if checkpoint.stores_own_head(directory, port.canonical_name, module.tied):
        module = module.untied()
    with checkpoint.making_model(directory):
        abstract = checkpoint.abstract_params(module, port.example_inputs(module.config))
    return module, port, config, abstract


def load_params(
    module: vision_language.VisionLanguageModel,
    port: Port,
    directory: Path,
    abstract: dict,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None,
) -> dict:
    """The parameters of `module` from a checkpoint, placed on the mesh as they are read."""
    shardings = None
    if mesh is not None:
        shardings = sharding.param_shardings(mesh, abstract, module.axes, module.kv_heads)
    if orbax_io.is_saved(directory):
        return orbax_io.load(directory, abstract, dtype, shardings)
    return checkpoint.load_params(
        directory,
        abstract,
        port.canonical_name,
        dtype=dtype,
        tied=module.tied,
        shardings=shardings,
    )


def place_abstract(
    module: vision_language.VisionLanguageModel,
    abstract: dict,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None,
) -> dict:
    """The shapes of the parameters of `module`, and where on the mesh each would be placed."""
    if mesh is None:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where),
        abstract,
        sharding.param_shardings(mesh, abstract, module.axes, module.kv_heads),
    )
