#!/usr/bin/env bash
# pycocoevalcap 1.2: a caption that equals none of its references can have the highest ROUGE-L, 1.0.
#
# With several references one would guess the score of the best one, as rouge-score's `score_multi` gives. Here the
# highest precision and the highest recall are looked for separately, each in a reference of its own, and one F is made
# of the two. Two words that both stand in a long reference (precision 1), one of which is all of a short reference
# (recall 1), have F 1, though neither reference gives more than 0.71. So the score with five references is above that
# with the best of them, and a reference of one or two words lifts every caption that has these.
#
# Output seen:
#   "a dog" against "a dog runs on the grass": 0.459
#   "a dog" against "dog": 0.709
#   "a dog" against both: 1.000 (rouge-score: 0.667)
#   "a man is riding a horse" against "a man rides a brown horse along the beach": 0.515
#   "a man is riding a horse" against "riding a horse": 0.709
#   "a man is riding a horse" against both: 0.830 (rouge-score: 0.667)
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet pycocoevalcap==1.2 rouge-score==0.1.2 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
from pycocoevalcap.rouge.rouge import Rouge
from rouge_score.rouge_scorer import RougeScorer

CASES = {
    "a dog": ("a dog runs on the grass", "dog"),
    "a man is riding a horse": ("a man rides a brown horse along the beach", "riding a horse"),
}


def rouge(caption, *references):
    return float(Rouge().compute_score({0: list(references)}, {0: [caption]})[0])


scorer = RougeScorer(["rougeL"])
found = {}
for caption, references in CASES.items():
    each, both = [rouge(caption, reference) for reference in references], rouge(caption, *references)
    best = scorer.score_multi(references, caption)["rougeL"].fmeasure
    for reference, score in zip(references, each):
        print(f'"{caption}" against "{reference}": {score:.3f}')
    print(f'"{caption}" against both: {both:.3f} (rouge-score: {best:.3f})')
    assert both > max(each) + 0.1 > best
    found[caption] = both
assert found["a dog"] == 1
PYTHON
"$directory/venv/bin/python" "$directory/run.py"
