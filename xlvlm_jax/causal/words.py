"""The words of concepts as tokens of a model, and other words that are as likely.

V vocabulary, W words, R spellings of a word, K concepts, P words of a concept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

NONE = -1  # fills rows of tokens and words that are shorter than others
MOST_OTHERS = 4096  # words of concepts that are not scored, to compare with


class Vocabulary(NamedTuple):
    """The words of a dictionary's concepts, each once, and where each concept has its own.

    Attributes:
        words: W words.
        tokens: int[W, R], ids of each word's spellings; `NONE` after the last.
        own: for each concept the indices of its words.
        unknown: words that no token of the model spells.
    """

    words: list[str]
    tokens: Int[np.ndarray, "W R"]
    own: list[list[int]]
    unknown: list[str]


def vocabulary_of(
    words: Sequence[Sequence[str]],
    tokenizer: Any,
    size: int,
    *,
    others: Sequence[Sequence[str]] = (),
) -> Vocabulary:
    """Finds the tokens that spell the words of concepts, as grounding reads tokens.

    A token spells a word if its text is the word once white space is stripped and letters are
    lower-cased: "dog", " dog" and "Dog" all spell "dog", and the probability of the word is the sum
    of theirs. Runs on the host and cannot be traced.

    Args:
        words: for each of K concepts its words; a concept may have none.
        tokenizer: a Hugging Face tokenizer.
        size: V, the number of ids to look at.
        others: words of further concepts, which only others are compared with; of more than 4,096
            that have a token, as many, spread evenly.

    Returns:
        The words that have a token, in the order in which they occur, those of `others` last.

    Raises:
        ValueError: no concept has a word that is a token.

    Examples:
        >>> import ports
        >>> from xlvlm_jax import causal
        >>> vlm = ports.load_abstract("embedded")
        >>> known = causal.vocabulary_of([["dog", "pup"], ["dog", "qqq"]], vlm.tokenizer, 708)
        >>> known.words, known.own, known.unknown
        (['dog', 'pup'], [[0, 1], [0]], ['qqq'])
    """
    wanted = dict.fromkeys(word for each in words for word in each)
    further = [w for w in dict.fromkeys(w for each in others for w in each) if w not in wanted]
    spelt: dict[str, list[int]] = {word: [] for word in (*wanted, *further)}
    for token in range(size if wanted else 0):
        text = tokenizer.decode([token]).lower().strip()
        if text in spelt:
            spelt[text].append(token)
    known = [word for word in wanted if spelt[word]]
    if not known:
        raise ValueError(
            "none of the concepts has a word that is a token of the model; ground them first "
            "(xlvlm ground), with this model"
        )
    further = [word for word in spelt if spelt[word]]
    if len(further) > MOST_OTHERS:
        # Of all words, so that the choice does not depend on the concepts that are asked for.
        further.sort()
        further = [further[i * len(further) // MOST_OTHERS] for i in range(MOST_OTHERS)]
    known += [word for word in further if word not in wanted]
    index = {word: i for i, word in enumerate(known)}
    return Vocabulary(
        words=known,
        tokens=filled([spelt[word] for word in known]),
        own=[list(dict.fromkeys(index[w] for w in each if w in index)) for each in words],
        unknown=[word for word in wanted if not spelt[word]],
    )


def filled(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "K P"]:
    """Returns rows of numbers as one array, at least one column wide, shorter ones with NONE."""
    made = np.full((len(rows), max([1, *map(len, rows)])), NONE, np.int32)
    for row, numbers in zip(made, rows, strict=True):
        row[: len(numbers)] = numbers
    return made


def own_tokens(known: Vocabulary) -> Int[np.ndarray, "K R"]:
    """Returns the tokens of all words of each concept.

    Args:
        known: the words, from `vocabulary_of`.

    Returns:
        int[K, R], ids; `NONE` after the last.
    """
    spelt = [[token for token in row if token != NONE] for row in known.tokens.tolist()]
    return filled([[token for i in own for token in spelt[i]] for own in known.own])


def matched_words(
    likelihood: Float[np.ndarray, " W"],
    own: Sequence[int],
    *,
    without: Sequence[int] = (),
    num_matched: int = 3,
) -> list[int]:
    """Returns other words that are about as likely as a concept's own.

    For each own word those whose likelihood has the nearest rank; a word may be chosen for several
    own words, and then counts as often. Runs on the host and cannot be traced.

    Args:
        likelihood: float[W], such as the mean log-probability of each word without an edit.
        own: indices of the concept's words.
        without: indices of further words that may not be chosen.
        num_matched: number of other words per own word, as far as there are so many.

    Returns:
        Indices, at most `num_matched` for each own word; empty if there are no other words.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import causal
        >>> causal.matched_words(np.array([-9.0, -2.0, -8.0, -1.0, -5.0]), [0, 1], num_matched=1)
        [2, 3]
    """
    order = np.argsort(likelihood, kind="stable")
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    others = np.setdiff1d(np.arange(len(order)), [*own, *without])
    if not len(others):
        return []
    gaps = np.abs(rank[others][None] - rank[np.asarray(own, int)][:, None])
    nearest = np.argsort(gaps, axis=1, kind="stable")[:, :num_matched]
    return others[nearest].ravel().tolist()
