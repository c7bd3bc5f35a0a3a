#!/usr/bin/env bash
# transformers 5.24.0: whether `hidden_states` show what a forward hook did to a layer depends on whether
# the model had been asked for hidden states before the hook was registered.
#
# Steering adds a vector to a layer's output in a forward hook. One would guess that hidden_states[k + 1]
# is what layer k + 1 received, edit included, as it was when the model's loop collected it (4.47.1), or
# never shows hooks. But the states are recorded by hooks of the library, which stay on the layers from
# the first call with output_hidden_states=True. A hook registered after such a call runs after the
# recorder: the state of the steered layer is recorded as it was before, while all later layers have
# the edit. A hook that was registered first is seen. A baseline run before steering, as in every
# comparison of the two, therefore changes what the second run reports.
#
# Output seen (mean change of the states after layers 0 and 1 when layer 0's output is raised by one):
#   transformers 5.24.0: hook first 1.0 1.0, states recorded first 0.0 1.0
#   transformers 4.47.1: hook first 1.0 1.0, states recorded first 1.0 1.0
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/run.py" <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.arange(5)[None]


def states(model: LlamaForCausalLM) -> tuple[torch.Tensor, ...]:
    return model(TOKENS, output_hidden_states=True).hidden_states


def raise_by_one(module, inputs, output):
    # A tuple up to version 4, a tensor in 5.
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


def changes(recorded_first: bool) -> list[float]:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, vocab_size=64)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    if recorded_first:
        states(model)
    hook = model.model.layers[0].register_forward_hook(raise_by_one)
    steered = states(model)
    hook.remove()
    plain = states(model)
    return [round((steered[i] - plain[i]).abs().mean().item(), 1) for i in (1, 2)]


with torch.no_grad():
    first, after = changes(recorded_first=False), changes(recorded_first=True)
version = transformers.__version__
print(f"transformers {version}: hook first", *first, end=", ")
print("states recorded first", *after)
assert first == [1.0, 1.0]
assert after == ([0.0, 1.0] if version.startswith("5") else [1.0, 1.0])
PYTHON
for version in 5.24.0 4.47.1; do
    python3 -m venv "$directory/$version"
    "$directory/$version/bin/pip" install --quiet "transformers==$version" torch==2.13.0
    "$directory/$version/bin/python" -W ignore "$directory/run.py"
done
