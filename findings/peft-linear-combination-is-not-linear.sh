#!/usr/bin/env bash
# peft 0.21.2: `add_weighted_adapter(combination_type="linear")` does not add the adapters' changes.
#
# A LoRA changes a weight by B A. One would guess that weights w1, w2 and "linear" give
# w1 B1 A1 + w2 B2 A2, as "cat" does. Instead the factors are added, each with the root of its weight:
# (√w1 B1 + √w2 B2)(√w1 A1 + √w2 A2), whose cross terms B1 A2 and B2 A1 are as large as the wanted ones.
# On independent adapters the result is as far from the sum as zero would be, at every weight, and
# "adapter a minus adapter b" is no better. The default, "svd", keeps the larger rank of the two, which
# leaves a fourth of the change out here. Only "cat" is exact; its rank is the sum of both.
#
# Output seen (distance from w1 B1 A1 + w2 B2 A2, relative to its length):
#   linear: a/2 + b/2 0.98, a - b 1.01
#   svd: a/2 + b/2 0.25, a - b 0.26
#   cat: a/2 + b/2 0.00, a - b 0.00
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import peft
import torch

torch.manual_seed(0)
lora = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
base = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
model = peft.get_peft_model(base, lora, adapter_name="first")
model.add_adapter("second", lora)
layer = model.base_model.model[0]
first, second = (layer.get_delta_weight(name).detach() for name in ("first", "second"))

errors = {}
for kind in ("linear", "svd", "cat"):
    for weights in ([0.5, 0.5], [1.0, -1.0]):
        name = f"{kind}_{len(errors)}"
        model.add_weighted_adapter(["first", "second"], weights, name, combination_type=kind)
        wanted = weights[0] * first + weights[1] * second
        error = (layer.get_delta_weight(name).detach() - wanted).norm() / wanted.norm()
        errors[kind, weights[1] < 0] = error.item()
    print(f"{kind}: a/2 + b/2 {errors[kind, False]:.2f}, a - b {errors[kind, True]:.2f}")

assert errors["linear", False] > 0.5 and errors["linear", True] > 0.5
assert errors["svd", False] > 0.1 and errors["svd", True] > 0.1
assert errors["cat", False] < 1e-5 and errors["cat", True] < 1e-5
PYTHON
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" -W ignore "$directory/run.py"
