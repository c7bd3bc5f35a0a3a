from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xlvlm_jax import tokens
from xlvlm_jax.selection import MODES, Selection, not_found, spellings
from xlvlm_jax.words import COLOURS

QWEN2 = Path(__file__).parents[2] / "shared" / "molmo" / "tokenizer"


def sentencepiece(*pieces):
    """A unigram tokenizer whose words begin with "▁", as Llama's do."""
    letters = [(letter, -20.0) for letter in "abcdefghijklmnopqrstuvwxyz3DR"]
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -12.0)]
    model = models.Unigram([*vocabulary, *((piece, -1.0) for piece in pieces), *letters], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def byte_level(*words):
    """A byte-level BPE tokenizer with a merge for each of `words`, as GPT-2's and Qwen2's are."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in words:
        word = word.replace(" ", "Ġ")
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                merges.append((word[: end - 1], word[end - 1]))
                vocabulary[word[:end]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


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


@pytest.mark.skipif(not QWEN2.exists(), reason="the tokenizer of Qwen2 is not here")
def test_spellings_of_qwen2():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QWEN2)
    found = spellings(tokenizer, "dog")
    assert list(found) == ["dog", "Dog", "Ġdog"]
    assert [tokenizer.decode([i]) for i in found.values()] == ["dog", "Dog", " dog"]
    assert all(tokenizer.decode([i]).strip() for i in spellings(tokenizer, COLOURS).values())


def test_not_found_says_what_was_looked_for():
    assert not_found("dog", {"▁dog": 4, "▁Dog": 7}, 120).startswith(
        "no sample of 120 predicted 'dog'; looked for the tokens '▁dog', '▁Dog' (ids 4, 7);"
    )


def test_selection_fills_in_what_the_mode_means():
    word = Selection("token-of-interest", "dog")
    assert (word.generated_only, word.how) == (True, "first")
    everything = Selection("all")
    assert (everything.generated_only, everything.how) == (False, "mean")
    assert Selection("all", generated_only=True).generated_only


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
        ("class:fruit", "no word class 'fruit'; expected one of colours"),
        ("token-of-interest", "token-of-interest needs a word, got none"),
        ("all:3", "all takes no argument, got '3'"),
    ],
)
def test_selection_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        Selection.parse(text)


def test_a_word_that_the_tokenizer_lacks():
    with pytest.raises(ValueError, match="the tokenizer knows no token for 'éø'; use another word"):
        Selection("token-of-interest", "éø").spellings(sentencepiece("▁dog"))


PROMPT = np.array([[20, 21, 22], [0, 23, 24]])
MASK = np.array([[1, 1, 1], [0, 1, 1]])
ANSWER = np.array([[30, 50, 1], [51, 31, 32]])


@pytest.mark.parametrize(
    ("text", "how", "expected"),
    [
        ("all", "first", [[0], [6]]),
        ("index:-1", None, [[4], [9]]),
        ("range:0:2", "each", [[0, 1], [6, 7]]),
        ("range:-2:", "each", [[3, 4], [8, 9]]),
        ("range::-3", "each", [[0, 1], [6]]),
        ("token-of-interest:dog", None, [[3], []]),
        ("class:dog,cat", None, [[3], [7]]),
        ("before-special-tokens", None, [[2.5], [8]]),
    ],
)
def test_rows_of_each_mode(text, how, expected):
    selection = Selection.parse(text, how=how)
    words = {"token-of-interest:dog": [50], "class:dog,cat": [50, 51]}
    states = jnp.arange(10.0).reshape(2, 5, 1)
    positions = tokens.Positions.of_generation(PROMPT, MASK, ANSWER, end_ids=1)
    select = jax.jit(
        lambda selection, *args: selection.rows(*args, token_ids=words.get(text, ()), end_ids=1),
        static_argnums=0,
    )
    rows, sample, _, _ = select(selection, states, positions).flat()
    assert [rows[sample == i, 0].tolist() for i in range(2)] == expected
