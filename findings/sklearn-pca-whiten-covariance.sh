#!/usr/bin/env bash
# scikit-learn 1.9.1: PCA(whiten=True).get_covariance() is not the covariance of the data, and
# get_precision, score_samples and score, which are made from it, are wrong with it.
#
# Whitening divides what transform returns; `components_`, `explained_variance_` and
# `noise_variance_` are the same with and without it. One would guess that the model, its covariance
# and its likelihood are too. But with whiten=True the components, of length one, are multiplied by
# their deviations before they are multiplied by their variances: a variance of 25 is told as 622,
# and the data's own likelihood falls. Whoever compares models by `score`, as in a grid search over
# whiten or n_components, compares two different things.
#
# Output seen:
#   variances of the columns: [25.4  8.6  1. ]
#   whiten=False: covariance [25.4  8.6  1. ] score -6.95
#   whiten=True: covariance [622.3  66.9   1. ] score -8.66
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet scikit-learn==1.9.1 numpy==2.3.5 scipy==1.16.3
cat > "$directory/run.py" <<'PYTHON'
import numpy as np
from sklearn.decomposition import PCA

X = np.random.default_rng(0).normal(size=(2000, 3)) * [5, 3, 1]
print("variances of the columns:", X.var(axis=0, ddof=1).round(1))
for whiten in (False, True):
    model = PCA(2, whiten=whiten).fit(X)
    covariance = np.diag(model.get_covariance()).round(1)
    print(f"whiten={whiten}: covariance {covariance} score {model.score(X):.2f}")
PYTHON
seen=$("$directory/venv/bin/python" "$directory/run.py")
echo "$seen"
[ "$seen" = 'variances of the columns: [25.4  8.6  1. ]
whiten=False: covariance [25.4  8.6  1. ] score -6.95
whiten=True: covariance [622.3  66.9   1. ] score -8.66' ]
