"""Writes the directories next to this file, and what SAELens computes with them.

    pip install sae-lens==6.54.12 torch==2.13.0 && python make_expected.py

The directories are small random dictionaries of every architecture and option, written by SAELens;
expected.npz contains their codes and reconstructions of the same states. Tests do not run this
script, so they do not need SAELens.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE, saes

HERE = Path(__file__).parent
D, K, OUT = 6, 8, 5
warnings.simplefilter("ignore")

# Case -> class, configuration.
CASES = {
    "standard": ("StandardSAE", {}),
    "standard-keeps-bias": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "standard-layer-norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "standard-constant-norm": ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    "standard-expected-average": (
        "StandardSAE",
        {"normalize_activations": "expected_average_only_in"},
    ),
    "standard-whitening": ("StandardSAE", {"normalize_activations": "covariance_whitening"}),
    "standard-heads": ("StandardSAE", {"reshape_activations": "hook_z"}),
    "topk": ("TopKSAE", {"k": 3}),
    "topk-rescaled": ("TopKSAE", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    "topk-layer-norm": ("TopKSAE", {"k": 3, "normalize_activations": "layer_norm"}),
    "abstopk": ("AbsTopKSAE", {"k": 3}),
    "abstopk-rescaled": ("AbsTopKSAE", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "matching-pursuit": ("MatchingPursuitSAE", {}),
    "matching-pursuit-keeps-bias": (
        "MatchingPursuitSAE",
        {"apply_b_dec_to_input": False, "residual_threshold": 1.5, "max_iterations": 4},
    ),
    "matching-pursuit-repeats": (
        "MatchingPursuitSAE",
        {"stop_on_duplicate_support": False, "residual_threshold": 0.0, "max_iterations": 9},
    ),
    "temporal": ("TemporalSAE", {"n_heads": 2, "bottleneck_factor": 2, "kval_topk": 2}),
    "temporal-untied": (
        "TemporalSAE",
        {
            "n_heads": 2,
            "bottleneck_factor": 2,
            "sae_diff_type": "relu",
            "tied_weights": False,
            "n_attn_layers": 2,
            "normalize_activations": "constant_scalar_rescale",
            "activation_normalization_factor": 0.3,
        },
    ),
    "transcoder": ("Transcoder", {"normalize_activations": "layer_norm"}),
    "skip-transcoder": ("SkipTranscoder", {"normalize_activations": "layer_norm"}),
    "jumprelu-transcoder": ("JumpReLUTranscoder", {}),
    "jumprelu-skip-transcoder": ("JumpReLUSkipTranscoder", {}),
    "bfloat16": ("StandardSAE", {"dtype": "bfloat16"}),
}
# Case -> class that trains, configuration; written for use.
TRAINED = {
    "batchtopk-for-use": ("BatchTopKTrainingSAE", {"k": 3}),
    "matryoshka-for-use": ("MatryoshkaBatchTopKTrainingSAE", {"k": 3, "matryoshka_widths": [3, 8]}),
    "topk-for-use": ("TopKTrainingSAE", {"k": 3}),
}
# Case -> a configuration of before version 6, for the tensors of another case.
OLD = {
    "old-standard": ("standard", {"normalize_activations": True, "hook_point": "blocks.1.hook"}),
    "old-topk": (
        "topk",
        {
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 2},
            "normalize_activations": False,
            "sae_lens_version": "5.9.1",
        },
    ),
    "old-tanh": ("standard", {"activation_fn_str": "tanh-relu", "normalize_activations": None}),
    "old-heads": ("standard-heads", {"hook_name": "blocks.2.attn.hook_z"}),
}


def fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.3 if name.startswith(("b_", "r_", "threshold")) else 1.0
            value.copy_(scale * torch.randn(value.shape, generator=generator))


def entered(name: str, states: torch.Tensor) -> torch.Tensor:
    return states.reshape(*states.shape[:-1], 2, 3) if "heads" in name else states


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    states = 2 * torch.randn((3, 4, D), generator=generator)
    found = {"states": states.numpy()}

    def keep(name: str, model: SAE) -> None:
        x = entered(name, states)
        with torch.no_grad():
            found[f"{name}.codes"] = model.encode(x).float().numpy()
            found[f"{name}.states"] = model(x).float().numpy()

    for name, (kind, values) in CASES.items():
        config = {"d_in": D, "d_sae": K, "dtype": "float32", "device": "cpu", **values}
        if "ranscoder" in kind:
            config |= {"d_out": OUT, "apply_b_dec_to_input": False}
        cls = getattr(saes, kind, None) or getattr(__import__("sae_lens"), kind)
        model = cls(getattr(__import__("sae_lens"), kind + "Config")(**config))
        model.cfg.metadata.hook_name = "blocks.2.attn.hook_z" if "heads" in name else "blocks.2.x"
        fill(model, generator)
        model.save_model(HERE / name)
        keep(name, SAE.load_from_disk(HERE / name))
    for name, (kind, values) in TRAINED.items():
        module = __import__("sae_lens")
        config = {"d_in": D, "d_sae": K, "dtype": "float32", "device": "cpu", **values}
        model = getattr(module, kind)(getattr(module, kind + "Config")(**config))
        fill(model, generator)
        if hasattr(model, "topk_threshold"):
            model.topk_threshold.fill_(0.7)
        model.save_inference_model(HERE / name)
        model.save_model(HERE / name.replace("for-use", "as-trained"))
        keep(name, SAE.load_from_disk(HERE / name))
    for name, (other, values) in OLD.items():
        (HERE / name).mkdir(exist_ok=True)
        weights = (HERE / other / "sae_weights.safetensors").read_bytes()
        (HERE / name / "sae_weights.safetensors").write_bytes(weights)
        config = {"d_in": D, "d_sae": K, "dtype": "float32", **values}
        (HERE / name / "cfg.json").write_text(json.dumps(config))
        keep(name, SAE.load_from_disk(HERE / name))
    np.savez_compressed(HERE / "expected.npz", **found)


if __name__ == "__main__":
    main()
