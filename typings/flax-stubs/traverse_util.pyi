"""What flax.traverse_util leaves without annotations: trees of parameters by path."""

from collections.abc import Mapping
from typing import Any

def flatten_dict(xs: Mapping[str, Any]) -> dict[tuple[str, ...], Any]: ...
def unflatten_dict(xs: Mapping[tuple[str, ...], Any]) -> dict[str, Any]: ...
