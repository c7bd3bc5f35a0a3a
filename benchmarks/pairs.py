"""Pictures of two objects: does the map of what one of them is point at it, and not at the other?

The objects of a pair stand beside each other and differ in kind and colour; animals may also differ
in mood. A map of *objects* can't tell them apart, whichever it is: it scores 1/2 on both measures.

    own      share of the objects for which the highest cell in the boxes of the two is in its own
    apart    how well the map ranks the pixels of its own object above those of the other
"""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import ports
from xlvlm_jax.data import scenes
from xlvlm_jax.data.scenes.draw import encode

SIDE, GRID = 112, 8
# Far from the scenes that other parts of the benchmark draw.
FIRST = 100_000
# In which the objects of a pair may differ.
ATTRIBUTES = ("kind", "colour", "mood")


class Pairs(NamedTuple):
    """Pictures of two objects, and their states at each site."""

    attributes: list[tuple[dict[str, Any], dict[str, Any]]]  # of the left and the right object
    inputs: list[dict[str, np.ndarray]]  # batches
    states: dict[str, np.ndarray]  # site -> float32[N, 64, D], of the image tokens
    pixels: np.ndarray  # float[N, 2, 64], pixels of each object in each cell
    in_box: np.ndarray  # bool[N, 2, 64], whether its middle lies in the box of each object


def pair_of_scenes(index: int) -> tuple[scenes.Scene, scenes.Scene]:
    """Returns two scenes of different kinds and colours, and of one place."""
    following = iter(range(FIRST + 100 * index, FIRST + 100 * (index + 1)))
    left = scenes.sample_scene("test", next(following))
    for number in following:
        right = scenes.sample_scene("test", number)
        if left.kind != right.kind and left.colour != right.colour:
            return left, right
    raise AssertionError("a hundred scenes of one kind or colour")


def states_of_cells(
    vlm: ports.VLM, prompt: str, images: list[Image.Image], sites: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the processor's arrays of a batch, and site -> states of its cells [B, 64, D]."""
    inputs = vlm.process([vlm.render(prompt)] * len(images), images)
    cells = np.stack([row[0].positions.reshape(-1) for row in vlm.patch_layout(inputs)])
    states = vlm.states(inputs, sites=sites)
    return inputs, {
        site: np.take_along_axis(np.asarray(value), cells[..., None], axis=1)
        for site, value in states.items()
    }


def cells_in_boxes(masks: np.ndarray) -> np.ndarray:
    """Returns bool[objects, 64], the cells whose middle is in the box of each object."""
    middle = (np.arange(GRID) + 0.5) * SIDE / GRID
    found = []
    for x0, y0, x1, y1 in scenes.boxes(masks):
        rows, columns = (middle >= y0) & (middle < y1), (middle >= x0) & (middle < x1)
        found.append((rows[:, None] & columns).reshape(-1))
    return np.stack(found)


def pixels_in_cells(masks: np.ndarray) -> np.ndarray:
    """Returns float[objects, 64], how many pixels of each cell show each object."""
    step = SIDE // GRID
    return masks.reshape(-1, GRID, step, GRID, step).sum((2, 4)).reshape(-1, GRID**2).astype(float)


def look_at_pairs(
    vlm: ports.VLM, prompt: str, count: int, sites: list[str], batch: int = 50
) -> Pairs:
    """Draws pairs and runs the model over them."""
    drawn = [pair_of_scenes(index) for index in range(count)]
    pictures, masks = zip(*(scenes.draw_pair(*pair) for pair in drawn), strict=True)
    inputs, states = [], {site: [] for site in sites}
    for start in range(0, count, batch):
        images = [Image.open(io.BytesIO(encode(p))) for p in pictures[start : start + batch]]
        made, found = states_of_cells(vlm, prompt, images, sites)
        inputs.append(made)
        for site, value in found.items():
            states[site].append(value)
    return Pairs(
        [(scenes.attributes(left), scenes.attributes(right)) for left, right in drawn],
        inputs,
        {site: np.concatenate(parts) for site, parts in states.items()},
        np.stack([pixels_in_cells(each) for each in masks]),
        np.stack([cells_in_boxes(each) for each in masks]),
    )


def score_pairs(maps: Mapping[Any, np.ndarray], pairs: Pairs, name: str) -> tuple[float, float]:
    """Returns `own` and `apart` of an attribute: means over its values.

    Args:
        maps: value -> float[N, 64], the map of each value in every picture.
        pairs: the pictures.
        name: the attribute.

    Returns:
        NaN if objects do not differ in it.
    """
    found: dict[Any, list[tuple[float, float]]] = {}
    for n, both in enumerate(pairs.attributes if name in ATTRIBUTES else ()):
        for mine in (0, 1):
            value, other = both[mine].get(name), both[1 - mine].get(name)
            if value is None or other is None or value == other or value not in maps:
                continue
            given = maps[value][n]
            highest = np.where(pairs.in_box[n], given, -np.inf).max(1)
            own = (np.sign(highest[mine] - highest[1 - mine]) + 1) / 2
            weights = pairs.pixels[n, mine][:, None] * pairs.pixels[n, 1 - mine]
            above = (np.sign(given[:, None] - given) + 1) / 2
            found.setdefault(value, []).append((own, (weights * above).sum() / weights.sum()))
    if not found:
        return float("nan"), float("nan")
    means = np.mean([np.mean(scores, axis=0) for scores in found.values()], axis=0)
    return float(means[0]), float(means[1])
