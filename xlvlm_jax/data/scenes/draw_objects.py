"""Draws the objects, each in its own coordinates and standing on (0, 0).

Scale 1 is the size of one of three. An animal is mostly head, as its mood must be visible in
patches of 14 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from .pen import Colour, Pen, bezier, mix

INK: Colour = (28, 26, 32)
PAPER: Colour = (252, 250, 244)
GLASS: Colour = (196, 226, 240)
PINK: Colour = (246, 160, 172)
TEAR: Colour = (70, 170, 245)

PAINT: dict[str, Colour] = {
    "red": (216, 30, 36),
    "orange": (250, 138, 18),
    "yellow": (250, 220, 32),
    "green": (24, 150, 56),
    "blue": (32, 84, 214),
    "purple": (142, 52, 176),
    "black": (44, 43, 48),
    "white": (250, 250, 250),
}


@dataclass(frozen=True)
class Paint:
    """The colours of one object: its own, a darker and a lighter one, outline and fine lines."""

    main: Colour
    dark: Colour
    light: Colour
    edge: Colour
    fine: Colour
    beak: Colour

    @classmethod
    def of(cls, name: str, main: Colour) -> Paint:
        """Returns the paint for a colour's name, of which `main` is a shade."""
        beak = (255, 214, 60) if name == "orange" else (245, 150, 30)
        if name == "black":
            # The outline stays dark; parts differ by lighter greys.
            return cls(main, (20, 20, 23), (112, 112, 120), (6, 6, 8), (200, 200, 205), beak)
        if name == "white":
            return cls(main, (196, 199, 210), (218, 221, 230), (60, 62, 72), (60, 62, 72), beak)
        return cls(
            main, mix(main, INK, 0.32), mix(main, PAPER, 0.5), mix(main, INK, 0.8), INK, beak
        )

    @property
    def contrast(self) -> Colour:
        """Colour of a small part that must stand out: blue on red and light paint, else red."""
        return (40, 70, 150) if self.main[0] >= 190 else (190, 40, 50)


# --- animals -----------------------------------------------------------------------------------


def _eyes(
    pen: Pen, v: float, apart: float, happy: bool, paint: Paint, iris: Colour = PAPER
) -> None:
    for side in (-1, 1):
        u = side * apart
        pen.ellipse(u - 3.6, v - 4.2, u + 3.6, v + 4.0, iris, paint.edge)
        pen.circle(u, v + (-0.4 if happy else 1.2), 2.1, INK)
        pen.circle(u - 0.7, v + (-1.4 if happy else 0.4), 0.8, PAPER)
        if not happy:
            # Brows raised towards the middle, a heavy lid on the outer side, a tear below.
            pen.polygon(
                [(u - side * 4.4, v - 5.2), (u + side * 4.4, v - 5.2), (u + side * 4.4, v - 0.2)],
                paint.main,
            )
            pen.line([(u - side * 3.8, v - 6.0), (u + side * 4.2, v - 2.4)], paint.fine, 1.5)
            pen.polygon([(u + side, v + 3.6), (u + side - 2, v + 9), (u + side + 2, v + 9)], TEAR)
            pen.circle(u + side, v + 9.6, 2.1, TEAR)
        else:
            pen.curve((u - 3.4, v - 5.8), (u, v - 8.6), (u + 3.4, v - 5.8), paint.fine, 1.3)


def _mouth(pen: Pen, v: float, half: float, happy: bool) -> None:
    """Draws a wide open smile, or a thick frown; `v` is the height of its middle."""
    if happy:
        smile = bezier((-half, v - 2.4), (0, v + 8.6), (half, v - 2.4))
        pen.polygon(smile, (150, 24, 40))
        pen.ellipse(-half * 0.45, v - 0.2, half * 0.45, v + 3.2, PINK)
        pen.line([*smile, smile[0]], INK, 1.3)
    else:
        pen.curve((-half, v + 3.4), (0, v - 5.6), (half, v + 3.4), INK, 2.2)


def _sitting(pen: Pen, paint: Paint, width: float, top: float) -> None:
    """Draws body, belly and two front paws."""
    pen.ellipse(-width, top, width, 1, paint.main, paint.edge)
    pen.ellipse(-width * 0.5, top + 4, width * 0.5, -1, paint.light)
    for side in (-1, 1):
        pen.ellipse(
            side * width * 0.48 - 4.4, -5, side * width * 0.48 + 4.4, 1, paint.light, paint.edge
        )


def dog(pen: Pen, paint: Paint, happy: bool) -> None:
    """Draws floppy ears, a snout, a collar; the tail up or down."""
    tail = ((9, -6), (20, -8), (19, -23)) if happy else ((9, -5), (17, -7), (20, 0))
    pen.curve(*tail, paint.edge, 6.0)
    pen.curve(*tail, paint.main, 4.2)
    _sitting(pen, paint, 12, -24)
    pen.rectangle(-8, -20.5, 8, -17, paint.contrast)
    pen.ellipse(-14.5, -50, 14.5, -18, paint.main, paint.edge)
    for side in (-1, 1):
        lobe = [
            (side * 8, -49),
            (side * 14, -50),
            (side * 18.5, -42),
            (side * 19.5, -31),
            (side * 16.5, -24),
            (side * 12.8, -27),
            (side * 12, -37),
        ]
        pen.polygon(lobe, paint.dark, paint.edge)
    pen.ellipse(-9.6, -33, 9.6, -17.4, mix(paint.light, PAPER, 0.45), paint.edge)
    pen.ellipse(-4.2, -35.5, 4.2, -29.6, INK)
    pen.ellipse(-2.2, -34.6, 0, -33, (150, 150, 160))
    _eyes(pen, -39, 6, happy, paint)
    _mouth(pen, -25, 6.6, happy)


def cat(pen: Pen, paint: Paint, happy: bool) -> None:
    """Draws pointed ears, whiskers, stripes on the forehead; the tail up or down."""
    tail = ((8, -5), (25, -6), (15, -27)) if happy else ((8, -4), (20, -8), (21, 0))
    pen.curve(*tail, paint.edge, 4.8)
    pen.curve(*tail, paint.main, 3.2)
    _sitting(pen, paint, 10.5, -24)
    for side in (-1, 1):
        pen.polygon(
            [(side * 15, -34), (side * 14.5, -57), (side * 2.5, -45)], paint.main, paint.edge
        )
        pen.polygon([(side * 13, -41), (side * 12.6, -52), (side * 6.6, -46)], PINK)
    pen.ellipse(-16.5, -48, 16.5, -18, paint.main, paint.edge)
    for u in (-3.4, 0, 3.4):
        pen.line([(u, -47), (u * 0.8, -42.5)], paint.dark, 1.6)
    pen.ellipse(-8.6, -32.5, 8.6, -18, mix(paint.light, PAPER, 0.45))
    pen.polygon([(-2.6, -33), (2.6, -33), (0, -29.6)], (232, 96, 120), INK)
    _eyes(pen, -38, 7.2, happy, paint, iris=(190, 236, 120))
    _mouth(pen, -25, 5.8, happy)
    for side in (-1, 1):
        for v0, v1 in ((-30.5, -33.5), (-28.5, -28.5), (-26.5, -23.5)):
            pen.line([(side * 8.4, v0), (side * 20, v1)], paint.edge, 0.8)


def rabbit(pen: Pen, paint: Paint, happy: bool) -> None:
    """Draws long upright ears, a white round tail, two teeth in the smile."""
    pen.circle(11.5, -6, 4.2, PAPER, paint.edge)
    _sitting(pen, paint, 11, -22)
    for side in (-1, 1):
        lean = side * (2 if happy else 5)
        ear = [
            (side * 2, -40),
            (side * 2.2 + lean, -58),
            (side * 5.4 + lean, -65.5),
            (side * 9.4 + lean, -60),
            (side * 10.5, -40),
        ]
        pen.polygon(ear, paint.main, paint.edge)
        inner = [
            (side * 4.4, -44),
            (side * 4.6 + lean, -57),
            (side * 6 + lean, -61),
            (side * 7.6, -44),
        ]
        pen.polygon(inner, PINK)
    pen.ellipse(-14, -47, 14, -17, paint.main, paint.edge)
    pen.ellipse(-9, -31, 0.6, -19.5, PAPER)
    pen.ellipse(-0.6, -31, 9, -19.5, PAPER)
    pen.ellipse(-2.6, -33, 2.6, -29.4, (226, 90, 116), INK)
    _eyes(pen, -37.4, 6.2, happy, paint)
    _mouth(pen, -25.4, 6, happy)
    if happy:
        pen.rectangle(-2.6, -26.6, 2.6, -22.6, (255, 255, 255), INK)
        pen.line([(0, -26), (0, -23)], INK, 0.6)


def bird(pen: Pen, paint: Paint, happy: bool) -> None:
    """Draws a crest and a beak that smiles or frowns; wings spread or hanging."""
    for side in (-1, 1):
        pen.line([(side * 4, -8), (side * 4.4, -1)], INK, 1.8)
        pen.line([(side * 4.4 - 3.2, 0), (side * 4.4, -2), (side * 4.4 + 3.4, 0)], INK, 1.8)
    pen.polygon([(8, -14), (23, -13), (22, -7), (15, -5.4), (8, -8)], paint.dark, paint.edge)
    pen.ellipse(-13, -32, 13, -4, paint.main, paint.edge)
    pen.ellipse(-7, -24, 7, -6, paint.light)
    for side in (-1, 1):
        if happy:
            wing = [
                (side * 11, -16),
                (side * 22, -26),
                (side * 22.5, -33),
                (side * 16, -30),
                (side * 10, -25),
            ]
        else:
            wing = [
                (side * 9, -25),
                (side * 14.5, -22),
                (side * 17, -12),
                (side * 14, -3),
                (side * 10, -10),
            ]
        pen.polygon(wing, paint.dark, paint.edge)
    for u, v in ((-4, -57), (0.4, -59.5), (4.6, -57)):
        pen.line([(u * 0.3, -50), (u, v)], paint.edge, 3.0)
        pen.line([(u * 0.3, -50), (u, v)], paint.main, 1.6)
    pen.circle(0, -37, 14.4, paint.main, paint.edge)
    _eyes(pen, -41.5, 6.6, happy, paint)
    if happy:
        upper = [(-8.6, -34.5), (0, -37.5), (8.6, -34.5), (0, -28.6)]
        pen.polygon(bezier((-8, -34), (0, -17), (8, -34)), (150, 24, 40), INK)
        pen.polygon(
            [
                *bezier((-8, -33.4), (0, -17.5), (8, -33.4)),
                *bezier((8, -33.4), (0, -22.5), (-8, -33.4)),
            ],
            paint.beak,
            INK,
        )
        pen.polygon(upper, paint.beak, INK)
    else:
        crescent = [
            *bezier((-8.4, -25.2), (0, -44), (8.4, -25.2)),
            *bezier((8.4, -25.2), (0, -31.5), (-8.4, -25.2)),
        ]
        pen.polygon(crescent, paint.beak, INK)
        pen.curve((-6.4, -26.6), (0, -37.2), (6.4, -26.6), INK, 1.0)


# --- things ------------------------------------------------------------------------------------


def _wheel(pen: Pen, u: float, radius: float) -> None:
    pen.circle(u, -radius, radius, INK)
    pen.circle(u, -radius, radius * 0.5, (190, 192, 198))


def bus(pen: Pen, paint: Paint) -> None:
    """Draws a tall box with two rows of windows and a door."""
    pen.rectangle(-22, -36, 22, -4, paint.main, paint.edge, radius=3)
    for k in range(5):
        pen.rectangle(-19.5 + 8 * k, -33, -13.5 + 8 * k, -25.6, GLASS, paint.edge)
    pen.rectangle(-21.2, -23.6, 21.2, -21.6, paint.light)
    for k in range(4):
        pen.rectangle(-19.5 + 8 * k, -19.5, -13.5 + 8 * k, -12.5, GLASS, paint.edge)
    pen.rectangle(13, -19.5, 19.5, -5, GLASS, paint.edge)
    pen.line([(16.2, -19), (16.2, -5.4)], paint.edge, 0.8)
    pen.rectangle(18.8, -9, 22.4, -6.4, (255, 240, 150), INK)
    _wheel(pen, -12, 5)
    _wheel(pen, 7.5, 5)


def train(pen: Pen, paint: Paint) -> None:
    """Draws a steam locomotive and its wagon, on rails."""
    steel = (92, 94, 104)
    pen.rectangle(-31, -1.4, 31, 0.4, steel)
    for k in range(8):
        pen.rectangle(-29 + 8 * k, 0.4, -25.4 + 8 * k, 2.2, (112, 78, 50))
    # Wagon.
    pen.rectangle(-30, -22, -7, -6, paint.main, paint.edge)
    pen.rectangle(-31, -24.4, -6, -21, paint.dark, paint.edge)
    for k in range(3):
        pen.rectangle(-28 + 7 * k, -18.6, -23 + 7 * k, -12.4, GLASS, paint.edge)
    pen.rectangle(-7, -9, -3, -7, INK)
    # Locomotive: cab, boiler, chimney with smoke, cow-catcher.
    pen.rectangle(-3, -26, 9, -6, paint.main, paint.edge)
    pen.rectangle(-4.6, -28.6, 10.6, -25, paint.dark, paint.edge)
    pen.rectangle(-0.4, -22.6, 6.2, -15, GLASS, paint.edge)
    pen.rectangle(9, -18.6, 27, -6, paint.main, paint.edge, radius=2.4)
    pen.rectangle(14, -18, 16, -6.4, paint.light)
    for u, v, r in ((20, -36, 4), (14.5, -39.5, 4.6), (7.5, -42, 3.6)):
        pen.circle(u, v, r, (236, 236, 240), (150, 150, 160))
    pen.polygon([(20.6, -18), (19, -29), (27, -29), (25.4, -18)], paint.dark, paint.edge)
    pen.polygon([(26, -8), (31, -1.6), (26, -1.6)], steel, INK)
    pen.circle(27, -13.6, 2.2, (255, 240, 150), INK)
    for u in (-25, -12):
        _wheel(pen, u, 3.6)
    for u in (1.8, 13, 22):
        _wheel(pen, u, 4.2)
    pen.line([(1.8, -4.2), (22, -4.2)], (205, 60, 50) if paint.main[0] < 190 else steel, 1.4)


def car(pen: Pen, paint: Paint) -> None:
    """Draws a low body with a cabin."""
    cabin = [(-15, -13), (-9.5, -23.5), (6.5, -23.5), (14, -13)]
    pen.polygon(cabin, paint.main, paint.edge)
    pen.polygon([(-11.4, -13), (-7.6, -21), (-1.4, -21), (-1.4, -13)], GLASS, paint.edge)
    pen.polygon([(1.2, -13), (1.2, -21), (5.4, -21), (10.4, -13)], GLASS, paint.edge)
    body = [(-24, -5), (-24, -11.5), (-21, -14), (14, -14), (22, -11.5), (25, -8.5), (25, -4.5)]
    pen.polygon(body, paint.main, paint.edge)
    pen.line([(-23, -8.6), (24, -8.6)], paint.light, 1.2)
    pen.line([(0, -13), (0, -5)], paint.edge, 0.8)
    pen.rectangle(2, -11.8, 5, -10.8, paint.edge)
    pen.ellipse(21.4, -11, 25, -7.4, (255, 240, 150), INK)
    pen.rectangle(-24.6, -11, -22.4, -8, (225, 40, 40), INK)
    _wheel(pen, -13.5, 5.6)
    _wheel(pen, 14, 5.6)


def boat(pen: Pen, paint: Paint) -> None:
    """Draws hull, mast, two sails and a flag, in a little water."""
    pen.rectangle(-0.8, -44, 0.8, -11, (122, 82, 50), INK)
    pen.polygon([(2.4, -42), (2.4, -15), (19, -15)], paint.main, paint.edge)
    pen.polygon([(-2.4, -37), (-2.4, -15), (-15, -15)], PAPER, (90, 90, 100))
    pen.polygon([(0.8, -48), (0.8, -43), (8.4, -45.5)], paint.main, paint.edge)
    pen.polygon([(-22, -13), (23, -13), (15.5, 0), (-15, 0)], paint.main, paint.edge)
    pen.polygon([(-21, -11), (21.6, -11), (20, -8), (-19.4, -8)], paint.light)
    for u in (-9, 0, 9):
        pen.circle(u, -5.2, 1.7, GLASS, paint.edge)
    pen.polygon(
        [
            (-25, 1.4),
            *[(-24 + 6 * k, -2.4 if k % 2 else 0.6) for k in range(9)],
            (26, 1.4),
            (20, 3),
            (-19, 3),
        ],
        (96, 190, 226),
        (40, 120, 170),
    )


def plane(pen: Pen, paint: Paint) -> None:
    """Draws a fuselage with swept wings, in flight."""
    pen.polygon([(-1, -17), (-11, -29), (-5, -29), (9, -17)], paint.dark, paint.edge)
    pen.polygon([(-15, -16), (-25, -30), (-19, -30), (-9, -18)], paint.main, paint.edge)
    hull = [
        *bezier((-24, -15), (-18, -21), (6, -20.6)),
        *bezier((16, -20.4), (26, -18), (26, -13)),
        *bezier((26, -11), (20, -8), (4, -8)),
        (-12, -10),
    ]
    pen.polygon(hull, paint.main, paint.edge)
    pen.polygon([(14, -19.4), (19, -18.8), (22.6, -15.6), (14, -15.6)], GLASS, paint.edge)
    for k in range(4):
        pen.circle(-9 + 5.6 * k, -15.6, 1.7, GLASS, paint.edge)
    pen.polygon([(-17, -14), (-25, -9), (-20, -9), (-9, -13)], paint.dark, paint.edge)
    pen.polygon([(0, -13), (-13, 0), (-6, 0), (11, -12)], paint.dark, paint.edge)


def ball(pen: Pen, paint: Paint) -> None:
    """Draws curved stripes and a highlight."""
    pen.circle(0, -15, 15, paint.main)
    # Two curved stripes, then the highlight.
    pen.polygon(
        [*bezier((-5, -29), (-13, -15), (-5, -1)), *bezier((-1, -0.4), (-6, -15), (-1, -29.6))],
        paint.light,
    )
    pen.polygon(
        [*bezier((6, -28.4), (8, -15), (6, -1.6)), *bezier((10, -4), (15, -15), (10, -26))],
        paint.light,
    )
    pen.circle(0, -15, 15, None, paint.edge)
    pen.ellipse(-10, -26, -4, -20.6, PAPER)


# name: (function, width, height) in pixels at scale 1.
ANIMAL_SHAPES = {
    "dog": (dog, 40, 51),
    "cat": (cat, 40, 57),
    "bird": (bird, 44, 59),
    "rabbit": (rabbit, 30, 66),
}
THING_SHAPES = {
    "bus": (bus, 45, 37),
    "train": (train, 62, 45),
    "car": (car, 50, 24),
    "boat": (boat, 51, 50),
    "plane": (plane, 52, 31),
    "ball": (ball, 30, 30),
}
