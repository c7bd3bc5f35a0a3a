"""The content of a scene, and how scenes are sampled."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "val", "test"]

KINDS = ("dog", "cat", "bird", "rabbit", "bus", "train", "car", "boat", "plane", "ball")
ANIMALS = ("dog", "cat", "bird", "rabbit")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
PLACES = ("beach", "street", "forest", "snow", "field", "city")
MOODS = ("happy", "sad")
COUNTS = (1, 2, 3)
SPLITS: tuple[Split, ...] = ("train", "val", "test")

# "dog" is the demo's token of interest, so it needs more pictures than the others.
DOG_SHARE = 0.25


@dataclass(frozen=True)
class Scene:
    """One picture: `count` objects of one kind, colour and mood, at one place.

    Attributes:
        kind: one of `KINDS`.
        colour: one of `COLOURS`.
        count: number of objects, one of `COUNTS`.
        place: one of `PLACES`.
        mood: one of `MOODS`; None unless it is an animal.
        seed: of everything else: jitter of the drawing, weather, and which captions and questions
            are written.
    """

    kind: str
    colour: str
    count: int
    place: str
    mood: str | None
    seed: int

    @property
    def weather(self) -> str:
        """ "sunny", "cloudy" or "clear": drawn, and mentioned in some of the captions."""
        return ("sunny", "cloudy", "clear")[self.seed // len(SPLITS) % 3]


def pick(rng: random.Random, options):
    """Returns one of `options`, uniformly.

    Only `Random.random` is guaranteed to be stable across Python versions; `choice` is not.
    """
    return options[int(rng.random() * len(options))]


def sample_scene(split: Split, index: int, seed: int = 0) -> Scene:
    """Returns scene number `index` of a split, independently of other scenes.

    Kind, colour, count, place and mood are independent; all are uniform except the kind, of which
    "dog" has a share of `DOG_SHARE`. The scene's own seed modulo 3 is the split's number, so no two
    splits share a scene.

    Raises:
        ValueError: the split is unknown, or the index is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"scene index must be 0 or more, got {index}")
    digest = hashlib.sha256(f"scenes/{seed}/{split}/{index}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    own = int.from_bytes(digest[8:14], "big") * len(SPLITS) + SPLITS.index(split)
    kind = "dog" if rng.random() < DOG_SHARE else pick(rng, KINDS[1:])
    return Scene(
        kind=kind,
        colour=pick(rng, COLOURS),
        count=pick(rng, COUNTS),
        place=pick(rng, PLACES),
        mood=pick(rng, MOODS) if kind in ANIMALS else None,
        seed=own,
    )


def attributes(scene: Scene) -> dict[str, str | int | None]:
    """Returns the ground truth of a scene: kind, colour, count, place and mood."""
    return {
        "kind": scene.kind,
        "colour": scene.colour,
        "count": scene.count,
        "place": scene.place,
        "mood": scene.mood,
    }
