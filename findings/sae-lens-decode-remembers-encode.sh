#!/usr/bin/env bash
# sae-lens 6.54.12: with `normalize_activations="layer_norm"`, `decode` uses the mean and scale of whatever rows
# `encode` saw last.
#
# encode and decode look like functions of their arguments, so one would guess that codes can be decoded later, twice,
# or after an edit, as steering by features does. The mean and deviation of each row are kept in the SAE by encode and removed by decode:
# decoding the same codes after an encode of other rows gives other reconstructions, without a word where the number of
# rows is the same, and decoding twice raises AttributeError.
#
# Output seen:
#   encode(a), decode: reconstructions up to 27.8
#   encode(a), encode(100 b), decode of a's codes: up to 2835.9
#   decode again: AttributeError
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet sae-lens==6.54.12 torch==2.13.0
cat > "$directory/run.py" <<'PYTHON'
import torch
from sae_lens import StandardSAE, StandardSAEConfig

torch.manual_seed(0)
a, b = 5 + 2 * torch.randn(2, 3, 16)
sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=64, normalize_activations="layer_norm"))
with torch.no_grad():
    codes = sae.encode(a)
    right = sae.decode(codes).abs().max().item()
    print(f"encode(a), decode: reconstructions up to {right:.1f}")
    codes = sae.encode(a)
    sae.encode(100 * b)
    wrong = sae.decode(codes).abs().max().item()
    print(f"encode(a), encode(100 b), decode of a's codes: up to {wrong:.1f}")
    assert wrong > 20 * right
    try:
        sae.decode(codes)
        raise SystemExit("decode again: no error")
    except AttributeError:
        print("decode again: AttributeError")
PYTHON
"$directory/venv/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
    cat "$directory/errors" >&2
    exit 1
}
