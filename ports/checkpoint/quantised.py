"""Quantised checkpoints: reads fp8 weights with their scales, refuses all other methods by name.

Ignoring the quantisation would silently load a different model: a tensor of 8-bit integers has the
right name and shape, but is meaningless without its scales. The ports compute with float weights.
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
    "only float weights and fp8 are implemented: use the original checkpoint, or save this one "
    "after transformers' model.dequantize()"
)
# Ends of tensor names that identify a quantisation method; the first one found counts.
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
# Where config.json, or a file that older tools write next to it, describes the method.
_KEYS = ("quantization_config", "compression_config")
_FILES = ("quantize_config.json", "quant_config.json")


def refuse_config(values: Mapping[str, Any], file: Path) -> None:
    """Refuses the configuration of a quantised checkpoint, unless it is fp8.

    Args:
        values: the values of config.json.
        file: its path; the files of older tools (AutoGPTQ, AutoAWQ) are looked for next to it.

    Raises:
        ValueError: the checkpoint is quantised by another method.
    """
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        for key in _KEYS:
            if part.get(key) and not _is_fp8(part[key]):
                raise ValueError(
                    f"{file}: quantised ({_method(part[key])}, according to {key}); {_TAKE}"
                )
    for name in _FILES:
        if (file.parent / name).is_file():
            raise ValueError(
                f"{file.parent}: quantised (AWQ or GPTQ, according to {name}); {_TAKE}"
            )


def without_quantisation(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of config.json for weights that are stored as they are.

    Args:
        values: the values of config.json, such as of an fp8 checkpoint.
    """
    parts = {
        key: {name: value for name, value in part.items() if name not in _KEYS}
        if isinstance(part, dict)
        else part
        for key, part in values.items()
    }
    return {key: part for key, part in parts.items() if key not in _KEYS}


def _method(entry: Any) -> str:
    """Returns the method's name, with its number of bits or its format if given."""
    if not isinstance(entry, dict):
        return repr(entry)[:80]
    name = str(entry.get("quant_method") or "unknown method")
    bits = {"load_in_4bit": 4, "load_in_8bit": 8}
    count = next((n for key, n in bits.items() if entry.get(key)), entry.get("bits"))
    detail = f"{count} bits" if count is not None else entry.get("format")
    return name if detail is None else f"{name}, {detail}"


def _is_fp8(entry: Any) -> bool:
    """Returns whether an entry describes 8-bit floats with scales."""
    if not isinstance(entry, dict):
        return False
    if entry.get("quant_method") == "compressed-tensors":
        return entry.get("format") == "float-quantized"
    return entry.get("quant_method") == "fp8"


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A stored weight [O, I] of 8-bit floats, with one scale per block.

    Attributes:
        weight: the 8-bit floats.
        scales: [] or [1] (one scale), [O] or [O, 1] (one per row), or
            [ceil(O / rows), ceil(I / columns)].
        block: (rows, columns) of a block.
    """

    weight: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]

    dtype = np.dtype(np.float32)

    @property
    def file(self) -> Path:
        """Path of the weight's file."""
        return self.weight.file

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [O, I] of the weight."""
        return self.weight.shape

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Reads the weight times its scales, float32.

        Args:
            rows: (first, last + 1) of the rows to read; None for all.

        Returns:
            float32[O, I], or only these rows.
        """
        first, last = rows or (0, self.shape[0])
        scales = self.scales.read().astype(np.float32)
        scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
        row = np.arange(first, last) // self.block[0]
        column = np.arange(self.shape[1]) // self.block[1]
        return self.weight.read(rows).astype(np.float32) * scales[np.ix_(row, column)]


Tensor = StoredTensor | ScaledTensor


def readable(stored: Mapping[str, StoredTensor], directory: Path) -> dict[str, Tensor]:
    """Joins fp8 weights with their scales, if config.json declares fp8.

    Scales of activations are dropped: activations are not rounded here.

    Args:
        stored: name -> tensor of a checkpoint.
        directory: the checkpoint.

    Returns:
        Name -> tensor, without the scales.

    Raises:
        ValueError: the checkpoint is quantised by another method, or scales do not fit.
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
    """Returns the rows and columns of a block; raises ValueError if the scales do not fit."""
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
        f"{weight.file}: {name} {weight.shape} has scales {scales.shape}; expected the block sizes "
        f"in config.json, {list(filter(None, sizes)) or 'none'}: download the checkpoint again"
    )


def refuse_tensors(stored: Mapping[str, Tensor], directory: Path) -> None:
    """Checks that no tensor's name or dtype shows that a checkpoint is quantised.

    Args:
        stored: name -> tensor.
        directory: the checkpoint, for the message.

    Raises:
        ValueError: the checkpoint is quantised.
    """
    for mark, method in _MARKS.items():
        for name in stored:
            # A whole part of the name, or the end of one (torchao's "..._weight_scale").
            if name.endswith((f".{mark}", f"_{mark}")):
                raise ValueError(
                    f"{directory}: quantised ({method}, according to tensor {name}); {_TAKE}"
                )
    for name, tensor in stored.items():
        if tensor.dtype.itemsize == 1 and tensor.dtype != bool:
            raise ValueError(
                f"{directory}: quantised (tensor {name} is stored as {tensor.dtype.name}); {_TAKE}"
            )
