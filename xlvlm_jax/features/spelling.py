"""Where tokens spell a word: `find_word`, on the host.

The texts of a row's tokens are joined and words are looked for in the whole; a place in the text is
then counted back to its token. That a vocabulary cuts a word into pieces, joins it to the space or
the bracket before it, or writes its letters byte by byte makes no difference.

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


def find_word(
    tokens: Int[Any, "B M"],
    tokenizer: Any,
    words: str | Iterable[str],
    match: str = "word",
) -> Int[np.ndarray, " B"]:
    """Returns the first position of each row from which the tokens spell one of the words.

    Runs on the host: it does not trace.

        find_word(answer.tokens, vlm.tokenizer, "toaster")    # not "next to a table"
        find_word(answer.tokens, vlm.tokenizer, ["hot dog", "TV", "tv"])

    A word is looked for as it is written and with a capital first letter, up to a word boundary
    (see `data.words.word_pattern`): give other capitals, and plurals, as further words. The
    position is that of the token that holds the word's first letter: of "▁", "3" the second, of
    " (", "dog" too, and of " (dog" the one. Special tokens, ids below 0 and ids outside the
    vocabulary have no text and end a word, and so does the end of the row.

    Args:
        tokens: int[B, M], token ids, on the host or a device.
        tokenizer: a Hugging Face tokenizer.
        words: a word or several, spaces within them allowed.
        match: "word"; or "first-token", the rule of XL-VLMs: the first token that is the first one
            of a word's spellings (see `spellings`), whatever follows.

    Returns:
        int32[B]; -1 where a row spells none of the words.

    Raises:
        ValueError: no words, an unknown rule, or tokens that are not int[B, M].
    """
    return WordFinder(tokenizer, words, match)(tokens)[:, 0]


class WordFinder:
    """Finds words in batch after batch as `find_word` does; keeps the texts of tokens that it met.

    `finder(tokens int[B, M])` returns int32[B, 2], the position of the first token of the word and
    of the one after its last; -1, -1 where a row spells none.
    """

    def __init__(self, tokenizer: Any, words: str | Iterable[str], match: str = "word"):
        words = (words,) if isinstance(words, str) else tuple(words)
        if not words or not all(word.strip() for word in words):
            raise ValueError(f"expected a word or several to find, got {words!r:.80}")
        if match not in MATCHES:
            raise ValueError(f"match must be one of {', '.join(MATCHES)}; got {match!r}")
        self._tokenizer, self.match = tokenizer, match
        self._first_tokens = spellings(tokenizer, words) if match == "first-token" else {}
        # not str.capitalize, which would lower the rest of "TV" and of "New York"
        capital = (word[:1].upper() + word[1:] for word in words)
        self._forms = tuple(dict.fromkeys((*words, *capital)))
        self._pattern = word_pattern(self._forms)
        self._bytes: dict[int, bytes] = {}

    def __call__(self, tokens: Int[Any, "B M"]) -> Int[np.ndarray, "B 2"]:
        """The places of the words in tokens int[B, M]."""
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
        """What is looked for, as a message says it."""
        if self.match == "first-token":
            ids = (f"{name!r} ({token})" for name, token in self._first_tokens.items())
            return f"the tokens {_some(ids)}"
        return f"the words {_some(map(repr, self._forms))}"

    def _find(self, row: list[int]) -> tuple[int, int]:
        pieces = [self._bytes[token] for token in row]
        # A byte that is part of no character becomes a character of its own, and that byte again.
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


_NO_TEXT = b"\0"  # a character of no word


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> dict[int, bytes]:
    """Returns the bytes of text that each token adds to the ones before it, {id: UTF-8}.

    Tokens without text, special ones among them, have a zero byte.
    """
    special = _special_ids(tokenizer)
    texts = dict.fromkeys(ids, _NO_TEXT)
    plain = [i for i in ids if i >= 0 and i not in special]
    # Behind another token, since decoders drop the space that a text would begin with.
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = _decode(tokenizer, before)
    for i in plain:
        try:
            text = _decode(tokenizer, [*before, i]).removeprefix(start)
        except (LookupError, OverflowError):  # mistral-common's: no id of its vocabulary
            continue
        if "\ufffd" in text:  # bytes of a character that others complete
            texts[i] = _part_of_character(tokenizer, i) or text.encode()
        elif text:
            texts[i] = text.encode()
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # mistral-common gives SentencePiece's pieces in place of text unless special ones are skipped
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _special_ids(tokenizer: Any) -> set[int]:
    special = {*tokenizer.all_special_ids}
    added = getattr(tokenizer, "added_tokens_decoder", None)
    if isinstance(added, Mapping):  # mistral-common's has none, and a method of that name
        special |= {i for i, token in added.items() if token.special}
    return special


# The characters by which byte-level vocabularies write bytes: themselves where they can be seen,
# the others in order from "Ā" on.
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in _VISIBLE)
}


def _part_of_character(tokenizer: Any, token: int) -> bytes | None:
    """The bytes that the vocabulary's name of a token stands for: "<0xE7>", or "çĭ"."""
    name = tokenizer.convert_ids_to_tokens(token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return bytes.fromhex(name[3:5])
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    tekken = getattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer", None)
    # mistral-common's, which names all such tokens alike
    return None if tekken is None else tekken.tokenizer.id_to_byte_piece(token)


def spellings(tokenizer: Any, words: str | Iterable[str]) -> dict[str, int]:
    """Returns the tokens by which words begin: {token as the vocabulary writes it: its id}.

    Each word is looked up as word, Word and " word", and the first sub-token of each counts. A
    sub-token that is white space alone is passed over (it begins every word), and a spelling that
    begins with a special or unknown token is left out. `words` is one word or the words of a class;
    `tokenizer` a Hugging Face one.
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
