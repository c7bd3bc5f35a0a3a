"""Captions of a scene, the content of a caption, and the vocabulary."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping

from . import words
from .scene import ANIMALS, COUNTS, MOODS, Scene

CAPTIONS = 5
COLOUR_SHARE = 0.62
PLACE_SHARE = 0.88
MOOD_SHARE = 0.52

# Forms of a caption; a scene's five captions have five different forms.
FORMS = {
    "plain": 6,  # a dog on the beach
    "doing": 5,  # a dog sitting on the beach
    "sentence": 3,  # a dog is sitting on the beach
    "there": 3,  # there is a dog on the beach
    "picture": 2,  # a picture of a dog on the beach
    "place first": 4,  # on the beach, a dog sits
    "place there": 2,  # on the beach there is a dog
    "place with": 2,  # a sandy beach with a dog
    "parts": 3,  # a dog with floppy ears on the beach
}


def choose(rng: random.Random, table: dict):
    """Draws one key of a table {key: weight}.

    Raises:
        ValueError: the sum of the weights is not positive.
    """
    left = rng.random() * sum(table.values())
    for key, weight in table.items():
        left -= weight
        if left < 0:
            return key
    raise ValueError("a table of weights must have a positive sum")


def with_article(phrase: str) -> str:
    """Replaces "{a}" by "a" or "an", depending on the next word."""
    return re.sub(r"\{a\} (?=([a-z]))", lambda m: "an " if m[1] in "aeiou" else "a ", phrase)


class _Writer:
    """Writes one caption without repeating itself."""

    def __init__(self, scene: Scene, rng: random.Random, form: str):
        self.scene, self.rng, self.form = scene, rng, form
        self.several = scene.count > 1
        self.colour = rng.random() < COLOUR_SHARE
        # The mood, until it has been said.
        self.mood = None if scene.mood is None or rng.random() >= MOOD_SHARE else scene.mood
        placed = form.startswith("place")
        self.place = placed or rng.random() < PLACE_SHARE

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def noun_phrase(self) -> str:
        """Returns count, adjectives and noun, with what directly follows the noun."""
        scene, rng = self.scene, self.rng
        quantifier = choose(rng, words.QUANTIFIERS[scene.count])
        front, back = [], []
        if self.mood and self.chance(0.5):
            front.append(choose(rng, words.MOOD_ADJECTIVES[self.mood]))
            self.mood = None
        if self.chance(0.1):
            front.append(choose(rng, words.SIZES[scene.count]))
        elif self.chance(0.08):
            front.append(choose(rng, words.QUALITIES[scene.kind]))
        if self.colour:
            colour = choose(rng, words.COLOUR_WORDS[scene.colour])
            if self.chance(0.14) and self.form != "parts":
                coat = choose(rng, words.COATS.get(scene.kind, words.THING_COAT))
                # "a {colour} coat" is only said about a single animal.
                if self.several:
                    coat = coat.replace("a {colour} coat", "{colour} coats")
                back.append(
                    coat.replace("a {colour}", "{a} {colour}").format(colour=colour, a="{a}")
                )
            else:
                front.append(colour)
        noun = choose(rng, words.NOUNS[scene.kind])[self.several]
        return with_article(" ".join([quantifier, *front, noun, *back]))

    def agree(self, singular: str, plural: str) -> str:
        return plural if self.several else singular

    def mood_behind(self) -> list[str]:
        """Returns the mood as a participle or a clause, if it has not been said."""
        mood, rng = self.mood, self.rng
        if mood is None:
            return []
        self.mood = None
        if self.chance(0.6):
            return [choose(rng, words.MOOD_VERBS[mood])[0]]
        # avoids a second "with" in "a dog with floppy ears with a smile"
        if self.form != "parts" and self.chance(0.65):
            return [choose(rng, words.MOOD_CLAUSES[mood])[self.several]]
        looks = choose(rng, dict.fromkeys(words.MOOD_LOOKS, 1))
        adjective = choose(rng, words.MOOD_ADJECTIVES[mood])
        return ["that", self.agree(looks, words.MOOD_LOOKS[looks]), adjective]

    def verb(self) -> tuple[str, str, str]:
        table = words.VERBS[self.scene.kind]
        if self.scene.kind in ANIMALS and self.place and self.chance(0.25):
            table = words.PLACE_VERBS[self.scene.place]
        return choose(self.rng, table)

    def where(self) -> list[str]:
        if not self.place:
            return []
        table = words.AIR_PHRASES if self.scene.kind == "plane" else words.PLACE_PHRASES
        return [choose(self.rng, table[self.scene.place])]

    def tail(self, share: float = 0.16) -> list[str]:
        """Returns something more about the place or the weather, now and then."""
        rng, scene = self.rng, self.scene
        if self.place and scene.kind != "plane" and self.chance(share):
            return [choose(rng, words.PLACE_TAILS[scene.place])]
        # Leaves hide the sky of the forest.
        if scene.place != "forest" and self.chance(0.08):
            return [choose(rng, words.WEATHER_TAILS[scene.weather])]
        return []

    def together(self) -> list[str]:
        if self.chance(0.1):
            return [choose(self.rng, words.TOGETHER[self.scene.count])]
        return []

    def write(self) -> str:
        rng, form = self.rng, self.form
        subject = self.noun_phrase()
        if form == "plain":
            said = [subject, *self.mood_behind(), *self.together(), *self.where(), *self.tail()]
        elif form == "doing":
            doing = self.mood_behind() or [self.verb()[0]]
            said = [subject, *doing, *self.together(), *self.where(), *self.tail()]
        elif form == "sentence":
            if self.mood:
                looks = choose(rng, dict.fromkeys(words.MOOD_LOOKS, 1))
                adjective = choose(rng, words.MOOD_ADJECTIVES[self.mood])
                self.mood = None
                verb = [self.agree(looks, words.MOOD_LOOKS[looks]), adjective]
            else:
                participle, singular, plural = self.verb()
                if singular.startswith("is "):
                    verb = [self.agree(singular, plural)]
                else:
                    verb = [self.agree("is", "are"), participle]
            said = [subject, *verb, *self.together(), *self.where(), *self.tail()]
        elif form == "there":
            be = "are" if re.match("two|three", subject) else "is"
            said = ["there", be, subject, *self.mood_behind(), *self.where(), *self.tail()]
        elif form == "picture":
            of = choose(rng, words.PICTURES)
            said = [of, subject, *self.mood_behind(), *self.where(), *self.tail()]
        elif form == "place first":
            place = " ".join([*self.where(), *self.tail(0.25)])
            if self.mood:
                _, singular, plural = choose(rng, words.MOOD_VERBS[self.mood])
                self.mood = None
            else:
                _, singular, plural = self.verb()
            rest = [self.agree(singular, plural)]
            said = [f"{place},", subject, *rest, *self.together()]
        elif form == "place there":
            place = " ".join([*self.where(), *self.tail(0.12)])
            be = "are" if re.match("two|three", subject) else "is"
            said = [place, "there", be, subject, *self.mood_behind()]
        elif form == "place with":
            noun = with_article(choose(rng, words.PLACE_NOUNS[self.scene.place]))
            said = [noun, "with", subject, *self.mood_behind()]
        else:
            part = choose(rng, words.PARTS[self.scene.kind])[self.several]
            said = [subject, "with", part, *self.mood_behind(), *self.where(), *self.tail(0.1)]
        return " ".join(said)


def captions(scene: Scene) -> list[str]:
    """Returns five different captions of a scene: lower case, without a final point."""
    rng = random.Random(f"captions/{scene.seed}")
    forms = dict(FORMS)
    texts: list[str] = []
    while len(texts) < CAPTIONS:
        form = choose(rng, forms)
        text = _Writer(scene, rng, form).write()
        if text not in texts:
            texts.append(text)
            del forms[form]
    return texts


def split_words(text: str) -> list[str]:
    """Returns the words of a caption, question or answer, as in `vocabulary`."""
    return re.findall(r"[A-Za-z]+", text)


def _families() -> dict[str, Mapping[str, str | int]]:
    """Returns {attribute: {word: the value that it names}}."""
    kinds = {w: kind for kind, table in words.NOUNS.items() for pair in table for w in pair}
    colours = {w: colour for colour, table in words.COLOUR_WORDS.items() for w in table}
    places = {w: place for place, text in words.PLACE_WORDS.items() for w in text.split()}
    moods: dict[str, str] = {}
    for mood in MOODS:
        for table in (words.MOOD_ADJECTIVES[mood], words.MOOD_VERBS[mood]):
            moods |= {w: mood for key in table for w in ([key] if isinstance(key, str) else key)}
    moods |= {"joy": "happy", "tears": "sad", "sorrow": "sad"}
    counts: dict[str, int] = {}
    for count in COUNTS:
        for phrase in words.QUANTIFIERS[count]:
            counts[phrase.removeprefix("a ").removesuffix(" of")] = count
    counts = {"three" if k == "group of three" else k: v for k, v in counts.items() if k != "{a}"}
    return {"kind": kinds, "colour": colours, "count": counts, "place": places, "mood": moods}


FAMILIES = _families()


def named(caption: str) -> dict[str, str | int | None]:
    """Returns the attributes that a caption names, including synonyms; None if it does not.

    The keys are those of `attributes`. If a caption contradicts itself the first word counts; a
    singular noun without a number means one.
    """
    said: dict[str, str | int | None] = dict.fromkeys(FAMILIES)
    found = split_words(caption.lower())
    for attribute, family in FAMILIES.items():
        said[attribute] = next((family[w] for w in found if w in family), None)
    if said["count"] is None and said["kind"] is not None:
        noun = next(w for w in found if w in FAMILIES["kind"])
        singular = any(noun == one for table in words.NOUNS.values() for one, _ in table)
        said["count"] = 1 if singular else None
    return said


def strings(value) -> Iterator[str]:
    """Yields all strings of nested tables, except entries of weight 0, which are never used."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if item != 0:
                yield from strings(key) if isinstance(item, int) else strings(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from strings(item)


def caption_words() -> set[str]:
    """Returns every word that a caption can contain."""
    spoken = ["there is are with that a an"]
    for name, table in vars(words).items():
        if name.isupper() and name not in ("MOOD_LOOKS", "PLACE_WORDS"):
            spoken += strings(table)
    spoken += [w for pair in words.MOOD_LOOKS.items() for w in pair]
    spoken += ["coats"]
    return {
        w for text in spoken for w in split_words(text.replace("{colour}", "").replace("{a}", ""))
    }
