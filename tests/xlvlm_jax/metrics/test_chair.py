"""CHAIR: objects as the authors' script finds them, scores by hand, properties, messages."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlvlm_jax import metrics
from xlvlm_jax.data.coco_objects import OBJECTS, WORDS
from xlvlm_jax.metrics.chair import plurals


# Each as the authors' script gives it, with nltk 3.2.5 and pattern 3.6.
@pytest.mark.parametrize(
    ("caption", "official", "plain"),
    [
        ("a man, a woman, and a child", ["person"] * 3, ["person"] * 3),
        ("a bus", [], ["bus"]),
        ("two buses and a minibus", ["bus"], ["bus", "bus"]),
        ("ties, canoes, collies", [], ["tie", "boat", "dog"]),
        ("a wine glass, two wine glasses", ["wine glass"] * 2, ["wine glass"] * 2),
        ("a glass", [], []),
        ("a tennis racket", ["tennis racket"], ["tennis racket"]),
        ("a baby goat", ["person", "sheep"], ["person", "sheep"]),
        ("baby elephants and an adult bear", ["elephant", "bear"], ["elephant", "bear"]),
        ("a baby animal", [], []),
        ("a passenger jet and a passenger train", ["airplane", "train"], ["airplane", "train"]),
        ("a passenger plane", ["person", "airplane"], ["person", "airplane"]),
        ("train tracks by the home plate", [], []),
        ("the toilet seat", ["toilet"], ["toilet"]),
        ("the seat of the toilet", ["toilet"], ["chair", "toilet"]),
        ("toilet paper", ["toilet"], ["toilet"]),
        ("hot dogs under stop signs", ["hot dog", "stop sign"], ["hot dog", "stop sign"]),
        ("a hot-dog", [], ["hot dog"]),
        ("it is hot, dogs pant", ["dog"], ["dog"]),
        ("a stove top oven", ["oven", "oven"], ["oven"]),
        ("a dining table", ["dining table"], ["dining table"]),
        ("a motor bike", [], ["motorcycle"]),
        ("a cheesecake on an iPhone", [], ["cake", "cell phone"]),
        ("a hair dryer, a hairdryer", ["hair drier"], ["hair drier"] * 2),
        ("a bow tie", ["tie"], ["tie"]),
        ("an orange cat", ["orange", "cat"], ["orange", "cat"]),
        ("no dog in sight", ["dog"], ["dog"]),
        ("A cat. A dog.", ["cat", "dog"], ["cat", "dog"]),
        ("A cat.A dog.", ["dog"], ["cat", "dog"]),
        ("the dog's bowl; 'dog'", ["dog", "bowl"], ["dog", "bowl", "dog"]),
        ("cats/dogs", [], ["cat", "dog"]),
        ("two cows, three persons", ["cow", "person"], ["cow", "person"]),
        ("thieves and people", ["person"], ["person"] * 2),
        ("knives, mice, geese, men", ["knife", "mouse", "bird", "person"], None),
        ("scissors", ["scissors"], ["scissors"]),
        ("skis", ["skis"], ["skis"]),
    ],
)
def test_objects_of_a_caption(caption, official, plain):
    assert metrics.mentioned_objects(caption) == official
    assert metrics.mentioned_objects(caption, "plain") == (official if plain is None else plain)


def test_plurals_as_people_write_them():
    """Those of the plain protocols; the official one undoes others, such as "kine"."""
    of = {
        **{"cow": ["cows"], "person": ["people", "persons"], "woman": ["women"]},
        **{"human": ["humans"], "tooth": ["teeth"], "shelf": ["shelves"], "bus": ["buses"]},
        **{"scarf": ["scarves", "scarfs"], "roof": ["roofs"], "giraffe": ["giraffes"]},
        **{"box": ["boxes"], "ox": ["oxen"], "penknife": ["penknives"], "fly": ["flies"]},
        **{"mongoose": ["mongooses"], "shaman": ["shamans"], "wildlife": [], "scissors": []},
        **{"goose": ["geese"], "dormouse": ["dormice"], "glasses": []},
    }
    assert {word: plurals(word) for word in of} == of


def test_eighty_objects_each_named_by_its_own_word():
    assert len(OBJECTS) == 80
    lost = {name for name in OBJECTS if metrics.mentioned_objects(name) != [name]}
    assert lost == {"bus"}
    for name, words in WORDS.items():
        for word in words:
            assert metrics.mentioned_objects(word, "plain") == [name]


def test_by_hand():
    captions = ["a dog and two cats on a bench", "a bus", "two dogs, one dog"]
    objects = [{"dog", "chair"}, {"bus"}, {"dog"}]
    # 5 mentions, 2 of them absent, both in the first caption; the dogs are found, of 4 objects.
    assert metrics.chair(captions, objects) == (2 / 5, 1 / 3, 2 / 4)
    assert metrics.chair(captions, objects, "plain") == (2 / 6, 1 / 3, 3 / 4)
    assert metrics.chair(["a puppy"], [{"canine"}]) == (0, 0, 1)


def test_undefined_shares_are_nan():
    score = metrics.chair(["the sky"], [set()])
    assert score.chair_s == 0 and math.isnan(score.chair_i) and math.isnan(score.recall)


@given(st.lists(st.sampled_from([n for n in OBJECTS if n != "bus"]), min_size=1, max_size=6))
def test_naming_what_is_there_hallucinates_nothing(names):
    caption = ", ".join(f"a {name}" for name in names)
    assert metrics.chair([caption], [names]) == (0, 0, 1)
    assert metrics.chair([caption], [set(OBJECTS) - set(names)])[:2] == (1, 1)


@pytest.mark.wrong_types
def test_messages():
    with pytest.raises(ValueError, match="there are 1 captions and objects of 2 images"):
        metrics.chair(["a dog"], [{"dog"}, {"cat"}])
    with pytest.raises(ValueError, match="'unicorn' is not an object of COCO"):
        metrics.chair(["a dog"], [{"unicorn"}])
    with pytest.raises(ValueError, match="protocol is 'mine'; expected 'official' or 'plain'"):
        metrics.mentioned_objects("a dog", "mine")
