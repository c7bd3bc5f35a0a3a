#!/usr/bin/env bash
# transformers 5.24.0: a call of a fast tokenizer without padding switches padding off for a call in another thread.
#
# Padding is an argument of each call, so one would guess that calls do not know of each other, and that a tokenizer can be
# shared by threads that prepare batches, as long as all of these pad. The setting lies in the tokenizer: each call writes
# it where it differs from the last one, and then encodes. A helper that counts the tokens of a word, unpadded,
# between the two steps of a padded call makes that call's rows ragged.
# Shown here without a race, by looking at the setting after each call.
#
# Output seen:
#   after a padded call, pads with: <pad>
#   after an unpadded call: None
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "dog": 3}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")

tokenizer(["a", "a dog"], padding=True)
padded = tokenizer.backend_tokenizer.padding
print("after a padded call, pads with:", padded["pad_token"])
tokenizer("dog")
print("after an unpadded call:", tokenizer.backend_tokenizer.padding)
assert padded["pad_token"] == "<pad>" and tokenizer.backend_tokenizer.padding is None
PYTHON
"$directory/venv/bin/python" "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
