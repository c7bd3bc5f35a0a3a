# What `ports.checkpoint` exports, imported at first use (see ports/lazy_names.py).
from ports.checkpoint.config import (
    loading,
    making_model,
    read_config,
    read_dtype,
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
    "read_dtype",
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
