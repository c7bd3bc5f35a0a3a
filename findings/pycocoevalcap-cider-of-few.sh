#!/usr/bin/env bash
# pycocoevalcap 1.2: the CIDEr of a caption depends on the other pictures it is scored with; alone, a perfect one has
# 0.
#
# CIDEr is said to range up to 10, so one would guess that a caption equal to its reference has 10, whatever else is
# scored. Rarity of words is counted in the references of that very call: words that all pictures have weigh log 1 =
# 0, so one picture, a batch of one, or pictures with the same reference all score 0. Captions of fewer than four
# words cannot reach 10 either (n-grams of length 1 to 4 count a quarter each). Means over batches, parts of a data
# set, or a subset that an experiment chose are so not the CIDEr of the whole, and two subsets cannot be compared.
#
# Output seen (each caption equals its reference):
#   one picture: 0.0
#   two pictures, the same reference: [0. 0.]
#   two pictures, references of six and two words: [10.  5.]
#   the mean of two calls with one picture each: 0.0, one call with both: 7.5
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet pycocoevalcap==1.2 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import numpy as np
from pycocoevalcap.cider.cider import Cider


def perfect(*captions):
    """CIDEr of captions that equal their references, and of each."""
    people = {number: [caption] for number, caption in enumerate(captions)}
    mean, each = Cider().compute_score(people, people)
    return float(mean), np.round(each, 6)


dog, bus = "a red dog on the grass", "blue bus"
alone, _ = perfect(dog)
print("one picture:", alone)
_, same = perfect(dog, dog)
print("two pictures, the same reference:", same)
both, apart = perfect(dog, bus)
print("two pictures, references of six and two words:", apart)
calls = (perfect(dog)[0] + perfect(bus)[0]) / 2
print(f"the mean of two calls with one picture each: {calls}, one call with both: {both}")
assert alone == 0 and not same.any() and calls == 0
assert np.allclose(apart, [10, 5]) and np.isclose(both, 7.5)
PYTHON
"$directory/venv/bin/python" "$directory/run.py"
