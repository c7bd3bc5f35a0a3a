#!/usr/bin/env bash
# safetensors 0.8.0: `safetensors.numpy.save` and `save_file` store a transposed or strided array with wrong values.
#
# One would guess that an array is stored by its values, as 0.7.0 did, or refused if it is not contiguous.
# 0.8.0 writes the array's shape, but the bytes as they lie in
# memory from its first number on. A transposed matrix comes back scrambled, a column comes back as part
# of a row, with the right shape and dtype and no error. Whoever stores `W.T`, a column of a matrix or
# what is in Fortran order has to make it contiguous first.
#
# Output seen (of a matrix [[0, 1, 2], [3, 4, 5]]):
#   0.7.0: transposed [[0, 3], [1, 4], [2, 5]], second column [1, 4], Fortran order [[0, 1, 2], [3, 4, 5]]
#   0.8.0: transposed [[0, 1], [2, 3], [4, 5]], second column [1, 2], Fortran order [[0, 3, 1], [4, 2, 5]]
#   0.8.0, np.ascontiguousarray first: transposed [[0, 3], [1, 4], [2, 5]], second column [1, 4], Fortran order [[0, 1, 2], [3, 4, 5]]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/run.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, load_file, save, save_file

name, contiguous = safetensors.__version__, len(sys.argv) > 2
Z = np.arange(6, dtype=np.float32).reshape(2, 3)
arrays = {"transposed": Z.T, "second column": Z[:, 1], "Fortran order": np.asfortranarray(Z)}
given = {key: np.ascontiguousarray(each) if contiguous else each for key, each in arrays.items()}
save_file(given, sys.argv[1])
found, in_memory = load_file(sys.argv[1]), load(save(given))
shown = ", ".join(f"{key} {found[key].astype(int).tolist()}" for key in arrays)
print(f"{name}, np.ascontiguousarray first:" if contiguous else f"{name}:", shown)
for key, wanted in arrays.items():
    assert found[key].shape == wanted.shape and (found[key] == in_memory[key]).all()
    is_right = bool((found[key] == wanted).all())
    assert is_right == (contiguous or name == "0.7.0"), key
PYTHON
for version in 0.7.0 0.8.0; do
    python3 -m venv "$directory/$version"
    "$directory/$version/bin/pip" install --quiet safetensors==$version numpy==2.3.5
    "$directory/$version/bin/python" "$directory/run.py" "$directory/z.safetensors"
done
"$directory/0.8.0/bin/python" "$directory/run.py" "$directory/z.safetensors" contiguous
