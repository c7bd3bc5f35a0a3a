#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata of several entries are written as files of other bytes.
#
# Tensors are laid out alike in whatever order they are given, so one would guess that equal content gives equal bytes.
# It does without metadata or with one entry. Several entries are written in an order that changes from one save to the
# next, even within a process. A cache, a registry or a test that knows a checkpoint or an adapter by a digest of its
# file takes a copy that was saved again for a different one. A digest of the header with sorted keys and of the bytes
# behind it is the same for all. (Reported upstream: safetensors #584.)
#
# Output seen (20 saves in memory, 20 to a file):
#   no metadata: one digest
#   one entry: one digest
#   six entries: several digests, content read back equal, one digest of sorted headers
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import hashlib
import json
import pathlib
import struct
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save, save_file

folder = pathlib.Path(sys.argv[1])
tensors = {name: np.full(3, number, np.float32) for number, name in enumerate("abc")}
turned = dict(reversed(tensors.items()))


def of_sorted_header(content):
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True)
    return hashlib.sha256(header.encode() + content[8 + size :]).hexdigest()


def is_equal(path, metadata):
    with safe_open(path, "numpy") as file:
        same = [(file.get_tensor(name) == tensors[name]).all() for name in file.keys()]
        return len(same) == len(tensors) and all(same) and file.metadata() == metadata


for names in ("", "a", "abcdef"):
    metadata = {name: name for name in names} or None
    in_memory, on_disk = set(), set()
    for number in range(20):
        given = turned if number % 2 else tensors
        path = folder / f"{len(names)}-{number}.safetensors"
        in_memory.add(save(given, metadata))
        save_file(given, path, metadata)
        on_disk.add(path.read_bytes())
        assert is_equal(path, metadata)
    digests = [len({hashlib.sha256(each).hexdigest() for each in files}) for files in (in_memory, on_disk)]
    assert len({of_sorted_header(each) for each in in_memory | on_disk}) == 1
    if metadata is None or len(metadata) == 1:
        assert digests == [1, 1] and in_memory == on_disk
        print("one entry: one digest" if metadata else "no metadata: one digest")
    else:
        assert min(digests) > 1
        print("six entries: several digests, content read back equal, one digest of sorted headers")
PYTHON
"$directory/venv/bin/python" "$directory/run.py" "$directory"
