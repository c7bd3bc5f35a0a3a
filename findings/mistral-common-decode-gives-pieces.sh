#!/usr/bin/env bash
# transformers 5.24.0, mistral-common 1.13.1, sentencepiece 0.2.3.
#
# Behaviour: `MistralCommonBackend.decode(ids)`, called as for any tokenizer, gives for a SentencePiece
# vocabulary of Mistral the pieces' names joined ("▁a▁hot▁dog▁<0xF0>...") and no text. It does so
# without a special token in sight; `skip_special_tokens=True` gives the text. For the Tekken
# vocabularies of the same class the plain call gives the text.
#
# Why the guess is wrong: the option is about special tokens, of which these ids hold none, and every
# other tokenizer of transformers (and this one with Tekken) gives the same text with and without it.
# Words read by `decode([id]).strip()` keep a "▁" and are found in no list of words.
#
# Seen:
#   default: '▁a▁hot▁dog▁<0xF0><0x9F><0x90><0x95>'
#   skipped: 'a hot dog 🐕'
#   tekken:  'a hot dog 🐕'
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 mistral-common==1.13.1 sentencepiece==0.2.3

PYTHONIOENCODING=utf-8 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import mistral_common
from transformers.tokenization_mistral_common import MistralCommonBackend

data = Path(mistral_common.__file__).parent / "data"
text = "a hot dog 🐕"
pieces = MistralCommonBackend(data / "tokenizer.model.v1")
ids = pieces.encode(text, add_special_tokens=False)
assert not set(ids) & set(pieces.all_special_ids)
default, skipped = pieces.decode(ids), pieces.decode(ids, skip_special_tokens=True)
tekken = MistralCommonBackend(data / "tekken_240911.json")
other = tekken.decode(tekken.encode(text, add_special_tokens=False))
print(f"default: {default!r}\nskipped: {skipped!r}\ntekken:  {other!r}")
assert default == "▁a▁hot▁dog▁<0xF0><0x9F><0x90><0x95>", "the plain call gives something else now"
assert skipped == other == text
PYTHON
