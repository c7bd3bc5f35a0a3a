#!/usr/bin/env bash
# transformers 5.24.0: the configuration of LLaVA's authors is read as another model's, without a word.
#
# Checkpoints in the authors' own format (`LlavaLlamaForCausalLM`) and in that of transformers
# (`LlavaForConditionalGeneration`) may both say `"model_type": "llava"`. One would guess that the first is
# refused, or that its sizes are read. Its values lie at the top level, where LlavaConfig does not look: a 13B
# of 40 layers and width 5120 becomes a text configuration of 32 layers and width 4096, the default, and 5120 stays an
# attribute that nothing reads. Counts of layers, sites or memory made from it are those of another model.
#
# Output seen:
#   written: 40 layers of width 5120
#   read by LlavaConfig: 32 layers of width 4096; hidden_size at the top 5120
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet transformers==5.24.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import json
import pathlib
import sys

from transformers import AutoConfig

written = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
    "vocab_size": 32000,
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}
pathlib.Path(sys.argv[1], "config.json").write_text(json.dumps(written))
config = AutoConfig.from_pretrained(sys.argv[1])
text = config.text_config
print(f"written: {written['num_hidden_layers']} layers of width {written['hidden_size']}")
print(
    f"read by {type(config).__name__}: {text.num_hidden_layers} layers of width {text.hidden_size}; "
    f"hidden_size at the top {config.hidden_size}"
)
assert (text.num_hidden_layers, text.hidden_size, config.hidden_size) == (32, 4096, 5120)
PYTHON
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" "$directory/run.py" "$directory" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
