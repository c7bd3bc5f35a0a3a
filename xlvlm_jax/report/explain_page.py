"""Writes the explanation of one sample as a self-contained HTML page."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xlvlm_jax.concepts.explain import SampleExplanation
from xlvlm_jax.concepts.picture_maps import MapRow
from xlvlm_jax.data.images import read_image
from xlvlm_jax.report.environment import environment, store
from xlvlm_jax.report.map_page import Mapped, mapped, page_parts

PROTOTYPES = 5


def write_explanation(
    explained: SampleExplanation,
    output: str | os.PathLike[str],
    facts: Sequence[tuple[str, str]] = (),
) -> Path:
    """Writes an explanation as a page, which needs no other file and no network.

    Args:
        explained: from `explain_picture` or, then without maps and effects, `explain_sample`.
        output: the file to write.
        facts: (name, value) pairs to show at the head of the page.

    Returns:
        The path of the page.

    Raises:
        OSError: the page can't be written.
    """
    own = explained.image
    shown = [image for each in explained.concepts for image in each.images[:PROTOTYPES]]
    text = (
        environment()
        .get_template("explain.html.jinja")
        .render(
            title=f"Why “{explained.prediction}”" if explained.prediction else explained.sample,
            explained=explained,
            facts=facts,
            overlays=_overlays(explained),
            name=Path(own or explained.sample).name,
            prototypes=PROTOTYPES,
            **page_parts([*([own] if own else []), *shown]),
        )
    )
    return store(Path(output), text)


def _overlays(explained: SampleExplanation) -> dict[int, Mapped]:
    """Returns the map of each concept, each with its own scale from zero."""
    layout, found = explained.layout, {}
    if layout is None or explained.image is None:
        return found
    size = read_image(explained.image).size
    for each in explained.concepts:
        if each.map is not None:
            # Codes and similarities begin at zero; a cell without any must not look active.
            zero = np.zeros((1, 1), np.float32)
            row = MapRow(f"concept {each.concept}", "activation", [each.map])
            drawn = mapped(row, [layout.boxes], [size], among=[zero, each.map])
            found[each.concept] = drawn
    return found
