#!/usr/bin/env bash
# transformers 5.24.0: `encode(text, add_prefix_space=True)` of a RoBERTa tokenizer ignores the option, on which
# bert-score 0.3.13 relies.
#
# The docstring offers the option where the tokenizer is made and where it is called, so one would guess that a call
# obeys or refuses it. In 4.57.6 the tokenizer written in Python obeyed, and the fast one raised TypeError. The one class
# of 5.24.0 accepts it in a call and encodes as without; only a tokenizer made with it obeys.
# bert-score, whose default model for English is roberta-large, passes it in every call, so that a sentence's first word
# has the token that it has within a text. With 5.24.0 the first word has another token than its copies further on.
# Given a tokenizer made with the option, bert-score's `sent_encode` gives the tokens of 4.57.6 again.
#
# Output seen (of "dog dog"; Ġ is a space):
#   4.57.6, use_fast=False: encode dog Ġdog, option of the call Ġdog Ġdog, of the making Ġdog Ġdog; bert-score Ġdog Ġdog
#   4.57.6, use_fast=True: encode dog Ġdog, option of the call TypeError, of the making Ġdog Ġdog
#   5.24.0, use_fast=False: encode dog Ġdog, option of the call dog Ġdog, of the making Ġdog Ġdog; bert-score dog Ġdog
#   5.24.0, use_fast=True: encode dog Ġdog, option of the call dog Ġdog, of the making Ġdog Ġdog
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/run.py" <<'PYTHON'
import json
import pathlib
import sys

import transformers
from bert_score.utils import get_tokenizer, lang2model, sent_encode
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

folder = pathlib.Path(sys.argv[1])
words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "do", "dog", "Ġdog"]
(folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
(folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g\nĠ dog\n")
(folder / "config.json").write_text(json.dumps({"model_type": "roberta"}))
(folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 64}))
plain, spaced = "dog Ġdog", "Ġdog Ġdog"


def shown(ids):
    return " ".join(words[number] for number in ids[1:-1])


version, found = transformers.__version__, {}
for fast in (False, True):
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
    made = AutoTokenizer.from_pretrained(folder, use_fast=fast, add_prefix_space=True)
    try:
        called = shown(tokenizer.encode("dog dog", add_prefix_space=True))
    except TypeError:
        called = "TypeError"
    found[fast] = [shown(tokenizer.encode("dog dog")), called, shown(made.encode("dog dog"))]
    encode, call, making = found[fast]
    line = f"{version}, use_fast={fast}: encode {encode}, option of the call {call}, of the making {making}"
    if not fast:  # what bert-score asks for unless told otherwise
        scored = shown(sent_encode(get_tokenizer(str(folder)), "dog dog"))
        line += f"; bert-score {scored}"
        assert shown(sent_encode(made, "dog dog")) == spaced
    print(line)
assert lang2model["en"] == "roberta-large"
if version == "4.57.6":
    assert found == {False: [plain, spaced, spaced], True: [plain, "TypeError", spaced]} and scored == spaced
else:
    assert found == {False: [plain, plain, spaced], True: [plain, plain, spaced]} and scored == plain
PYTHON
python3 -m venv "$directory/venv"
for version in 4.57.6 5.24.0; do
    "$directory/venv/bin/pip" install --quiet bert-score==0.3.13 transformers==$version torch==2.13.0 numpy==2.3.5
    mkdir "$directory/$version"
    HF_HUB_OFFLINE=1 "$directory/venv/bin/python" -W ignore "$directory/run.py" "$directory/$version" \
        2> "$directory/errors" || {
        cat "$directory/errors" >&2
        exit 1
    }
done
