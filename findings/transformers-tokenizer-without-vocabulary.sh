#!/usr/bin/env bash
# transformers 5.24.0: `AutoTokenizer.from_pretrained` of a directory without any tokenizer's file may give a tokenizer
# that turns every text into nothing.
#
# With config.json alone, as a copy of a checkpoint that lost its tokenizer has it, one would guess an error. For types
# whose tokenizer is Llama's or Gemma's there is none: a class is made with its special tokens alone, and "a red dog" has
# no tokens (Gemma: one unknown token). A model prompted so answers the empty text. Types without such a class raise
# ValueError.
#
# Output seen:
#   idefics2: LlamaTokenizer, 3 tokens, "a red dog" -> []
#   gemma2: GemmaTokenizer, 5 tokens, "a red dog" -> [3]
#   llava: ValueError
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import json
import pathlib
import sys

from transformers import AutoTokenizer

found = {}
for kind in ("idefics2", "gemma2", "llava"):
    directory = pathlib.Path(sys.argv[1], kind)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        found[kind] = tokenizer("a red dog")["input_ids"]
        print(f'{kind}: {type(tokenizer).__name__}, {len(tokenizer)} tokens, "a red dog" -> {found[kind]}')
    except ValueError:
        found[kind] = ValueError
        print(f"{kind}: ValueError")
assert found == {"idefics2": [], "gemma2": [3], "llava": ValueError}
PYTHON
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" "$directory/run.py" "$directory" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
