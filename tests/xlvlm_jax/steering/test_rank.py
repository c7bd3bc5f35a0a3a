"""Ranking of vectors: by hand, a property, and on the embedded model."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax import SteeringVector, steering
from xlvlm_jax.data import sweeps
from xlvlm_jax.data.images import read_image

SITE = "language_model.model.layers.6"


class TestAnswerShift:
    def test_by_hand(self):
        before = ["yes"] * 4 + ["no", "red", "blue", "2"]
        after = ["No."] * 3 + ["red", "no", "red", "yes", "two"]
        shift = steering.answer_shift(before, after)
        # no 1 -> 4, red 1 -> 2; yes 4 -> 1, blue 1 -> 0.
        assert shift.gained == {"no": 3, "red": 1}
        assert shift.lost == {"yes": 3, "blue": 1}
        assert (shift.score, shift.strength) == (3 / 8, 4 / 8)
        assert shift.targets == pytest.approx(4 / 3**0.75)
        assert steering.answer_shift(before, after, num_targets=2).score == 4 / 8

    def test_extremes(self):
        one = steering.answer_shift(["a b", "c", "d", "e"], ["x"] * 4)
        assert (one.score, one.strength, one.targets) == (1, 1, pytest.approx(1))
        each = steering.answer_shift(["x"] * 4, ["ab", "c", "d", "e"])
        assert (each.score, each.strength, each.targets) == (1 / 4, 1, pytest.approx(4))
        none = steering.answer_shift(["x", "y"], ["y", "x"])
        assert (none.score, none.strength, none.targets, none.gained) == (0, 0, 0, {})

    @given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("xyz")), min_size=1))
    def test_the_order_of_samples_does_not_matter(self, pairs):
        before, after = zip(*pairs, strict=True)
        shift = steering.answer_shift(before, after)
        assert shift == steering.answer_shift(before[::-1], after[::-1])
        assert 0 <= shift.score <= shift.strength <= 1
        assert sum(shift.gained.values()) == sum(shift.lost.values())

    def test_messages(self):
        with pytest.raises(ValueError, match="1 answers before and 2 after"):
            steering.answer_shift(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="num_targets is 0"):
            steering.answer_shift(["a"], ["b"], num_targets=0)


class TestMainAnswers:
    def test_by_hand(self):
        before = {"yes": 9, "no": 1, "red car": 2, "blue": 4}
        after = {"no": 7, "red bus": 4, "red car": 3, "yes": 1, "": 1}
        # no +6, red +4 + 1, yes -8; blue is no longer given and does not count.
        assert steering.main_answers(before, after) == (("no", "red"), 13)
        assert steering.main_answers(before, after, num_answers=1) == (("no",), 6)
        assert steering.main_answers({}, {"a": 2, "b": 2}) == (("a", "b"), 0)
        assert steering.main_answers({}, {"a": 2, "b": 2, "c": 1}) == (("a", "b"), 1)
        with pytest.raises(ValueError, match="there are 0 answers after steering"):
            steering.main_answers({"yes": 1}, {"": 3})

    @settings(max_examples=25)
    @given(st.lists(st.integers(-20, 20), min_size=2, max_size=5, unique=True))
    def test_against_k_means(self, gains):
        from sklearn.cluster import KMeans

        before, after = ({f"w{i}": 30 for i in range(len(gains))} for _ in range(2))
        after = {name: 30 + gain for (name, _), gain in zip(after.items(), gains, strict=True)}
        main = steering.main_answers(before, after).answers
        model = KMeans(2, n_init=20, random_state=0).fit(np.array(gains)[:, None])
        upper = {f"w{i}" for i in np.flatnonzero(model.labels_ == model.labels_[np.argmax(gains)])}
        parts: dict[bool, list[int]] = {True: [], False: []}
        for i, gain in enumerate(gains):
            parts[f"w{i}" in main].append(gain)
        spread = sum(np.var(part) * len(part) for part in parts.values())
        # Where two cuts are equally good, either counts.
        assert set(main) == upper or spread == pytest.approx(model.inertia_)

    def test_the_top_vectors(self):
        def ranked(name, main, lead):
            vector = SteeringVector(np.zeros(2, np.float32), name)
            shift = steering.answer_shift(["a"], ["a"])._replace(main=main, lead=lead)
            return steering.RankedVector(vector, shift)

        some = [ranked("u", ("no",), 3), ranked("v", ("no",), 5), ranked("w", ("red", "no"), 9)]
        some += [ranked("x", ("red",), 4), ranked("y", (), 0)]
        names = [each.vector.site for each in steering.top_by_lead(some)]
        assert names == ["v", "x"]
        assert len(steering.top_by_lead(some, unique=False)) == 3
        assert [r.vector.site for r in steering.top_by_lead(some, num_targets=2)] == ["w", "v", "x"]
        assert len(steering.top_by_lead(some, num_vectors=1)) == 1


class TestVectors:
    def test_the_one_that_moves_answers_comes_first(self, vlm, questions):
        def states(samples):
            inputs = vlm.process(
                [vlm.render(s.prompt) for s in samples], [read_image(s.image) for s in samples]
            )
            return vlm.states(inputs, sites=[SITE])[SITE][:, -1]

        no = [sample for sample in questions if sample.metadata["answer"] == "no"]
        towards = np.asarray(steering.steering_vector(states(questions[:12]), states(no)))
        # Samples that are not given do not take the place of those that are.
        ids = ["gone", "lost", *(sample.id for sample in questions[:6])]
        vectors = [
            SteeringVector(factor * towards, SITE, {"from": 0, "to": j, "samples": ids})
            for j, factor in enumerate((0.0, 1.5))
        ]
        ranked = steering.rank_vectors(
            vlm, vectors, questions, batch_size=8, max_new_tokens=2, num_samples=6
        )
        assert [each.vector.source["to"] for each in ranked] == [1, 0]
        assert ranked[0].shift.lost == {"yes": 6}
        assert ranked[0].shift.gained == {"no": 6}
        assert ranked[1].shift.strength == 0
        described = ranked[0].describe()
        assert (described["to"], described["score"], described["samples"]) == (1, 1.0, 6)

    def test_a_refused_sample_is_not_counted(self, vlm, questions):
        odd = [dataclasses.replace(questions[0], prompt="is <image> a dog ?"), *questions[1:3]]
        vector = SteeringVector(np.zeros(192, np.float32), SITE, {})
        (ranked,) = steering.rank_vectors(vlm, [vector], odd, batch_size=8, max_new_tokens=2)
        assert (ranked.shift.samples, ranked.shift.strength) == (2, 0)
        with pytest.raises(ValueError, match=f"sample {questions[0].id}: .* refuses it"):
            steering.rank_vectors(vlm, [vector], odd, strict=True)

    def test_samples_that_are_a_number_or_none_at_all(self, vlm, questions):
        """Learnt vectors record how many samples they saw, concepts may have none."""
        zero = np.zeros(192, np.float32)
        vectors = [SteeringVector(zero, SITE, {"samples": n}) for n in (128, [])]
        ranked = steering.rank_vectors(
            vlm, vectors, questions, batch_size=8, max_new_tokens=2, num_samples=6
        )
        assert [each.shift.samples for each in ranked] == [6, 0]
        assert ranked[1].shift.score == 0 and ranked[1].shift.gained == {}

    def test_no_more_variants_at_once_than_fit_into_the_cache(self, vlm, questions, monkeypatch):
        """The plain variant runs once, and every run has as many variants."""
        rng = np.random.default_rng(0)
        vectors = [
            SteeringVector(np.float32(20 * rng.normal(size=192)), SITE, {"to": i}) for i in range(4)
        ]
        options = {"batch_size": 6, "max_new_tokens": 2, "num_samples": 6}
        swept, sweep = [], type(vlm).sweep

        def counted(self, inputs, variants, **rest):
            swept.append([float(next(iter(edits.values())).alpha) for edits in variants])
            return sweep(self, inputs, variants, **rest)

        monkeypatch.setattr(type(vlm), "sweep", counted)
        whole = steering.rank_vectors(vlm, vectors, questions, **options)
        monkeypatch.setattr(sweeps, "MOST_ROWS", 12)
        parts = steering.rank_vectors(vlm, vectors, questions, **options)
        assert swept == [[0, 1, 1, 1, 1], [0, 1], [1, 1], [1, 1]]
        for one, other in zip(whole, parts, strict=True):
            assert (one.vector is other.vector, one.shift) == (True, other.shift)

    def test_messages(self, vlm, questions):
        vector = SteeringVector(np.ones(192), SITE, {"samples": ["nobody"]})
        with pytest.raises(ValueError, match="none of the 1 samples of a vector is among the 24"):
            steering.rank_vectors(vlm, [vector], questions)
        with pytest.raises(ValueError, match="there are no samples to try the vectors on"):
            steering.rank_vectors(vlm, [vector], [])
        with pytest.raises(ValueError, match="0 vectors for 0 sites"):
            steering.rank_vectors(vlm, [], questions)
