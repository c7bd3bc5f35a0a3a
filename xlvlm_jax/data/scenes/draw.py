"""Draws a scene as pixels."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageDraw

from .draw_objects import ANIMAL_SHAPES, PAINT, THING_SHAPES, Paint
from .draw_places import PLACE_DRAWERS, snowflakes
from .pen import SIZE, SUPER, Pen
from .scene import Scene, pick

JPEG_QUALITY = 95
NOISE = 4  # maximum change of a pixel, uniform

# Where objects stand: (x, y of the ground, scale). Wide objects take two rows, tall ones one; all
# arrangements leave at least about 70 % of each object visible.
TALL = {
    1: [[(56, 102, 1.5)]],
    2: [[(32, 99, 1.2), (80, 102, 1.2)], [(32, 102, 1.2), (80, 96, 1.2)]],
    3: [
        [(20, 102, 1.0), (56, 92, 1.0), (92, 103, 1.0)],
        [(20, 94, 1.0), (56, 104, 1.0), (92, 93, 1.0)],
        [(21, 105, 1.0), (55, 98, 1.0), (91, 92, 1.0)],
    ],
}
WIDE = {
    1: [[(56, 96, 1.75)]],
    2: [[(38, 72, 1.25), (74, 104, 1.25)], [(72, 70, 1.25), (38, 103, 1.25)]],
    3: [
        [(28, 70, 1.0), (84, 72, 1.0), (56, 104, 1.0)],
        [(56, 68, 1.0), (28, 104, 1.0), (84, 102, 1.0)],
        [(30, 66, 0.95), (82, 80, 0.95), (34, 105, 0.95)],
    ],
}
ROUND = {
    1: [[(56, 98, 1.7)]],
    2: [[(34, 96, 1.35), (78, 102, 1.35)], [(36, 102, 1.35), (78, 90, 1.35)]],
    3: [
        [(22, 100, 1.1), (56, 88, 1.1), (90, 102, 1.1)],
        [(30, 80, 1.1), (80, 84, 1.1), (56, 106, 1.1)],
    ],
}
ARRANGEMENTS = {"ball": ROUND, "bus": WIDE, "train": WIDE, "car": WIDE, "boat": WIDE, "plane": WIDE}
LARGEST = {"rabbit": 1.4, "bird": 1.45, "train": 1.6, "boat": 1.65, "bus": 1.75}
SMALLER = {"train": 0.86, "boat": 0.88, "bus": 0.96}  # next to others


def _places(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Returns ground points and scales, farthest first."""
    shapes = pick(rng, ARRANGEMENTS.get(scene.kind, TALL)[scene.count])
    _, width, height = (ANIMAL_SHAPES | THING_SHAPES)[scene.kind]
    placed = []
    turned = rng.random() < 0.5
    for x, y, scale in shapes:
        if scene.count == 1:
            scale = min(scale, LARGEST.get(scene.kind, scale))
        else:
            scale *= SMALLER.get(scene.kind, 1.0)
        scale *= 1 + 0.1 * (rng.random() - 0.5)
        wander = 9 if scene.count == 1 else 2.5
        x = (SIZE - x if turned else x) + wander * (2 * rng.random() - 1)
        y = y + 3 * (2 * rng.random() - 1)
        if scene.kind == "plane":
            y -= 14
        half = width * scale / 2
        x = min(max(x, half + 1), SIZE - half - 1)
        y = min(max(y, height * scale + 2), SIZE - 3)
        placed.append((x, y, scale))
    return sorted(placed, key=lambda place: place[1])


def draw(scene: Scene) -> np.ndarray:
    """Returns the picture of a scene: uint8[112, 112, 3], RGB."""
    return draw_with_masks(scene)[0]


def draw_with_masks(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene, and tells which of its pixels show which object.

    Returns:
        uint8[112, 112, 3], RGB, and bool[count, 112, 112]: for each object, farthest first, the
        pixels of which at least half show it and not an object in front of it.
    """
    rng = random.Random(scene.seed)
    image, pen = _begin(scene, rng)
    paint = _paint(scene, rng)
    objects = [(scene, paint, place) for place in _places(scene, rng)]
    shown = _draw_objects(image, objects, rng)
    return _finish(image, pen, scene, rng), shown


def draw_pair(left: Scene, right: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draws one object of each of two scenes beside each other, where the left one is.

    Such pictures tell the map of an attribute from one of any object. Models are not trained on
    them.

    Args:
        left: kind, colour and mood of the object on the left, and everything else.
        right: kind, colour and mood of the object on the right.

    Returns:
        uint8[112, 112, 3], RGB, and bool[2, 112, 112], the pixels that show the left and the right
        object.
    """
    rng = random.Random(left.seed)
    image, pen = _begin(left, rng)
    objects = []
    for scene, x in ((left, SIZE / 4), (right, 3 * SIZE / 4)):
        _, width, height = (ANIMAL_SHAPES | THING_SHAPES)[scene.kind]
        scale = min((SIZE / 2 - 4) / width, 1.25) * (1 - 0.1 * rng.random())
        y = max(92 + 12 * rng.random(), height * scale + 2)
        objects.append((scene, _paint(scene, rng), (x, y, scale)))
    shown = _draw_objects(image, objects, rng)
    return _finish(image, pen, left, rng), shown


def _begin(scene: Scene, rng: random.Random) -> tuple[Image.Image, Pen]:
    """Returns a picture of a place, larger than it will be."""
    image = Image.new("RGB", (SIZE * SUPER, SIZE * SUPER))
    pen = Pen(ImageDraw.Draw(image))
    PLACE_DRAWERS[scene.place](pen, rng, scene.weather)
    return image, pen


def _paint(scene: Scene, rng: random.Random) -> Paint:
    # Greys stay grey: one shift for all channels.
    grey = scene.colour in ("black", "white")
    shift = 8 * (2 * rng.random() - 1)
    shade = [shift if grey else 12 * (2 * rng.random() - 1) for _ in range(3)]
    red, green, blue = (
        int(min(255, max(0, c + d))) for c, d in zip(PAINT[scene.colour], shade, strict=True)
    )
    return Paint.of(scene.colour, (red, green, blue))


def _draw_objects(
    image: Image.Image,
    objects: list[tuple[Scene, Paint, tuple[float, float, float]]],
    rng: random.Random,
) -> np.ndarray:
    """Draws objects at (x, y, scale), farthest first; bool[count, 112, 112], what shows each."""
    shown = np.zeros((len(objects), SIZE, SIZE), bool)
    alone = Image.new("RGBA", image.size)
    canvas = ImageDraw.Draw(alone)
    for number, (scene, paint, (x, y, scale)) in enumerate(objects):
        own = Pen(canvas, x, y, scale, mirrored=rng.random() < 0.5)
        if scene.kind in ANIMAL_SHAPES:
            ANIMAL_SHAPES[scene.kind][0](own, paint, scene.mood == "happy")
        else:
            THING_SHAPES[scene.kind][0](own, paint)
        # What is not drawn on stays transparent, and nothing is half transparent.
        left, top, right, bottom = alone.getbbox() or (0, 0, 0, 0)
        x0, y0, x1, y1 = left // SUPER, top // SUPER, -(-right // SUPER), -(-bottom // SUPER)
        box = (SUPER * x0, SUPER * y0, SUPER * x1, SUPER * y1)
        drawn = alone.crop(box)
        image.paste(drawn, box, drawn)
        alone.paste((0, 0, 0, 0), box)
        covered = np.zeros((SIZE, SIZE), bool)
        covered[y0:y1, x0:x1] = np.asarray(drawn.getchannel("A").reduce(SUPER)) >= 128
        shown[:number] &= ~covered
        shown[number] = covered
    return shown


def _finish(image: Image.Image, pen: Pen, scene: Scene, rng: random.Random) -> np.ndarray:
    """Returns the picture in its size, with snowflakes and noise, uint8[112, 112, 3]."""
    if scene.place == "snow":
        snowflakes(pen, rng)
    pixels = np.asarray(image.reduce(SUPER), np.int16)
    noise = np.random.default_rng(scene.seed).integers(-NOISE, NOISE + 1, pixels.shape, np.int8)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def boxes(masks: np.ndarray) -> np.ndarray:
    """Returns the box around the pixels of each object.

    Args:
        masks: bool[count, height, width], from `draw_with_masks`.

    Returns:
        int[count, 4]: x0, y0, x1 and y1 in pixels, where x1 and y1 are the first after the object.
    """
    found = []
    for mask in masks:
        y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found.append((x[0], y[0], x[-1] + 1, y[-1] + 1))
    return np.array(found, int).reshape(-1, 4)


def encode(picture: np.ndarray) -> bytes:
    """Returns a drawn picture as the JPEG file that `write` stores."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def training_image(scene: Scene) -> np.ndarray:
    """Returns the picture as read from the JPEG file: uint8[112, 112, 3]."""
    return np.asarray(Image.open(io.BytesIO(encode(draw(scene)))).convert("RGB"))
