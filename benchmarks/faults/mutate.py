"""Damages valid files: any bytes, or the structure of JSON, safetensors and torch files."""

import io
import json
import random
import struct
import zipfile
from typing import Any

MARKUP = "<script>alert(1)</script>"
MARKER = "fuzz-was-here"  # a file that appears only if a pickle was executed
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, -0.0),
    *(float("nan"), float("inf"), "", "a\nb", MARKUP, "\x00", "\ud800", "../../etc", "é" * 300),
    *([], {}, [[]], [1, "a", None], {"": ""}, {MARKUP: MARKUP}, "0", "none", "." * 5000),
)
# Pickles that run a command, in several protocols; none may have an effect.
HOSTILE = (
    f"cos\nsystem\n(S'touch {MARKER}'\ntR.".encode(),
    f"(S'touch {MARKER}'\nios\nsystem\n.".encode(),
    b"\x8c\x02os\x8c\x06system\x93\x8c"
    + bytes([len(MARKER) + 6])
    + b"touch "
    + MARKER.encode()
    + b"\x85R.",
    f"cbuiltins\nexec\n(S\"open('{MARKER}','w')\"\ntR.".encode(),
    f"cbuiltins\neval\n(S\"open('{MARKER}','w')\"\ntR".encode(),
)


def mutate(name: str, content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Returns a damaged copy of a file, by its format or sometimes only by its bytes.

    Args:
        name: of the file; its suffix tells the kind.
        others: files to splice from.
    """
    kinds = {".json": _json, ".jsonl": _jsonl, ".safetensors": _safetensors, ".pth": _pth}
    suffix = name[name.rfind(".") :]
    if suffix in kinds and rng.random() < 0.7:
        try:
            return kinds[suffix](content, others, rng)
        except Exception:  # it was damaged before, and can't be taken apart
            return _bytes(content, others, rng)
    return _bytes(content, others, rng)


def _bytes(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Flips, truncates, inserts, splices or changes numbers, once or several times."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        # Lengths are stored in headers.
        at = min(at, rng.choice((len(data), 64, 16)))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 4:
            del data[at : at + rng.choice((1, 2, 8, 100))]
        elif kind == 5:
            other = rng.choice(others) or b"x"
            start = rng.randrange(len(other))
            data[at : at + rng.choice((0, 50))] = other[start : start + rng.choice((4, 50, 5000))]
        elif kind == 6:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(INTERESTING) % (1 << 8 * size)
            data[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))
        else:
            data[at:at] = data[at : at + 40] * rng.choice((1, 3, 50))
    return bytes(data)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Returns (container, key) of every entry of a JSON value, at any depth."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            _places(value[key], found)
    return found


def damaged_value(value: Any, rng: random.Random) -> Any:
    """Drops, renames or doubles entries, or gives them another type or size."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value, [])
        if not places or rng.random() < 0.02:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice((MARKUP, "", "x", key + " ", key.upper()))] = holder.pop(key)
        elif kind == 2:
            other, place = rng.choice(places)
            if isinstance(other, dict) and place not in other:
                continue
            if isinstance(other, list) and place >= len(other):
                continue
            holder[key] = json.loads(json.dumps(other[place]))
        elif kind == 3 and isinstance(holder, list):
            holder += holder[key : key + 1] * rng.choice((1, 20))
        else:
            holder[key] = rng.choice(VALUES)
    return value


def _text(value: Any, rng: random.Random) -> bytes:
    """Writes JSON as other tools may: other encodings, a byte-order mark, deep nesting."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    kind = rng.randrange(30)
    if kind < 3:
        return text.encode(("utf-8-sig", "utf-16", "utf-32")[kind], "surrogatepass")
    if kind == 3:
        return text.encode("latin-1", "replace")
    if kind == 4:
        depth = rng.choice((500, 5000, 200_000))
        return b"[" * depth + text.encode("utf-8", "surrogatepass") + b"]" * depth
    if kind == 5:
        return text.replace("1", "1" * rng.choice((20, 400, 5000)), 1).encode("utf-8", "replace")
    return text.encode("utf-8", "surrogatepass")


def _json(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    return _text(damaged_value(json.loads(content), rng), rng)


def _jsonl(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = _json(lines[number], others, rng)
    return b"\n".join(lines) + b"\n"


def _safetensors(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Changes the header's values, and updates its length."""
    (size,) = struct.unpack_from("<Q", content)
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    kept = header.get("__metadata__")
    if kept and rng.random() < 0.5:  # a value of the metadata, which is JSON too
        key = rng.choice(list(kept))
        try:
            kept[key] = json.dumps(damaged_value(json.loads(kept[key]), rng))
        except ValueError:
            kept[key] = str(rng.choice(VALUES))
        text = json.dumps(header).encode()
    else:
        text = _text(damaged_value(header, rng), rng)
    if rng.random() < 0.2:
        body = _bytes(body, others, rng)
    return struct.pack("<Q", len(text)) + text + body


def _pth(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Changes the pickle, and rebuilds the archive so that its checksums are valid."""
    if not content.startswith(b"PK"):
        return _hostile(content, rng) if rng.random() < 0.3 else _bytes(content, others, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    chosen = next(iter(parts)) if rng.random() < 0.8 else rng.choice(list(parts))
    if rng.random() < 0.3:
        parts[chosen] = _hostile(parts[chosen], rng)
    else:
        parts[chosen] = _bytes(parts[chosen], others, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return out.getvalue()


def _hostile(content: bytes, rng: random.Random) -> bytes:
    at = rng.choice((0, 2, rng.randrange(len(content) + 1)))
    return content[:at] + rng.choice(HOSTILE) + content[at:]
