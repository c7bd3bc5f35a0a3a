"""Lays maps of concepts over the pictures on their cards."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from xlvlm_jax.concepts.stored_maps import CellValues, load_maps
from xlvlm_jax.features.reader import Features
from xlvlm_jax.report.cards import Card, Section
from xlvlm_jax.report.heat_maps import overlay, shared_scale
from xlvlm_jax.report.thumbnails import Thumbnail
from xlvlm_jax.storage.zarr_rows import StoredRows

BUDGET = 700_000  # bytes of all overlays on a page; the cards that come first have theirs


def with_overlays(
    sections: list[Section],
    run: Path,
    features: Features,
    thumbnails: Mapping[str, Thumbnail],
    budget: int = BUDGET,
) -> list[Section]:
    """Returns the sections with maps over the pictures of their cards, as far as they are known.

    Maps of concepts of image tokens are the activations of the tokens; those of others are known
    once `xlvlm map` has stored them beside the concepts. The pictures of a card share a scale.

    Args:
        sections: the sections, with the pictures that the page shows.
        run: the run directory.
        features: the features that the concepts were learnt on.
        thumbnails: {image as given: thumbnail}.
        budget: maximum size of all overlays, in bytes.

    Raises:
        ValueError: stored maps are damaged, or of other concepts.
    """
    made = []
    for section in sections:
        stored = load_maps(run / section.name, section.concepts)
        cards = []
        for card in section.cards:
            drawn = _overlays(card, section, features, stored, thumbnails) if budget > 0 else {}
            budget -= sum(map(len, drawn.values()))
            pictures = [p._replace(overlay=drawn.get(p.number)) for p in card.pictures]
            cards.append(dataclasses.replace(card, pictures=pictures))
        made.append(dataclasses.replace(section, cards=cards))
    return made


def _overlays(
    card: Card,
    section: Section,
    features: Features,
    stored: Mapping[tuple[int, int], CellValues],
    thumbnails: Mapping[str, Thumbnail],
) -> dict[int, str]:
    """Returns {sample: overlay} of a card's pictures."""
    cells = {}
    for picture in card.pictures:
        thumbnail = thumbnails.get(picture.image or "")
        if thumbnail is None or thumbnail.size is None:
            continue
        known = stored.get((card.number, picture.number))
        if known is None:
            known = _of_rows(card.number, picture.number, section, features)
        if known is not None:
            cells[picture.number] = (known, thumbnail.size)
    scale = shared_scale(values for (values, _), _ in cells.values())
    return {
        number: overlay(values[:, None], boxes[:, None], size, scale)
        for number, ((values, boxes), size) in cells.items()
    }


def _of_rows(concept: int, sample: int, section: Section, features: Features) -> CellValues | None:
    """Returns the activations of a sample's image tokens; None for rows of other tokens."""
    if features.cells is None:
        return None
    first, last = np.searchsorted(features.sample_rows, [sample, sample + 1])
    picture, view, *_ = features.cells.grid[first:last].T
    rows = first + np.flatnonzero((picture == 0) & (view == 0))
    activations = section.concepts.activations
    if activations is None or not len(rows):
        return None
    if isinstance(activations, StoredRows):
        near = activations.read(int(first), int(last))
    else:
        near = np.asarray(activations[first:last])
    values = np.asarray(near[rows - first, concept], np.float32)
    return CellValues(values, np.asarray(features.cells.box[rows]))
