#!/usr/bin/env bash
# interpreto 0.5.2: `MSE` grows with the root of the number of rows, and `SparsityRatio` divides by the number of concepts
# twice.
#
# One would guess that MSE is a mean of squares, and that the ratio is the share of active concepts. MSE is the
# Euclidean norm of the whole array of errors: four times as many of the same rows give twice the number, so that
# values of two sets of rows can't be compared. `Sparsity` is already the share of nonzero activations, a mean over rows
# and concepts, and `SparsityRatio` divides that once more: of 4 active concepts among 64 it gives 0.001.
#
# Output seen:
#   100 rows, each off by 0.5 in 16 columns: MSE 20.0, mean of squares 0.25
#   400 rows, each off by 0.5 in 16 columns: MSE 40.0, mean of squares 0.25
#   4 of 64 active: Sparsity 0.0625, SparsityRatio 0.00098
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet interpreto==0.5.2 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import types

import torch
from interpreto.concepts.metrics import MSE, Sparsity, SparsityRatio

# The metrics call these two methods of an explainer, and read its number of concepts.
codes = torch.zeros(64)
codes[:4] = 1
explainer = types.SimpleNamespace(
    activations_to_concepts=lambda x: codes.expand(len(x), 64),
    concepts_to_activations=lambda z: torch.zeros(len(z), 16),
    concept_model=types.SimpleNamespace(nb_concepts=64),
)
found = []
for rows in (100, 400):
    x = torch.full((rows, 16), 0.5)
    found.append(MSE(explainer).compute(x))
    print(
        f"{rows} rows, each off by 0.5 in 16 columns: MSE {found[-1]:.1f}, "
        f"mean of squares {x.square().mean():.2f}"
    )
found += [metric(explainer).compute(x) for metric in (Sparsity, SparsityRatio)]
print(f"4 of 64 active: Sparsity {found[2]:.4f}, SparsityRatio {found[3]:.5f}")
torch.testing.assert_close(found, [20.0, 40.0, 4 / 64, 4 / 64 / 64])
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
