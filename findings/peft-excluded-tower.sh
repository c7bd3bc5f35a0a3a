#!/usr/bin/env bash
# peft 0.21.2: exclude_modules=["vision_tower"] excludes nothing of a tower, silently, and layers_to_transform counts
# the layers of every tower.
#
# In a vision-language model one wants adapters in the language model alone. A list of names is what target_modules
# takes, and a tower's name in exclude_modules reads as its exclusion. Names in a list are compared with the end of a
# module's name, so that of a module above the layers matches none, and no message says that an exclusion was not
# used; only a regular expression reaches inside. Likewise layers_to_transform=[1], read as one layer of the language
# model, adapts layer 1 of the vision tower too, and may not be combined with a regular expression in target_modules
# (ValueError). Fine-tuning then moves the image features that an analysis takes for fixed.
#
# Output seen:
#   no exclusion: 4 in the tower, 6 in the language model
#   exclude_modules=["vision_tower"]: 4 in the tower, 6 in the language model
#   exclude_modules=".*vision_tower.*": 0 in the tower, 6 in the language model
#   layers_to_transform=[1]: 1 in the tower, 1 in the language model
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import warnings

from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
vision = CLIPVisionConfig(**sizes, num_hidden_layers=4, image_size=28, patch_size=14)
text = LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=64)
config = LlavaConfig(vision_config=vision, text_config=text)


def adapted(said, **options):
    """Adapters of queries in the vision tower and in the language model."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = LlavaForConditionalGeneration(config)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **options))
    assert not any("exclude" in str(warning.message) for warning in told)
    names = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    counts = tuple(sum(part in name for name in names) for part in ("vision_tower", "language_model"))
    print(f"{said}: {counts[0]} in the tower, {counts[1]} in the language model")
    return counts


assert adapted("no exclusion") == (4, 6)
assert adapted('exclude_modules=["vision_tower"]', exclude_modules=["vision_tower"]) == (4, 6)
assert adapted('exclude_modules=".*vision_tower.*"', exclude_modules=".*vision_tower.*") == (0, 6)
assert adapted("layers_to_transform=[1]", layers_to_transform=[1]) == (1, 1)
PYTHON
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" "$directory/run.py"
