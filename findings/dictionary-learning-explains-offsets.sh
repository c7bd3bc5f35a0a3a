#!/usr/bin/env bash
# dictionary-learning 0.1.0: `evaluate` gives `frac_variance_explained` 1.0 to a dictionary whose reconstructions are
# wrong by a constant, of any size.
#
# One would guess one minus the mean squared error over the variance, as sae-lens computes it. It is one minus the
# variance of the error, so what the reconstruction is off by on average does not count: a wrong b_dec, or one that was added
# twice or left out, is not seen. Beside it in the same result, `l2_ratio` and `cossim` do move.
#
# Output seen:
#   reconstruction = states + 0: frac_variance_explained 1.000, by the squared error 1.000
#   reconstruction = states + 1: frac_variance_explained 1.000, by the squared error -0.002
#   reconstruction = states + 100: frac_variance_explained 1.000, by the squared error -10023
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet dictionary-learning==0.1.0 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import torch
from dictionary_learning.dictionary import IdentityDict
from dictionary_learning.evaluation import evaluate


class Shifted(IdentityDict):
    def __init__(self, offset):
        super().__init__(8)
        self.offset = offset

    def forward(self, x, output_features=False, ghost_mask=None):
        return x + self.offset, x


torch.manual_seed(0)
x = torch.randn(1000, 8)
variance = x.var(0, correction=0).mean().item()
for offset in (0, 1, 100):
    found = evaluate(Shifted(offset), iter([x]))["frac_variance_explained"]
    right = 1 - offset**2 / variance
    print(
        f"reconstruction = states + {offset}: frac_variance_explained {found:.3f}, "
        f"by the squared error {right:.3f}"
    )
    assert abs(found - 1) < 1e-4
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
