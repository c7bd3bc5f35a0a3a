#!/usr/bin/env bash
# scikit-learn 1.9.1: PCA of float32 rows whose mean is large loses digits by the default solver, silently.
#
# PCA centres, so one would guess that an offset of all rows changes nothing but rounding of the input, as it is with
# svd_solver="full". Since 1.5, "auto" takes "covariance_eigh" where there are ten times more rows than columns (of at
# most 1,000), and that one forms the products of the rows as they are and then subtracts those of their mean: both
# are about the square of the offset, and float32 has no digits left for their difference. Residual streams have such
# columns ("massive activations"). An offset of 1,000, where deviations are 1 to 16, costs 1 % of the singular
# values, 10,000 all their digits, without a warning.
#
# Output seen (the digits of "auto" depend on the BLAS):
#   offset     0: error of the singular values auto 7.3e-08, full 5.2e-07; explained 0.864 and 0.864
#   offset  1000: error of the singular values auto 1.7e-02, full 4.6e-07; explained 0.865 and 0.864
#   offset 10000: error of the singular values auto 1.3e+00, full 5.6e-07; explained 0.929 and 0.864
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet scikit-learn==1.9.1 numpy==2.3.5 scipy==1.16.3
cat > "$directory/run.py" <<'PYTHON'
import warnings

import numpy as np
from sklearn.decomposition import PCA

warnings.simplefilter("error")
noise = np.random.default_rng(0).standard_normal((2000, 16)) * np.arange(1, 17)
for offset, low, high in ((0, 0, 1e-5), (1_000, 1e-4, 1e-1), (10_000, 0.1, 10)):
    rows = (offset + noise).astype(np.float32)
    right = np.linalg.svd(rows - rows.mean(axis=0, dtype=float), compute_uv=False)[:8]
    auto, full = (PCA(8, svd_solver=solver).fit(rows) for solver in ("auto", "full"))
    errors = [np.abs(pca.singular_values_ / right - 1).max() for pca in (auto, full)]
    explained = [pca.explained_variance_ratio_.sum() for pca in (auto, full)]
    print(
        f"offset {offset:5}: error of the singular values auto {errors[0]:.1e}, full {errors[1]:.1e};"
        f" explained {explained[0]:.3f} and {explained[1]:.3f}"
    )
    assert low <= errors[0] <= high and errors[1] < 1e-5
PYTHON
"$directory/venv/bin/python" "$directory/run.py"
