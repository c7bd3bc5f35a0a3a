"""Reads files of torch.save: the zip format, and the older one of concatenated pickles."""

import io
import mmap
import os
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from xlvlm_jax.features.pth.torch_globals import Globals, StorageType
from xlvlm_jax.features.pth.unpickle import Machine, PthError, Storage

_MAGIC = 0x1950A86A20F9469CFC6C  # start of a file of the older format, as a pickle
_PROTOCOL = 1001
# Tensors may take this multiple of the file's size (views of one storage), or this many bytes.
_EXPANSION, _SMALL = 16, 64 * 2**20


def read_pth(path: str | os.PathLike[str], *, opaque: bool = False) -> Any:
    """Returns the value that was saved with torch.save; executes nothing in the file.

    Tensors and numpy arrays are read by `numpy.asarray` (a tensor is a `StoredTensor`: its numbers
    stay in the file until then); containers are dict, list and tuple, paths are text. Parameters
    are returned as their data; requires_grad and devices are dropped.

    Args:
        path: the file.
        opaque: whether objects of other classes are passed over (an `unpickle.Opaque` stands for
            each) instead of refused. Nothing of them is run either way.

    Raises:
        FileNotFoundError: the file does not exist.
        PthError: (a ValueError) the file is not from torch.save, is damaged or truncated, or asks
            for a global that is neither a tensor nor a plain value; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .pth file written by torch.save")
    try:
        with open(path, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            if size == 0:
                raise PthError("empty; expected a file written by torch.save")
            # Views of the map stay valid after the file is closed.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            read = _read_zip if content[:2] == b"PK" else _read_legacy
            return read(file, content, Globals(max(_EXPANSION * size, _SMALL), opaque=opaque))
    except PthError as error:
        # A name in the file may contain a newline.
        raise PthError(f"{path}: {' '.join(str(error).split())}") from None
    # Any other error comes from damaged bytes, which may give any value instead of the expected
    # one.
    except Exception as error:
        said = " ".join(str(error).split())[:100]
        raise PthError(
            f"{path}: damaged, or not written by torch.save ({type(error).__name__}: {said});"
            " copy or save it again"
        ) from error


def _storage(storages: dict[str, Storage], identifier: Any) -> Storage:
    """Returns the storage of ("storage", type, key, device, number of values, ...)."""
    kind, dtype, key, _, length, *view = identifier
    if kind != "storage" or not isinstance(dtype, StorageType) or not isinstance(key, str):
        raise PthError("the pickle refers to something that is not a storage")
    if type(length) is not int or length < 0 or any(part is not None for part in view):
        raise PthError(
            f"storage {key[:40]!r} is a view, or has no length; save it with a newer torch"
        )
    storage = storages.setdefault(key, Storage(dtype.dtype, length))
    if (storage.dtype, storage.length) != (dtype.dtype, length):
        raise PthError(f"storage {key[:40]!r} is described in two ways")
    return storage


def _read_zip(file: io.BufferedReader, content: mmap.mmap, known: Globals) -> Any:
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise PthError(
            f"a zip file with {len(names)} data.pkl; expected a file written by torch.save"
        )
    root = names[0].removesuffix("data.pkl")
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise PthError(f"{info.filename[:80]!r} is compressed, which torch.save never does")
    if sum(info.file_size for info in archive.infolist()) > len(content):
        raise PthError("a zip file whose parts overlap")
    # None has one if torch.serialization.set_crc32_options(False) was called.
    if any(info.CRC for info in archive.infolist()) and (broken := archive.testzip()):
        raise PthError(f"{broken[:80]!r} is damaged (its checksum differs); copy it again")

    def part(name: str) -> tuple[int, int]:
        """Returns where the bytes of a part start in the file, and their number."""
        info = archive.getinfo(name)
        # The local header may be longer than the directory's entry: torch uses it to align data.
        header = info.header_offset + 26
        return header + 4 + sum(struct.unpack_from("<HH", content, header)), info.file_size

    def read(name: str) -> bytes:
        start, size = part(name)
        return content[start : start + size]

    order = "little"
    if f"{root}byteorder" in archive.namelist():
        order = read(f"{root}byteorder").decode("ascii")

    storages: dict[str, Storage] = {}
    stream = io.BytesIO(read(names[0]))
    value = Machine(stream, known.find, lambda pid: _storage(storages, pid)).load()
    for key, storage in storages.items():
        _fill(storage, key, content, *part(f"{root}data/{key}"), order)
    return value


def _read_legacy(file: io.BufferedReader, content: mmap.mmap, known: Globals) -> Any:
    def plain() -> Any:
        def refuse(_: Any) -> Any:
            raise PthError("its header refers to storages")

        return Machine(file, known.find, refuse).load()

    file.seek(0)
    # A plain pickle that asks for a global is refused here, and the global is named.
    if plain() != _MAGIC:
        raise PthError("a pickle that torch.save did not write; expected hidden states")
    if plain() != _PROTOCOL:
        raise PthError(f"written in another version of the format than {_PROTOCOL}")
    system = plain()
    order = "little" if system.get("little_endian", True) else "big"
    storages: dict[str, Storage] = {}
    value = Machine(file, known.find, lambda pid: _storage(storages, pid)).load()
    for key in plain():
        length = file.read(8)
        if len(length) < 8:
            raise PthError("truncated; copy it again")
        if key not in storages:
            raise PthError("has a storage that no tensor uses")
        storage = storages[key]
        (count,) = struct.unpack("<q" if order == "little" else ">q", length)
        size = count * storage.dtype.itemsize
        start = file.tell()
        _fill(storage, key, content, start, min(size, len(content) - start), order)
        file.seek(start + size)
    if missing := [key for key, storage in storages.items() if storage.data is None]:
        raise PthError(f"storage {missing[0][:40]!r} is missing; copy it again")
    return value


def _fill(
    storage: Storage, key: str, content: mmap.mmap, start: int, size: int, order: str
) -> None:
    expected = storage.length * storage.dtype.itemsize
    if size != expected or start + size > len(content):
        raise PthError(
            f"storage {key[:40]!r} has {size} bytes, expected {expected}; truncated, copy it again"
        )
    storage.data = np.frombuffer(content, np.uint8, size, start) if size else np.zeros(0, np.uint8)
    storage.swapped = order != sys.byteorder
