"""Chooses the pictures that the page shows: as many per concept as its size allows."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from xlvlm_jax.features.reader import Features
from xlvlm_jax.report.cards import Card, Picture, Section, own_pictures
from xlvlm_jax.report.thumbnails import SIDES, Thumbnail, thumbnails

ROOM = 0.5  # share of the budget that the strongest pictures shrink to; the rest is for more
LEAST = 1000  # bytes, fewer than any thumbnail of the smallest size has


class Shown(NamedTuple):
    """The pictures that the page shows."""

    sections: list[Section]  # with the pictures that fit on the page
    thumbnails: dict[str, Thumbnail]  # {image as given: thumbnail}
    left_out: int  # number of concepts' strongest pictures that did not fit
    asked_for: int


def choose_pictures(
    sections: Sequence[tuple[Section, Features]],
    others: Iterable[str],
    roots: Sequence[Path],
    budget: int,
) -> Shown:
    """Chooses pictures and makes their thumbnails within a budget.

    Each concept's strongest picture comes first, then `others`, then the next strongest pictures.
    The rest of the budget goes to small pictures of the concepts' own rows, one concept after the
    other.

    Args:
        sections: each with the features that its concepts were learnt on.
        others: the images of other parts of the page.
        roots: directories in which relative paths are looked up.
        budget: maximum size of all thumbnails, in bytes.

    Returns:
        The sections and thumbnails.
    """
    wanted = _in_order([section for section, _ in sections], others)
    small = thumbnails(wanted, roots, budget=budget, room=ROOM)
    shown = [_with_shown(section, small) for section, _ in sections]
    left, most = budget - sum(len(t.uri or "") for t in small.values()), budget // LEAST
    turns = _InTurn(
        {
            (s, c): own_pictures(card, features, most)
            for s, (_, features) in enumerate(sections)
            for c, card in enumerate(shown[s].cards)
        },
        most=most,
    )
    new = (p.image for p in turns if p.image and p.image not in small)
    # They are folded away at first: the smallest size is enough and fits the most.
    small |= thumbnails(new, roots, budget=left, sides=SIDES[-1:], first=len(small))
    shown = [
        dataclasses.replace(
            section,
            cards=[
                _with_more(card, turns, (s, c), small, most) for c, card in enumerate(section.cards)
            ],
        )
        for s, section in enumerate(shown)
    ]
    return Shown(shown, small, sum(image not in small for image in wanted), len(wanted))


def _in_order(sections: Iterable[Section], others: Iterable[str]) -> list[str]:
    """Returns every picture once: each concept's first, then `others`, then the rest."""
    ranked = itertools.zip_longest(
        *([p.image for p in card.pictures] for section in sections for card in section.cards)
    )
    first = next(ranked, ())
    found = (*first, *others, *itertools.chain.from_iterable(ranked))
    return list(dict.fromkeys(image for image in found if image))


def _with_shown(section: Section, small: Mapping[str, Thumbnail]) -> Section:
    """Returns the section without the pictures that did not fit on the page."""
    cards = [
        dataclasses.replace(
            card, pictures=[p for p in card.pictures if not p.image or p.image in small]
        )
        for card in section.cards
    ]
    return dataclasses.replace(section, cards=cards)


Key = tuple[int, int]  # section, card


class _InTurn:
    """Yields a picture of each concept in turn, and records what it yielded per concept."""

    def __init__(self, waiting: dict[Key, Iterator[Picture]], most: int):
        self._waiting, self._most = waiting, most
        self.yielded: dict[Key, list[Picture]] = defaultdict(list)
        self.ended: set[Key] = set()  # concepts without further pictures

    def __iter__(self) -> Iterator[Picture]:
        count = 0
        while self._waiting:
            for key, pictures in list(self._waiting.items()):
                picture = next(pictures, None)
                if picture is None:
                    del self._waiting[key]
                    self.ended.add(key)
                elif count == self._most:
                    return
                else:
                    count += 1
                    self.yielded[key].append(picture)
                    yield picture


def _with_more(
    card: Card, turns: _InTurn, key: Key, small: Mapping[str, Thumbnail], most: int
) -> Card:
    further = turns.yielded[key]
    more = [p for p in further if not p.image or p.image in small]
    looked_at_all = key in turns.ended and len(card.own[0]) <= most
    return dataclasses.replace(card, more=more, has_all=looked_at_all and len(more) == len(further))
