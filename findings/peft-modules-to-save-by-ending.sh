#!/usr/bin/env bash
# peft 0.21.2: `modules_to_save` matches names by their last letters, `target_modules` by their last
# parts between dots.
#
# Both are lists of names in one LoraConfig, and target_modules=["norm"] means modules called "norm"
# (or "....norm"). One would guess the same of modules_to_save=["norm"]. It also takes every module
# whose name merely ends in those letters, such as "input_norm" or "layernorm": they become trained
# copies and are stored in the adapter, without a word. On a language model ["norm"] trains and
# stores every layer's input_layernorm and post_attention_layernorm. Whoever reads adapters has to
# match as peft does, or calls their tensors foreign.
#
# Output seen:
#   target_modules=["norm"]: norm
#   modules_to_save=["norm"]: input_norm, norm
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import peft
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.input_norm = torch.nn.Linear(2, 2)
        self.norm = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(2, 2)


def adapted(**options):
    model = peft.get_peft_model(Model(), peft.LoraConfig(**options))
    names = {name.split(".")[2] for name in peft.get_peft_model_state_dict(model)}
    return sorted(names - {"head"})


for options in ({"target_modules": ["norm"]}, {"modules_to_save": ["norm"]}):
    (name,) = options
    print(f'{name}=["norm"]:', ", ".join(adapted(**{"target_modules": ["head"], **options})))
PYTHON
seen=$("$directory/venv/bin/python" "$directory/run.py" 2> /dev/null)
echo "$seen"
[ "$seen" = 'target_modules=["norm"]: norm
modules_to_save=["norm"]: input_norm, norm' ]
