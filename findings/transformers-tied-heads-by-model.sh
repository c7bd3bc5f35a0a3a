#!/usr/bin/env bash
# transformers 5.24.0: whether a VLM's head is tied to its embeddings follows another rule in each of three siblings.
#
# LLaVA, LLaVA-NeXT and InternVL have the same parts: a tower, a projector and a language model with its own
# text_config. Whether the language model's head shares the embeddings is its own matter, so one would
# guess that text_config.tie_word_embeddings decides in all three, or the value beside text_config in all
# three. In LLaVA the head is tied if either says so: a false beside a true text_config is overruled. In
# LLaVA-NeXT only the value at the top counts, which is false unless given: a language model whose own
# configuration ties its head is built with a separate one. In InternVL only the value at the top counts,
# and it is true unless given: a language model with a head of its own is built without. (Loading a
# checkpoint that stores a different head keeps that head.)
#
# Output seen (t true, f false, - not given; is the head of the built model tied?):
#                 LLaVA  LLaVA-NeXT  InternVL
#   text t, top -   yes          no       yes
#   text t, top t   yes         yes       yes
#   text t, top f   yes          no        no
#   text f, top -    no          no       yes
#   text f, top t   yes         yes       yes
#   text f, top f    no          no        no
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
clip = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **sizes}
intern = {"image_size": [28, 28], "patch_size": [14, 14], **sizes}
models = {
    "LLaVA": (LlavaConfig, LlavaForConditionalGeneration, clip),
    "LLaVA-NeXT": (LlavaNextConfig, LlavaNextForConditionalGeneration, clip),
    "InternVL": (InternVLConfig, InternVLForConditionalGeneration, intern),
}
expected = {
    (True, None): "yes no yes",
    (True, True): "yes yes yes",
    (True, False): "yes no no",
    (False, None): "no no yes",
    (False, True): "yes yes yes",
    (False, False): "no no no",
}
print(" " * 14 + "  ".join(["LLaVA", "LLaVA-NeXT", "InternVL"]))
for (text, top), answers in expected.items():
    found = []
    for kind, model_kind, vision in models.values():
        given = {} if top is None else {"tie_word_embeddings": top}
        language = LlamaConfig(vocab_size=40, tie_word_embeddings=text, **sizes)
        parts = dict(text_config=language, vision_config=vision, image_token_id=39)
        model = model_kind(kind(**parts, **given))
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
        found.append("yes" if head.data_ptr() == embeddings.data_ptr() else "no")
    name = f"text {str(text).lower()[0]}, top {'-' if top is None else str(top).lower()[0]}"
    print(f"{name:<14}{found[0]:>5}  {found[1]:>10}  {found[2]:>8}")
    assert found == answers.split(), found
PYTHON
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
