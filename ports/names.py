"""Names of modules and parameters: Flax paths <-> checkpoint names.

Modules are named as in the checkpoints: the Flax path ("language_model", "model", "layers_19") is
"language_model.model.layers.19", and its parameter "kernel" is that name with ".weight".

A linear layer that is fused in the checkpoints, such as query, key and value in one, has a kernel
and a bias per part, so that each part can be divided among devices by itself (`layers.fused`):
("blocks_0", "attn", "qkv", "key", "kernel") is a part of "blocks.0.attn.qkv.weight".
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

Path = tuple[str, ...]
T = TypeVar("T")
Rename = Callable[[str], str | None]
_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "table": "embedding",  # a bare parameter with this name
}
# Containers of numbered blocks. Other names may end in a number too (linear_1, layer_norm2).
_CONTAINERS = {"layer", "layers", "blocks"}
# Fused linear layers -> their parts, in the order of the stored rows.
_FUSED: dict[str, Path] = {}
_NUMBER = re.compile(r"^(.+)_(\d+)$")


def number(*containers: str) -> None:
    """Registers containers: modules NAME_0, NAME_1 ... are NAME.0, NAME.1 ... in checkpoints."""
    _CONTAINERS.update(containers)


def fuse(layer: str, *parts: str) -> None:
    """Registers a linear layer that is one in checkpoints and has a kernel per part here.

    Args:
        layer: its name.
        *parts: names of its parts, in the order of the rows of the stored weight.
    """
    _FUSED[layer] = parts


def parts_of(layer: str) -> Path:
    """Returns the parts of a fused layer, in the order of the stored rows; none of any other."""
    return _FUSED.get(layer, ())


def stored_path(path: Path) -> Path:
    """Returns a parameter's path without the part of a fused layer: that of the stored tensor."""
    if len(path) < 3:
        return path
    *above, part, leaf = path
    return (*above, leaf) if part in parts_of(above[-1]) else path


def by_tensor(parameters: Mapping[Path, T]) -> dict[Path, dict[Path, T]]:
    """Groups parameters that are stored in one tensor.

    Args:
        parameters: Flax path -> anything.

    Returns:
        Path of the tensor (`stored_path`) -> its parameters, in the order of the stored rows. All
        but the parts of fused layers have a tensor of their own.
    """
    found: dict[Path, dict[Path, T]] = {}
    for path, value in parameters.items():
        found.setdefault(stored_path(path), {})[path] = value
    for path, group in found.items():
        if len(group) > 1:
            order = parts_of(path[-2])
            found[path] = dict(sorted(group.items(), key=lambda item: order.index(item[0][-2])))
    return found


def tensor_name(path: Path) -> str:
    """Returns the checkpoint name of the tensor that holds the parameter at a Flax path."""
    path = stored_path(path)
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
