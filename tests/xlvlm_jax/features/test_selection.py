"""Selections of token positions: parsing, defaults, messages, rows of each mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.features import token_positions
from xlvlm_jax.features.selection import MODES, Selection

from ...small_tokenizers import sentencepiece


def test_selection_fills_in_the_defaults_of_its_mode():
    word = Selection("token-of-interest", "dog")
    assert (word.generated_only, word.how) == (True, "first")
    everything = Selection("all")
    assert (everything.generated_only, everything.how) == (False, "mean")
    assert Selection("all", generated_only=True).generated_only
    assert (word.match, everything.match) == ("word", None)
    assert word.describe()["match"] == "word" and "match" not in everything.describe()


@pytest.mark.parametrize(
    "text",
    ["all", "index:-1", "range:3:7", "token-of-interest:dog", "class:colours", "class:cup,mug"],
)
def test_parse_and_print_are_inverse(text):
    assert str(Selection.parse(text)) == text
    assert hash(Selection.parse(text)) == hash(Selection.parse(text))
    assert Selection.parse(text, how="each") != Selection.parse(text, how="mean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("some", f"token selection must be one of {', '.join(MODES)}; got 'some'"),
        ("index:two", "index needs a whole number, got 'two'"),
        ("range:3", "range needs start:stop, got '3'"),
        ("range:a:b", "range needs start:stop, got 'a:b'"),
        ("class:fruit", "unknown word class 'fruit'; expected one of colours"),
        ("class:,", "class needs a class or words, got ','; e.g. class:cup, mug"),
        ("token-of-interest", "token-of-interest needs a word, got none"),
        ("all:3", "all takes no argument, got '3'"),
        ("token-id:dog", "token-id needs whole numbers, got 'dog'"),
    ],
)
def test_selection_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Selection.parse(text)


@pytest.mark.parametrize(("text", "match"), [("class:colours", "words"), ("all", "word")])
def test_a_rule_for_matching_that_does_not_apply(text, match):
    with pytest.raises(ValueError, match=f"match must be one of word, first-token, .* '{match}'"):
        Selection.parse(text, match=match)


def test_a_start_belongs_to_a_search():
    assert Selection.parse("token-id:4", start=-2).describe()["start"] == -2
    assert "start" not in Selection.parse("token-id:4").describe()
    with pytest.raises(ValueError, match="start is 3 for all; only a search"):
        Selection.parse("all", start=3)


def test_a_word_that_the_tokenizer_lacks():
    with pytest.raises(ValueError, match="the tokenizer has no token for 'éø'; use another word"):
        Selection("token-of-interest", "éø").finder(sentencepiece("▁dog"))


PIECES = sentencepiece("▁a", "▁dog", "▁cat", "fish")
PROMPT = np.array([[20, 21, 22], [0, 23, 24]])
MASK = np.array([[1, 1, 1], [0, 1, 1]])
# "a dog", and "catfish cat"
ANSWER = np.array([[3, 4, 1, 1], [5, 6, 5, 1]])


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("all", {"how": "first"}, [[0], [7]]),
        ("all", {"how": "last"}, [[4], [11]]),
        ("index:-1", {}, [[4], [11]]),
        ("range:0:2", {"how": "each"}, [[0, 1], [7, 8]]),
        ("range:-2:", {"how": "each"}, [[3, 4], [10, 11]]),
        ("range::-3", {"how": "each"}, [[0, 1], [7, 8]]),
        ("token-of-interest:dog", {}, [[3], []]),
        ("token-of-interest:cat", {}, [[], [10]]),
        ("token-of-interest:cat", {"match": "first-token"}, [[], [8]]),
        ("class:dog,cat", {}, [[3], [10]]),
        ("class:catfish,cat", {}, [[], [8]]),
        ("class:catfish,cat", {"how": "last"}, [[], [9]]),
        ("class:catfish,cat", {"how": "mean"}, [[], [8.5]]),
        ("class:catfish,cat", {"how": "each"}, [[], [8, 9]]),
        ("before-special-tokens", {}, [[2.5], [9]]),
        ("token-id:4", {}, [[3], []]),
        ("token-id:5,3", {}, [[2], [8]]),
        ("token-id:5", {"start": 2}, [[], [10]]),
        ("token-id:5", {"start": -4}, [[], [8]]),
    ],
)
def test_rows_of_each_mode(text, options, expected):
    selection = Selection.parse(text, **options)
    assert PIECES.convert_ids_to_tokens([3, 4, 5, 6]) == ["▁a", "▁dog", "▁cat", "fish"]
    states = jnp.arange(12.0).reshape(2, 6, 1)
    positions = token_positions.Positions.of_generation(PROMPT, MASK, ANSWER, end_ids=1)
    finder = selection.finder(PIECES)
    found = None if finder is None else finder(token_positions.searched(positions))
    select = jax.jit(
        lambda selection, *args: selection.rows(*args, found=found, end_ids=1), static_argnums=0
    )
    rows, sample, _, _ = select(selection, states, positions).flat()
    assert [rows[sample == i, 0].tolist() for i in range(2)] == expected


def test_further_end_tokens():
    selection = Selection("before-special-tokens", "dog fish")
    # The first token of each: "fish" begins with a space of its own.
    assert selection.end_ids(PIECES)[0] == 4
    assert Selection("token-of-interest", "dog").end_ids(PIECES) == ()
    states = jnp.arange(12.0).reshape(2, 6, 1)
    positions = token_positions.Positions.of_generation(PROMPT, MASK, ANSWER, end_ids=1)
    rows, sample, _, _ = selection.rows(states, positions, end_ids=(1, 4, 6)).flat()
    assert [rows[sample == i, 0].tolist() for i in range(2)] == [[2], [8]]


def test_the_selection_itself_does_not_search_for_words():
    positions = token_positions.Positions.of_generation(PROMPT, MASK, ANSWER, end_ids=1)
    with pytest.raises(
        ValueError, match="class:dog,cat needs the positions of its words; pass found"
    ):
        Selection("class", "dog,cat").keep(positions)


def test_the_prompt_is_searched_on_request():
    """The prompt's word comes first; padding before it with the same token does not count."""
    prompt = np.array([[4, 3, 4, 3]])
    positions = token_positions.Positions.of_generation(
        prompt, np.array([[0, 1, 1, 1]]), ANSWER[:1]
    )
    finder = Selection("token-of-interest", "dog").finder(PIECES)
    assert finder(token_positions.searched(positions, generated_only=False)).tolist() == [[1, 2]]
    assert finder(token_positions.searched(positions)).tolist() == [[4, 5]]
    later = token_positions.searched(positions, generated_only=False, start=1)
    assert finder(later).tolist() == [[4, 5]]


@pytest.mark.parametrize("pieces", [(".", "▁."), (".",), ("▁.",)])
def test_punctuation_ends_an_answer_behind_a_word_too(pieces):
    """By itself it is "▁." or "▁", "."; never the lone space, which precedes words."""
    tokenizer = sentencepiece("▁dog", *pieces)
    found = Selection("before-special-tokens", ".").end_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(found) == sorted(pieces, reverse=True)
    assert Selection("before-special-tokens", "</s> </s>").end_ids(tokenizer) == (1,)


def test_bounds_of_rows_per_sample():
    for text in ("index:-1", "token-id:5"):
        assert Selection.parse(text, how="each").rows_at_most(700) == 1
    first = Selection("class", "dog,cat", how="each", match="first-token")
    assert first.rows_at_most(700) == 1
    # Three times the bytes of the longest, with its accent as a character of its own.
    for text, most in (("dog", 9), ("caf\u00e9", 18), ("hot dog", 700)):
        word = Selection("token-of-interest", text, how="each")
        assert word.rows_at_most(700) == most
    assert Selection("class", "dog,caf\u00e9", how="each").rows_at_most(700) == 18
