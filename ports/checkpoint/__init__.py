"""Checkpoints on disk: configurations, parameters, safetensors, Orbax, PEFT, the Hub's cache.

config                        config.json, and errors for files that do not load
params                        tensors <-> Flax parameters
safetensors_io, orbax_io      the two file formats for parameters
quantised                     reads fp8 with its scales, refuses other quantised checkpoints
peft_io                       LoRA adapters in PEFT's format
hub                           names and Hub repositories -> directories
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
    untie,
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
    "untie",
]
