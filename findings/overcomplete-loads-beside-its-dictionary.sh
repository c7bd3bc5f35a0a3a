#!/usr/bin/env bash
# overcomplete 0.3.0: a state dict that is loaded into an SAE in eval mode changes its encoder, but not its dictionary.
#
# Making a model, calling eval() and then load_state_dict() is usual in PyTorch, in either order, and one would guess
# that the order does not matter here. eval() computes the normalised dictionary once and keeps it outside of the
# parameters; loading does not renew it, nor does calling eval() again. The new encoder is then decoded by the
# random dictionary that the model began with, without a word. train() and then eval() renews it.
#
# Output seen:
#   loaded before eval(): same dictionary, same reconstructions
#   loaded after eval(): other dictionary, other reconstructions
#   eval() once more: other dictionary, other reconstructions
#   train(), then eval(): same dictionary, same reconstructions
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet torch==2.13.0 einops==0.8.2 scikit-learn==1.9.1 pillow==13.0.0 tqdm==4.70.1
"$directory/venv/bin/pip" install --quiet --no-deps overcomplete==0.3.0
cat > "$directory/run.py" <<'PYTHON'
import importlib.util
import sys
import types

import torch

# Its own __init__ also imports torchvision and plots, which nothing here uses.
package = types.ModuleType("overcomplete")
package.__path__ = list(importlib.util.find_spec("overcomplete").submodule_search_locations)
sys.modules["overcomplete"] = package

from overcomplete.sae import TopKSAE

torch.manual_seed(0)
x = torch.randn(100, 8)
make = lambda: TopKSAE(8, nb_concepts=64, top_k=4)
stored = make().eval()


def is_same(name, sae):
    same = [
        torch.allclose(stored.get_dictionary(), sae.get_dictionary(), atol=1e-6),
        torch.allclose(stored(x)[2], sae(x)[2], atol=1e-5),
    ]
    words = ["same" if one else "other" for one in same]
    print(f"{name}: {words[0]} dictionary, {words[1]} reconstructions")
    assert same[0] == same[1]
    return same[0]


before, after = make(), make().eval()
for sae in (before, after):
    sae.load_state_dict(stored.state_dict())
found = [
    is_same("loaded before eval()", before.eval()),
    is_same("loaded after eval()", after),
    is_same("eval() once more", after.eval()),
    is_same("train(), then eval()", after.train().eval()),
]
assert found == [True, False, False, True]
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
