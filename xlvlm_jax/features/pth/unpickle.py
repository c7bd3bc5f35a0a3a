"""A pickle reader that can only build plain values and tensors.

`pickle` executes what a file asks for. Here the standard library only splits the bytes into opcodes
(`pickletools.genops`), and each opcode below has its own implementation. All others are refused,
and so are globals that `torch_globals` does not know, by name, before anything is built with them.
Values stay within a small multiple of the file's size: the memo is a dictionary, nothing is copied,
and shared values are never traversed (keys are scalars, messages only quote strings).
"""

import io
import math
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class PthError(ValueError):
    """A file is damaged, or asks for something that is not allowed; the message says which."""


class Buildable:
    """A value that BUILD may complete, once."""

    def build(self, state: Any) -> None:
        """Takes the state from the pickle."""
        raise NotImplementedError


class Function:
    """A function that REDUCE may call; a pickle can call nothing else."""

    def __init__(self, name: str, call: Callable[..., Any]):
        self.name, self.call = name, call


class Opaque(Buildable):
    """An object of a class that is not known: its class's name, and its state as plain values.

    Nothing of the class is run.
    """

    def __init__(self, name: str):
        self.name = name
        self.state: Any = None

    def build(self, state: Any) -> None:
        """Takes the state, such as the dict of an object's attributes."""
        self.state = state


_MARK = object()

_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_BELOW = {"NEWOBJ": 2, "NEWOBJ_EX": 3}  # where the class is on the stack
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}


class Machine:
    """Reads one pickle.

    Args:
        stream: positioned at the pickle; afterwards, just after it.
        find: (module, name) -> what the pickle may use under that name, or PthError.
        persistent: maps an identifier of something outside the pickle to its value.
    """

    def __init__(
        self,
        stream: io.BytesIO | io.BufferedReader,
        find: Callable[[str, str], Any],
        persistent: Callable[[Any], Any],
    ):
        self._stream, self._find, self._persistent = stream, find, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Returns the value of the pickle.

        Raises:
            PthError: the pickle asks for something that is not allowed. Damaged bytes may raise any
                error.
        """
        for opcode, argument, _ in pickletools.genops(self._stream):
            if opcode.name == "STOP":
                return self._pop()
            self._step(opcode.name, argument)
        raise PthError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(self._top())
        elif name in _TUPLES:
            stack.append(tuple(reversed([self._pop() for _ in range(_TUPLES[name])])))
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name == "LIST":
            stack.append(list(self._to_mark()))
        elif name == "DICT":
            stack.append(dict(couples(self._to_mark())))
        elif name == "APPEND":
            self._extend([self._pop()])
        elif name in ("APPENDS", "ADDITEMS"):
            self._extend(self._to_mark())
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [self._pop(), self._pop()][::-1]
            self._top(dict).update(couples(items))
        elif name == "GLOBAL":
            stack.append(self._find(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = self._pop(), self._pop()
            stack.append(self._find(str(module), str(attribute)))
        elif name in ("NEWOBJ", "NEWOBJ_EX") and isinstance(self._stack[-_BELOW[name]], Opaque):
            made = stack[-_BELOW[name]]
            del stack[-_BELOW[name] :]
            stack.append(Opaque(made.name))
        elif name in ("INST", "EXT1", "EXT2", "EXT4", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            if name == "INST":
                self._find(*argument.split(" ", 1))
            raise PthError(f"the pickle creates an object (opcode {name}), which is not allowed")
        elif name == "BINPERSID":
            stack.append(self._persistent(self._pop()))
        elif name == "REDUCE":
            arguments, function = self._pop(), self._pop()
            if isinstance(function, Opaque):
                stack.append(Opaque(function.name))
                return
            if not isinstance(function, Function):
                raise PthError(f"the pickle calls a {type(function).__name__}")
            stack.append(function.call(*arguments))
        elif name == "BUILD":
            state, value = self._pop(), self._top()
            if isinstance(value, Buildable):
                value.build(state)
            elif not isinstance(value, dict):  # attributes of an OrderedDict, not needed
                raise PthError(f"the pickle sets the state of a {type(value).__name__}")
        else:
            raise PthError(f"the pickle uses opcode {name}, which is not allowed")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise PthError("the pickle takes a value from an empty stack")
        return value

    def _top(self, kind: type = object) -> Any:
        value = self._stack[-1]
        if value is _MARK or not isinstance(value, kind):
            raise PthError(f"the pickle fills a {type(value).__name__} as a {kind.__name__}")
        return value

    def _to_mark(self) -> list[Any]:
        taken = []
        while (value := self._stack.pop()) is not _MARK:
            taken.append(value)
        return taken[::-1]

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)


def couples(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields (key, value) of alternating items.

    Raises:
        PthError: a key is not a plain value.
    """
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise PthError(f"a dictionary has a {type(key).__name__} as a key")
        yield key, value


class Storage:
    """A run of numbers that tensors are views of; `data` is set when its bytes are found."""

    def __init__(self, dtype: np.dtype, length: int):
        self.dtype, self.length = dtype, length
        self.data: np.ndarray | None = None
        self.swapped = False  # whether the numbers have the other byte order

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.length * self.dtype.itemsize


class StoredTensor:
    """A tensor in a file. Nothing is read before `numpy` (or `numpy.asarray`) is called.

    Attributes:
        shape: size of each axis.
        dtype: numpy dtype; bfloat16 comes from ml_dtypes.

    Raises:
        PthError: the shape is invalid, or reaches beyond the storage.
    """

    def __init__(
        self, storage: Storage, dtype: np.dtype, offset: int, shape: tuple, strides: tuple
    ):
        whole = (*shape, *strides, offset)
        if len(shape) != len(strides) or len(shape) > 32:
            raise PthError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
        if not all(type(n) is int and 0 <= n < 2**40 for n in whole):
            raise PthError("a tensor has an invalid shape, strides or offset")
        if math.prod(max(n, 1) for n in shape) >= 2**56:
            raise PthError(f"a tensor has shape {shape}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        held = storage.nbytes // dtype.itemsize
        if 0 not in shape and last >= held:
            raise PthError(f"a tensor of shape {shape} reaches value {last} of a storage of {held}")
        self.shape, self.dtype = shape, dtype
        self._storage, self._offset, self._strides = storage, offset, strides

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def numpy(self) -> np.ndarray:
        """Returns a read-only view into the file."""
        if self.size == 0:
            return np.zeros(self.shape, self.dtype)
        size = self.dtype.itemsize
        strides = [step * size for step in self._strides]
        view = np.ndarray(self.shape, self.dtype, self._storage.data, self._offset * size, strides)
        return view.byteswap() if self._storage.swapped else view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        if dtype is not None and dtype != array.dtype:
            return array.astype(dtype)
        return array.copy() if copy else array
