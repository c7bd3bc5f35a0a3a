"""Words in sequences of tokens, whatever the tokenizer."""

import functools
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from xlvlm_jax import find_word
from xlvlm_jax.data.words import COLOURS, PLACES, SENTIMENTS
from xlvlm_jax.demo import embedded
from xlvlm_jax.features.spelling import WordFinder, spellings, token_bytes

from ...small_tokenizers import byte_level, sentencepiece

SHARED = Path(__file__).parents[4] / "shared"
REAL = {  # byte-level BPE, and SentencePiece with bytes where it has no piece
    "qwen2": SHARED / "molmo" / "tokenizer",
    "llama2": SHARED / "tokenizers" / "llama2",
    "embedded": embedded.LLAVA,
}


@pytest.fixture(scope="module", params=[*REAL, "tekken", "mistral"])
def tokenizer(request):
    return load(request.param)


@functools.cache
def load(name):
    if name in REAL:
        if not REAL[name].exists():
            pytest.skip(f"the tokenizer of {name} is not here")
        return AutoTokenizer.from_pretrained(REAL[name])
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    from transformers.tokenization_mistral_common import MistralCommonBackend

    if name == "tekken":
        return MistralCommonBackend(data / "tekken_240911.json")
    pytest.importorskip("sentencepiece")
    return MistralCommonBackend(data / "tokenizer.model.v1")


def encode(tokenizer, text):
    return np.array([tokenizer.encode(text, add_special_tokens=False)], int)


def decode(tokenizer, ids):
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)


def before_and_in(tokenizer, ids, position):
    """Returns the text before a position, and up to and including its token."""
    texts = (decode(tokenizer, ids[:end]) for end in (position, position + 1))
    return [text.rstrip("\ufffd") for text in texts]


# By hand.


def test_a_word_is_found_where_its_tokens_spell_it_whole():
    tokenizer = sentencepiece("▁a", "▁to", "▁toast", "er", "▁car", "rot", "s")
    ids = tokenizer.convert_tokens_to_ids
    rows = [
        ids(["▁to", "▁a", "▁toast", "er"]),
        ids(["▁a", "▁toast", "▁car", "er"]),
        ids(["▁toast", "er", "s", "</s>"]),
        ids(["</s>", "▁toast", "er", "</s>"]),
        ids(["▁a", "▁a", "▁a", "▁toast"]),  # cut off
        ids(["▁toast", "</s>", "er", "▁a"]),  # a special token lies between
    ]
    assert find_word(rows, tokenizer, "toaster").tolist() == [2, -1, -1, 1, -1, -1]
    both = find_word(jnp.array(rows), tokenizer, ["carer", "toaster"])
    assert both.tolist() == [2, 2, -1, 1, -1, -1]
    assert WordFinder(tokenizer, "toaster")(rows)[:2].tolist() == [[2, 4], [-1, -1]]
    assert find_word(rows, tokenizer, "toaster", "first-token").tolist() == [2, 1, 0, 1, 3, 0]
    assert find_word(np.zeros((0, 4), int), tokenizer, "toaster").shape == (0,)
    assert find_word(np.zeros((2, 0), int), tokenizer, "toaster").tolist() == [-1, -1]


def test_ids_without_text_end_a_word():
    tokenizer = sentencepiece("▁dog", "s")
    dog, s = tokenizer.convert_tokens_to_ids(["▁dog", "s"])
    rows = [[dog, s], [dog, -1], [dog, len(tokenizer) + 7]]
    assert find_word(rows, tokenizer, "dog").tolist() == [-1, 0, 0]


@pytest.mark.parametrize(
    ("text", "word", "there"),
    [
        ("the dog's bowl", "dog", True),
        ("a hot-dog", "dog", True),
        ("two dogs", "dog", False),
        ("hotdog", "dog", False),
        ("Dog", "dog", True),
        ("dog", "Dog", False),
        ("a TV set", "TV", True),
        ("a T-shirt", "TV", False),
        ("a tv set", "TV", False),
        ("hot dogs", "hot dog", False),
        ("one hot dog.", "hot dog", True),
        ("don't", "don't", True),
        ("30 cats", "3", False),
        ("costs 3.5 or 3,000", "3", False),
        ("it is 3.", "3", True),
        ("naïve", "na", False),
        ("一只狗在跑", "狗", True),
        ("一只dog在跑", "dog", True),
        ("the café", "café", True),
        ("🐕dog🐕", "dog", True),
    ],
)
def test_boundaries_do_not_depend_on_the_vocabulary(tokenizer, text, word, there):
    ids = encode(tokenizer, text)
    if tokenizer.unk_token_id in ids:
        pytest.skip("the vocabulary has no piece for a letter")
    start, stop = WordFinder(tokenizer, word)(ids)[0]
    assert (start >= 0) == there
    if there:
        form = word if word in text else word.capitalize()
        before, _ = before_and_in(tokenizer, ids[0], start)
        assert len(before) <= text.index(form)
        assert form in decode(tokenizer, ids[0, start:stop])
        assert form not in decode(tokenizer, ids[0, start + 1 : stop])


def test_ids_outside_a_vocabulary_have_no_text(tokenizer):
    dog = tokenizer.encode("a dog", add_special_tokens=False)
    row = [2**31 - 1, -5, *dog, len(tokenizer) + 5000]
    assert find_word([row], tokenizer, "dog").tolist() == [1 + len(dog)]


# Real vocabularies.


@pytest.mark.parametrize(
    ("name", "text", "word", "position", "first_token"),
    [
        ("llama2", "next to a toaster", "toaster", 3, 1),
        ("llama2", "a car and a carrot", "carrot", 4, 1),
        ("llama2", "in a T-shirt", "TV", -1, 2),
        ("llama2", "30 cats and 3 dogs", "3", 7, 1),  # "▁", "3", "0", ... "▁", "3"
        ("qwen2", "30 cats and 3 dogs", "3", 5, 0),
        ("qwen2", "snow on a snowboard", "snowboard", 3, 0),
        ("qwen2", "An Anxious dog", "anxious", 1, 0),
        ("tekken", "next to a toaster", "toaster", 3, 1),
        ("tekken", "a car and a carrot", "carrot", 4, 1),
        ("mistral", "next to a toaster", "toaster", 3, 1),
        ("mistral", "a car and a carrot", "carrot", 4, 1),
    ],
)
def test_words_whose_first_token_begins_others(name, text, word, position, first_token):
    tokenizer = load(name)
    ids = encode(tokenizer, text)
    assert find_word(ids, tokenizer, word).tolist() == [position]
    assert find_word(ids, tokenizer, word, "first-token").tolist() == [first_token]


@pytest.mark.parametrize("words", [COLOURS, PLACES, SENTIMENTS])
def test_every_word_of_a_class_and_no_piece_of_one(tokenizer, words):
    """As given, capitalised, in brackets, after a line break and at the end of the text."""
    texts = [
        form.format(word, word.capitalize())
        for word in words
        for form in ("an {0} thing", "{1}.", "it ({0})", "it\n\n{1}", "it is {0}")
    ]
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    finder = WordFinder(tokenizer, words)
    for text, row in zip(texts, rows, strict=True):
        start, stop = finder([row])[0]
        said = decode(tokenizer, row[start:stop]).strip(" .(\n)").lower()
        assert said in words and said in text.lower()
    # All first tokens of the class, none of which is a word of it by itself.
    stray = spellings(tokenizer, words).values()
    alone = [i for i in stray if finder([[i]])[0, 0] < 0]
    assert alone
    end = tokenizer.eos_token_id
    assert finder([[x for i in alone for x in (i, end)]]).tolist() == [[-1, -1]]


def test_combining_accents_equal_composed_characters(tokenizer):
    """Some tokenizers compose characters, others do not."""
    for text in ("a caf\u00e9s caf\u00e9 t", "a cafe\u0301s cafe\u0301 t"):
        ids = encode(tokenizer, text)
        places = {int(find_word(ids, tokenizer, w)[0]) for w in ("caf\u00e9", "cafe\u0301")}
        assert len(places) == 1
        before, within = before_and_in(tokenizer, ids[0], places.pop())
        assert before.rstrip().endswith("s") and within.split()[-1].startswith("c")


PARTS = ["dog", "Dog", "do", "g", "s", "car", "carrot", "TV", "é", "🐕", "3", " ", "  ", "\n", "-"]
PARTS += ["'", "(", ".", "_", "—", "hot dog", "toaster", "to"]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=12), word=st.sampled_from(PARTS))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", [*REAL, "tekken"])
def test_it_agrees_with_a_pattern_over_the_decoded_text(name, parts, word):
    tokenizer = load(name)
    if not re.fullmatch(r"[a-zA-Z]+", word):
        word = "dog"
    ids = encode(tokenizer, "".join(parts))
    text = decode(tokenizer, ids[0])
    forms = f"{word}|{word[0].upper()}{word[1:]}"
    found = re.search(rf"(?<!\w)(?:{forms})(?!\w)", text)
    position = find_word(ids, tokenizer, word)[0]
    assert (position >= 0) == (found is not None)
    if found:
        before, within = before_and_in(tokenizer, ids[0], position)
        assert len(before) <= found.start() < len(within)


def test_the_bytes_of_tokens_join_to_the_text(tokenizer):
    text = " a (dog)\n\nnaïve 狗🐕 30 is 'x'"
    ids = encode(tokenizer, text)[0].tolist()
    known = token_bytes(tokenizer, ids)
    assert b"".join(known[i] for i in ids).decode().strip() == text.strip()
    end = tokenizer.eos_token_id
    assert token_bytes(tokenizer, [end, -1]) == {end: b"\0", -1: b"\0"}


# Errors.


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("tokens", "words", "match", "message"),
    [
        ([[1, 2]], [], "word", r"expected one or more words to find, got \(\)"),
        ([[1, 2]], ["dog", " "], "word", "expected one or more words to find"),
        ([[1, 2]], "dog", "token", "match must be one of word, first-token; got 'token'"),
        ([1, 2], "dog", "word", r"tokens are int64\[2\]; expected int\[B, M\]"),
        ([[0.5]], "dog", "word", r"tokens are float64\[1, 1\]; expected int\[B, M\]"),
    ],
)
def test_what_is_wrong_is_one_line(tokens, words, match, message):
    with pytest.raises(ValueError, match=message):
        find_word(tokens, sentencepiece("▁dog"), words, match)


def test_the_word_is_named():
    tokenizer = sentencepiece("▁dog", "▁Dog")
    assert str(WordFinder(tokenizer, "dog")) == "the words 'dog', 'Dog'"
    assert str(WordFinder(tokenizer, list("abcdefgh"))).endswith("'e', 'f' and 10 more")
    first = WordFinder(tokenizer, "dog", "first-token")
    assert str(first) == "the tokens '▁dog' (3), '▁Dog' (4)"


# The rule of XL-VLMs.


def test_spellings_of_a_sentencepiece_tokenizer():
    tokenizer = sentencepiece("▁dog", "▁Dog")
    # " dog" becomes "▁", "▁dog": the bare marker, which begins every word, is passed over
    assert tokenizer.tokenize(" dog") == ["▁", "▁dog"]
    assert list(spellings(tokenizer, "dog")) == ["▁dog", "▁Dog"]


def test_spellings_of_a_word_whose_marker_stands_alone():
    tokenizer = sentencepiece("▁dog")
    assert tokenizer.tokenize("3") == ["▁", "3"]
    assert list(spellings(tokenizer, "3")) == ["3"]


def test_spellings_leave_out_unknown_tokens():
    tokenizer = sentencepiece("▁dog")
    assert spellings(tokenizer, "éø") == {}


def test_spellings_of_a_byte_level_tokenizer():
    tokenizer = byte_level(" dog", "dog", "Dog")
    found = spellings(tokenizer, "dog")
    assert list(found) == ["dog", "Dog", "Ġdog"]
    assert list(found.values()) == tokenizer.convert_tokens_to_ids(["dog", "Dog", "Ġdog"])


def test_spellings_take_the_first_sub_token():
    tokenizer = byte_level(" tur", "tur")
    assert list(spellings(tokenizer, "turquoise")) == ["tur", "T", "Ġtur"]


def test_spellings_of_a_class_are_those_of_its_words():
    tokenizer = sentencepiece("▁red", "▁blue")
    expected = spellings(tokenizer, "red") | spellings(tokenizer, "blue")
    assert spellings(tokenizer, ["red", "blue"]) == expected


def test_spellings_of_qwen2():
    tokenizer = load("qwen2")
    found = spellings(tokenizer, "dog")
    assert list(found) == ["dog", "Dog", "Ġdog"]
    assert [tokenizer.decode([i]) for i in found.values()] == ["dog", "Dog", " dog"]
    assert all(tokenizer.decode([i]).strip() for i in spellings(tokenizer, COLOURS).values())
