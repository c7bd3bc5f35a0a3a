# What `ports` exports, imported at first use (see ports/lazy_names.py).
from ports.decoding.generate import Generation
from ports.decoding.sampling import Sampling
from ports.intervene.adaptive_edits import add_adaptive, add_if_similar
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
from ports.loading import hub_names, load, load_abstract, load_text
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
    "add_adaptive",
    "add_if_similar",
    "add_mapped",
    "add_relative",
    "capture",
    "compilation_cache",
    "edit_with",
    "hub_names",
    "list_sites",
    "load",
    "load_abstract",
    "load_text",
    "make_mesh",
    "merge",
    "parse_mesh",
    "replace",
    "stacked",
    "steer",
    "substitute",
]

# Old module paths, kept importable.
from ports.checkpoint import hub as hub
from ports.inputs import padding as padding
from ports.intervene import edits as edits
from ports.intervene import lora as lora
from ports.intervene import sites as sites
from ports.intervene import steer as steering  # noqa: F401
from ports.models import bert as bert
from ports.models import clip as clip
from ports.parallel import sharding as sharding
