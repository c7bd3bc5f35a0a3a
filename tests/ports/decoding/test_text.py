"""`decode_tokens`: by hand, against transformers, what is left out, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from ports.decoding.text import decode_tokens

from ... import small_tokenizers

DOG = small_tokenizers.byte_level("dog", " cat")
END, BANG = DOG.eos_token_id, DOG.convert_tokens_to_ids("!")
WORDS = DOG("dog cat")["input_ids"]


def decode(tokens, end=(END,), pad=END):
    return decode_tokens(DOG, tokens, len(DOG), end, pad)


def test_one_row_is_one_text_and_several_are_a_list():
    assert len(WORDS) == 2
    assert decode(WORDS) == "dog cat"
    assert decode([WORDS]) == ["dog cat"]
    assert decode([[*WORDS, END], [WORDS[0], END, END]]) == ["dog cat", "dog"]
    assert decode([]) == "" and decode([[], []]) == ["", ""]


@pytest.mark.parametrize("library", ["numpy", "jax.numpy", "torch"])
def test_arrays_of_any_library(library):
    rows = [[*WORDS, END], [WORDS[0], END, END]]
    asarray = pytest.importorskip(library).asarray
    assert decode(asarray(rows)) == ["dog cat", "dog"]
    assert decode(asarray(rows[0])) == "dog cat"


class TestPaddingWithAnOrdinaryToken:
    """Without a pad token, rows are padded with a token that is text elsewhere."""

    def test_goes_after_the_end_and_stays_before_it(self):
        assert decode([*WORDS, BANG, END, BANG, BANG], pad=BANG) == "dog cat!"

    def test_is_text_in_a_row_that_did_not_end(self):
        assert decode([*WORDS, BANG, BANG], pad=BANG) == "dog cat!!"
        assert decode([BANG, BANG], pad=BANG) == "!!"

    def test_an_end_that_is_text_is_kept_once(self):
        assert decode([*WORDS, BANG, BANG, BANG], end=(BANG,), pad=BANG) == "dog cat!"


@pytest.mark.parametrize("seed", range(3))
def test_filling_a_row_up_never_changes_its_text(seed):
    draw = np.random.default_rng(seed)
    row = draw.integers(0, END, 12).tolist()
    for end, pad in (((END,), END), ((END,), BANG), ((END, BANG), BANG)):
        for count in range(4):
            assert decode([*row, END, *[pad] * count], end, pad) == decode([*row, END], end, pad)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "llama2"])
def test_is_what_transformers_says(kind, request):
    if kind == "llama2":
        directory = request.getfixturevalue("shared") / "tokenizers" / "llama2"
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    else:
        tokenizer = DOG if kind == "byte level" else small_tokenizers.sentencepiece("▁dog", "s")
    size, end = len(tokenizer), tokenizer.eos_token_id
    tokens = np.random.default_rng(0).integers(0, size, (3, 50))
    tokens[1, 20:] = end
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert decode_tokens(tokenizer, jnp.asarray(tokens), size, (end,), end) == expected
    for row in tokens:
        alone = decode_tokens(tokenizer, row, size, (end,), end)
        assert alone == tokenizer.decode(row, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0.5], r"tokens have dtype float64; expected token ids, integers of shape \[T\] or"),
        ([[True]], "tokens have dtype bool"),
        (5, r"tokens have shape \(\); expected"),
        (np.zeros((1, 2, 3), int), r"tokens have shape \(1, 2, 3\)"),
        ([[1], [1, 2]], r"tokens are not an array \(.*inhomogeneous"),
        ([[1, 2], [-100, 3]], r"token id -100 at \[1, 0\] does not exist; expected ids from 0 to"),
        ([1, 10**6], r"token id 1000000 at \[1\] does not exist"),
    ],
)
def test_invalid_token_ids(tokens, message):
    with pytest.raises(ValueError, match=message) as caught:
        decode(tokens)
    assert "\n" not in str(caught.value)


def test_traced_tokens():
    with pytest.raises(ValueError, match="tokens are traced"):
        jax.jit(decode)(jnp.array(WORDS))
