"""Keeps what a foreign file has in addition to the rows, so that an export restores it bit by bit.

features/foreign.json           the values, with arrays replaced by {"array": number, ...}
features/foreign.safetensors    the bytes of the arrays
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from xlvlm_jax.features.pth.torch_globals import StorageType, StoredArray
from xlvlm_jax.features.pth.unpickle import PthError, StoredTensor
from xlvlm_jax.storage import atomic
from xlvlm_jax.storage.tensors import as_bytes

_JSON, _ARRAYS = "foreign.json", "foreign.safetensors"
_DEPTH = 32


def write_kept(directory: Path, value: Any, limit: int) -> None:
    """Writes a value returned by `read_pth`.

    Raises:
        PthError: values are nested too deeply, or there are more than `limit` (a short file can
            repeat the same list any number of times), or one is neither a tensor nor plain.
    """
    arrays: dict[str, np.ndarray] = {}
    left = limit

    def encode(value: Any, depth: int = 0) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > _DEPTH:
            raise PthError("its values are nested too deeply, or repeat each other too often")
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, bool | float | str):
            return value
        if isinstance(value, int):
            return value if abs(value) < 2**63 else {"int": hex(value)}
        if isinstance(value, bytes):
            value = np.frombuffer(value, np.uint8)
        if isinstance(value, StorageType):
            return value.dtype.name
        if isinstance(value, StoredTensor | StoredArray | np.ndarray):
            array = np.asarray(value)
            number = str(len(arrays))
            arrays[number] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            return {"array": number, "dtype": array.dtype.name, "shape": list(array.shape)}
        if isinstance(value, list):
            return [encode(item, depth + 1) for item in value]
        if isinstance(value, tuple):
            return {"tuple": [encode(item, depth + 1) for item in value]}
        if isinstance(value, dict):
            pairs = [(encode(k, depth + 1), encode(v, depth + 1)) for k, v in value.items()]
            return {"dict": pairs}
        raise PthError(f"has a {type(value).__name__}, which is neither a tensor nor a plain value")

    text = json.dumps(encode(value)) + "\n"
    atomic.write(directory / _ARRAYS, as_bytes(arrays))
    atomic.write(directory / _JSON, text)


def read_kept(directory: Path) -> Any:
    """Reads what `write_kept` wrote; None if it wrote nothing.

    Raises:
        ValueError: the file is damaged.
    """
    if not (directory / _JSON).exists():
        return None

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "float" in value:
            return float(value["float"])
        if "int" in value:
            return int(value["int"], 16)
        if "tuple" in value:
            return tuple(map(decode, value["tuple"]))
        if "dict" in value:
            return {decode(key): decode(inner) for key, inner in value["dict"]}
        name = value["dtype"]
        dtype = np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)
        return arrays[value["array"]].view(dtype).reshape(value["shape"])

    try:
        arrays = load_file(directory / _ARRAYS)
        return decode(json.loads((directory / _JSON).read_text("utf-8")))
    except Exception as error:  # also from the safetensors library, which has its own errors
        raise ValueError(
            f"{directory / _JSON}: damaged ({str(error)[:100]}); import the .pth file again"
        ) from error
