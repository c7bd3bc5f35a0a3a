#!/usr/bin/env bash
# torchmetrics 1.9.0: the AUROC of the same scores depends on how they are batched (1.000 against 0.750) where some
# exceed 1, and is 0.5 of scores that rank perfectly where all are large.
#
# An area under a ROC curve depends on the order of the scores alone, so one would guess that any number may be one: an
# activation of a concept, a distance. If one score lies outside 0 to 1, all are taken for logits and go through a
# sigmoid, as is documented. But each batch is judged by itself: one whose activations happen to lie below 1 keeps its
# numbers, while those of another become 0.5 to 1, and the rows of both are ranked together. And the sigmoid, which
# keeps the order of real numbers, is exactly 1 in float32 from 17 on: all larger activations are tied. Average
# precision does the same. Scores replaced by their ranks, divided by how many there are, give what is meant.
#
# Output seen (rows with the concept always score higher than rows without):
#   six rows, scores 1 to 6: AUROC 1.000, average precision 1.000
#   six rows, scores 10 to 60: AUROC 0.667, average precision 0.600
#   six rows, scores 100 to 150: AUROC 0.500, average precision 0.500
#   two rows of 0.1 without, 0.4 and 3.0 with: AUROC in one batch 1.000, in two batches 0.750
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet torchmetrics==1.9.0 torch==2.13.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import torch
from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision


def score(metric, *batches):
    metric = metric()
    for scores, has_concept in batches:
        metric.update(torch.tensor(scores), torch.tensor(has_concept))
    return metric.compute().item()


found = {}
for scores in ([1.0, 2, 3, 4, 5, 6], [10.0, 20, 30, 40, 50, 60], [100.0, 110, 120, 130, 140, 150]):
    rows = scores, [0, 0, 0, 1, 1, 1]
    found[scores[-1]] = area, precision = score(BinaryAUROC, rows), score(BinaryAveragePrecision, rows)
    shown = f"scores {scores[0]:.0f} to {scores[-1]:.0f}"
    print(f"six rows, {shown}: AUROC {area:.3f}, average precision {precision:.3f}")

first, second = ([0.1, 0.4], [0, 1]), ([0.1, 3.0], [0, 1])
together = score(BinaryAUROC, (first[0] + second[0], first[1] + second[1]))
apart = score(BinaryAUROC, first, second)
print("two rows of 0.1 without, 0.4 and 3.0 with: ", end="")
print(f"AUROC in one batch {together:.3f}, in two batches {apart:.3f}")
assert found[6] == (1, 1) and found[150] == (0.5, 0.5) and max(found[60]) < 0.7
assert together == 1 and apart == 0.75
PYTHON
"$directory/venv/bin/python" "$directory/run.py"
