#!/usr/bin/env bash
# overcomplete 0.3.0: `r2_score`, which its training prints, is near 1 for a reconstruction that knows nothing but the
# mean of each column.
#
# Its docstring says that 0 is as good as the mean, and one would guess the mean of each column, as in scikit-learn or in
# an explained variance. It is one number, the mean of all rows and columns: in states where one dimension is a
# hundred times larger than the rest, as hidden states of language models have, the constant vector of means scores 0.999,
# and scores of real dictionaries differ in the third digit. Subtract the columns' means first.
#
# Output seen:
#   column means as reconstruction: r2_score 0.999, explained variance 0.000
#   the same rows, centred first: r2_score 0.000
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet torch==2.13.0 einops==0.8.2 scikit-learn==1.9.1 pillow==13.0.0 tqdm==4.70.1
"$directory/venv/bin/pip" install --quiet --no-deps overcomplete==0.3.0
cat > "$directory/run.py" <<'PYTHON'
import importlib.util
import sys
import types

import torch

# Its own __init__ also imports torchvision and plots, which nothing here uses.
package = types.ModuleType("overcomplete")
package.__path__ = list(importlib.util.find_spec("overcomplete").submodule_search_locations)
sys.modules["overcomplete"] = package

from overcomplete.metrics import r2_score

torch.manual_seed(0)
x = torch.randn(1000, 8)
x[:, 0] += 100
means = x.mean(0).expand_as(x)
score = r2_score(x, means).item()
explained = 1 - ((x - means).square().sum() / (x - x.mean(0)).square().sum()).item()
print(f"column means as reconstruction: r2_score {score:.3f}, explained variance {explained:.3f}")
centred = abs(r2_score(x - means, torch.zeros_like(x)).item())
print(f"the same rows, centred first: r2_score {centred:.3f}")
assert score > 0.99 and explained == 0 and centred < 1e-3
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
