"""AMBER's descriptions: what is named that is not there, and what is there (Wang et al. 2023).

    CHAIR   mentions of what is not there / mentions
    Cover   annotated objects that are there and named / those that are there
    Hal     descriptions with a mention of what is not there / descriptions
    Cog     annotated objects that people imagine and that are named / those that people imagine

over all descriptions together, in which only the words of AMBER's lists are mentions. Two protocols
find them:

official   As the authors' script does (junyangwang0410/AMBER, inference.py at 534babf): nouns are
           those that nltk tags and lemmatises, in the case they are written in, so "Dogs" at the
           start of a sentence is none; words are alike if their vectors in spaCy's en_core_web_lg
           have a cosine above 0.8. Both packages and their data have to be installed.
plain      Words of the lists in any case, singular or plural; only the lists say what is alike.

To both, "orange", "snack", "line", "camera" and "light" (safe_words.txt) are never wrong, though
they are mentions; a word that is alike to one that is there is not wrong, even if the annotations
say that people imagine it, but Cog counts it; an object that is annotated twice can be covered
once. The script rounds to one digit in percent and adds 0.001 to every denominator, which this does
not.
"""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from xlvlm_jax.data.amber import WordLists
from xlvlm_jax.metrics.chair import plurals

LIKENESS = 0.8  # the script's --similarity_score
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


class AmberDescriptionScore(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to take a share of.

    Attributes:
        chair: of the mentions, those of objects that are not there.
        cover: of the annotated objects that are there, those that are named.
        hal: of the descriptions, those with a mention of what is not there.
        cog: of the annotated objects that people imagine, those that are named.
    """

    chair: float
    cover: float
    hal: float
    cog: float


def _equal(first: str, second: str) -> bool:
    return first == second


def amber_descriptions(
    nouns: Sequence[Sequence[str]],
    there: Sequence[Sequence[str]],
    imagined: Sequence[Sequence[str]],
    lists: WordLists,
    *,
    alike: Callable[[str, str], bool] = _equal,
) -> AmberDescriptionScore:
    """Returns AMBER's scores of descriptions.

    Args:
        nouns: the nouns of each of N descriptions, once per mention, see `listed_words` and
            `nltk_nouns`; those that are not in the lists do not count.
        there, imagined: the objects in each image, and those that people imagine there ("truth"
            and "hallu" of the annotations).
        lists: AMBER's words.
        alike: whether two words mean the same, see `spacy_alike`; by default, if they are equal.

    Raises:
        ValueError: there are no descriptions, the numbers differ, or an annotated object is not in
            the lists.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> lists = metrics.WordLists({"dog": ["puppy"], "sea": ["water"], "boat": []})
        >>> metrics.amber_descriptions([["puppy", "boat"]], [["dog", "sea"]], [["boat"]], lists)
        AmberDescriptionScore(chair=0.5, cover=0.5, hal=1.0, cog=1.0)
    """
    if not nouns:
        raise ValueError("there are no descriptions; expected at least one")
    counts = amber_counts(nouns, there, imagined, lists, alike=alike).sum(0)
    scores = amber_description_scores(counts)
    return AmberDescriptionScore(**{name: float(score) for name, score in scores.items()})


def amber_counts(
    nouns: Sequence[Sequence[str]],
    there: Sequence[Sequence[str]],
    imagined: Sequence[Sequence[str]],
    lists: WordLists,
    *,
    alike: Callable[[str, str], bool] = _equal,
) -> Float[np.ndarray, "N 8"]:
    """Returns what each description adds to the counts that `amber_description_scores` takes.

    Args:
        nouns, there, imagined, lists, alike: as for `amber_descriptions`.

    Returns:
        float[N, 8]: mentions, those of what is not there, objects there that are named, objects
        there, whether something is named that is not there, 1, imagined objects that are named, and
        imagined objects.

    Raises:
        ValueError: the numbers differ, or an annotated object is not in the lists.
    """
    if not len(nouns) == len(there) == len(imagined):
        raise ValueError(
            f"there are nouns of {len(nouns)} descriptions and objects of {len(there)} and "
            f"{len(imagined)} images; expected as many of each"
        )
    words = lists.words
    rows = []
    for said, truth, thought in zip(nouns, there, imagined, strict=True):
        mentions = [noun for noun in said if noun in words]
        real, unreal = _Named(truth, lists, alike), _Named(thought, lists, alike)
        wrong = sum(_is_wrong(noun, real, unreal, lists) for noun in mentions)
        found = sum(real.found), len(truth), wrong > 0, 1, sum(unreal.found), len(thought)
        rows.append((len(mentions), wrong, *found))
    return np.array(rows, float).reshape(-1, 8)


class _Named:
    """Which of the annotated objects of an image are named."""

    def __init__(
        self, objects: Sequence[str], lists: WordLists, alike: Callable[[str, str], bool]
    ) -> None:
        if missing := [name for name in objects if name not in lists.associations]:
            raise ValueError(
                f"the annotated object {missing[0]!r} is not in AMBER's list of words; expected "
                "relation.json of the same data"
            )
        associated = [
            (word, i) for i, name in enumerate(objects) for word in lists.associations[name]
        ]
        # The first that fits counts: associated words come before the objects themselves.
        self.words = associated + [(name, i) for i, name in enumerate(objects)]
        self.found = [False] * len(objects)
        self.alike = alike

    def mark(self, noun: str, same: Callable[[str, str], bool]) -> bool:
        """Marks the object of the first word that is the same as a noun; False if there is none."""
        first = next((i for word, i in self.words if same(noun, word)), None)
        if first is not None:
            self.found[first] = True
        return first is not None


def _is_wrong(noun: str, real: _Named, unreal: _Named, lists: WordLists) -> bool:
    """Returns whether a noun is not there, and marks what it names."""
    if noun in lists.safe or real.mark(noun, _equal):
        return False
    unreal.mark(noun, _equal)
    unreal.mark(noun, unreal.alike)
    return not real.mark(noun, real.alike)


def amber_description_scores(
    counts: Float[np.ndarray, "*shape 8"],
) -> dict[str, Float[np.ndarray, "*shape"]]:
    """Returns the fields of `AmberDescriptionScore` from sums of counts, as of a bootstrap.

    Args:
        counts: float[..., 8], sums of what `amber_counts` returns.

    Returns:
        {field: float[...]}; NaN where there is nothing to take a share of.
    """
    mentions, wrong, found, real, hallucinating, number, imagined, unreal = np.moveaxis(
        np.asarray(counts), -1, 0
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = {
            "chair": wrong / mentions,
            "cover": found / real,
            "hal": hallucinating / number,
            "cog": imagined / unreal,
        }
    return {name: np.asarray(share) for name, share in shares.items()}


def listed_words(text: str, lists: WordLists) -> list[str]:
    """Returns the words of AMBER's lists in a text, once per mention, by the plain protocol.

    Args:
        text: a description.
        lists: AMBER's words.

    Examples:
        >>> from xlvlm_jax import metrics
        >>> lists = metrics.WordLists({"dog": ["puppy"], "sea": []})
        >>> metrics.listed_words("Puppies by the sea, and one dog.", lists)
        ['puppy', 'sea', 'dog']
    """
    forms = _forms(lists.words)
    found = (forms.get(word.lower()) for word in _WORD.findall(text))
    return [word for word in found if word is not None]


@functools.lru_cache(8)
def _forms(words: frozenset[str]) -> dict[str, str]:
    """Returns {form in lower case: word}, singular and plural; a listed word is always itself."""
    of_plurals = {form.lower(): word for word in sorted(words) for form in plurals(word)}
    return of_plurals | {word.lower(): word for word in words}


def nltk_nouns(text: str) -> list[str]:
    """Returns the nouns of a text as the official script finds them, by nltk.

    Args:
        text: a description.

    Returns:
        A noun per mention, in the order of the text, as nltk lemmatises it.

    Raises:
        ModuleNotFoundError: nltk is not installed.
        ValueError: its data are not.
    """
    import nltk  # pyright: ignore[reportMissingImports]
    from nltk.stem import WordNetLemmatizer  # pyright: ignore[reportMissingImports]

    try:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        lemma = WordNetLemmatizer().lemmatize
        return [lemma(word) for word, tag in tagged if tag.startswith("NN")]
    except LookupError:
        raise ValueError(
            "nltk has no data to find nouns with; run: python -m nltk.downloader punkt punkt_tab "
            "averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet"
        ) from None


@functools.cache
def can_read_officially() -> bool:
    """Returns whether the official protocol can run: nltk and spaCy are there, with their data.

    Warns, the first time, if only the data are missing.
    """
    try:
        spacy_alike()
        nltk_nouns("A dog.")
    except ModuleNotFoundError:
        return False
    except ValueError as error:
        warnings.warn(f"AMBER's official protocol is left out: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def spacy_alike() -> Callable[[str, str], bool]:
    """Returns what says whether two words are alike to the official script, by spaCy's vectors.

    Raises:
        ModuleNotFoundError: spaCy is not installed.
        ValueError: its model is not.
    """
    import spacy  # pyright: ignore[reportMissingImports]

    try:
        read = functools.lru_cache(None)(spacy.load("en_core_web_lg"))
    except OSError:
        raise ValueError(
            "spaCy has no word vectors; run: python -m spacy download en_core_web_lg"
        ) from None

    @functools.lru_cache(None)
    def alike(first: str, second: str) -> bool:
        return read(first).similarity(read(second)) > LIKENESS

    return alike
