"""CHAIR: how many of the objects that captions name are not in the image (Rohrbach et al. 2018).

    CHAIRi = mentions of objects that are not there / mentions of objects
    CHAIRs = captions with at least one such mention / captions

over all captions together. Two protocols read the objects in a caption:

official   As the authors' script does (LisaAnne/Hallucination, utils/chair.py at 6e4d33c, with
           nltk 3.2.5 and pattern 3.6): the plural of every word is undone by rules, plural or not,
           so "bus" becomes "bu" and is no bus, though "buses" is one; pairs of neighbouring words
           are joined first, from a short list; and words match, whatever they mean.
plain      As a person would spell: "bus", "ties" and "hair dryer" count, in any number of words,
           with or without a hyphen. Words still match whatever they mean.

Recall (Maxlinn/CHAIR-metric-standalone at 471eb75): distinct objects found / objects there.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from xlvlm_jax.data.coco_objects import OBJECT_OF, UNMATCHED

Protocol = Literal["official", "plain"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

_JOINED = """air plane, baseball bat, baseball glove, cell phone, fire hydrant, hair drier,
    home plate, hot dog, laptop computer, mobile phone, motor bike, motor cycle, parking meter,
    potted plant, sports ball, stop light, stop sign, street light, suit case, teddy bear,
    tennis racket, traffic light, traffic signal, train track, wine glass"""
# Pairs that the official script joins, and what each then is; some are no object.
_ANIMALS = (
    *("bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "animal", "cub"),
)
_PAIRS = {
    **{pair: pair for pair in re.split(r",\s+", _JOINED)},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # "glass", undone
}
_OFFICIAL = {word: name for word, name in OBJECT_OF.items() if word not in UNMATCHED}

# Irregular plurals that the official script undoes, as endings.
_UNDONE = {
    "man": "men",
    "child": "children",
    "goose": "geese",
    "mouse": "mice",
    "person": "people",
    "ox": "oxen",
    "cow": "kine",
    "knife": "knives",
    "calf": "calves",
}
# Plurals as people write them: of these words, and of words with these endings.
_OF_WORDS = {"person": "people", "ox": "oxen"}
# Words that end so by chance.
_BY_CHANCE = """bigfoot, bluetooth, brahman, caiman, cayman, german, human, mongoose, norman,
    ottoman, roman, shaman, superhuman, talisman, tenderfoot"""
_OF_WORDS |= {word: f"{word}s" for word in re.split(r",\s+", _BY_CHANCE)}
_OF_ENDINGS = {
    **{"man": "men", "child": "children", "goose": "geese", "mouse": "mice"},
    **{"tooth": "teeth", "foot": "feet", "knife": "knives", "wife": "wives", "life": "lives"},
    **{"calf": "calves", "half": "halves", "leaf": "leaves", "loaf": "loaves"},
    **{
        "hoof": "hooves",
        "shelf": "shelves",
        "scarf": "scarves",
        "thief": "thieves",
        "wolf": "wolves",
    },
}
# Of these the regular plural is usual as well, or the only one that some write.
_ALSO_REGULAR = ("person", "scarf", "hoof", "mouse")
_ALWAYS_PLURAL = {"people", "children", "oxen", "cattle", "scissors", "skis"}
_WITHOUT_PLURAL = _ALWAYS_PLURAL | {
    *("binoculars", "clothes", "glasses", "goggles", "headphones", "jeans", "pajamas", "pants"),
    *("pliers", "pyjamas", "shorts", "sunglasses", "tights", "tongs", "trousers", "tweezers"),
    *("behalf", "nightlife", "wildlife"),
}


class ChairScore(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to take a share of.

    Attributes:
        chair_i: of the mentions, those of objects that are not there.
        chair_s: of the captions, those with such a mention.
        recall: of the objects that are there, those mentioned.
    """

    chair_i: float
    chair_s: float
    recall: float


def chair(
    captions: Sequence[str],
    objects: Sequence[Collection[str]],
    protocol: Protocol = "official",
) -> ChairScore:
    """Returns how much captions hallucinate objects.

    Args:
        captions: N captions.
        objects: the objects in each image, by their names in COCO or another word for them. CHAIR's
            own also has those that people's captions name, see `mentioned_objects`.
        protocol: "official" or "plain", see the module.

    Raises:
        ValueError: the numbers differ, there are no captions, an object is not one of COCO's, or
            the protocol is unknown.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> metrics.chair(["a dog on a bench", "two buses"], [{"dog"}, {"bus"}])
        ChairScore(chair_i=0.3333333333333333, chair_s=0.5, recall=1.0)
    """
    if not captions or len(captions) != len(objects):
        raise ValueError(
            f"there are {len(captions)} captions and objects of {len(objects)} images; expected "
            "one caption per image, at least one"
        )
    said = [mentioned_objects(caption, protocol) for caption in captions]
    there = [{object_named(name) for name in given} for given in objects]
    counts = chair_counts(said, there).sum(0)
    return ChairScore(**{name: float(score) for name, score in chair_scores(counts).items()})


def chair_counts(
    mentioned: Sequence[Sequence[str]], there: Sequence[Collection[str]]
) -> Float[np.ndarray, "N 6"]:
    """Returns what each caption adds to the counts that `chair_scores` takes.

    Works for the objects of any data set; those of COCO come from `mentioned_objects`.

    Args:
        mentioned: the objects that each of N captions mentions, once per mention.
        there: the objects in each image, by the same names.

    Returns:
        float[N, 6]: mentions, those of objects that are not there, whether there is such a mention,
        distinct objects found, objects there, and 1.

    Raises:
        ValueError: the numbers differ.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> metrics.chair_counts([["dog", "dog", "boat"]], [{"dog", "ball"}]).tolist()
        [[3.0, 1.0, 1.0, 1.0, 2.0, 1.0]]
    """
    if len(mentioned) != len(there):
        raise ValueError(
            f"there are mentions of {len(mentioned)} captions and objects of {len(there)} images; "
            "expected one caption per image"
        )
    rows = []
    for said, given in zip(mentioned, there, strict=True):
        present = set(given)
        wrong = sum(name not in present for name in said)
        rows.append((len(said), wrong, wrong > 0, len(present & set(said)), len(present), 1))
    return np.array(rows, float).reshape(-1, 6)


def chair_scores(counts: Float[np.ndarray, "*shape 6"]) -> dict[str, Float[np.ndarray, "*shape"]]:
    """Returns the fields of `ChairScore` from sums of counts, such as those of a bootstrap.

    Args:
        counts: float[..., 6], sums of what `chair_counts` returns.

    Returns:
        {field: float[...]}; NaN where there is nothing to take a share of.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import metrics
        >>> float(metrics.chair_scores(np.float64([3, 1, 1, 1, 2, 1]))["recall"])
        0.5
    """
    mentions, absent, hallucinating, found, present, number = np.moveaxis(np.asarray(counts), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {
            "chair_i": absent / mentions,
            "chair_s": hallucinating / number,
            "recall": found / present,
        }
    return {name: np.asarray(share) for name, share in shares.items()}


def mentioned_objects(caption: str, protocol: Protocol = "official") -> list[str]:
    """Returns the objects of COCO that a caption mentions, by name, once per mention.

    Args:
        caption: a text.
        protocol: "official" or "plain", see the module.

    Raises:
        ValueError: the protocol is unknown.

    Examples:
        >>> from xlvlm_jax.metrics.chair import mentioned_objects
        >>> mentioned_objects("Two puppies and a baby bear")
        ['dog', 'bear']
        >>> mentioned_objects("A bus"), mentioned_objects("A bus", "plain")
        ([], ['bus'])
    """
    if protocol == "official":
        return _official_objects(caption)
    if protocol == "plain":
        return [_plain_phrases()[each] for each in _plain_mentions(caption)]
    raise ValueError(f"protocol is {protocol!r}; expected {' or '.join(map(repr, PROTOCOLS))}")


def _official_objects(caption: str) -> list[str]:
    words = [_singulars().get(token, "") for token in _tokens(caption)]
    joined, i = [], 0
    while i < len(words):
        pair = " ".join(words[i : i + 2])
        joined.append(_PAIRS.get(pair, words[i]))
        i += 2 if pair in _PAIRS else 1
    if "toilet" in joined:
        joined = [word for word in joined if word != "seat"]
    return [_OFFICIAL[word] for word in joined if word in _OFFICIAL]


# Marks that nltk's tokenizer splits off, of those that matter to words.
_MARK = re.compile(
    r"""[][(){}<>;@#$%&?!"\u201c\u201d\u2018\u2019\u00ab\u00bb]|--|\.{3}|[:,](?!\d)"""
)
_LAST_STOP = re.compile(r"""(?<=[^.])\.(?=[\])}>"'\u201d\u2019\u00bb\s]*$)""")
_ENDING = re.compile(r"(?<=[^'\s])('s|'m|'d|'ll|'re|'ve|n't|')(?=\s|$)")
_SENTENCE_END = re.compile(r"""(?<=[.?!])[\])}"'\u201d\u2019]*\s+""")


def _tokens(caption: str) -> Iterator[str]:
    """Yields lower-case words and marks, of each sentence in turn."""
    for sentence in _sentences(caption.lower()):
        text = _LAST_STOP.sub(" . ", _MARK.sub(r" \g<0> ", sentence))
        yield from _ENDING.sub(r" \1", text).split()


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(text):
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


@cache
def _singulars() -> dict[str, str]:
    """Returns {form: word} of each form whose plural the official script undoes to a word."""
    parts = {part for pair in _PAIRS for part in pair.split()}
    words = {word for word in _OFFICIAL if " " not in word} | parts
    forms: dict[str, str] = {}
    for word in sorted(words):
        forms[f"{word}s"] = word
        # The rules take "s" from every word but a few such as "scissors".
        if not word.endswith("s") or word == "scissors":
            forms.setdefault(word, word)
        if not word.endswith("s") or word.endswith(("bus", "ss")):
            forms |= dict.fromkeys(_undone_plurals(word), word)
        if word.endswith(("a", "o")):
            forms[f"{word}e" if word.endswith("a") else f"{word}es"] = word
    for lost in ("canoes", "collies", "doggies", "magpies", "ties", "oxens"):
        del forms[lost]
    forms |= {"oxes": "ox", "oxen": "ox", "oxenen": "oxen", "knives": "knife"}
    return {**forms, "children": "child", "people": "person"}


def _undone_plurals(word: str) -> list[str]:
    """Returns the plurals of a word that the official script undoes."""
    for ending, plural in _UNDONE.items():
        if word == ending or (word.endswith(ending) and ending not in ("ox", "person", "cow")):
            return [word[: -len(ending)] + plural]
    return _regular_plurals(word)


def plurals(word: str) -> list[str]:
    """Returns the plural of a word as people write it; both, where there are two, or none.

    Examples:
        >>> from xlvlm_jax.metrics.chair import plurals
        >>> plurals("cow"), plurals("scarf"), plurals("buffalo")
        (['cows'], ['scarves', 'scarfs'], ['buffalos', 'buffaloes'])
        >>> plurals("scissors"), plurals("wildlife")
        ([], [])
    """
    if word in _WITHOUT_PLURAL:
        return []
    if word in _OF_WORDS:
        found = [_OF_WORDS[word]]
    else:
        found = [word[: -len(e)] + plural for e, plural in _OF_ENDINGS.items() if word.endswith(e)]
    return found + (_regular_plurals(word) if not found or word in _ALSO_REGULAR else [])


def _regular_plurals(word: str) -> list[str]:
    if re.search("[^aeiou]y$", word):
        return [f"{word[:-1]}ies"]
    if re.search("(s|x|ch|sh)$", word):
        return [f"{word}es"]
    return [f"{word}s", f"{word}es"] if re.search("[^aeiou]o$", word) else [f"{word}s"]


@cache
def _plain_phrases() -> dict[str, str]:
    """Returns {phrase: object} in lower case, singular and plural; "" for what is no object."""
    animals = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
    named = {
        **{word.lower(): name for word, name in OBJECT_OF.items()},
        **{phrase: OBJECT_OF.get(animal, "") for phrase, animal in animals.items()},
        **dict.fromkeys(("train track", "home plate", "passenger jet", "passenger train"), ""),
        "passenger jet": "airplane",
        "passenger train": "train",
        "toilet seat": "toilet",
        "hair dryer": "hair drier",
        "hairdrier": "hair drier",
        "television": "tv",
    }
    phrases = dict(named)
    for phrase, name in named.items():
        if phrase not in _ALWAYS_PLURAL:
            first, last = phrase.rsplit(" ", 1) if " " in phrase else ("", phrase)
            phrases |= {f"{first} {plural}".strip(): name for plural in plurals(last)}
    return phrases


@cache
def _plain_pattern() -> re.Pattern[str]:
    longest = sorted(_plain_phrases(), key=len, reverse=True)
    forms = (re.escape(phrase).replace(r"\ ", r"[\s-]+") for phrase in longest)
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(forms)})(?![^\W_])")


def _plain_mentions(caption: str) -> Iterator[str]:
    for found in _plain_pattern().finditer(caption.lower()):
        phrase = re.sub(r"[\s-]+", " ", found.group())
        if _plain_phrases()[phrase]:
            yield phrase


def object_named(name: str) -> str:
    """Returns the object of COCO that a name or another word for it stands for.

    Raises:
        ValueError: there is none.

    Examples:
        >>> from xlvlm_jax.metrics.chair import object_named
        >>> object_named("puppy")
        'dog'
    """
    if name not in OBJECT_OF:
        raise ValueError(f"{name!r} is not an object of COCO, such as 'dog' or 'traffic light'")
    return OBJECT_OF[name]
