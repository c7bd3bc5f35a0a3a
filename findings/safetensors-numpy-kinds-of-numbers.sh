#!/usr/bin/env bash
# safetensors 0.8.0 with ml_dtypes 0.6.0: which kinds of numbers its NumPy functions read depends on the function.
#
# `load` takes the bytes of a file, `load_file` its path, so one would guess that they read the same. With ml_dtypes
# installed, `load_file` gives bfloat16; `load` of the same bytes raises KeyError. Float8, as checkpoints of this year
# store it, fails in both, though ml_dtypes has it: `load_file` looks for it in numpy itself.
#
# Output seen:
#   F32: load float32, load_file float32
#   BF16: load KeyError, load_file bfloat16
#   F8_E4M3: load KeyError, load_file AttributeError
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet safetensors==0.8.0 ml_dtypes==0.6.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import json
import pathlib
import struct
import sys

import ml_dtypes  # noqa: F401  bfloat16 is known to numpy from here on
import safetensors.numpy as st

found = {}
for kind, size in (("F32", 4), ("BF16", 2), ("F8_E4M3", 1)):
    entry = {"dtype": kind, "shape": [2], "data_offsets": [0, 2 * size]}
    header = json.dumps({"x": entry}).encode()
    path = pathlib.Path(sys.argv[1], f"{kind}.safetensors")
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * size))
    for name, read in (("load", lambda: st.load(path.read_bytes())), ("load_file", lambda: st.load_file(path))):
        try:
            found[kind, name] = str(read()["x"].dtype)
        except (KeyError, AttributeError) as error:
            found[kind, name] = type(error).__name__
    print(f"{kind}: load {found[kind, 'load']}, load_file {found[kind, 'load_file']}")
assert list(found.values()) == ["float32"] * 2 + ["KeyError", "bfloat16", "KeyError", "AttributeError"]
PYTHON
"$directory/venv/bin/python" "$directory/run.py" "$directory" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
