"""Which pictures the page shows, by hand, and that they stay within the budget."""

import dataclasses

import numpy as np
import pytest

from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.samples import StoredSamples
from xlvlm_jax.report.cards import _own, own_pictures, read_section
from xlvlm_jax.report.pictures import choose_pictures
from xlvlm_jax.report.thumbnails import BUDGET


def choose(run, budget=BUDGET, others=()):
    features = Features.open(run / "features")
    section = read_section(run / "concepts", features, {})
    return choose_pictures([(section, features)], others, (run,), budget)


def size(shown):
    return sum(len(thumbnail.uri or "") for thumbnail in shown.thumbnails.values())


def test_every_row_of_a_concept_has_its_picture_the_strongest_first(write_run, activations):
    shown = choose(write_run(activations))
    assigned = activations.argmax(axis=1)
    assigned[-1] = -1  # it activates none
    for card in shown.sections[0].cards:
        own = np.flatnonzero(assigned == card.number)
        found = [int(p.sample.removeprefix("sample-")) for p in (*card.pictures, *card.more)]
        assert card.has_all and set(own) <= set(found) and len(set(found)) == len(found)
        strengths = [p.activation for p in card.more]
        assert strengths == sorted(strengths, reverse=True)
        assert len(card.pictures) == 5
    assert shown.left_out == 0
    assert set(shown.thumbnails) >= {
        p.image for card in shown.sections[0].cards for p in (*card.pictures, *card.more)
    }
    assert len({t.name for t in shown.thumbnails.values()}) == len(shown.thumbnails)


def test_a_sparse_feature_has_all_rows_that_activate_it():
    """It is the strongest nowhere; a dense concept has its own rows alone."""
    sparse, dense, own = np.zeros(40, np.float32), np.ones(40, np.float32), np.zeros(40, bool)
    sparse[3:11] = [1, 2, 3, 4, 8, 7, 6, 5]
    own[[5, 20]] = True
    found = _own(sparse, own)
    assert found.rows.tolist() == [7, 8, 9, 10, 6, 5, 4, 3]
    assert found.activations.tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert _own(dense, own).rows.tolist() == [5, 20]
    sparse[11] = 1  # more than a fifth
    assert _own(sparse, own).rows.tolist() == [5]


def test_the_rest_of_the_budget_goes_to_each_concept_in_turn(write_run, activations):
    run = write_run(activations)
    everything = choose(run)
    strongest = {p.image for card in everything.sections[0].cards for p in card.pictures}
    first = sum(len(everything.thumbnails[image].uri) for image in strongest)
    shown = choose(run, budget=first + 8000)
    # Of concepts with 9 and 1 further pictures, the second has its one before the first has all.
    counts = {card.number: len(card.more) for card in shown.sections[0].cards}
    whole = {card.number: card.has_all for card in shown.sections[0].cards}
    assert 0 < counts[1] < 9 and counts[0] == 1 and counts[2] == 0
    assert whole == {0: True, 1: False, 2: True}
    assert size(shown) <= first + 8000 and shown.left_out == 0


@pytest.mark.parametrize("budget", [0, 5_000, 20_000, 60_000])
def test_no_budget_is_exceeded_and_every_shown_picture_has_a_thumbnail(
    write_run, activations, budget
):
    run = write_run(activations)
    everything, shown = choose(run), choose(run, budget)
    assert size(shown) <= budget
    cards = shown.sections[0].cards
    images = {p.image for card in cards for p in (*card.pictures, *card.more)}
    assert images <= set(shown.thumbnails)
    strongest = {p.image for card in everything.sections[0].cards for p in card.pictures}
    assert shown.asked_for == len(strongest)
    assert shown.left_out == len(strongest - set(shown.thumbnails))


@pytest.mark.wrong_types  # checking `samples` reads one
def test_samples_are_not_read_beyond_the_budget(write_run, activations, monkeypatch):
    """A page of a million rows reads about as many samples as it shows."""
    run = write_run(activations)
    read, get = [], StoredSamples.__getitem__
    monkeypatch.setattr(
        StoredSamples, "__getitem__", lambda self, index: read.append(index) or get(self, index)
    )
    choose(run, budget=3000)
    few = len(read)
    read.clear()
    choose(run)
    # The 5 strongest of each of 3 concepts; and of the 23 rows of their own, one or all.
    assert few == 15 + 1 and len(read) == 15 + 23


def test_a_limited_number_of_a_concepts_rows_is_read(write_run, activations):
    """Of a million rows with the same few pictures, not all are read."""
    run = write_run(activations)
    features = Features.open(run / "features")
    card = read_section(run / "concepts", features, {}).cards[0]
    card = dataclasses.replace(card, pictures=[])
    everything = [picture.sample for picture in own_pictures(card, features, len(card.own[0]))]
    assert [p.sample for p in own_pictures(card, features, 3)] == everything[:3]
    assert len(everything) > 3
