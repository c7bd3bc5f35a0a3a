"""The analysis of two sets of states: planted shifts, permutations, what is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax import Concepts, shift
from xlvlm_jax.shift import Pairs, ShiftAnalysis


def pairs_of(Z) -> Pairs:
    rows = np.arange(len(Z))
    return Pairs(rows, rows, len(Z))


@pytest.fixture
def analysis(states, concepts_of) -> ShiftAnalysis:
    before, after = states
    return shift.analyse(before, after, pairs_of(before), concepts_of(before), concepts_of(after))


@pytest.fixture
def grounded(analysis, states, concepts_of, head) -> ShiftAnalysis:
    before, after = states
    ids = [f"s{i}" for i in range(30)]
    words = shift.ground_words(analysis, head.unembed, head.tokenizer, num_words=2)
    concepts = concepts_of(before), concepts_of(after)
    return shift.ground_samples(words, *concepts, before, after, ids, ids, num_images=10)


def group_of(analysis: ShiftAnalysis) -> np.ndarray:
    """Returns the planted group of each concept."""
    return analysis.original[:, :3].argmax(1)


def test_planted_shifts_are_found_and_hit_the_new_concepts(analysis):
    group = group_of(analysis)
    assert sorted(group) == [0, 1, 2]
    expected = 5 * np.eye(8)[group + 1] * (group < 2)[:, None]
    np.testing.assert_allclose(analysis.shifts, expected, atol=1e-4)
    np.testing.assert_allclose(analysis.shifted, analysis.finetuned, atol=1e-4)
    moving = group < 2
    np.testing.assert_allclose(analysis.recovery_l2[moving], 1, atol=1e-4)
    np.testing.assert_allclose(analysis.spread.consistency, moving, atol=1e-5)
    np.testing.assert_allclose(analysis.spread.magnitude, 5 * moving, atol=1e-4)
    # cos(6 e + 5 f, 6 e) = 6 / sqrt(61), and the shifted concept is the new one.
    np.testing.assert_allclose(analysis.recovery[moving], 61**0.5 / 6 - 1, rtol=0.02)
    assert analysis.counts.tolist() == [10, 10, 10]
    assert analysis.correlations["consistency-recovery"].r == pytest.approx(1, abs=1e-3)


def test_words_and_images_of_the_three(grounded):
    group = group_of(grounded)
    names = ("dog", "beach", "red")
    for k, g in enumerate(group):
        own = {f"s{i}" for i in range(10 * g, 10 * g + 10)}
        for kind in ("original", "shifted", "finetuned"):
            assert grounded.words[kind][k][0] == names[g]
            assert set(grounded.images[kind][k]) == own
        if g < 2:
            assert (
                grounded.words["shifted"][k]
                == grounded.words["finetuned"][k]
                == [
                    names[g],
                    names[g + 1],
                ]
            )
            assert grounded.words["shift"][k][0] == names[g + 1]
    np.testing.assert_array_equal(grounded.overlap("shifted")[group < 2], 1)
    assert grounded.mean_overlap("shifted", "images") == 1
    assert grounded.vocabulary == 6  # "the" and "of" are stop words
    chance = grounded.chance("images")
    assert chance == {"random": pytest.approx(1 / 3), "mismatched": 0}


@pytest.mark.parametrize("reduce", ["mean", "median", "trimmed_mean"])
def test_permuting_concepts_permutes_the_figures(states, concepts_of, reduce):
    before, after = states
    concepts, order = concepts_of(before), np.array([2, 0, 1])
    moved = dataclasses.replace(
        concepts,
        components=concepts.components[order],
        activations=concepts.activations[:, order],
    )
    options = {"reduce": reduce, "alpha": 0.5}
    a, b = (
        shift.analyse(before, after, pairs_of(before), each, concepts_of(after), **options)
        for each in (concepts, moved)
    )
    for name in ("shifts", "shifted", "finetuned", "counts", "recovery", "recovery_l2"):
        np.testing.assert_allclose(getattr(a, name)[order], getattr(b, name), atol=1e-6)
    np.testing.assert_allclose(a.shifted, a.original + 0.5 * a.shifts, atol=1e-6)


def test_a_concept_with_one_common_sample_is_marked_and_not_fatal(states, concepts_of, head):
    before, after = states
    kept = np.append(np.arange(20), 25)  # one of the third group
    concepts, theirs = concepts_of(before), concepts_of(after)
    found = shift.analyse(before, after, Pairs(kept, kept, 30), concepts, theirs)
    lost = group_of(found) == 2
    assert found.moved.tolist() == (~lost).tolist()
    assert found.counts[lost] == 1
    for name in ("recovery", "recovery_l2", "consistency", "magnitude"):
        assert np.isnan(found.figure(name)).tolist() == lost.tolist()
    ids = [str(i) for i in range(30)]
    words = shift.ground_words(found, head.unembed, head.tokenizer, num_words=2)
    images = shift.ground_samples(words, concepts, theirs, before, after, ids, ids, num_images=3)
    (k,) = np.flatnonzero(lost)
    assert images.words["shifted"][k] == images.images["shifted"][k] == []
    assert len(images.words["original"][k]) == 2
    assert np.isnan(images.overlap("shifted")[k])
    assert images.mean_overlap("shifted") == 1
    assert images.summary()["without shift"] == [k]


@pytest.mark.parametrize("method", ["snmf", "pca", "simple"])
def test_concepts_of_every_method(states, concepts_of, method):
    """With components only, activations are those of the projected states."""
    before, after = states
    concepts, theirs = (Concepts.from_components(concepts_of(Z).components, method) for Z in states)
    found = shift.analyse(before, after, pairs_of(before), concepts, theirs)
    ids = [str(i) for i in range(30)]
    found = shift.ground_samples(found, concepts, theirs, before, after, ids, ids, num_images=4)
    assert found.moved.all()
    for k, g in enumerate(group_of(found)):
        if method == "simple":
            assert set(found.images["shifted"][k]) <= {str(i) for i in range(10 * g, 10 * g + 10)}
        assert len(found.images["shifted"][k]) == 4


def test_shifted_concepts_are_projected_as_the_originals_were(states):
    """Codes have any sign: the last of 30 samples has the smallest code, not the smallest row."""
    before, after = states
    options = {"nonnegative": False, "alpha": 0.0}
    concepts, theirs = (
        Concepts.from_components(np.eye(8)[:3] + 0.1 * move, **options) for move in (0, 1)
    )
    found = shift.analyse(before, after, pairs_of(before), concepts, theirs, alpha=0.05)
    ids = [str(i) for i in range(30)]
    images = shift.ground_samples(found, concepts, theirs, before, after, ids, ids).images
    codes = np.linalg.lstsq(found.shifted.T, after.T, rcond=None)[0]
    assert (codes < 0).sum(axis=1).min() > 3
    for k, order in enumerate(images["shifted"]):
        assert sorted(order) == sorted(ids)
        assert np.diff(codes[k, list(map(int, order))]).max() < 1e-3


def test_words_of_shifts_are_read_through_the_final_norm(states, concepts_of, head):
    before, after = states
    concepts, theirs = concepts_of(before), concepts_of(after)
    found = shift.analyse(before, after, pairs_of(before), concepts, theirs)
    tilted = dataclasses.replace(
        found,
        **{kind: getattr(found, kind) + 0.3 * np.eye(8)[7] for kind in ("shifts", "original")},
    )
    for through_norm in (False, True):
        words = shift.ground_words(
            tilted, head.unembed, head.tokenizer, num_words=1, through_norm=through_norm
        ).words
        k = group_of(found).tolist().index(0)  # the last group does not move
        for kind in ("shift", "original"):
            assert (words[kind][k] == ["snow"]) == through_norm


def test_what_is_saved_comes_back(grounded, tmp_path):
    recovery = np.array([np.nan, 0.25, -0.5], np.float32)
    counts = np.array([1, 20, 9])
    lost = dataclasses.replace(grounded, counts=counts, recovery=recovery, source={"site": "norm"})
    lost.save(tmp_path / "shift")
    again = ShiftAnalysis.load(tmp_path / "shift")
    for field in dataclasses.fields(lost):
        a, b = (getattr(each, field.name) for each in (lost, again))
        if isinstance(a, np.ndarray) or field.name == "spread":
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=field.name)
        else:
            assert a == b, field.name
    described = json.loads((tmp_path / "shift" / "shift.json").read_text(), parse_constant=float)
    assert described["concepts"][0]["recovery"] is None
    assert described["summary"]["without shift"] == [0]


def test_a_damaged_directory_is_refused(grounded, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"shift\.safetensors is missing; run `xlvlm shift"):
        ShiftAnalysis.load(tmp_path)
    grounded.save(tmp_path)
    text = (tmp_path / "shift.json").read_text()
    (tmp_path / "shift.json").write_text(text.replace('"recovery"', '"other"'))
    with pytest.raises(ValueError, match=r"does not describe a shift \('recovery'\)"):
        ShiftAnalysis.load(tmp_path)
    (tmp_path / "shift.json").write_text(text)
    dataclasses.replace(grounded, shifts=grounded.shifts + 1).save(tmp_path / "other")
    (tmp_path / "other" / "shift.safetensors").rename(tmp_path / "shift.safetensors")
    with pytest.raises(ValueError, match="were not saved together"):
        ShiftAnalysis.load(tmp_path)


def test_samples_count_once_and_only_where_they_activate_a_concept(states):
    """Both models' concepts have two active samples of 15, of two rows each, all of them others."""
    before, after = states
    codes = np.zeros((2, 30, 3), "f4")
    for model, k in np.ndindex(2, 3):
        rows = 12 * model + 4 * k + np.arange(4)
        codes[model, rows, k] = [2, 2, 1, 1]
    concepts = [Concepts(np.eye(3, 8, dtype="f4"), each, "kmeans") for each in codes]
    found = shift.analyse(before, after, pairs_of(before), *concepts)
    ids = [f"s{i // 2}" for i in range(30)]
    found = shift.ground_samples(found, *concepts, before, after, ids, ids, num_images=50)
    assert found.images["original"] == [["s0", "s1"], ["s2", "s3"], ["s4", "s5"]]
    theirs = found.images["finetuned"]
    assert theirs == [["s6", "s7"], ["s8", "s9"], ["s10", "s11"]]
    assert found.num_images == found.rows["finetuned samples"] == 15
    assert found.mean_overlap("original", "images") == 0
    # Two of 15 drawn at random hit 4 / 15 of two others, of at most 15.
    assert found.chance("images") == {"random": pytest.approx(4 / 15 / 15), "mismatched": 0}


def test_a_concept_without_figures_leaves_the_means_of_the_others(states, concepts_of):
    before, _ = states
    concepts = concepts_of(before)
    same = shift.analyse(
        before, before, pairs_of(before), concepts, concepts, normalise_shifts=True
    )
    assert not same.shifts.any() and np.isnan(same.recovery_l2).all()
    figures = np.float32([np.nan, 0.5, -np.inf])
    summary = dataclasses.replace(same, recovery=figures).summary()
    assert summary["means"]["recovery"] == 0.5 and np.isnan(summary["means"]["recovery_l2"])
    assert (summary["counted"]["recovery"], summary["counted"]["recovery_l2"]) == (1, 0)


@pytest.mark.wrong_types
def test_what_does_not_fit_is_refused(states, concepts_of, analysis):
    before, after = states
    pairs, concepts = pairs_of(before), concepts_of(before)
    with pytest.raises(ValueError, match="states are 7 wide, the original's 8; a shift needs"):
        shift.analyse(before, after[:, 1:], pairs, concepts, concepts)
    with pytest.raises(ValueError, match="3 original and 2 fine-tuned concepts; matching needs"):
        shift.analyse(before, after, pairs, concepts, concepts_of(after, 2))
    with pytest.raises(ValueError, match="activations for 30 rows, the original features 29"):
        shift.analyse(before[:29], after, pairs, concepts, concepts)
    fewer = dataclasses.replace(concepts, activations=concepts.activations[:29])
    message = "fine-tuned concepts have activations for 29 rows, the fine-tuned features 30"
    with pytest.raises(ValueError, match=message):
        shift.analyse(before, after, pairs, concepts, fewer)
    ids = [str(i) for i in range(30)]
    with pytest.raises(ValueError, match="the concepts have activations for 29 rows, the features"):
        shift.ground_samples(analysis, concepts, fewer, before, after, ids, ids)
    with pytest.raises(ValueError, match="alpha is nan; expected a finite number"):
        shift.analyse(before, after, pairs, concepts, concepts, alpha=float("nan"))
    narrow = Concepts.from_components(jnp.ones((3, 5)), "kmeans")
    with pytest.raises(ValueError, match=r"5 \(original\) and 8 \(fine-tuned\) wide, the states 8"):
        shift.analyse(before, after, pairs, narrow, concepts)
    with pytest.raises(ValueError, match=r"not grounded in words; call shift\.ground_words"):
        analysis.overlap("original")


def test_a_notebook_shows_the_figures_of_each_concept(analysis, grounded):
    assert repr(analysis) == (
        "ShiftAnalysis(3 concepts: float32[3, 8] shifts, 30 common rows, mean, alpha 1)"
    )
    shown = analysis._repr_html_()
    assert shown.count("<tr>") == 4 and "<th>recovery</th><th>consistency</th>" in shown
    assert f"<td>{analysis.recovery[0]:.3g}</td>" in shown and "words" not in shown
    assert f"<td>{', '.join(grounded.words['shift'][0])}</td>" in grounded._repr_html_()
