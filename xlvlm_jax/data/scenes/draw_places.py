"""Draws the places: background, ground and typical things, with jitter, behind the objects."""

from __future__ import annotations

import random

from .pen import SIZE, Pen, mix

CLOUD = (250, 251, 253)
SUN = (255, 226, 96)


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _sky(pen: Pen, rng: random.Random, colour, weather: str, cloud=CLOUD) -> None:
    pen.rectangle(0, 0, SIZE, SIZE, colour)
    pen.rectangle(0, 26, SIZE, SIZE, mix(colour, (255, 255, 255), 0.22))
    if weather == "sunny":
        u, v = _between(rng, 10, 102), _between(rng, 8, 16)
        pen.circle(u, v, 10.5, mix(colour, SUN, 0.45))
        pen.circle(u, v, 7, SUN)
    elif weather == "cloudy":
        for _ in range(3):
            u, v = _between(rng, 6, 106), _between(rng, 6, 22)
            pen.ellipse(u - 12, v - 3, u + 12, v + 4, cloud)
            pen.ellipse(u - 6, v - 7, u + 5, v + 3, cloud)


def beach(pen: Pen, rng: random.Random, weather: str) -> None:
    """Draws the sea with waves, sand with shells, one palm."""
    _sky(pen, rng, (158, 212, 240), weather)
    sea = _between(rng, 34, 40)
    shore = sea + _between(rng, 15, 20)
    pen.rectangle(0, sea, SIZE, shore + 6, (72, 166, 200))
    for k in range(4):
        v = sea + 3 + 4.2 * k
        for _ in range(3):
            u = _between(rng, -6, 100)
            pen.curve((u, v), (u + 6, v - 3), (u + 12, v), (190, 228, 238), 0.9)
    points = [(0, SIZE), (0, shore)]
    points += [(14 * k, shore + _between(rng, -1.5, 2.5)) for k in range(1, 9)]
    points.append((SIZE, SIZE))
    pen.line(points[1:-1], (244, 248, 248), 3.4)
    pen.polygon(points, (238, 218, 166))
    for _ in range(16):
        u, v = _between(rng, 2, 110), _between(rng, shore + 5, 110)
        pen.circle(u, v, 0.7, (214, 188, 132))
    for _ in range(2):
        u, v = _between(rng, 6, 106), _between(rng, 98, 109)
        pen.polygon([(u - 3, v), (u, v - 4), (u + 3, v)], (250, 236, 226), (196, 150, 136))
    left = rng.random() < 0.5
    u, lean = (_between(rng, 6, 16), 5) if left else (_between(rng, 96, 106), -5)
    top = _between(rng, 16, 22)
    pen.curve((u, shore + 8), (u - lean, 44), (u + lean, top), (150, 112, 70), 3.2)
    for a, b in ((-14, 3), (-11, -6), (0, -9), (11, -6), (14, 3), (6, 9), (-6, 9)):
        tip = (u + lean + a, top + b)
        pen.curve((u + lean, top), (u + lean + a * 0.6, top + b - 4), tip, (70, 140, 84), 2.6)


def street(pen: Pen, rng: random.Random, weather: str) -> None:
    """Draws a row of houses, a pavement with a lamppost, the road."""
    _sky(pen, rng, (196, 216, 232), weather)
    kerb = _between(rng, 54, 60)
    u = -_between(rng, 0, 12)
    walls = [(214, 160, 134), (222, 204, 170), (176, 150, 138), (198, 184, 190), (206, 178, 140)]
    while u < SIZE:
        width = _between(rng, 22, 30)
        top = _between(rng, 16, 26)
        wall = walls[int(rng.random() * 5)]
        pen.rectangle(u, top, u + width, kerb, wall)
        pen.polygon([(u - 1, top), (u + width / 2, top - 8), (u + width + 1, top)], (140, 84, 72))
        for a in (0.14, 0.6):
            pen.rectangle(
                u + width * a,
                top + 5,
                u + width * (a + 0.26),
                top + 13,
                (236, 240, 232),
                (110, 92, 86),
            )
        pen.rectangle(u + width * 0.36, kerb - 14, u + width * 0.64, kerb, (118, 86, 70))
        u += width + 1
    pen.rectangle(0, kerb, SIZE, kerb + 9, (206, 202, 194))
    for k in range(8):
        u = 16 * k + 3
        pen.line([(u, kerb), (u - 3, kerb + 8)], (182, 178, 170), 0.7)
    pen.rectangle(0, kerb + 8, SIZE, SIZE, (128, 130, 136))
    pen.rectangle(0, kerb + 8, SIZE, kerb + 10, (160, 160, 162))
    shift = _between(rng, -14, 14)
    middle = (kerb + SIZE) / 2 + 8
    for k in range(-1, 5):
        u = 28 * k + shift
        pen.polygon(
            [(u, middle), (u + 16, middle), (u + 14, middle + 3.4), (u - 2, middle + 3.4)],
            (242, 238, 222),
        )
    u = _between(rng, 4, 12) if rng.random() < 0.5 else _between(rng, 100, 108)
    pen.rectangle(u - 1, 22, u + 1, kerb + 6, (70, 74, 80))
    pen.polygon(
        [(u - 4, 16), (u + 4, 16), (u + 2.4, 23), (u - 2.4, 23)], (255, 236, 160), (70, 74, 80)
    )


def forest(pen: Pen, rng: random.Random, weather: str) -> None:
    """Draws trunks and leaves, a brown floor with mushrooms."""
    _sky(pen, rng, (190, 220, 214), weather)
    for _ in range(9):
        u, v = _between(rng, 0, SIZE), _between(rng, 24, 40)
        pen.circle(u, v, 13, (132, 170, 134))
    floor = _between(rng, 56, 62)
    pen.rectangle(0, floor - 12, SIZE, SIZE, (104, 146, 106))
    pen.rectangle(0, floor, SIZE, SIZE, (146, 130, 92))
    start = _between(rng, -6, 8)
    for k in range(5):
        u = start + 25 * k + _between(rng, -4, 4)
        wide = _between(rng, 3, 4.4)
        foot = floor + _between(rng, 0, 10)
        pen.polygon(
            [
                (u - wide * 0.7, 0),
                (u + wide * 0.7, 0),
                (u + wide * 1.3, foot),
                (u - wide * 1.3, foot),
            ],
            (112, 82, 58),
        )
        pen.line([(u, 34), (u + 8, 26)], (112, 82, 58), 2)
        green = mix((66, 118, 74), (96, 148, 84), rng.random())
        for a in (-8, 8, 0):
            pen.circle(u + a, 10 + _between(rng, -5, 4) - (abs(a) < 1) * 6, 12, green)
    for _ in range(12):
        u, v = _between(rng, 0, SIZE), _between(rng, floor + 3, 110)
        pen.ellipse(u - 2.2, v - 1, u + 2.2, v + 1, (178, 120, 62))
    for u in (_between(rng, 3, 26), _between(rng, 86, 109)):
        v = _between(rng, 98, 109)
        pen.rectangle(u - 1, v - 4, u + 1, v, (244, 236, 220))
        pen.ellipse(u - 4, v - 8, u + 4, v - 2.6, (196, 70, 58))
        pen.circle(u - 1, v - 6, 0.8, (250, 245, 240))


def snow(pen: Pen, rng: random.Random, weather: str) -> None:
    """Draws white peaks, drifts, two pines; `snowflakes` are added on top."""
    _sky(pen, rng, (186, 202, 222), weather, cloud=(226, 231, 238))
    base = _between(rng, 52, 58)
    for _ in range(3):
        u, top, wide = _between(rng, 6, 106), _between(rng, 16, 28), _between(rng, 26, 38)
        pen.polygon([(u - wide, base + 2), (u, top), (u + wide, base + 2)], (150, 166, 190))
        share = 0.36
        peak = [
            (u - wide * share, top + (base - top) * share),
            (u, top),
            (u + wide * share, top + (base - top) * share),
        ]
        pen.polygon([*peak, (u + 4, top + 6), (u - 3, top + 9)], (244, 247, 252))
    drift = [(0, SIZE), (0, base + 2)]
    drift += [(16 * k, base + _between(rng, -3, 3)) for k in range(1, 7)] + [
        (SIZE, base),
        (SIZE, SIZE),
    ]
    pen.polygon(drift, (226, 233, 243))
    for _ in range(5):
        u, v = _between(rng, 0, 100), _between(rng, base + 8, 108)
        pen.curve((u, v), (u + 9, v - 4), (u + 18, v), (196, 208, 226), 1.2)
    for u in (_between(rng, 4, 22), _between(rng, 90, 108)):
        foot = base + _between(rng, 2, 8)
        pen.rectangle(u - 1.4, foot - 4, u + 1.4, foot, (104, 78, 62))
        for k in range(3):
            v, wide = foot - 4 - 8 * k, 10 - 2.4 * k
            pen.polygon([(u - wide, v), (u, v - 13), (u + wide, v)], (70, 112, 104))
            pen.polygon(
                [(u - wide * 0.5, v - 6.5), (u, v - 13), (u + wide * 0.5, v - 6.5)], (248, 250, 253)
            )


def snowflakes(pen: Pen, rng: random.Random) -> None:
    """Draws falling flakes; drawn last, since they also fall in front of the objects."""
    for _ in range(22):
        pen.circle(
            _between(rng, 0, SIZE), _between(rng, 0, SIZE), _between(rng, 0.8, 1.5), (255, 255, 255)
        )


def field(pen: Pen, rng: random.Random, weather: str) -> None:
    """Draws hills, a barn, a fence, grass with flowers."""
    _sky(pen, rng, (150, 204, 242), weather)
    base = _between(rng, 46, 52)
    for k in range(3):
        u = 56 * k + _between(rng, -16, 16)
        pen.ellipse(
            u - 42,
            base - _between(rng, 8, 14),
            u + 42,
            base + 30,
            mix((150, 190, 112), (172, 204, 122), k / 2),
        )
    pen.rectangle(0, base + 4, SIZE, SIZE, (176, 208, 118))
    for k in range(4):
        v = base + 10 + 14 * k
        pen.rectangle(0, v, SIZE, v + 6, (190, 216, 128))
    u = _between(rng, 8, 40) if rng.random() < 0.5 else _between(rng, 72, 104)
    pen.rectangle(u - 8, base - 12, u + 8, base + 2, (186, 84, 70))
    pen.polygon([(u - 10, base - 11), (u, base - 20), (u + 10, base - 11)], (122, 70, 62))
    pen.rectangle(u - 3, base - 7, u + 3, base + 2, (240, 230, 214))
    v = base + 6
    for k in range(9):
        pen.rectangle(14 * k - 1, v - 6, 14 * k + 1, v + 4, (206, 178, 130))
    pen.rectangle(0, v - 4, SIZE, v - 2.4, (206, 178, 130))
    pen.rectangle(0, v, SIZE, v + 1.6, (206, 178, 130))
    for _ in range(10):
        u, v = _between(rng, 2, 110), _between(rng, base + 16, 110)
        pen.line([(u, v), (u, v + 3.4)], (104, 152, 74), 1)
        petal = ((250, 246, 240), (238, 150, 180), (250, 226, 120))[int(rng.random() * 3)]
        pen.circle(u, v, 1.9, petal)
        pen.circle(u, v, 0.7, (200, 140, 50))
    for _ in range(10):
        u, v = _between(rng, 2, 110), _between(rng, base + 14, 111)
        pen.line([(u - 1.6, v - 3), (u, v), (u + 1.6, v - 3)], (122, 168, 84), 0.8)


def city(pen: Pen, rng: random.Random, weather: str) -> None:
    """Draws towers with lit windows at dusk, a tiled square."""
    _sky(pen, rng, (244, 206, 186), weather, cloud=(252, 234, 226))
    base = _between(rng, 58, 64)
    u = -_between(rng, 0, 8)
    while u < SIZE:
        width = _between(rng, 10, 15)
        pen.rectangle(u, _between(rng, 18, 36), u + width, base, (176, 168, 188))
        u += width + _between(rng, 0, 3)
    u = -_between(rng, 0, 10)
    while u < SIZE:
        width, top = _between(rng, 13, 19), _between(rng, 6, 34)
        wall = mix((96, 106, 134), (122, 118, 146), rng.random())
        pen.rectangle(u, top, u + width, base, wall)
        if rng.random() < 0.3:
            pen.line([(u + width / 2, top), (u + width / 2, top - 7)], wall, 1.2)
        columns = int(width / 4.4)
        v = top + 3
        while v < base - 5:
            for k in range(columns):
                lit = rng.random() < 0.6
                a = u + 2.2 + 4.4 * k
                pen.rectangle(a, v, a + 2.2, v + 3, (250, 226, 150) if lit else (146, 156, 184))
            v += 6
        u += width + _between(rng, 1, 6)
    pen.rectangle(0, base, SIZE, SIZE, (190, 184, 190))
    for k in range(5):
        v = base + 2 + 2.4 * k * (k + 1) / 1.2
        pen.line([(0, v), (SIZE, v)], (168, 162, 172), 0.8)
    for k in range(-4, 13):
        pen.line(
            [(56 + (14 * k - 56) * 0.6, base), (56 + (14 * k - 56) * 1.6, SIZE)],
            (168, 162, 172),
            0.8,
        )


PLACE_DRAWERS = {
    "beach": beach,
    "street": street,
    "forest": forest,
    "snow": snow,
    "field": field,
    "city": city,
}
