"""Which samples' states go into a vector: by hand, and messages."""

from pathlib import Path

import numpy as np
import pytest

from xlvlm_jax import Concepts, Features, steering
from xlvlm_jax.features.writer import FeaturesWriter

ANSWERS = ["Yes.", "no", "yes", "red", "No"]


@pytest.fixture
def make(tmp_path):
    """make(name, model, answers, moved=m): features of site "s" with row i (2 i, 2 i + 1) + m."""

    def features(name="features", model="m", answers=ANSWERS, truths=None, moved=0):
        states = np.arange(2 * len(answers), dtype=np.float32).reshape(-1, 2) + moved
        number = np.arange(len(answers))
        arguments = {"model": model, "fingerprint": model}
        with FeaturesWriter(tmp_path / name, arguments) as writer:
            samples = [
                {
                    "id": str(i),
                    "image": f"{i}.png",
                    "image_id": str(i),
                    "prompt": "?",
                    "references": ["a"],
                    "prediction": answer,
                    **({} if truths is None else {"answer": truths[i]}),
                }
                for i, answer in enumerate(answers)
            ]
            writer.append(samples, {"s": states}, number, number, number)
            writer.close()
        return Features.open(tmp_path / name)

    return features


class TestDirections:
    @pytest.mark.parametrize("method", ["pca", "lat", "probe"])
    def test_rows_are_those_of_coarse(self, make, method):
        # All rows lie on the diagonal, so that each direction is the diagonal.
        fitted = steering.fit_direction(make(), "s", ["yes"], ["no"], method=method, where="image")
        np.testing.assert_allclose(fitted.vector, [3, 3], rtol=1e-5)
        assert (fitted.source["method"], fitted.where) == (method, "image")
        assert fitted.source["source rows"] == 2

    def test_pairs_are_the_samples_in_both(self, make):
        tuned = make("tuned", model="tuned", answers=["a", "b", "c"], moved=1)
        between = {"target_features": tuned, "between_models": True, "matched": True}
        states = steering.answer_states(make(), "s", None, **between)
        np.testing.assert_array_equal(states.pairs, np.ones((3, 2)))
        assert states.source_rows.tolist() == [0, 1, 2]

    @pytest.mark.parametrize("method", ["pca", "lat", "probe", "coarse"])
    def test_matched_answers_are_those_of_the_same_samples(self, make, method):
        # Sample 0 alone goes from yes to no; 1 and 2 have states on one side.
        base = make(answers=["yes", "red", "yes"])
        tuned = make("tuned", "tuned", ["no", "no", "x"], moved=1)
        between = {"target_features": tuned, "between_models": True, "matched": True}
        states = steering.answer_states(base, "s", ["yes"], ["no"], **between)
        assert (states.source_rows.tolist(), states.target_rows.tolist()) == ([0], [0])
        np.testing.assert_array_equal(states.pairs, [[1, 1]])
        assert states.described["source rows"] == states.described["target rows"] == 1
        with pytest.raises(ValueError, match=r"no sample has both source states in .* and target"):
            words = ["red"], ["x"]
            if method == "coarse":
                steering.fit_coarse(base, "s", *words, **between)
            else:
                steering.fit_direction(base, "s", *words, method=method, **between)

    def test_unknown(self, make):
        with pytest.raises(ValueError, match="method is 'ica'; expected one of pca, lat, probe"):
            steering.fit_direction(make(), "s", ["yes"], ["no"], method="ica")


class TestCoarse:
    def test_by_hand(self, make):
        fitted = steering.fit_coarse(make(), "s", ["yes"], ["no"], where="generated")
        # Rows 0 and 2 against rows 1 and 4.
        np.testing.assert_array_equal(fitted.vector, [5 - 2, 6 - 3])
        assert (fitted.site, fitted.where) == ("s", "generated")
        assert (fitted.source["source rows"], fitted.source["target rows"]) == (2, 2)
        assert (fitted.source["model"], fitted.source["fingerprint"]) == ("m", "m")

    def test_by_outcome(self, make):
        """False yes (rows 0 and 2) against right no (rows 1 and 4)."""
        features = make(truths=["no", "no", "No", "red", "no"])
        outcomes = ["yes for no", "no for no", "yes for no", "red for red", "no for no"]
        assert steering.fit.answers_of(features, "outcome") == outcomes
        fitted = steering.fit_coarse(features, "s", ["yes for no"], ["no for no"], key="outcome")
        np.testing.assert_array_equal(fitted.vector, [3, 3])
        assert (fitted.source["source rows"], fitted.source["key"]) == (2, "outcome")
        lesson = steering.lessons.lesson(features, ["yes for no"], "no", key="outcome", keep=1)
        assert set(zip(lesson.given[:2], lesson.wanted[:2], strict=True)) == {
            *(("Yes.", "no"), ("yes", "no"))
        }
        assert lesson.given[2:] == lesson.wanted[2:]
        with pytest.raises(ValueError, match="its samples have no 'answer'"):
            steering.fit_coarse(make("bare"), "s", ["yes for no"], ["no for no"], key="outcome")

    def test_captions_with_a_word_against_those_without(self, make):
        captions = ["a red dog", "a dog", "Two reddish dogs.", "dogs in red"]
        features = make(answers=captions)
        fitted = steering.fit_coarse(features, "s", None, ["red", "blue"], match="contains")
        # Rows 0 and 3 against rows 1 and 2.
        np.testing.assert_array_equal(fitted.vector, [3 - 3, 4 - 4])
        assert (fitted.source["source rows"], fitted.source["target rows"]) == (2, 2)

    def test_from_every_sample(self, make):
        fitted = steering.fit_coarse(make(), "s", ["*"], ["red"])
        np.testing.assert_array_equal(
            fitted.vector, [6 - 4, 7 - 5]
        )  # row 3 against the mean of all
        assert fitted.source["source rows"] == 5

    def test_between_two_models(self, make):
        tuned = make("tuned", model="tuned", answers=["a", "b", "c"], moved=1)
        with pytest.raises(ValueError, match="come from different models"):
            steering.fit_coarse(make(), "s", None, target_features=tuned)
        between = {"target_features": tuned, "between_models": True}
        fitted = steering.fit_coarse(make("again"), "s", None, **between)
        np.testing.assert_array_equal(fitted.vector, [3 - 4, 4 - 5])
        assert fitted.source["fingerprint"] == "m" and fitted.source["target model"] == "tuned"
        # The first three samples have rows in both.
        matched = steering.fit_coarse(make("once more"), "s", None, **between, matched=True)
        np.testing.assert_array_equal(matched.vector, [1, 1])
        assert matched.source["source rows"] == 3

    def test_from_the_mean_of_concepts(self, make):
        concepts = Concepts.from_components(np.float32([[1, 0], [3, 2]]), "kmeans")
        fitted = steering.fit_coarse(make(), "s", None, ["red"], source_concepts=concepts)
        np.testing.assert_array_equal(fitted.vector, [6 - 2, 7 - 1])

    def test_a_target_is_needed(self, make):
        with pytest.raises(ValueError, match="there are no target answers; give some, or feat"):
            steering.fit_coarse(make(), "s", None)

    def test_target_states_from_elsewhere(self, make):
        others = make("others", answers=["x", "no"])
        fitted = steering.fit_coarse(make(), "s", ["red"], ["no"], target_features=others)
        np.testing.assert_array_equal(fitted.vector, [2 - 6, 3 - 7])

    def test_messages(self, make):
        features = make()
        with pytest.raises(ValueError, match=r"none of 5 samples .* target words blue; choose"):
            steering.fit_coarse(features, "s", ["yes"], ["blue"])
        for source in (["yes"], ["*"]):
            target = ["yes"] if source == ["yes"] else ["yes", "no", "red"]
            with pytest.raises(ValueError, match=r"the \d source and target states at 's' are the"):
                steering.fit_coarse(features, "s", source, target)
        with pytest.raises(ValueError, match="the word ' ' is empty once normalised"):
            steering.fit_coarse(features, "s", ["yes", " "], ["no"])
        with pytest.raises(ValueError, match="the word 'A' is empty once normalised, as articles"):
            steering.fit_coarse(features, "s", ["A"], ["no"])
        with pytest.raises(ValueError, match="have no 'answer'"):
            steering.fit_coarse(features, "s", ["yes"], ["no"], key="answer")
        with pytest.raises(ValueError, match="no site 't'"):
            steering.fit_coarse(features, "t", ["yes"], ["no"])
        with pytest.raises(ValueError, match="match is 'like'; expected equals or contains"):
            steering.fit_coarse(features, "s", ["yes"], ["no"], match="like")
        with pytest.raises(ValueError, match=r"different models: .* from 'm' .* from 'other'"):
            others = make("others", model="other")
            steering.fit_coarse(features, "s", ["yes"], ["no"], target_features=others)


class TestFine:
    def test_every_pair_and_the_samples_of_its_source(self, make):
        vectors, fine = steering.fit_fine(make(), "s", 2)
        assert [(v.source["from"], v.source["to"]) for v in vectors] == [(0, 1), (1, 0)]
        np.testing.assert_array_equal(vectors[0].vector, -vectors[1].vector)
        # The rows lie on a line: two of them on one side, three on the other.
        sides = [v.source["samples"] for v in vectors]
        assert sorted(sides, key=len) in (
            [["0", "1"], ["2", "3", "4"]],
            [["3", "4"], ["0", "1", "2"]],
        )
        assert [len(fine.samples(i)) for i in range(2)] == [len(ids) for ids in sides]

    def test_chosen_pairs_of_chosen_answers(self, make):
        vectors, _ = steering.fit_fine(make(), "s", 2, ["yes", "no"], pairs=[(1, 0)])
        assert [(v.source["from"], v.source["to"]) for v in vectors] == [(1, 0)]
        assert "3" not in vectors[0].source["samples"]

    def test_messages(self, make):
        features = make()
        with pytest.raises(ValueError, match=r"the pair 1:1 is invalid; .* from 0 to 1"):
            steering.fit_fine(features, "s", 2, pairs=[(1, 1)])
        with pytest.raises(ValueError, match="num_concepts is 1; expected at least 2"):
            steering.fit_fine(features, "s", 1)
        with pytest.raises(ValueError, match="num_concepts=9 is larger than the 5 rows"):
            steering.fit_fine(features, "s", 9)
        with pytest.raises(ValueError, match=r"none of 5 samples .* source words blue"):
            steering.fit_fine(features, "s", 2, ["blue"])


class TestLesson:
    def test_by_hand(self, make):
        found = steering.lesson(make(), ["yes"], "no", keep=1.0)
        assert sorted(sample.id for sample in found.samples[:2]) == ["0", "2"]
        assert found.wanted[:2] == ["no", "no"]
        # The others stay as they are.
        assert len(found.wanted) == 4
        assert found.wanted[2:] == found.given[2:]
        kept = found.samples[0]
        assert (kept.image, kept.references) == (Path(f"{kept.id}.png"), ("a",))

    def test_prompts_about_an_image_whose_id_is_a_number(self, tmp_path):
        asked = {"image": "x.png", "image_id": 3}
        samples = [{**asked, "prompt": "dog?", "prediction": "yes"}]
        samples += [{**asked, "prompt": "car?", "prediction": "no"}]
        with FeaturesWriter(tmp_path / "f", {}) as writer:
            rows = np.arange(2)
            writer.append(samples, {"s": np.eye(2, dtype="f4")}, rows, rows, rows)
            writer.close()
        features = Features.open(tmp_path / "f")
        lesson = steering.lesson(features, ["yes"], "no", keep=0)
        found = steering.lessons.contrast_prompts(features, lesson, ["no"])
        assert found[1:] == (["car?"], ["dog?"]) and found[0][0].id == "0"

    def test_empty_answers_can_neither_change_nor_stay(self, make):
        found = steering.lesson(make(answers=["yes", " ", "", "red"]), ["yes"], "no", keep=3)
        assert [sample.id for sample in found.samples] == ["0", "3"]
        assert found.wanted == ["no", "red"]

    def test_messages(self, make):
        with pytest.raises(ValueError, match="keep is -1; expected at least 0"):
            steering.lesson(make("kept"), ["yes"], "no", keep=-1)
        with pytest.raises(ValueError, match=r"none of 5 samples .* source words blue"):
            steering.lesson(make(), ["blue"], "no")


class TestTwoModels:
    @pytest.fixture
    def both(self, tmp_path):
        """both(name, fingerprint) returns features of two models; the states of one are doubled."""

        def write(name, fingerprint="2"):
            told = {"model": "tuned", "fingerprint": fingerprint}
            manifest = {"model": "m", "fingerprint": "1", "finetuned": told}
            states, rows = np.arange(10, dtype=np.float32).reshape(5, 2), np.arange(5)
            with FeaturesWriter(tmp_path / name, manifest) as writer:
                samples = [{"prediction": answer} for answer in ANSWERS]
                sites = {"s": states, "finetuned:s": 2 * states}
                writer.append(samples, sites, rows, rows, rows)
                writer.close()
            return Features.open(tmp_path / name)

        return write

    @pytest.mark.parametrize(
        "fit",
        [
            steering.fit_coarse,
            steering.fit_direction,
            steering.fit_adaptive,
            steering.fit_conditional,
            lambda *asked: steering.fit_memory(*asked, num_keys=1),
            lambda features, site, *_: steering.fit_fine(features, site, 2)[0][0],
        ],
    )
    def test_a_vector_of_the_fine_tuned_model_is_its_own(self, both, fit):
        features = both("features")
        for site, told in (("s", ("m", "1")), ("finetuned:s", ("tuned", "2"))):
            fitted = fit(features, site, ["yes"], ["no"])
            assert (fitted.site, fitted.source["model"], fitted.source["fingerprint"]) == (
                *("s",),
                *told,
            )

    def test_features_of_different_fine_tuned_models(self, both):
        others = {"target_features": both("others", "3")}
        asked = both("features"), "finetuned:s", ["yes"], ["no"]
        with pytest.raises(ValueError, match=r"from 'tuned' \(2\), .* from 'tuned' \(3\); extract"):
            steering.fit_coarse(*asked, **others)
        fitted = steering.fit_coarse(asked[0], "s", *asked[2:], **others)
        np.testing.assert_array_equal(fitted.vector, [3, 3])

    def test_samples_without_ids_are_known_by_their_number(self, both):
        features = both("features")
        vectors, _ = steering.fit_fine(features, "s", 2)
        found = [name for vector in vectors for name in vector.source["samples"]]
        assert sorted(found) == ["0", "1", "2", "3", "4"]
        between = {"target_features": features, "between_models": True, "matched": True}
        with pytest.raises(ValueError, match="no sample has both source states in"):
            steering.answer_states(features, "s", ["yes"], ["no"], **between)
