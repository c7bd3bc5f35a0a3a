"""Finds where tokens spell a word: `find_word`, on the host.

The texts of a row's tokens are joined, words are looked for in the joined text, and each match is
mapped back to its tokens. It makes no difference whether a vocabulary splits a word into pieces,
joins it to the preceding space or bracket, or writes its letters byte by byte.

B batch, M tokens.
"""

import bisect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from xlvlm_jax.data.words import word_pattern

MATCHES = ("word", "first-token")
Tokens = Int[Any, "B M"] | Sequence[Sequence[int]]


def find_word(
    tokens: Tokens,
    tokenizer: Any,
    words: str | Iterable[str],
    match: str = "word",
) -> Int[np.ndarray, " B"]:
    """Returns the first position of each row from which the tokens spell one of the words.

    Runs on the host and cannot be traced.

        find_word(answer.tokens, vlm.tokenizer, "toaster")    # not "next to a table"
        find_word(answer.tokens, vlm.tokenizer, ["hot dog", "TV", "tv"])

    A word matches as written and with a capital first letter, up to a word boundary (see
    `data.words.word_pattern`): pass other capitalisations, and plurals, as further words. The
    position is that of the token that contains the word's first letter: in "▁", "3" the second, in
    " (", "dog" too, and in " (dog" the only one. Special tokens, ids below 0 and ids outside the
    vocabulary have no text and end a word, and so does the end of the row.

    Args:
        tokens: int[B, M], token ids, on the host or a device, or lists of them.
        tokenizer: a Hugging Face tokenizer.
        words: a word or several; a word may contain spaces.
        match: "word"; or "first-token", the rule of XL-VLMs: the first token that is the first one
            of a word's spellings (see `spellings`), whatever follows.

    Returns:
        int32[B]; -1 for a row that spells none of the words.

    Raises:
        ValueError: there are no words, the rule is unknown, or tokens are not int[B, M].

    Examples:
        >>> import ports, xlvlm_jax
        >>> tokenizer = ports.load_abstract("embedded").tokenizer
        >>> tokens = [tokenizer.encode("a small dog", add_special_tokens=False)]
        >>> tokenizer.decode(tokens[0][xlvlm_jax.find_word(tokens, tokenizer, "dog")[0]]).strip()
        'dog'
    """
    return WordFinder(tokenizer, words, match)(tokens)[:, 0]


class WordFinder:
    """Finds words in one batch after another like `find_word`; caches the texts of tokens.

    `finder(tokens int[B, M])` returns int32[B, 2], the position of the word's first token and the
    position after its last token; -1, -1 for a row that spells none.

    Raises:
        ValueError: there are no words, `match` is unknown, or tokens are not integers [B, M].
    """

    def __init__(self, tokenizer: Any, words: str | Iterable[str], match: str = "word"):
        words = (words,) if isinstance(words, str) else tuple(words)
        if not words or not all(word.strip() for word in words):
            raise ValueError(f"expected one or more words to find, got {words!r:.80}")
        if match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}; got {match!r}")
        self._tokenizer, self.match = tokenizer, match
        self._first_tokens = spellings(tokenizer, words) if match == "first-token" else {}
        # not str.capitalize, which would lower the rest of "TV" and of "New York"
        capital = (word[:1].upper() + word[1:] for word in words)
        self._forms = tuple(dict.fromkeys((*words, *capital)))
        self._pattern = word_pattern(self._forms)
        self._bytes: dict[int, bytes] = {}

    def __call__(self, tokens: Tokens) -> Int[np.ndarray, "B 2"]:
        """Returns the positions of the words in tokens int[B, M]."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens are {tokens.dtype}{list(tokens.shape)}; expected int[B, M]")
        if self.match == "first-token":
            hit = np.isin(tokens, list(self._first_tokens.values()))
            start = (np.cumsum(hit, axis=1) == 0).sum(axis=1)[:, None]
            span = np.concatenate([start, start + 1], axis=1, dtype=np.int32)
            return np.where(start < tokens.shape[1], span, np.int32(-1))
        new = set(np.unique(tokens).tolist()) - self._bytes.keys()
        self._bytes |= token_bytes(self._tokenizer, sorted(new))
        spans = [self._find(row) for row in tokens.tolist()]
        return np.array(spans, np.int32).reshape(-1, 2)

    def __str__(self) -> str:
        """Returns what is looked for, for messages."""
        if self.match == "first-token":
            ids = (f"{name!r} ({token})" for name, token in self._first_tokens.items())
            return f"the tokens {_some(ids)}"
        return f"the words {_some(map(repr, self._forms))}"

    def _find(self, row: list[int]) -> tuple[int, int]:
        pieces = [self._bytes[token] for token in row]
        # A byte that is not part of a character becomes a surrogate, and later that byte again.
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        found = self._pattern.search(text)
        if found is None:
            return -1, -1
        ends = list(itertools.accumulate(map(len, pieces)))
        start, stop = (len(text[:i].encode("utf-8", "surrogateescape")) for i in found.span())
        return bisect.bisect_right(ends, start), bisect.bisect_left(ends, stop) + 1


def _some(names: Iterable[str], count: int = 6) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


_NO_TEXT = b"\0"  # a character that no word contains


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> dict[int, bytes]:
    """Returns the bytes of text that each token adds to the ones before it, {id: UTF-8}.

    Tokens without text, including special tokens, get a zero byte.
    """
    special = _special_ids(tokenizer)
    texts = dict.fromkeys(ids, _NO_TEXT)
    plain = [i for i in ids if i >= 0 and i not in special]
    # After another token, since decoders drop the space at the start of a text.
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = _decode(tokenizer, before)
    for i in plain:
        try:
            text = _decode(tokenizer, [*before, i]).removeprefix(start)
        except (LookupError, OverflowError):  # mistral-common: id is not in the vocabulary
            continue
        if "\ufffd" in text:  # bytes of a character that other tokens complete
            texts[i] = _part_of_character(tokenizer, i) or text.encode()
        elif text:
            texts[i] = text.encode()
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # unless special tokens are skipped, mistral-common returns SentencePiece's pieces
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: Any) -> set[int]:
    special = {*tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if isinstance(added, Mapping):  # in mistral-common this is a method
        special |= {i for i, token in added.items() if token.special}
    return special


# The characters that byte-level vocabularies use for bytes: printable bytes stand for themselves,
# the others are numbered from "Ā".
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in _VISIBLE)
}


def _part_of_character(tokenizer: Any, token: int) -> bytes | None:
    """Returns the bytes that a token's name in the vocabulary represents: "<0xE7>", or "çĭ"."""
    name = tokenizer.convert_ids_to_tokens(token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    tekken = getattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer", None)
    # mistral-common gives all such tokens the same name
    return None if tekken is None else tekken.tokenizer.id_to_byte_piece(token)


def end_tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Returns the first tokens of a text by itself and, for punctuation, behind a letter.

    SentencePiece puts a space before a text, so that "." is "▁." or "▁", "." by itself, and "." in
    an answer. A piece of only white space is skipped, as it precedes most words.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the text, such as "." or "</s>".
    """
    special = {*tokenizer.all_special_ids}
    forms = [tokenizer.encode(text, add_special_tokens=False)]
    if not text[:1].isalnum():  # a word behind a letter would be cut elsewhere
        letter, both = (tokenizer.encode(t, add_special_tokens=False) for t in ("a", f"a{text}"))
        # Where the letter and the text share a token, the text has none of its own.
        forms += [both[len(letter) :]] if both[: len(letter)] == letter else []
    firsts = (
        next((i for i in ids if i in special or _decode(tokenizer, [i]).strip()), None)
        for ids in forms
    )
    # The unknown token stands for other texts too, unless it is asked for itself.
    unknown = None if text == tokenizer.unk_token else tokenizer.unk_token_id
    return tuple(dict.fromkeys(i for i in firsts if i is not None and i != unknown))


def spellings(tokenizer: Any, words: str | Iterable[str]) -> dict[str, int]:
    """Returns the tokens that can start the words, {token as written in the vocabulary: its id}.

    Each word is looked up as word, Word and " word", and the first sub-token of each counts. A
    sub-token of only white space is skipped (it starts every word), and a spelling that starts with
    a special or unknown token is ignored.

    Args:
        tokenizer: a Hugging Face tokenizer.
        words: one word, or the words of a class.
    """
    special = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
    found = {}
    for word in [words] if isinstance(words, str) else words:
        for spelling in dict.fromkeys([word, word.capitalize(), f" {word}"]):
            ids = tokenizer.encode(spelling, add_special_tokens=False)
            first = next((i for i in ids if i in special or _decode(tokenizer, [i]).strip()), None)
            if first is not None and first not in special:
                found[tokenizer.convert_ids_to_tokens(first)] = first
    return found
