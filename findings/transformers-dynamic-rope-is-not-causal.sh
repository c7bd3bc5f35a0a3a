#!/usr/bin/env bash
# transformers 5.24.0: with rotary scaling "dynamic", the states of a position depend on the tokens after it.
#
# A decoder is causal, so one would guess that appending tokens changes nothing before them, that generation with a
# cache equals generation without, and that a forward pass over prompt and answer shows the states in which the answer
# was generated. With "dynamic", the base of all angles grows with the length of the input, once it is longer than
# `max_position_embeddings`: the logits of the first 24 positions change as 24 more tokens follow, and cached keys
# keep the angles of the lengths at which they were made, so that greedy tokens differ. "default" and "linear" do as
# one would guess. Whoever captures states in a second pass over generated text gets others than generation had.
#
# Output seen:
#   default: logits before appended tokens move by 0.0, same tokens with and without a cache: True
#   linear: logits before appended tokens move by 0.0, same tokens with and without a cache: True
#   dynamic: logits before appended tokens move by 7.0, same tokens with and without a cache: False
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def model(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    if kind != "default":
        rope["factor"] = 4.0
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    special = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(
        **sizes,
        **special,
        num_attention_heads=4,
        max_position_embeddings=32,
        rope_parameters=rope,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


prompt = torch.randint(1, 64, (1, 24), generator=torch.Generator().manual_seed(1))
for kind in ("default", "linear", "dynamic"):
    llama, given = model(kind), {"max_new_tokens": 24, "do_sample": False}
    with torch.no_grad():
        cached = llama.generate(prompt, use_cache=True, **given)
        recomputed = llama.generate(prompt, use_cache=False, **given)
        alone = llama(prompt).logits
        followed = llama(cached).logits[:, :24]
    moved, same = (alone - followed).abs().max().item(), torch.equal(cached, recomputed)
    print(
        f"{kind}: logits before appended tokens move by {moved:.1f}, "
        f"same tokens with and without a cache: {same}"
    )
    assert (moved > 0.1) == (not same) == (kind == "dynamic")
PYTHON
"$directory/venv/bin/python" "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
