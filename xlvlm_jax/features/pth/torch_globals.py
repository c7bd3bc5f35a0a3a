"""Globals that a pickle of torch.save may use: tensors, storages, dtypes, plain numpy values."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from xlvlm_jax.features.pth.unpickle import (
    Buildable,
    Function,
    Opaque,
    PthError,
    Storage,
    StoredTensor,
    couples,
)

# torch's dtypes, by the name of their storage class; others are saved as raw bytes.
STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
UNTYPED = np.dtype(np.uint8)
_PAIR_BYTES = 64  # of a dictionary entry, in addition to its name and value
DTYPES = {
    **{dtype.name: dtype for dtype in STORAGES.values()},
    **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64")},
    **{
        name: np.dtype(getattr(ml_dtypes, name))
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    },
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "half": np.dtype(np.float16),
    "long": np.dtype(np.int64),
    "int": np.dtype(np.int32),
    "short": np.dtype(np.int16),
}


class StorageType:
    """A storage class, or a dtype, as a value of the pickle."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class _NumpyDtype(Buildable):
    def __init__(self, code: Any, *_: Any):
        # The code of a number, with its size: f4, i8, b1, c16.
        code = code if isinstance(code, str) else ""
        if code[:1] not in tuple("biufc") or code[1:] not in ("1", "2", "4", "8", "16"):
            raise PthError(f"a numpy array has dtype {code[:40]!r}; expected plain numbers")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Takes the state (version, byte order, ...)."""
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray(Buildable):
    """A numpy array in a pickle, returned by `numpy` (or `numpy.asarray`)."""

    def __init__(self, *_: Any):
        self._array = np.zeros(0)

    def build(self, state: Any) -> None:
        """Takes the state (version, shape, dtype, is_fortran, bytes)."""
        _, shape, dtype, fortran, content = state
        values = np.frombuffer(_bytes(content), dtype.dtype)
        self._array = values.reshape(shape, order="F" if fortran is True else "C")

    def numpy(self) -> np.ndarray:
        """Returns the array, which is read-only."""
        return self._array

    __array__ = StoredTensor.__array__


def _bytes(content: Any) -> bytes:
    if not isinstance(content, bytes):
        raise PthError(f"a numpy array contains a {type(content).__name__}, expected bytes")
    return content


def _scalar(dtype: _NumpyDtype, content: Any) -> Any:
    (value,) = np.frombuffer(_bytes(content), dtype.dtype)
    return value.item()


class Globals:
    """The globals of one file; counts the memory of what is made with them.

    Args:
        limit: maximum number of bytes that all tensors and strings made here may take together.
            With strides of zero, or many tensors on one storage, a short file can describe any
            number of them.
        opaque: whether an unknown global stands for an object that is not read, instead of being
            refused.
    """

    def __init__(self, limit: int, *, opaque: bool = False):
        self._left = self._limit = limit
        self._opaque = opaque

    def find(self, module: str, name: str) -> Any:
        """Returns what a pickle may use as `module.name`.

        Raises:
            PthError: the name is unknown.
        """
        known = self._known().get((module, name))
        if known is None and module in ("torch", "torch.storage"):
            if name in STORAGES:
                known = StorageType(STORAGES[name])
            elif name == "UntypedStorage":
                known = StorageType(UNTYPED)
            elif module == "torch" and name in DTYPES:
                known = StorageType(DTYPES[name])
        if known is None and self._opaque:
            return Opaque(f"{module}.{name}")
        if known is None:
            raise PthError(
                f"asks for {module[:80]}.{name[:80]}, which is neither a tensor nor a plain "
                "value; nothing in the file was run, and it should not be loaded in another way "
                "either"
            )
        return Function(f"{module}.{name}", known) if callable(known) else known

    def _known(self) -> dict[tuple[str, str], Any]:
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch", "Size"): _same(tuple),
            ("torch", "device"): lambda kind, *_: self._text([kind]),
            ("collections", "OrderedDict"): self._ordered,
            ("_codecs", "encode"): self._encode,
            ("numpy", "dtype"): _NumpyDtype,
            ("numpy", "ndarray"): "numpy.ndarray",
        }
        for module in ("builtins", "__builtin__"):
            known[module, "set"] = known[module, "frozenset"] = _same(list)
        for module in ("pathlib", "pathlib._local"):
            for kind in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
                known[module, kind] = lambda *parts: self._text(parts)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            known[module, "_reconstruct"] = StoredArray
            known[module, "scalar"] = _scalar
        return known

    def _spend(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise PthError(
                f"its values take more than {self._limit / 2**20:.0f} MiB, many times the file's "
                "size; if that is intended, save contiguous tensors (tensor.clone())"
            )

    def _ordered(self, pairs: Any = ()) -> dict[Any, Any]:
        """Returns the OrderedDict of pairs [[name, value]], the form that Python 2 pickled."""
        if not isinstance(pairs, list | tuple):
            raise PthError(f"an OrderedDict is built from a {type(pairs).__name__}, expected pairs")
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise PthError("an OrderedDict is not built from pairs of a name and a value")
        self._spend(_PAIR_BYTES * len(pairs))
        return dict(couples([item for pair in pairs for item in pair]))

    def _text(self, parts: Sequence[Any]) -> str:
        """Joins the parts of a path, or of a device."""
        if not all(isinstance(part, str) for part in parts):
            raise PthError("a path or a device is not text")
        self._spend(sum(map(len, parts)))
        return "/".join(parts).replace("//", "/")

    def _encode(self, text: str, encoding: str) -> bytes:
        """Returns bytes that an older protocol wrote as text."""
        if encoding != "latin1":
            raise PthError("bytes are encoded as text that is not latin1")
        self._spend(len(text))
        return text.encode("latin1")

    def _tensor(self, storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Any:
        return self._counted(storage, storage.dtype, offset, shape, strides)

    def _tensor_v3(
        self,
        storage: Storage,
        offset: int,
        shape: Any,
        strides: Any,
        _grad: Any,
        _hooks: Any,
        dtype: StorageType,
        *_: Any,
    ) -> StoredTensor:
        return self._counted(storage, dtype.dtype, offset, shape, strides)

    def _counted(
        self, storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any
    ) -> StoredTensor:
        tensor = StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))
        self._spend(tensor.size * dtype.itemsize)
        return tensor


def _same(kind: type) -> Callable[..., Any]:
    """Returns a call that checks the type of its argument and returns it without a copy."""

    def same(value: Any) -> Any:
        if not isinstance(value, kind):
            raise PthError(f"expected a {kind.__name__}, got a {type(value).__name__}")
        return value

    return same
