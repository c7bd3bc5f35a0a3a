#!/usr/bin/env bash
# captum 0.9.0: the accuracy of TCAV's classifier of two concepts is the share of the first one, however well it
# separates them.
#
# Whether a concept has a direction at all is read off the accuracy of the classifier that gives its vector. One would
# guess 1 for two clouds of points 60 deviations apart, as three of them have. A linear classifier has one score for two
# classes, and the class is chosen by argmax over scores, so that it is always the first. The number is the share of the
# first concept among the held-out third of the examples: near 0.5 for sets of the same size, moving with the seed like
# an accuracy of chance, and 0.9 or 0.2 where one set is larger. The vectors themselves tell all examples apart.
#
# Output seen (seeds 0 to 3, and the share of examples that the vectors tell apart):
#   50 and 50 examples: accuracy 0.61 0.45 0.58 0.45, by the vectors 1.00
#   50 and 10 examples: accuracy 0.79 0.89 0.95 0.95, by the vectors 1.00
#   10 and 50 examples: accuracy 0.21 0.21 0.21 0.21, by the vectors 1.00
#   50 and 50 and 50 examples: accuracy 1.00 1.00 1.00 1.00, by the vectors 1.00
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet captum==0.9.0 scikit-learn==1.9.1 torch==2.13.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import random
import tempfile

import torch
from captum.concept import TCAV, Concept
from torch.utils.data import DataLoader

PLACES = ((3.0, 0.0), (-3.0, 0.0), (0.0, 3.0))
points = [
    torch.tensor(place) + 0.1 * torch.randn(50, 2, generator=torch.Generator().manual_seed(number))
    for number, place in enumerate(PLACES)
]
model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 1))

found = {}
for counts in ((50, 50), (50, 10), (10, 50), (50, 50, 50)):
    examples = [points[number][:count] for number, count in enumerate(counts)]
    concepts = [Concept(k, f"concept {k}", DataLoader(rows, batch_size=50)) for k, rows in enumerate(examples)]
    accuracies, apart = [], []
    for seed in range(4):
        random.seed(seed)
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            (layers,) = TCAV(model, ["0"], save_path=folder).compute_cavs([concepts]).values()
        stats = layers["0"].stats
        accuracies.append(stats["accs"].item())
        chosen = [(rows @ stats["weights"].T).argmax(1) == k for k, rows in enumerate(examples)]
        apart.append(torch.cat(chosen).float().mean().item())
    found[counts] = accuracies, apart
    shown = " ".join(f"{accuracy:.2f}" for accuracy in accuracies)
    print(f"{' and '.join(map(str, counts))} examples: accuracy {shown}, by the vectors {min(apart):.2f}")
assert all(min(apart) == 1 for _, apart in found.values())
assert min(found[50, 50, 50][0]) == 1
assert max(found[50, 50][0]) < 0.7 and min(found[50, 10][0]) > 0.6 and max(found[10, 50][0]) < 0.4
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
