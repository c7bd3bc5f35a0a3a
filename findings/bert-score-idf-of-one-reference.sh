#!/usr/bin/env bash
# bert-score 0.3.13: with idf=True, a copy of its reference scores F1 0.0 where all references share their words, as
# where there is only one.
#
# BERTScore of a copy is 1, and weights that favour rare words should not change that of equal tokens, so one would
# guess 1 or an error. A token of all references has weight log 1 = 0, and [CLS] and [SEP] have none: with one
# reference, or one caption repeated, no weight is left, precision and recall are NaN, and F1, whose NaN is replaced,
# is 0.0, which enters a mean like any score. A few captions that share most of their words are scored by the rest
# alone.
#
# Output seen:
#   idf=False, one pair: precision 1.0, recall 1.0, F1 1.0
#   idf=True, one pair: precision nan, recall nan, F1 0.0
#   idf=True, two pairs: precision 1.0, recall 1.0, F1 1.0
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet bert-score==0.3.13 transformers==5.24.0 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import sys

import torch
from bert_score import BERTScorer
from transformers import BertConfig, BertModel, BertTokenizerFast

folder = sys.argv[1]
words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red dog blue bus".split()
with open(f"{folder}/vocab.txt", "w") as file:
    file.write("\n".join(words))
BertTokenizerFast(f"{folder}/vocab.txt", model_max_length=64).save_pretrained(folder)
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def copies(references, idf):
    """Precision, recall and F1 of the first copy."""
    sentences = references if idf else None
    scorer = BERTScorer(model_type=folder, num_layers=2, idf=idf, idf_sents=sentences)
    precision, recall, f1 = (round(x[0].item(), 4) for x in scorer.score(references, references))
    pairs = "one pair" if len(references) == 1 else "two pairs"
    print(f"idf={idf}, {pairs}: precision {precision}, recall {recall}, F1 {f1}")
    return precision, recall, f1


assert copies(["a red dog"], False) == (1, 1, 1)
precision, recall, f1 = copies(["a red dog"], True)
assert precision != precision and recall != recall and f1 == 0
assert copies(["a red dog", "a blue bus"], True) == (1, 1, 1)
PYTHON
mkdir "$directory/model"
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" -W ignore "$directory/run.py" "$directory/model" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
