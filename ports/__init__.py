"""Flax Linen ports of vision-language models.

    vlm = ports.load("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    inputs = vlm.processor(images=image, text=prompt, return_tensors="np")
    answer = vlm.generate(inputs, max_new_tokens=20)

This package does not depend on `xlvlm_jax` and can be used on its own.
"""

import importlib
from types import ModuleType

from ports import torch_notice
from ports.decoding.generate import Generation
from ports.decoding.sampling import Sampling
from ports.intervene.edits import (
    Edit,
    Places,
    ablate,
    add,
    add_mapped,
    add_relative,
    edit_with,
    replace,
    stacked,
)
from ports.intervene.lora import Adapter, adapted, merge
from ports.intervene.sites import capture, list_sites
from ports.intervene.steer import steer, substitute
from ports.loading import hub_names, load, load_abstract
from ports.parallel.sharding import make_mesh, parse_mesh
from ports.passes import Output
from ports.programs import compilation_cache
from ports.vlm import VLM

__all__ = [
    "VLM",
    "Adapter",
    "Edit",
    "Generation",
    "Output",
    "Places",
    "Sampling",
    "ablate",
    "adapted",
    "add",
    "add_mapped",
    "add_relative",
    "capture",
    "compilation_cache",
    "edit_with",
    "hub_names",
    "list_sites",
    "load",
    "load_abstract",
    "make_mesh",
    "merge",
    "parse_mesh",
    "replace",
    "stacked",
    "steer",
    "substitute",
]

# Old module paths, kept importable.
_ROOMS = {
    "bert": "ports.models.bert",
    "clip": "ports.models.clip",
    "edits": "ports.intervene.edits",
    "hub": "ports.checkpoint.hub",
    "lora": "ports.intervene.lora",
    "padding": "ports.inputs.padding",
    "sharding": "ports.parallel.sharding",
    "sites": "ports.intervene.sites",
    "steering": "ports.intervene.steer",
}

torch_notice.leave_out()


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
