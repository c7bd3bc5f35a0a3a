#!/usr/bin/env bash
# repeng 0.4.0: `ControlVector.train` with its default method, "pca_diff", leaves out what all pairs share.
#
# A control vector is the direction between the states of positive and negative prompts. One would guess
# that the first principal component of their differences, positive minus negative, points along the
# mean difference, most of all where all pairs differ by the same. But the differences go into
# scikit-learn's PCA, which subtracts their mean: what is found is how the pairs vary around it. The
# more alike the pairs, the less of the wanted direction is left. (In the method's paper the order
# within pairs is random, so that the mean is near zero and the subtraction harmless.) "pca_center"
# subtracts the mean of each pair, and finds it.
#
# Output seen (64 pairs of prompts that differ in the last word alone; absolute cosine with the mean
# difference, layers 1 to 3; and the share of the differences' square that is their mean's):
#   pca_diff:   0.05 0.24 0.21
#   pca_center: 1.00 1.00 1.00
#   shared:     0.99 0.98 0.97
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet repeng==0.4.0 transformers==5.24.0 torch==2.13.0 scikit-learn==1.9.1
cat > "$directory/run.py" <<'PYTHON'
import numpy as np
import torch
from repeng import ControlModel, ControlVector, DatasetEntry
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<pad>", "good", "bad", *(f"w{i}" for i in range(40))]
plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, vocab_size=len(words))
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes)).eval()

draw = np.random.default_rng(0)
starts = [" ".join(f"w{i}" for i in draw.integers(40, size=4)) for _ in range(64)]
pairs = [DatasetEntry(f"{start} good", f"{start} bad") for start in starts]


def last_states(word: str) -> torch.Tensor:
    tokens = tokenizer([f"{start} {word}" for start in starts], return_tensors="pt")
    with torch.no_grad():
        states = model(tokens["input_ids"], output_hidden_states=True).hidden_states
    return torch.stack(states)[2:5, :, -1]  # after layers 1 to 3, as repeng numbers them


differences = (last_states("good") - last_states("bad")).numpy()
mean = differences.mean(1)
shared = 64 * (mean**2).sum(-1) / (differences**2).sum((1, 2))
cosines = {}
controlled = ControlModel(model, [1, 2, 3])
for method in ("pca_diff", "pca_center"):
    vector = ControlVector.train(controlled, tokenizer, pairs, method=method)
    cosines[method] = [
        abs(vector.directions[layer] @ mean[i]) / np.linalg.norm(mean[i])
        for i, layer in enumerate((1, 2, 3))
    ]
for name, values in (*cosines.items(), ("shared", shared)):
    print(f"{name + ':':<11}", *(f"{value:.2f}" for value in values))
assert max(cosines["pca_diff"]) < 0.5 < 0.95 < min(cosines["pca_center"])
PYTHON
HF_HUB_OFFLINE=1 "$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
