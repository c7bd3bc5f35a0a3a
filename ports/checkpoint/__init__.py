"""Checkpoints on disk: configurations, parameters, safetensors, Orbax, PEFT, the hub's cache.

config                        config.json, and errors of files that do not load
params                        tensors <-> Flax parameters
safetensors_io, orbax_io      the two formats of parameters
quantised                     fp8 is read with its scales, the rest is refused
peft_io                       LoRA adapters in PEFT's format
hub                           names and repositories of the hub -> directories
"""

from ports.checkpoint.config import (
    loading,
    making_model,
    read_config,
    read_json,
    require_tokenizer,
)
from ports.checkpoint.params import (
    abstract_params,
    fingerprint,
    is_finite,
    load_params,
    save_params,
    stored_shapes,
    stored_tensors,
    stores_own_head,
    to_kernel,
)
from ports.names import module_name, tensor_name

__all__ = [
    "abstract_params",
    "fingerprint",
    "is_finite",
    "load_params",
    "loading",
    "making_model",
    "module_name",
    "read_config",
    "read_json",
    "require_tokenizer",
    "save_params",
    "stored_shapes",
    "stored_tensors",
    "stores_own_head",
    "tensor_name",
    "to_kernel",
]
