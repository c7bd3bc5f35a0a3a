"""What all figures share: one style, no window, and a file that is written atomically."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

from xlvlm_jax.storage import atomic

FAINT = "#b8bcc2"  # of what the others are compared with
COLOURS = ("#3b6ea5", "#c8553d", "#6a994e", "#8e6c8a", "#d4a017", "#4f5d75")
_LOOK: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # answers and names may hold dollar signs
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "xlvlm",  # the same figure gives the same bytes
}


@contextmanager
def figure(
    path: str | os.PathLike[str], rows: int = 1, columns: int = 1, *, width: float, height: float
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Yields a figure to draw on and writes it to `path` when the block ends.

        with figure("effect.svg", width=5, height=3) as (_, axes):
            axes[0, 0].plot(alphas, moved)

    Args:
        path: the file to write; its suffix (.svg, .png or .pdf) sets the format. A missing parent
            directory is created. If the block raises, no file is written.
        rows, columns: the number of rows and columns of axes.
        width, height: the size of the whole figure in inches.

    Yields:
        The figure and its axes, object[rows, columns].

    Raises:
        ValueError: the suffix is not .svg, .png or .pdf.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(
            f"{path}: expected a file ending in .svg, .png or .pdf; got {path.suffix!r}"
        )
    with matplotlib.rc_context(_LOOK):
        # Without pyplot: no global state, no display, and nothing to close.
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn, drawn.subplots(rows, columns, squeeze=False)
        stream = io.BytesIO()
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
        kind = path.suffix.removeprefix(".")
        drawn.savefig(stream, format=kind, dpi=150, metadata=dated[kind])
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, stream.getvalue())
