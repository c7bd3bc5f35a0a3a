"""Questions about a scene, each with the answers of ten people."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from . import words
from .language import caption_words, split_words, strings
from .scene import ANIMALS, COLOURS, COUNTS, DOG_SHARE, KINDS, MOODS, PLACES, Scene, pick

ANSWERS = 10
NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}
VEHICLES = ("bus", "train", "car", "boat", "plane")
# Where a thing is, with the preposition of the place.
AT = {
    "beach": "on the beach",
    "street": "on the street",
    "forest": "in the forest",
    "snow": "in the snow",
    "field": "in the field",
    "city": "in the city",
}

# Answers of people who do not give the most frequent answer.
NEAR_MISSES = {
    "beach": ("sand", "seaside", "shore"),
    "street": ("road", "sidewalk"),
    "forest": ("woods", "trees"),
    "snow": ("mountains", "outside"),
    "field": ("meadow", "grass", "outside"),
    "city": ("downtown", "outside"),
    "red": ("crimson", "scarlet"),
    "orange": ("amber", "tangerine"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "jade"),
    "blue": ("azure", "cobalt"),
    "purple": ("violet", "plum"),
    "black": ("ebony", "charcoal"),
    "white": ("ivory", "pearly"),
    "one": ("two", "three"),
    "two": ("one", "three"),
    "three": ("two", "one"),
    "yes": ("no",),
    "no": ("yes",),
    "happy": ("smiling", "joyful", "good"),
    "sad": ("crying", "unhappy", "bad"),
    "dog": ("puppy", "dogs", "animal"),
    "cat": ("kitten", "cats", "animal"),
    "bird": ("birds", "songbird", "animal"),
    "rabbit": ("bunny", "rabbits", "animal"),
    "bus": ("coach", "buses", "vehicle"),
    "train": ("locomotive", "trains", "vehicle"),
    "car": ("automobile", "cars", "vehicle"),
    "boat": ("sailboat", "boats", "ship"),
    "plane": ("airplane", "planes", "jet"),
    "ball": ("balls", "toy"),
}

# Phrasings: {x} is the noun asked about, in the number that the picture shows; {one} and {many} are
# its singular and plural; {be}, {do}, {look} agree with {x}; {at} names a place.
EXISTS = (
    "Is there a {one} in the picture?",
    "Is there a {one} here?",
    "Are there any {many} in the picture?",
    "Can you see a {one}?",
    "Do you see any {many}?",
    "Does this image show a {one}?",
)
COUNT = (
    "How many {many} are there?",
    "How many {many} are in the picture?",
    "How many {many} can you see?",
    "What is the number of {many}?",
)
COUNT_CHECK = ("Is the number of {many} {number}?", "Does the image show exactly {number} {noun}?")
COLOUR = (
    "What color {be} the {x}?",
    "What is the color of the {x}?",
    "Which color {do} the {x} have?",
)
COLOUR_CHECK = ("{Be} the {x} {colour}?", "Is {colour} the color of the {x}?")
PLACE = (
    "Where {be} the {x}?",
    "Where can you see the {x}?",
    "What place is this?",
    "Where was this picture taken?",
)
PLACE_CHECK = ("{Be} the {x} {at}?", "Was this picture taken {at}?", "Is this {place_noun}?")
OBJECT = (
    "What is {at}?",
    "What is in the picture?",
    "What does the image show?",
    "What can you see {at}?",
)
ANIMAL_OBJECT = (
    "What animal is this?",
    "What kind of animal is {at}?",
    "Which animal can you see?",
)
VEHICLE_OBJECT = (
    "What vehicle is this?",
    "What kind of vehicle is {at}?",
    "Which vehicle can you see?",
)
MOOD = (
    "How {do} the {x} feel?",
    "How {do} the {x} look?",
    "{Be} the {x} happy or sad?",
    "What is the mood of the {x}?",
)
MOOD_CHECK = ("{Be} the {x} {mood}?", "{Do} the {x} look {mood}?", "{Do} the {x} feel {mood}?")
PLACE_NOUN = {
    "beach": "a beach",
    "street": "a street",
    "forest": "a forest",
    "snow": "a snowy place",
    "field": "a field",
    "city": "a city",
}


@dataclass(frozen=True)
class Question:
    """A question with ten answers.

    Attributes:
        question: the text.
        answers: ten of them.
        answer: the truth, and the most frequent of `answers`.
        answer_type: of VQAv2: "yes/no", "number" or "other".
        attribute: what it is about: "exists", "count", "colour", "place", "object" or "mood".
    """

    question: str
    answers: tuple[str, ...]
    answer: str
    answer_type: str
    attribute: str


def answers_of(rng: random.Random, truth: str) -> tuple[str, ...]:
    """Returns the answers of ten people, most of whom give `truth`, drawn with `rng`."""
    agreeing = 6 + int(5 * rng.random())
    given = [truth] * agreeing
    given += [pick(rng, NEAR_MISSES[truth]) for _ in range(ANSWERS - agreeing)]
    for k in range(ANSWERS - 1, 0, -1):
        j = int(rng.random() * (k + 1))
        given[k], given[j] = given[j], given[k]
    return tuple(given)


def _other(rng: random.Random, options, truth):
    return pick(rng, [option for option in options if option != truth])


def _absent_kind(rng: random.Random, kind: str) -> str:
    """Returns a kind that is not in the picture, drawn as often as it is present elsewhere.

    This makes "yes" and "no" equally frequent for every noun.
    """
    share = DOG_SHARE / (1 - DOG_SHARE)
    if kind != "dog" and rng.random() < share:
        return "dog"
    return _other(rng, [k for k in KINDS if k != "dog"], kind)


class _Asker:
    def __init__(self, scene: Scene, rng: random.Random):
        self.scene, self.rng = scene, rng
        one, many = next(iter(words.NOUNS[scene.kind]))
        several = scene.count > 1
        self.slots = {
            "one": one,
            "many": many,
            "x": many if several else one,
            "be": "are" if several else "is",
            "Be": "Are" if several else "Is",
            "do": "do" if several else "does",
            "Do": "Do" if several else "Does",
            "at": AT[scene.place],
        }
        self.asked: list[Question] = []

    def add(self, phrasings, answer: str, answer_type: str, attribute: str, **slots: str) -> None:
        text = pick(self.rng, phrasings).format(**(self.slots | slots))
        if all(q.question != text for q in self.asked):
            answers = answers_of(self.rng, answer)
            self.asked.append(Question(text, answers, answer, answer_type, attribute))

    def exists(self) -> None:
        true = self.rng.random() < 0.5
        kind = self.scene.kind if true else _absent_kind(self.rng, self.scene.kind)
        one, many = next(iter(words.NOUNS[kind]))
        self.add(EXISTS, "yes" if true else "no", "yes/no", "exists", one=one, many=many)

    def check(self, attribute: str) -> None:
        """Adds a yes/no question about an attribute of the scene, true in half of the cases."""
        scene, rng = self.scene, self.rng
        true = rng.random() < 0.5
        answer = "yes" if true else "no"
        if attribute == "colour":
            colour = scene.colour if true else _other(rng, COLOURS, scene.colour)
            self.add(COLOUR_CHECK, answer, "yes/no", attribute, colour=colour)
        elif attribute == "place":
            place = scene.place if true else _other(rng, PLACES, scene.place)
            slots = {"at": AT[place], "place_noun": PLACE_NOUN[place]}
            self.add(PLACE_CHECK, answer, "yes/no", attribute, **slots)
        elif attribute == "mood":
            mood = str(scene.mood) if true else _other(rng, MOODS, scene.mood)
            self.add(MOOD_CHECK, answer, "yes/no", attribute, mood=mood)
        else:
            count = scene.count if true else _other(rng, COUNTS, scene.count)
            noun = self.slots["many" if count > 1 else "one"]
            slots = {"number": NUMBER_WORDS[count], "noun": noun}
            self.add(COUNT_CHECK, answer, "yes/no", attribute, **slots)


def questions(scene: Scene) -> list[Question]:
    """Returns about eight questions about a scene; every attribute is asked about at least once."""
    rng = random.Random(f"questions/{scene.seed}")
    asker = _Asker(scene, rng)
    asker.exists()
    asker.exists()
    asker.add(COUNT, NUMBER_WORDS[scene.count], "number", "count")
    asker.add(COLOUR, scene.colour, "other", "colour")
    asker.add(PLACE, scene.place, "other", "place")
    asking = OBJECT
    if scene.kind in ANIMALS and rng.random() < 0.5:
        asking = ANIMAL_OBJECT
    elif scene.kind in VEHICLES and rng.random() < 0.5:
        asking = VEHICLE_OBJECT
    asker.add(asking, scene.kind, "other", "object")
    checks = ["colour", "place", "count"]
    if scene.mood is not None:
        asker.add(MOOD, scene.mood, "other", "mood")
        checks.append("mood")
        asker.check("mood")
    while len(checks) > 2:
        checks.remove(pick(rng, checks))
    for attribute in checks:
        asker.check(attribute)
    return asker.asked


def check(scene: Scene, attribute: str, rng: random.Random) -> Question:
    """Returns one yes/no question drawn with `rng`; `questions` is deterministic per scene.

    attribute: "exists", "colour", "place", "count", or for animals "mood".
    """
    asker = _Asker(scene, rng)
    if attribute == "exists":
        asker.exists()
    else:
        asker.check(attribute)
    return asker.asked[0]


PHRASINGS = (
    EXISTS,
    COUNT,
    COUNT_CHECK,
    COLOUR,
    COLOUR_CHECK,
    PLACE,
    PLACE_CHECK,
    OBJECT,
    ANIMAL_OBJECT,
    VEHICLE_OBJECT,
    MOOD,
    MOOD_CHECK,
)


def vocabulary() -> list[str]:
    """Returns every word of captions, questions and answers, sorted and without punctuation.

    Lower case, except for the first words of questions; plurals are words of their own.
    """
    found = caption_words()
    for text in strings(PHRASINGS):
        found |= set(split_words(re.sub(r"\{\w+\}", " ", text)))
    found |= set(split_words("Is Are Do Does is are do does a"))
    for table in (AT, PLACE_NOUN, NUMBER_WORDS, NEAR_MISSES):
        found |= {w for text in table.values() for w in split_words(" ".join(strings(text)))}
    found |= set(NEAR_MISSES) | {
        w for pair in words.NOUNS.values() for p in pair for w in p if pair[p]
    }
    return sorted(found)
