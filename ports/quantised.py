"""Quantised checkpoints, which are refused by name: the ports compute with float weights.

Read as if they were not, they would be another model: a tensor of 8-bit integers has the right name
and shape, but means nothing without its scales.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ports.safetensors_io import StoredTensor

_TAKE = (
    "only float weights are implemented: take the checkpoint that it was made from, or save it "
    "again after transformers' model.dequantize()"
)
# The ends of tensors' names that tell how they were quantised; the first that is found counts.
_MARKS = {
    "SCB": "bitsandbytes, 8 bits",
    "absmax": "bitsandbytes, 4 bits",
    "g_idx": "GPTQ",
    "qzeros": "AWQ or GPTQ",
    "qweight": "AWQ or GPTQ",
    "weight_packed": "compressed-tensors",
    "weight_qdata": "torchao",
    "weight_scale_inv": "fp8, in blocks",
    "weight_scale": "compressed-tensors or fp8",
    "W_q": "HQQ",
}
# Where a configuration, or the file that older tools write beside it, says how.
_KEYS = ("quantization_config", "compression_config")
_FILES = ("quantize_config.json", "quant_config.json")


def refuse_config(values: Mapping[str, Any], file: Path) -> None:
    """ValueError if a configuration, or a part of it, is that of a quantised checkpoint.

    Args:
        values: of config.json.
        file: that file; files of older tools (AutoGPTQ, AutoAWQ) are looked for beside it.
    """
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        for key in _KEYS:
            if part.get(key):
                raise ValueError(f"{file}: quantised ({_method(part[key])}, by its {key}); {_TAKE}")
    for name in _FILES:
        if (file.parent / name).is_file():
            raise ValueError(f"{file.parent}: quantised (AWQ or GPTQ, by its {name}); {_TAKE}")


def _method(entry: Any) -> str:
    """The name of the method, with its number of bits or its format where an entry tells them."""
    if not isinstance(entry, dict):
        return repr(entry)[:80]
    name = str(entry.get("quant_method") or "unknown method")
    bits = {"load_in_4bit": 4, "load_in_8bit": 8}
    count = next((n for key, n in bits.items() if entry.get(key)), entry.get("bits"))
    detail = f"{count} bits" if count is not None else entry.get("format")
    return name if detail is None else f"{name}, {detail}"


def refuse_tensors(stored: Mapping[str, StoredTensor], directory: Path) -> None:
    """ValueError if names or dtypes of tensors are those of a quantised checkpoint."""
    for mark, method in _MARKS.items():
        for name in stored:
            # A part of its own, or the end of a longer one ("..._weight_scale" of torchao).
            if name.endswith((f".{mark}", f"_{mark}")):
                raise ValueError(f"{directory}: quantised ({method}, by its {name}); {_TAKE}")
    for name, tensor in stored.items():
        if tensor.dtype.itemsize == 1 and tensor.dtype != bool:
            raise ValueError(
                f"{directory}: quantised (tensor {name} is stored as {tensor.dtype.name}); {_TAKE}"
            )
