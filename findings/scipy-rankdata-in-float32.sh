#!/usr/bin/env bash
# scipy 1.18.1: rankdata of float32 returns float32, in which ranks beyond 16,777,216 are no longer all different;
# 1.17.1 returned float64.
#
# Ranks are counts, and the function always gave float64, so one would guess that only memory limits how many rows can
# be ranked. Now the result has the dtype of the input: the ranks of two values that differ become equal from 2^24
# rows on (activations of some 30,000 pictures' image tokens), and means of tied ranks lose their half. Areas under a
# ROC curve and tests that are computed from them change without a warning; so does the dtype of everything that
# follows.
#
# Output seen:
#   scipy 1.17.1: float64; the last four of 16777220 ranks: 16777217 16777218 16777219 16777220
#   scipy 1.18.1: float32; the last four of 16777220 ranks: 16777216 16777216 16777220 16777220
set -euo pipefail
python=python3
for candidate in python3.13 python3.12 "$HOME"/.pyenv/versions/3.1[23].*/bin/python3; do
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then python=$candidate; fi
done
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/run.py" <<'PYTHON'
import numpy as np
import scipy
from scipy.stats import rankdata

rows = 2**24 + 4
values = np.arange(rows, dtype=np.int32).view(np.float32)  # positive, in order, all different
found = rankdata(values)
last = " ".join(f"{rank:.0f}" for rank in found[-4:])
print(f"scipy {scipy.__version__}: {found.dtype}; the last four of {rows} ranks: {last}")
right = np.arange(rows - 3, rows + 1)
if scipy.__version__ == "1.17.1":
    assert found.dtype == np.float64 and np.array_equal(found[-4:], right)
else:
    assert found.dtype == np.float32 and not np.array_equal(found[-4:], right)
PYTHON
python3 -m venv "$directory/before"
"$directory/before/bin/pip" install --quiet scipy==1.17.1 numpy==2.3.5
"$directory/before/bin/python" "$directory/run.py"
"$python" -m venv "$directory/now" # SciPy 1.18 needs Python 3.12
"$directory/now/bin/pip" install --quiet scipy==1.18.1 numpy==2.5.5
"$directory/now/bin/python" "$directory/run.py"
