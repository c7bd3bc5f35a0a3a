"""Describes a model: its parts, their sizes and its sites, from parameters and shapes only."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from markupsafe import Markup

from ports.checkpoint.params import stored_shapes
from ports.nn.vision_language import VisionLanguageModel
from ports.tables import html_table


def count_by_part(module: VisionLanguageModel, params: dict[str, Any]) -> dict[str, int]:
    """Counts parameters by part: each child of the decoder, the head, and every other tower."""
    decoder, head = ".".join(module.decoder_path), ".".join(module.head_path)
    outer = {tuple(decoder.split(".")[:depth]) for depth in range(1, decoder.count(".") + 1)}
    parts: dict[str, int] = defaultdict(int)
    for name, shape in stored_shapes(params).items():
        if name.startswith(head + "."):
            part = head
        elif name.startswith(decoder + "."):
            part = f"{decoder}.{name.removeprefix(decoder + '.').split('.')[0]}"
        else:
            path = name.split(".")
            part = ".".join(path[:2] if tuple(path[:1]) in outer else path[:1])
        parts[part] += math.prod(shape)
    return dict(parts)


def patterns(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Merges sites that differ only in numbers into one pattern with its count and width."""
    groups: dict[tuple[str, int], list[tuple[int, ...]]] = defaultdict(list)
    for name, shape in shapes.items():
        numbers = tuple(int(n) for n in re.findall(r"\.(\d+)(?=\.|$)", name))
        groups[re.sub(r"\.\d+(?=\.|$)", ".{}", name), shape[-1]].append(numbers)
    found = {}
    for (pattern, width), numbers in groups.items():
        spans = (sorted(set(column)) for column in zip(*numbers, strict=True))
        spans = [f"{s[0]}" if len(s) == 1 else f"{{{s[0]}-{s[-1]}}}" for s in spans]
        found[pattern.format(*spans)] = (len(numbers), width)
    return found


def in_short(model_type: str, module: VisionLanguageModel, params: dict[str, Any]) -> str:
    """Returns one line with the model family, the number of parameters and the dtype."""
    total = sum(count_by_part(module, params).values())
    return f"{model_type}, {total:,} parameters, {jnp.dtype(module.dtype).name}"


def as_html(
    model_type: str,
    module: VisionLanguageModel,
    params: dict[str, Any],
    site_shapes: Mapping[str, tuple[int, ...]],
) -> Markup:
    """Returns HTML with this line and two tables: parameters by part, and the sites."""
    parts = count_by_part(module, params)
    total = sum(parts.values())
    return html_table(
        [(part, f"{count:,}", f"{count / total:.1%}") for part, count in parts.items()],
        head=("part", "parameters", "share"),
        title=in_short(model_type, module, params),
    ) + html_table(
        [(pattern, count, width) for pattern, (count, width) in patterns(site_shapes).items()],
        head=("sites", "count", "width"),
        title=f"{len(site_shapes)} sites that can be captured or steered",
    )
