"""Quantised checkpoints: fp8 weights are read with their scales, all others are refused by name.

Read as if they were not quantised, they would be another model: a tensor of 8-bit integers has the
right name and shape, but means nothing without its scales. The ports compute with float weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ports.checkpoint.safetensors_io import StoredTensor

_TAKE = (
    "only float weights and fp8 are implemented: take the checkpoint that it was made from, or "
    "save it again after transformers' model.dequantize()"
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
    """ValueError if a configuration, or a part of it, is that of a checkpoint quantised otherwise
    than to fp8.

    Args:
        values: of config.json.
        file: that file; files of older tools (AutoGPTQ, AutoAWQ) are looked for beside it.
    """
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        for key in _KEYS:
            if part.get(key) and not _is_fp8(part[key]):
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


def _is_fp8(entry: Any) -> bool:
    """Whether an entry asks for 8-bit floats with scales, and nothing else."""
    if not isinstance(entry, dict):
        return False
    if entry.get("quant_method") == "compressed-tensors":
        return entry.get("format") == "float-quantized"
    return entry.get("quant_method") == "fp8"


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A stored weight [O, I] of 8-bit floats and its scales, each for a block of it.

    scales: [], [1] (one for all), [O], [O, 1] (one a row) or [ceil(O / rows), ceil(I / columns)].
    block: (rows, columns) of a block.
    """

    weight: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    dtype = np.dtype(np.float32)

    @property
    def file(self) -> Path:
        """The file of the weight."""
        return self.weight.file

    @property
    def shape(self) -> tuple[int, ...]:
        """[O, I]."""
        return self.weight.shape

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The weight times its scales, or of it the rows from one to another; float32."""
        first, last = rows or (0, self.shape[0])
        scales = self.scales.read().astype(np.float32)
        scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
        row = np.arange(first, last) // self.block[0]
        column = np.arange(self.shape[1]) // self.block[1]
        return self.weight.read(rows).astype(np.float32) * scales[np.ix_(row, column)]


Tensor = StoredTensor | ScaledTensor


def readable(stored: Mapping[str, StoredTensor], directory: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, fp8 weights with their scales as one if config.json says so.

    Scales of activations are left out: activations are not rounded here.

    Raises ValueError for a checkpoint that is quantised otherwise, or scales that do not fit.
    """
    tensors: dict[str, Tensor] = dict(stored)
    entry = _fp8_entry(directory)
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if entry is None or leaf != "weight" or tensor.dtype != ml_dtypes.float8_e4m3fn:
            continue
        found = [f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in stored]
        if found:
            scales = stored[found[0]]
            tensors[name] = ScaledTensor(tensor, scales, _block(name, tensor, scales, entry))
            del tensors[found[0]]
            tensors.pop(f"{module}.input_scale", None)
    refuse_tensors(tensors, directory)
    return tensors


def _fp8_entry(directory: Path) -> dict[str, Any] | None:
    file = directory / "config.json"
    values = json.loads(file.read_text("utf-8")) if file.exists() else {}
    entries = (values.get(key) for key in _KEYS)
    return next((entry for entry in entries if _is_fp8(entry)), None)


def _block(
    name: str, weight: StoredTensor, scales: StoredTensor, entry: dict[str, Any]
) -> tuple[int, int]:
    """The rows and columns that share a scale; ValueError if the scales do not fit the weight."""
    rows, columns = weight.shape
    if scales.shape in ((), (1,), (1, 1)):
        return rows, columns
    if scales.shape in ((rows,), (rows, 1)):
        return 1, columns
    groups = (entry.get("config_groups") or {}).values()
    sizes = [entry.get("weight_block_size")]
    sizes += [(group.get("weights") or {}).get("block_structure") for group in groups]
    for size in filter(None, sizes):
        if scales.shape == tuple(-(-n // each) for n, each in zip(weight.shape, size, strict=True)):
            return tuple(size)
    raise ValueError(
        f"{weight.file}: scales {scales.shape} of {name} {weight.shape} are none of config.json's "
        f"blocks, {list(filter(None, sizes)) or 'which names none'}; download the checkpoint again"
    )


def refuse_tensors(stored: Mapping[str, Tensor], directory: Path) -> None:
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
