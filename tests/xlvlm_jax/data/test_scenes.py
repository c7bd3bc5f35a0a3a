"""Scenes: how they are sampled and drawn, their captions and their questions."""

import dataclasses
import hashlib
import itertools
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from xlvlm_jax.data import scenes
from xlvlm_jax.data.scenes import draw_objects, language, pen, words
from xlvlm_jax.data.scenes.draw import _places
from xlvlm_jax.data.scenes.language import split_words

DOGS = scenes.Scene("dog", "red", 3, "beach", "sad", seed=30)
BUS = scenes.Scene("bus", "blue", 1, "city", None, seed=31)

any_scene = st.builds(
    scenes.sample_scene,
    st.sampled_from(["train", "val", "test"]),
    st.integers(0, 10**6),
    st.integers(0, 50),
)


@pytest.fixture(scope="module")
def many() -> list[scenes.Scene]:
    return [scenes.sample_scene("train", index) for index in range(4000)]


# --- sampling ----------------------------------------------------------------------------------


def test_a_scene_does_not_depend_on_the_order():
    forwards = [scenes.sample_scene("val", index) for index in range(20)]
    backwards = [scenes.sample_scene("val", index) for index in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [scenes.sample_scene("val", index, seed=1) for index in range(20)]


def test_no_attribute_tells_another(many):
    rows = [scenes.attributes(scene) for scene in many]
    for one, other in itertools.combinations(["kind", "colour", "count", "place"], 2):
        table = Counter((row[one], row[other]) for row in rows)
        first, second = Counter(r[one] for r in rows), Counter(r[other] for r in rows)
        expected = {(a, b): first[a] * second[b] / len(rows) for a in first for b in second}
        chi2 = sum((table[cell] - e) ** 2 / e for cell, e in expected.items())
        degrees = (len(first) - 1) * (len(second) - 1)
        assert chi2 < degrees + 4 * (2 * degrees) ** 0.5, (one, other)


def test_kinds_are_uniform_but_for_the_dog(many):
    share = Counter(scene.kind for scene in many)
    assert share["dog"] / len(many) == pytest.approx(0.25, abs=0.03)
    for kind in scenes.KINDS[1:]:
        assert share[kind] / len(many) == pytest.approx(0.75 / 9, abs=0.02)
    assert all((scene.mood is None) == (scene.kind not in scenes.ANIMALS) for scene in many)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("split", "index", "message"),
    [
        ("training", 0, "unknown split 'training'; expected one of train, val, test"),
        ("val", -1, "scene index must be 0 or more, got -1"),
    ],
)
def test_bad_scenes_are_refused(split, index, message):
    with pytest.raises(ValueError, match=message):
        scenes.sample_scene(split, index)


# --- drawing -----------------------------------------------------------------------------------


def test_splits_share_no_picture():
    seen = defaultdict(set)
    for split in ("train", "val", "test"):
        for index in range(200):
            pixels = scenes.draw(scenes.sample_scene(split, index))
            seen[split].add(hashlib.sha256(pixels.tobytes()).digest())
        assert len(seen[split]) == 200
    assert len(set.union(*seen.values())) == 600


@pytest.mark.parametrize("scene", [DOGS, BUS])
def test_a_picture_is_its_scene_alone(scene):
    picture = scenes.draw(scene)
    assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, scenes.draw(scene))
    through_jpeg = scenes.training_image(scene)
    assert through_jpeg.shape == picture.shape and through_jpeg.dtype == np.uint8
    assert 0 < np.abs(through_jpeg.astype(int) - picture).mean() < 4


def test_the_object_has_its_colour():
    # A third of a large ball is plain paint, shaded by at most 12 and with noise of 4.
    for colour, rgb in draw_objects.PAINT.items():
        picture = scenes.draw(scenes.Scene("ball", colour, 1, "field", None, seed=12)).astype(int)
        near = (np.abs(picture - rgb).max(axis=-1) <= 24).mean()
        assert near > 0.05, colour


def _moods(kind: str, count: int) -> float:
    """Returns the share of pixels that change if only the mood changes."""
    happy, sad = (
        scenes.draw(scenes.Scene(kind, "green", count, "street", mood, seed=9)).astype(int)
        for mood in scenes.MOODS
    )
    return (np.abs(happy - sad).max(axis=-1) > 60).mean()


@pytest.mark.parametrize("kind", scenes.ANIMALS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_moods_are_drawn_large(kind, count):
    # A 14 x 14 patch is 1.6 % of the picture: each animal's mood has at least one patch's worth.
    assert _moods(kind, count) > 0.016 * count


@settings(max_examples=60, deadline=None)
@given(any_scene)
def test_objects_can_be_counted(scene):
    """At least 70 % of each object is visible and inside the picture."""
    shapes = draw_objects.ANIMAL_SHAPES | draw_objects.THING_SHAPES
    paint = draw_objects.Paint(*[(255, 0, 0)] * 6)
    placed = _places(scene, random.Random(scene.seed))
    assert len(placed) == scene.count
    masks, margin = [], 40
    for x, y, scale in placed:
        side = (pen.SIZE + 2 * margin) * pen.SUPER
        image = Image.new("RGB", (side, side))
        own = pen.Pen(ImageDraw.Draw(image), x + margin, y + margin, scale)
        mood = [scene.mood == "happy"] if scene.mood else []
        shapes[scene.kind][0](own, paint, *mood)
        masks.append(np.asarray(image).any(axis=-1))
    inside = np.zeros_like(masks[0])
    frame = slice(margin * pen.SUPER, -margin * pen.SUPER)
    inside[frame, frame] = True
    for k, mask in enumerate(masks):
        seen = mask & inside
        for later in masks[k + 1 :]:
            seen &= ~later
        assert seen.sum() >= 0.7 * mask.sum()


@settings(max_examples=20, deadline=None)
@given(any_scene)
def test_masks_are_where_the_colour_of_the_objects_matters(scene):
    scene = dataclasses.replace(scene, colour="green")
    picture, masks = scenes.draw_with_masks(scene)
    np.testing.assert_array_equal(picture, scenes.draw(scene))
    assert masks.shape == (scene.count, 112, 112) and masks.any((1, 2)).all()
    assert masks.sum(0).max() == 1  # a pixel shows the object in front
    other = dataclasses.replace(scene, colour="purple")
    changed = np.abs(picture.astype(int) - scenes.draw(other)).max(-1) > 60
    # Beside an object only the pixels of its outline change, of which it covers less than half.
    assert (changed & masks.any(0)).sum() > 0.97 * changed.sum()


@settings(max_examples=20, deadline=None)
@given(any_scene, any_scene)
def test_the_objects_of_a_pair_are_apart(left, right):
    """Another colour on the right changes pixels of the object there alone."""
    right = dataclasses.replace(right, colour="green")
    picture, masks = scenes.draw_pair(left, right)
    (first, second) = scenes.boxes(masks)
    assert masks.shape == (2, 112, 112) and first[2] <= second[0]
    other, same = scenes.draw_pair(left, dataclasses.replace(right, colour="purple"))
    np.testing.assert_array_equal(same, masks)
    changed = np.abs(picture.astype(int) - other).max(-1) > 60
    assert (changed & masks[1]).sum() > 0.97 * changed.sum() > 0
    assert not (changed & masks[0]).any()


def test_boxes_by_hand():
    masks = np.zeros((2, 5, 7), bool)
    masks[0, 1:3, 2:6] = masks[1, 4, 0] = True
    assert scenes.boxes(masks).tolist() == [[2, 1, 6, 3], [0, 4, 1, 5]]


# --- captions ----------------------------------------------------------------------------------


def test_captions_of_one_scene():
    texts = scenes.captions(DOGS)
    assert len(texts) == len(set(texts)) == 5
    truth = scenes.attributes(DOGS)
    for text in texts:
        said = scenes.named(text)
        assert said["kind"] == "dog" and said["count"] == 3
        assert all(value in (None, truth[key]) for key, value in said.items()), text
    assert texts == scenes.captions(DOGS)


def test_named_reads_a_caption():
    said = scenes.named("on the sandy beach by the waves, a scarlet puppy with floppy ears grins")
    assert said == {"kind": "dog", "colour": "red", "count": 1, "place": "beach", "mood": "happy"}
    assert scenes.named("a pair of buses downtown") == {
        "kind": "bus",
        "colour": None,
        "count": 2,
        "place": "city",
        "mood": None,
    }
    assert scenes.named("nothing of this")["count"] is None


@settings(max_examples=200, deadline=None)
@given(any_scene)
def test_captions_tell_the_truth(scene):
    truth = scenes.attributes(scene)
    for text in scenes.captions(scene):
        assert text == text.lower() and not text.endswith(".") and "  " not in text
        assert "{" not in text
        found = split_words(text)
        for word, following in itertools.pairwise(found):
            if word in ("a", "an"):
                assert (word == "an") == (following[0] in "aeiou"), text
        said = scenes.named(text)
        assert said["kind"] == truth["kind"] and said["count"] == truth["count"]
        assert all(value in (None, truth[key]) for key, value in said.items()), text
        nouns = {pair[scene.count > 1] for pair in words.NOUNS[scene.kind]}
        assert nouns & set(found), text


def test_captions_name_what_they_should(many):
    said = Counter()
    animals = 0
    nouns = Counter()
    for scene in many[:1500]:
        animals += 5 * (scene.mood is not None)
        for text in scenes.captions(scene):
            said.update(key for key, value in scenes.named(text).items() if value is not None)
            if scene.kind == "dog":
                nouns["dog"] += bool({"dog", "dogs"} & set(split_words(text)))
                nouns["all"] += 1
    captions = 5 * 1500
    assert said["kind"] == said["count"] == captions
    assert said["place"] > 0.8 * captions
    assert said["colour"] / captions == pytest.approx(0.62, abs=0.04)
    assert said["mood"] / animals == pytest.approx(0.52, abs=0.04)
    assert 0.7 < nouns["dog"] / nouns["all"] < 0.95


def test_the_plain_word_is_the_most_frequent_of_its_family():
    for table in (words.NOUNS, words.COLOUR_WORDS, words.MOOD_ADJECTIVES, words.QUANTIFIERS):
        for name, family in table.items():
            plain, *others = family
            assert isinstance(name, int) or name in (plain, plain[0])
            assert family[plain] > 0.5 * sum(family.values())
            assert all(family[plain] > 3 * family[other] for other in others)


def test_every_phrase_of_a_place_says_where_it_is():
    family = language.FAMILIES["place"]
    for table in (words.PLACE_PHRASES, words.AIR_PHRASES, words.PLACE_NOUNS):
        for place, phrases in table.items():
            for phrase in phrases:
                assert {family[w] for w in split_words(phrase) if w in family} == {place}, phrase
    # A tail adds to the place, and never says another.
    for place, phrases in words.PLACE_TAILS.items():
        for phrase in phrases:
            assert scenes.named(phrase)["place"] in (None, place)


# --- questions ---------------------------------------------------------------------------------


def test_questions_of_one_scene():
    asked = {
        question.attribute: question
        for question in scenes.questions(DOGS)
        if question.answer_type != "yes/no"
    }
    assert {key: question.answer for key, question in asked.items()} == {
        "count": "three",
        "colour": "red",
        "place": "beach",
        "object": "dog",
        "mood": "sad",
    }
    assert asked["count"].answer_type == "number"
    assert "dogs" in asked["colour"].question
    assert scenes.questions(DOGS) == scenes.questions(DOGS)
    assert "mood" not in {question.attribute for question in scenes.questions(BUS)}


@settings(max_examples=200, deadline=None)
@given(any_scene)
def test_ten_people_answer_and_most_are_right(scene):
    asked = scenes.questions(scene)
    assert 7 <= len(asked) <= 10
    assert len({question.question for question in asked}) == len(asked)
    for question in asked:
        assert question.question[0].isupper() and question.question.endswith("?")
        assert "{" not in question.question
        assert len(question.answers) == 10
        [(best, votes)] = Counter(question.answers).most_common(1)
        assert best == question.answer and votes >= 6


def test_yes_and_no_cannot_be_guessed(many):
    """For every attribute, and every noun in questions, half of the answers are "yes"."""
    yes, total, disagree, questions = Counter(), Counter(), 0, 0
    for scene in many:
        for question in scenes.questions(scene):
            questions += 1
            disagree += len(set(question.answers)) > 1
            if question.answer_type != "yes/no":
                continue
            keys = [question.attribute]
            if question.attribute == "exists":
                keys.append("exists " + scenes.named(question.question)["kind"])
            total.update(keys)
            if question.answer == "yes":
                yes.update(keys)
    for key, number in total.items():
        assert yes[key] / number == pytest.approx(0.5, abs=2.5 * 0.5 / number**0.5 + 0.01), key
    assert 0.5 < disagree / questions < 0.95


@pytest.mark.parametrize("attribute", ["exists", "colour", "place", "count", "mood"])
def test_a_check_is_right_about_its_attribute(attribute):
    """Each question names a value of that attribute; the answer is yes if the picture shows it."""
    name = "kind" if attribute == "exists" else attribute
    shown = scenes.attributes(DOGS)[name]
    drawn = [scenes.check(DOGS, attribute, random.Random(i)) for i in range(60)]
    for question in drawn:
        assert (question.attribute, question.answer_type) == (attribute, "yes/no")
        said = scenes.named(question.question)[name]
        assert question.answer == ("yes" if said == shown else "no"), question.question
    assert len({question.question for question in drawn}) > 3
    assert {question.answer for question in drawn} == {"yes", "no"}
    assert scenes.check(DOGS, attribute, random.Random(7)) == drawn[7]


def test_questions_are_about_all_colours(many):
    answers = Counter(
        question.answer
        for scene in many[:500]
        for question in scenes.questions(scene)
        if question.attribute == "colour" and question.answer_type == "other"
    )
    assert set(answers) == set(scenes.COLOURS)


# --- vocabulary --------------------------------------------------------------------------------


def test_no_word_is_outside_of_the_vocabulary(many):
    vocabulary = scenes.vocabulary()
    assert vocabulary == sorted(set(vocabulary))
    assert 350 <= len(vocabulary) <= 600
    assert all(word.isalpha() for word in vocabulary)
    said = set()
    for scene in many:
        for text in scenes.captions(scene):
            said.update(split_words(text))
        for question in scenes.questions(scene):
            said.update(split_words(question.question))
            said.update(word for answer in question.answers for word in split_words(answer))
    assert said <= set(vocabulary)
    # And hardly a word is listed in vain.
    assert len(said) > 0.97 * len(vocabulary)
