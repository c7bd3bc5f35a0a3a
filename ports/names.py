"""Names of modules and parameters: Flax paths <-> checkpoint names.

Modules are named as in the checkpoints: the Flax path ("language_model", "model", "layers_19") is
"language_model.model.layers.19", and its parameter "kernel" is that name with ".weight".
"""

import re
from collections.abc import Callable, Iterable

Rename = Callable[[str], str | None]
_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "table": "embedding",  # a bare parameter with this name
}
# Containers of numbered blocks. Other names may end in a number too (linear_1, layer_norm2).
_CONTAINERS = {"layer", "layers", "blocks"}
_NUMBER = re.compile(r"^(.+)_(\d+)$")


def number(*containers: str) -> None:
    """Registers containers: modules NAME_0, NAME_1 ... are NAME.0, NAME.1 ... in checkpoints."""
    _CONTAINERS.update(containers)


def tensor_name(path: tuple[str, ...]) -> str:
    """Returns the checkpoint name of the parameter at a Flax path."""
    return site_name((*path[:-1], _LEAVES.get(path[-1], path[-1])))


def module_name(rename: Rename, module: str) -> str:
    """Returns the port's name for a module named as in a known checkpoint or in transformers."""
    return (rename(f"{module}.weight") or "").removesuffix(".weight")


def site_name(path: Iterable[str]) -> str:
    """Returns the site of a Flax module: ("model", "layers_3", "mlp") -> "model.layers.3.mlp"."""
    return ".".join(map(_dotted, path))


def _dotted(part: str) -> str:
    found = _NUMBER.match(part)
    return f"{found[1]}.{found[2]}" if found and found[1] in _CONTAINERS else part


def called_name(path: Iterable[str], method: str) -> str:
    """Returns the site of a method's output: the module's, plus the name unless `__call__`."""
    return site_name((*path, *([] if method == "__call__" else [method])))


def normal_name(name: str) -> str:
    """Normalizes the spelling: a/layers_3, a.layers_3 and a.layers.3 all give a.layers.3."""
    return re.sub(r"_(\d+)(?=\.|$)", r".\1", name.replace("/", "."))
