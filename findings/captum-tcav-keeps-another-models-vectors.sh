#!/usr/bin/env bash
# captum 0.9.0: TCAV explains a model by the concept vectors of the model that was explained before it.
#
# TCAV is given a model and examples of concepts, and one would guess that it learns vectors from that model's
# activations, or refuses those of others. What it learned is stored in ./cav, under the numbers of the concepts, the
# name of the layer, and "default_model_id" unless the caller thinks of `model_id`. If such a file is there, it is read,
# whatever model or examples were given: a model before and after fine-tuning, two seeds, or the same model with mended
# examples have the same vectors in every later call and process, with no message. Here a concept that lowers the output
# of a model, whose layer points the other way than that of the first, is said to raise it. A `save_path` or `model_id`
# of its own gives the right answer.
#
# Output seen (share of inputs whose output the concept raises):
#   first model: 1.0, its vector [1.32, -0.04]
#   second model, after the first: 1.0, its vector [1.32, -0.04]
#   second model, in a folder of its own: 0.0, its vector [-1.37, -0.02]
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet captum==0.9.0 scikit-learn==1.9.1 torch==2.13.0 numpy==2.3.5
cat > "$directory/run.py" <<'PYTHON'
import random
import tempfile

import torch
from captum.concept import TCAV, Concept
from torch.utils.data import DataLoader


def model(sign):
    """Gives the first of two numbers back; its layer "0" holds both, times `sign`."""
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(sign * torch.eye(2))
        second.weight.copy_(torch.tensor([[1.0, 0.0]]))
    return torch.nn.Sequential(first, second)


def concept(number, name, first):
    noise = 0.1 * torch.randn(50, 2, generator=torch.Generator().manual_seed(number))
    return Concept(number, name, DataLoader(torch.tensor([first, 0.0]) + noise, batch_size=25))


def explained(sign, folder):
    random.seed(0)
    torch.manual_seed(0)
    concepts = [concept(0, "dog", 3.0), concept(1, "none", -3.0)]
    tcav = TCAV(model(sign), ["0"], save_path=folder)
    inputs = torch.randn(20, 2, generator=torch.Generator().manual_seed(2))
    share = tcav.interpret(inputs, [concepts], target=0)["0-1"]["0"]["sign_count"][0].item()
    return share, tcav.compute_cavs([concepts])["0-1"]["0"].stats["weights"][0]


with tempfile.TemporaryDirectory() as shared, tempfile.TemporaryDirectory() as own:
    first, vector = explained(1, shared)
    after, taken = explained(-1, shared)
    alone, right = explained(-1, own)


def shown(vector):
    return "[" + ", ".join(f"{number:.2f}" for number in vector.tolist()) + "]"


print(f"first model: {first}, its vector {shown(vector)}")
print(f"second model, after the first: {after}, its vector {shown(taken)}")
print(f"second model, in a folder of its own: {alone}, its vector {shown(right)}")
assert (first, after, alone) == (1, 1, 0)
assert torch.equal(vector, taken) and vector[0] > 0 > right[0]
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
