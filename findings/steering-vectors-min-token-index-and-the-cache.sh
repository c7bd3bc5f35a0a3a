#!/usr/bin/env bash
# steering-vectors 0.12.2: with a key-value cache, `min_token_index` stops steering after the prompt.
#
# `SteeringVector.apply(model, min_token_index=n)` says that it steers tokens from index n on. With n the
# length of the prompt one would guess that it steers what is generated. But its hook counts positions
# within the forward pass that it sees. In `generate`, every pass after the first holds one position,
# number 0, because earlier ones are in the cache. So no positive n ever reaches a generated token: with n
# the length of the prompt nothing is steered at all, and with a smaller n only the end of the prompt.
# Nothing is raised. Without the cache the same call steers every token from n on.
#
# Output seen (a prompt of 8 tokens, 12 greedy tokens; how many equal those of the model without steering):
#   min_token_index 0: with cache 0, without 0; equal to each other 12
#   min_token_index 7: with cache 0, without 0; equal to each other 1
#   min_token_index 8: with cache 12, without 1; equal to each other 1
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet steering-vectors==0.12.2 transformers==4.57.6 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import torch
from steering_vectors import SteeringVector
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=64)
heads = dict(num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, eos_token_id=None)
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
prompt = torch.randint(3, 64, (1, 8))
vector = SteeringVector({2: torch.randn(64)})


def answer(use_cache: bool) -> torch.Tensor:
    fixed = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    return model.generate(prompt, use_cache=use_cache, **fixed)[0, 8:]


plain = answer(True)
assert (plain == answer(False)).all()
found = {}
for index in (0, 7, 8):
    with vector.apply(model, multiplier=5.0, min_token_index=index):
        steered = answer(True), answer(False)
    cached, uncached = (int((each == plain).sum()) for each in steered)
    same = int((steered[0] == steered[1]).sum())
    found[index] = cached, uncached, same
    print(f"min_token_index {index}: with cache {cached}, without {uncached}; equal to each other {same}")
assert found[0][2] == 12  # steering everything does not depend on the cache
assert found[8][0] == 12 and found[8][1] < 6 and found[7][2] < 6
PYTHON
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
