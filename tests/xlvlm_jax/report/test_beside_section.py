"""Two runs side by side: pairs by hand, unmatched concepts, and runs that cannot be compared."""

import dataclasses
import re

import numpy as np
import pytest

from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.report import write_report
from xlvlm_jax.report.beside_section import beside, pair_sections, read_other

SITE = "language_model.model.norm"
AXES = np.eye(4, dtype=np.float32)


@pytest.fixture
def two_runs(tmp_path, write_run, activations):
    """Returns two runs: concepts along axes 0, 1, 2, and along 2, 0, 3, 1 at other lengths."""
    for name, order, codes, words in (
        ("ours", (0, 1, 2), activations, [["dog", "red"], ["cat"], ["sea", "sky"]]),
        (
            "theirs",
            (2, 0, 3, 1),
            np.c_[activations[:, [2, 0]], 0 * activations[:, 0], activations[:, 1]],
            [["sky", "sea"], ["red", "blue"], [], ["bird"]],
        ),
    ):
        run = write_run(codes)
        Concepts(
            AXES[list(order)] * (1 + len(order)), codes, words=words, source={"site": SITE}
        ).save(run / "concepts")
        run.rename(tmp_path / name)
    return tmp_path / "ours", tmp_path / "theirs"


def sections(run):
    return read_other(run).sections


def side_by_side(two_runs):
    (ours,), (theirs,) = map(sections, two_runs)
    return beside(ours, theirs, ("ours", "theirs"), ({"batch": 1, "model": "a"}, {"model": "a"}))


def test_pairs_by_hand(two_runs):
    made = side_by_side(two_runs)
    # In the order of our shares: 14, 6 and 3 rows; then the concept that has no match.
    numbers = [(p.ours and p.ours.number, p.theirs and p.theirs.number) for p in made.pairs]
    assert numbers == [(1, 3), (0, 1), (2, 0), (None, 2)]
    assert [p.cosine for p in made.pairs] == [1, 1, 1, None]
    assert [set(p.shared) for p in made.pairs] == [set(), {"red"}, {"sea", "sky"}, set()]
    assert made.cosine == 1
    assert made.overlap == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert made.differences == [("concepts", "3", "4"), ("batch", "1", "–")]


def test_fewer_concepts_on_the_other_side(two_runs):
    (theirs,), (ours,) = map(sections, two_runs)
    made = beside(ours, theirs, ("a", "b"), ({}, {}))
    alone = [p.ours.number for p in made.pairs if p.theirs is None]
    assert alone == [2] and all(p.ours is not None for p in made.pairs)
    assert made.cosine == 1


def test_pairs_of_concepts_not_shown_in_full(two_runs):
    whole = side_by_side(two_runs)
    (ours,), (theirs,) = (read_other(two_runs[i], num_concepts=2 - i).sections for i in (0, 1))
    made = beside(ours, theirs, ("ours", "theirs"), ({"batch": 1, "model": "a"}, {"model": "a"}))
    assert [(p.ours.number, p.theirs.number, p.cosine) for p in made.pairs] == [
        (1, 3, 1),
        (0, 1, 1),
    ]
    assert made.pairs[0].theirs.pictures and not made.pairs[1].theirs.pictures
    assert made.left_out == 1
    assert (made.cosine, made.overlap) == (whole.cosine, whole.overlap)
    assert made.differences == whole.differences


def test_the_order_of_their_concepts_changes_no_pair(two_runs):
    (ours,), (theirs,) = map(sections, two_runs)
    order = [3, 1, 0, 2]
    concepts = dataclasses.replace(
        theirs.concepts, components=np.asarray(theirs.concepts.components)[order]
    )
    cards = [dataclasses.replace(c, number=order.index(c.number)) for c in theirs.cards]
    moved = dataclasses.replace(theirs, concepts=concepts, cards=cards)
    first = beside(ours, theirs, ("a", "b"), ({}, {}))
    again = beside(ours, moved, ("a", "b"), ({}, {}))
    assert [(p.ours, p.shared, p.cosine) for p in first.pairs] == [
        (p.ours, p.shared, p.cosine) for p in again.pairs
    ]


def test_sections_of_one_name_then_of_one_site_belong_together(two_runs):
    (ours,), (theirs,) = map(sections, two_runs)
    other = dataclasses.replace(ours, name="concepts-b", site="layers.1")
    renamed = dataclasses.replace(theirs, name="concepts-c", site="layers.1")
    assert pair_sections([ours, other], [renamed, theirs]) == [(0, 1), (1, 0)]
    assert pair_sections([ours], [dataclasses.replace(theirs, site="layers.2")]) == [(0, 0)]
    with pytest.raises(
        ValueError, match=r"no site in common: one has language_model\.model\.norm, layer"
    ):
        pair_sections([ours, other], [dataclasses.replace(theirs, site="layers.2")])


def test_other_widths_are_refused(two_runs):
    (ours,), (theirs,) = map(sections, two_runs)
    wide = dataclasses.replace(theirs.concepts, components=np.ones((4, 7), np.float32))
    with pytest.raises(ValueError, match="of ours have width 4 and of theirs 7; compare runs of"):
        beside(ours, dataclasses.replace(theirs, concepts=wide), ("ours", "theirs"), ({}, {}))


def test_the_page(two_runs, xlvlm):
    ours, theirs = two_runs
    assert "Side by side" not in write_report(ours).read_text()
    status, _, err = xlvlm("report", ours, "--beside", theirs, "--overwrite")
    assert (status, err) == (0, "")
    text = (ours / "report.html").read_text()
    plain = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "ours on the left, theirs on the right" in plain
    assert text.count('<article class="pair"') == 4 and text.count("cosine 1.00") == 3
    assert "<b>red</b>" in text and "no match" in plain
    status, _, err = xlvlm("report", ours, "--beside", ours / "features", "--overwrite")
    assert status == 2 and "expected features/ and concepts*/ of another run" in err


def test_runs_of_one_name_are_distinguished_by_their_paths(two_runs, tmp_path):
    ours, theirs = two_runs
    for place, run in (("a", ours), ("b", theirs)):
        (tmp_path / place).mkdir()
        run.rename(tmp_path / place / "run")
    text = write_report(tmp_path / "a" / "run", beside=tmp_path / "b" / "run").read_text()
    assert "a/run on the left, b/run on the right" in text
