"""Writes the files next to this one, and what overcomplete computes with them.

    pip install overcomplete==0.3.0 torch==2.13.0 && python make_expected.py

The files are small random models of every class and option that is read, as whole models and as
state dicts; expected.npz has their codes and reconstructions of the same states. Tests do not run
this script, so they do not need overcomplete.
"""

import json
from pathlib import Path

import numpy as np
import torch
from overcomplete import sae

HERE = Path(__file__).parent
D, K = 6, 8
# Case -> class, arguments, whether the whole model is saved, in eval mode if so.
CASES = {
    "standard": ("SAE", {}, "state dict"),
    "topk": ("TopKSAE", {"top_k": 3}, "state dict"),
    "topk-whole": ("TopKSAE", {"top_k": 2}, "train"),
    "topk-eval": (
        "TopKSAE",
        {"top_k": 3, "dictionary_params": {"normalization": "max_l1", "use_multiplier": True}},
        "eval",
    ),
    "topk-tied": ("TopKSAE", {"top_k": 3}, "train"),
    "topk-untied": ("TopKSAE", {"top_k": 3}, "state dict"),
    "topk-batchnorm": ("TopKSAE", {"top_k": 3, "encoder_module": "mlp_bn_1"}, "state dict"),
    "batchtopk": ("BatchTopKSAE", {"top_k": 20}, "state dict"),
    "batchtopk-whole": ("BatchTopKSAE", {"top_k": 20}, "train"),
    "jump": (
        "JumpSAE",
        {"dictionary_params": {"normalization": "l1"}},
        "state dict",
    ),
    "jump-archetypal": ("RAJumpSAE", {"delta": 0.3}, "train"),
    "archetypal": ("RATopKSAE", {"top_k": 3, "delta": 0.5}, "state dict"),
    "archetypal-eval": ("RATopKSAE", {"top_k": 3}, "eval"),
    "pursuit": ("MpSAE", {"k": 4}, "state dict"),
    "pursuit-few": ("MpSAE", {"k": 4}, "state dict"),  # of three atoms all products may be < 0
    "pursuit-whole": ("MpSAE", {"k": 3, "dropout": 0.5}, "train"),
}
BESIDE = ("top_k", "k", "delta")


def fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("num_batches_tracked", ".C")):
                continue
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(drawn.abs() if "var" in name else drawn)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    states = 2 * torch.randn((12, D), generator=generator)
    found = {"states": states.numpy()}
    for name, (kind, given, how) in CASES.items():
        more = {"points": torch.randn((10, D), generator=generator)} if kind[:2] == "RA" else {}
        model = getattr(sae, kind)(D, 3 if "few" in name else K, **given, **more)
        if name == "topk-tied":
            model.tied(bias=True)
        if name == "topk-untied":
            model.untied(bias=False)
        fill(model, generator)
        if "batchtopk" in name:
            model.train()
            with torch.no_grad():
                model(states)  # sets the running threshold
            fill(model, generator)
        if how == "state dict":
            torch.save(model.state_dict(), HERE / f"{name}.pth")
            beside = {key: value for key, value in given.items() if key in BESIDE}
            if "dictionary_params" in given:
                beside["normalization"] = given["dictionary_params"]["normalization"]
            if kind == "BatchTopKSAE":
                beside = {"running_threshold": float(model.running_threshold)}
            text = json.dumps({"class": kind} | beside)
            (HERE / f"{name}.json").write_text(text + "\n")
        with torch.no_grad():
            if how == "train":
                torch.save(model, HERE / f"{name}.pt")
            model.eval()
            if how == "eval":
                torch.save(model, HERE / f"{name}.pt")
            codes = model.encode(states)[1]
            found[f"{name}.codes"] = codes.numpy()
            found[f"{name}.states"] = model.decode(codes).numpy()
            found[f"{name}.dictionary"] = model.get_dictionary().numpy()
    np.savez_compressed(HERE / "expected.npz", **found)


if __name__ == "__main__":
    main()
