"""Selection of samples by words, lists of ids and random draws."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlm_jax.data import Sample, select
from xlvlm_jax.data.words import COLOURS


def sample(number, *references, **metadata):
    image = Path(f"{number}.jpg")
    return Sample(str(number), image, str(number // 10), "Describe it.", references, metadata)


SAMPLES = [
    sample(1, "A dog on a beach.", "An animal at the sea"),
    sample(2, "Two hotdogs", answer="red-brown"),
    sample(3, "Dog, asleep", answer="Red"),
    sample(14, "a dog's tail", answer="reddish"),
]


def ids(samples):
    return [int(s.id) for s in samples]


def test_words_by_hand():
    assert ids(select.containing(SAMPLES, "dog", match="word")) == [1, 14]  # as it is written
    assert ids(select.containing(SAMPLES, "dog", any_case=True)) == [1, 3, 14]
    assert ids(select.containing(SAMPLES, ["sea", "hotdogs"])) == [1, 2]
    assert ids(select.containing(SAMPLES, ["sea", "hotdogs"], which="first")) == [2]
    assert ids(select.containing(SAMPLES, COLOURS, key="answer", any_case=True)) == [2, 3]
    assert ids(select.containing(SAMPLES, "Describe", key="prompt")) == [1, 2, 3, 14]


def test_forms_of_words_by_hand():
    samples = [
        sample(1, "two dogs", "a cat"),
        sample(2, "Dogs' toys"),
        sample(3, "two hotdogs"),
        sample(4, "children smile at train stations"),
        sample(5, "she is smiling"),
        sample(6, "a cat", "the dog's tail"),
    ]
    found = {match: ids(select.containing(samples, "dog", match=match)) for match in select.MATCHES}
    assert found == {"inflected": [1, 6], "word": [6], "substring": [1, 3, 6]}
    assert ids(select.containing(samples, "dog", any_case=True)) == [1, 2, 6]
    assert ids(select.containing(samples, ["child"])) == [4]
    assert ids(select.containing(samples, ["smile"])) == [4, 5]
    assert ids(select.containing(samples, ["train station"])) == [4]
    assert ids(select.containing(samples, "dog", match="substring", which="first")) == [1, 3]


@pytest.mark.wrong_types
def test_unknown_ways_to_search():
    with pytest.raises(ValueError, match="match is 'fuzzy'; expected one of inflected, word"):
        select.containing([sample(1, "a dog")], "dog", match="fuzzy")
    with pytest.raises(ValueError, match="which is 'last'; expected any or first"):
        select.containing([sample(1, "a dog")], "dog", which="last")


def test_samples_in_a_list():
    assert ids(select.of_samples(SAMPLES, [3, "14"])) == [3, 14]
    with pytest.raises(ValueError, match=r"no sample of 4 has one of the 1 ids; .* like '1'"):
        select.of_samples(SAMPLES, [99])
    with pytest.warns(UserWarning, match="no sample of 4 has 2 of the 3 ids, such as '77'"):
        assert ids(select.of_samples(SAMPLES, ["1", "77", "78"])) == [1]


def test_the_draw_of_xl_vlms():
    # The draw itself: numpy's generator on the list of samples.
    drawn = select.drawn_as_xl_vlms(SAMPLES, 3, seed=0)
    names = np.random.default_rng(0).choice([s.id for s in SAMPLES], size=3, replace=False)
    assert [s.id for s in drawn] == names.tolist() == ["3", "14", "2"]
    assert sorted(s.id for s in select.drawn_as_xl_vlms(SAMPLES, 4)) == ["1", "14", "2", "3"]
    with pytest.raises(ValueError, match="samples to draw is 5; expected 1 to 4"):
        select.drawn_as_xl_vlms(SAMPLES, 5)


def test_lists_of_ids_of_xl_vlms(tmp_path):
    file = tmp_path / "place.pkl"
    file.write_bytes(pickle.dumps(["train2014/COCO_train2014_000000152965.jpg", 7]))
    assert select.read_ids(file) == ["152965", "7"]
    file.write_bytes(pickle.dumps([print]))
    with pytest.raises(ValueError, match=r"not a pickle of plain values \(asks for builtins.print"):
        select.read_ids(file)
    (tmp_path / "a.txt").write_text("COCO_val2014_000000000042.jpg\ndog.jpg\n")
    assert select.read_ids(tmp_path / "a.txt") == ["42", "dog.jpg"]


def test_words_may_hold_signs_and_spaces():
    samples = [sample(1, "a c++ book"), sample(2, "a train station"), sample(3, "a c book")]
    assert ids(select.containing(samples, "c++")) == [1]
    assert ids(select.containing(samples, "train station")) == [2]


def test_words_in_no_sample():
    with pytest.raises(ValueError, match="no sample of 4 has 'bus' in its references; look for"):
        select.containing(SAMPLES, "bus")
    with pytest.raises(ValueError, match="'0', '1', '2', '3', '4' or 3 more words in its answer"):
        select.containing(SAMPLES, map(str, range(8)), key="answer")


def test_references_by_hand():
    samples = [
        sample(1, "a red dog", "A dog", "a sad red dog"),
        sample(2, "Red dogs"),
        sample(3, "a blue dog", "reddish"),
    ]

    def references(*args, **kwargs):
        return {int(s.id): s.references for s in select.naming(samples, *args, **kwargs)}

    assert references("red") == {1: ("a red dog", "a sad red dog")}
    assert references(["red", "blue"], without="sad") == {1: ("a red dog",), 3: ("a blue dog",)}
    assert references("red", any_case=True)[2] == ("Red dogs",)
    assert references(without=["dog", "dogs"]) == {3: ("reddish",)}
    assert references() == {int(s.id): s.references for s in samples}
    assert samples[0].references[1] == "A dog"  # the samples themselves stay
    with pytest.raises(ValueError, match="no reference of 3 samples has 'bus' and not 'a'; look"):
        references("bus", without="a")


def test_a_key_that_no_sample_has():
    with pytest.raises(ValueError, match="no 'caption'; expected one of references, prompt"):
        select.containing(SAMPLES, "dog", key="caption")


def test_images_in_a_list():
    assert ids(select.of_images(SAMPLES, [1])) == [14]
    assert ids(select.of_images(SAMPLES, ["0", 7])) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"no sample of 4 has one of the 2 image ids; .* like '0'"):
        select.of_images(SAMPLES, [8, 9])


@pytest.mark.parametrize(("name", "text"), [("a.json", '[4, "x"]'), ("a.txt", "4\n\n x \n")])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
def test_read_image_ids(tmp_path, name, text, mark):
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    assert select.read_image_ids(tmp_path / name) == ["4", "x"]


def test_bad_lists_of_image_ids(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"a.json: expected a list of ids"):
        select.read_image_ids(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a.txt: has no ids; expected a JSON list, or"):
        select.read_image_ids(tmp_path / "a.txt")
    for odd in ("[1, 2]", "null", "true", "0.5"):
        (tmp_path / "a.json").write_text(f'["4", {odd}]')
        with pytest.raises(ValueError, match=r"a.json: has .* among the ids; expected texts or nu"):
            select.read_image_ids(tmp_path / "a.json")
    (tmp_path / "latin.txt").write_bytes(b"12\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin.txt: byte 6: not text in UTF-8; expected ids"):
        select.read_image_ids(tmp_path / "latin.txt")
    with pytest.raises(FileNotFoundError, match=r"b.txt: no such file; expected ids"):
        select.read_image_ids(tmp_path / "b.txt")


MANY = [sample(number) for number in range(60)]


@given(st.permutations(MANY), st.integers(1, 70), st.integers(1, 70), st.integers(0, 5))
def test_a_draw_depends_on_ids_and_seed_alone(shuffled, n, more, seed):
    drawn = select.subsample(MANY, n, seed)
    assert select.subsample(shuffled, n, seed) == drawn
    assert len(drawn) == len(set(ids(drawn))) == min(n, 60)
    assert select.subsample(MANY, n + more, seed)[:n] == drawn


def test_ids_need_not_be_unicode():
    """A file's name, and an id in JSON."""
    samples = [Sample(name, Path("a.jpg"), "0", "") for name in ("a\udce9", "\ud800", "b")]
    assert len(select.subsample(samples, 2)) == 2


def test_draws_of_different_seeds_differ_and_are_even():
    draws = [select.subsample(MANY, 20, seed) for seed in range(60)]
    assert len({tuple(ids(draw)) for draw in draws}) == 60
    counts = [sum(s in draw for draw in draws) for s in MANY]
    assert sum(counts) == 60 * 20
    assert min(counts) >= 8 and max(counts) <= 34  # 20 expected, deviation 3.7


def test_without_a_seed_or_a_number_samples_stay_in_order():
    assert select.subsample(MANY, 3, None) == MANY[:3]
    assert select.subsample(MANY, None, 4) == MANY


def test_a_draw_of_zero_samples():
    with pytest.raises(ValueError, match="number of samples must be at least 1, got 0"):
        select.subsample(MANY, 0)
