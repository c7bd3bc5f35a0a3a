#!/usr/bin/env bash
# transformers 5.24.0: the usual hook that steers, `output[0].add_(vector)`, steers the first prompt of a
# batch alone on Llama and the whole batch on GPT-Neo.
#
# Published code for steering and reading states takes `output[0]` of a decoder layer, since layers
# returned tuples up to version 4, with the states of the batch first. One would guess that a layer
# still does, or that all layers changed together, or that the old code raises. Most layers now return
# the states themselves, so that [0] is the first row of the batch; those of GPT-Neo
# return tuples as before. Nothing raises: with one prompt everything works, and with more the other
# rows stay as they were. Reading `output[0]` loses the axis of the batch in the same way.
#
# Output seen (mean change of each row's states after the hooked layer, for a batch of three):
#   LlamaDecoderLayer returns Tensor: rows moved by 1.0 0.0 0.0
#   GPTNeoBlock returns tuple: rows moved by 1.0 1.0 1.0
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import torch
from torch import nn
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

TOKENS = torch.arange(3, 18).reshape(3, 5)


def rows_moved(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[str, list[float]]:
    kinds, received = [], []

    def steer(module, inputs, output):
        kinds.append(type(output).__name__)
        output[0].add_(1)

    def receive(module, inputs, output):
        received.append(inputs[0].clone())

    layers[1].register_forward_hook(receive)
    with torch.no_grad():
        model(TOKENS)
        layers[0].register_forward_hook(steer)
        model(TOKENS)
    change = (received[1] - received[0]).mean((1, 2))
    return kinds[0], [round(row, 1) for row in change.tolist()]


torch.manual_seed(0)
llama = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
    )
).eval()
neo = GPTNeoForCausalLM(
    GPTNeoConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global"], 2]],
        vocab_size=64,
        eos_token_id=2,
        bos_token_id=1,
    )
).eval()

seen = [rows_moved(llama, llama.model.layers), rows_moved(neo, neo.transformer.h)]
for model, (kind, rows) in zip(("LlamaDecoderLayer", "GPTNeoBlock"), seen):
    print(f"{model} returns {kind}: rows moved by", *rows)
assert seen == [("Tensor", [1.0, 0.0, 0.0]), ("tuple", [1.0, 1.0, 1.0])]
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py"
