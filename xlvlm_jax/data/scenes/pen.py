"""A pen that draws in an object's own coordinates, on a supersampled canvas."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import ImageDraw

SIZE = 112  # pixels of the finished picture
SUPER = 3  # supersampling factor

Colour = tuple[int, int, int]


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Returns the colour between `a` (share 0) and `b` (share 1)."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


@dataclass(frozen=True)
class Pen:
    """Draws at (x, y) + scale * (right, down), mirrored if requested; coordinates are pixels.

    Every shape takes `edge`, the colour of an outline about one pixel wide.
    """

    canvas: ImageDraw.ImageDraw
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    mirrored: bool = False

    def _point(self, u: float, v: float) -> tuple[float, float]:
        u = -u if self.mirrored else u
        return (self.x + self.scale * u) * SUPER, (self.y + self.scale * v) * SUPER

    def _box(self, u0: float, v0: float, u1: float, v1: float) -> list[float]:
        (a, b), (c, d) = self._point(u0, v0), self._point(u1, v1)
        return [min(a, c), min(b, d), max(a, c), max(b, d)]

    def _width(self, width: float) -> int:
        return max(1, round(width * self.scale * SUPER))

    def rectangle(self, u0, v0, u1, v1, fill, edge=None, radius: float = 0) -> None:
        """Draws a rectangle from (u0, v0) to (u1, v1); `radius` rounds the corners."""
        box = self._box(u0, v0, u1, v1)
        width = self._width(0.9) if edge else 0
        if radius:
            self.canvas.rounded_rectangle(
                box, radius * self.scale * SUPER, fill=fill, outline=edge, width=width
            )
        else:
            self.canvas.rectangle(box, fill=fill, outline=edge, width=width)

    def ellipse(self, u0, v0, u1, v1, fill, edge=None) -> None:
        """Draws the ellipse that fills the box from (u0, v0) to (u1, v1)."""
        width = self._width(0.9) if edge else 0
        self.canvas.ellipse(self._box(u0, v0, u1, v1), fill=fill, outline=edge, width=width)

    def circle(self, u, v, radius, fill, edge=None) -> None:
        """Draws a circle around (u, v)."""
        self.ellipse(u - radius, v - radius, u + radius, v + radius, fill, edge)

    def polygon(self, points, fill, edge=None) -> None:
        """Draws a closed polygon through (u, v) points."""
        corners = [self._point(u, v) for u, v in points]
        self.canvas.polygon(corners, fill=fill)
        if edge:
            self.canvas.line(
                [*corners, corners[0], corners[1]], fill=edge, width=self._width(0.9), joint="curve"
            )

    def line(self, points, colour, width: float = 1.0) -> None:
        """Draws a polyline with round joints and ends."""
        corners = [self._point(u, v) for u, v in points]
        thick = self._width(width)
        self.canvas.line(corners, fill=colour, width=thick, joint="curve")
        if thick > 4:
            for a, b in (corners[0], corners[-1]):
                half = thick / 2
                self.canvas.ellipse((a - half, b - half, a + half, b + half), fill=colour)

    def curve(self, start, control, end, colour, width: float = 1.0) -> None:
        """Draws a quadratic Bezier curve."""
        self.line(bezier(start, control, end), colour, width)


def bezier(start, control, end, steps: int = 8) -> list[tuple[float, float]]:
    """Returns points of a quadratic Bezier curve, including both ends."""
    points = []
    for k in range(steps + 1):
        t = k / steps
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        points.append(
            tuple(a * p + b * q + c * r for p, q, r in zip(start, control, end, strict=True))
        )
    return points
