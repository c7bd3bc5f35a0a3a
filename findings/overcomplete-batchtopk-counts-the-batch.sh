#!/usr/bin/env bash
# overcomplete 0.3.0: `top_k` of BatchTopKSAE is the number of codes of a whole batch, not per row.
#
# In the paper that it cites, in sae-lens and in dictionary-learning, k is the average per row: a batch of n rows keeps
# n k codes; and `top_k` of the same package's TopKSAE is per row. Here a batch keeps `top_k` codes whatever its size. With
# top_k=4, all but at most four of 1,000 rows are reconstructed from nothing, and the default (a tenth of the number of
# concepts) does not know the batch either. Give it k times the number of rows, and let no batch be shorter.
#
# Output seen:
#   TopKSAE, 10 rows: 40 codes; BatchTopKSAE: 4 codes
#   TopKSAE, 1000 rows: 4000 codes; BatchTopKSAE: 4 codes
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

from overcomplete.sae import BatchTopKSAE, TopKSAE

torch.manual_seed(0)
for rows in (10, 1000):
    x, counts = torch.randn(rows, 8), []
    for kind in (TopKSAE, BatchTopKSAE):
        sae = kind(8, nb_concepts=64, top_k=4).train()
        _, codes = sae.encode(x)
        counts.append(int((codes > 0).sum()))
    print(f"TopKSAE, {rows} rows: {counts[0]} codes; BatchTopKSAE: {counts[1]} codes")
    assert counts == [4 * rows, 4]
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
