"""Token selections as a user names them: by words, classes of words, or places in the sequence.

The words become the ids of their first sub-tokens here; the selections themselves are the pure
functions of `xlvlm_jax.tokens`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool

from xlvlm_jax import tokens
from xlvlm_jax.words import class_words


def spellings(tokenizer: Any, words: str | Iterable[str]) -> dict[str, int]:
    """The tokens by which a word begins: {token as the vocabulary writes it: its id}.

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
            first = next((i for i in ids if i in special or tokenizer.decode([i]).strip()), None)
            if first is not None and first not in special:
                found[tokenizer.convert_ids_to_tokens(first)] = first
    return found


def not_found(word: str, tokens: Mapping[str, int], num_samples: int) -> str:
    """The message for when no sample predicted `word`, which was looked for as `tokens`."""
    names = ", ".join(repr(token) for token in tokens)
    ids = ", ".join(str(i) for i in tokens.values())
    return (
        f"no sample of {num_samples} predicted {word!r}; looked for the tokens {names} (ids {ids});"
        " take more samples, or a word that the model's answers hold"
    )


_DEFAULT_HOW = {
    "all": "mean",
    "index": "first",
    "range": "mean",
    "token-of-interest": "first",
    "class": "first",
    "before-special-tokens": "mean",
}
MODES = tuple(_DEFAULT_HOW)


@dataclass(frozen=True)
class Selection:
    """A token selection and how its positions make rows; hashable, so static under `jax.jit`.

    Selection("token-of-interest", "dog")    Selection("index", "-1")    Selection("all")
    Selection("class", "colours")            Selection("range", "3:7")
    Selection("before-special-tokens")

    Attributes:
        mode: one of MODES.
        argument: the word, the class (or words separated by commas), the index or the range.
        generated_only: by default True for the two modes that look for tokens.
        how: one of tokens.HOWS; by default "mean" for all, range and before-special-tokens.

    Raises ValueError for an unknown mode and an argument that does not fit it.
    """

    mode: str
    argument: str = ""
    generated_only: bool | None = None
    how: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                f"token selection must be one of {', '.join(MODES)}; got {self.mode!r}"
            )
        fill = object.__setattr__  # the way to set a default in a frozen dataclass
        fill(self, "argument", str(self.argument))
        if self.how is None:
            fill(self, "how", _DEFAULT_HOW[self.mode])
        if self.generated_only is None:
            modes = ("token-of-interest", "class", "before-special-tokens")
            fill(self, "generated_only", self.mode in modes)
        if self.how not in tokens.HOWS:
            raise ValueError(f"rows must be one of {', '.join(tokens.HOWS)}; got {self.how!r}")
        if self.mode == "index":
            self._index()
        elif self.mode == "range":
            self._range()
        elif self.mode == "class":
            class_words(self.argument)
        elif self.mode == "token-of-interest" and not self.argument.strip():
            raise ValueError("token-of-interest needs a word, got none; e.g. token-of-interest:dog")
        elif self.mode in ("all", "before-special-tokens") and self.argument:
            raise ValueError(f"{self.mode} takes no argument, got {self.argument!r}")
        if self.mode == "before-special-tokens" and not self.generated_only:
            raise ValueError("before-special-tokens selects in the generated part only")

    @classmethod
    def parse(cls, text: str, **options: Any) -> "Selection":
        """From "mode" or "mode:argument": "all", "index:-1", "range:3:7", "class:colours"."""
        mode, _, argument = text.partition(":")
        return cls(mode.strip(), argument.strip(), **options)

    def __str__(self) -> str:
        return f"{self.mode}:{self.argument}" if self.argument else self.mode

    def _index(self) -> int:
        try:
            return int(self.argument)
        except ValueError:
            raise ValueError(
                f"index needs a whole number, got {self.argument!r}; e.g. index:-1"
            ) from None

    def _range(self) -> tuple[int | None, int | None]:
        try:
            start, stop = (int(x) if x.strip() else None for x in self.argument.split(":"))
        except ValueError:
            raise ValueError(f"range needs start:stop, got {self.argument!r}; e.g. 3:7") from None
        return start, stop

    def spellings(self, tokenizer: Any) -> dict[str, int]:
        """The tokens to look for, {token: id}; empty for the modes that look for none.

        Raises ValueError when the tokenizer has no token of its own for any spelling.
        """
        if self.mode not in ("token-of-interest", "class"):
            return {}
        words = (self.argument,) if self.mode == "token-of-interest" else class_words(self.argument)
        found = spellings(tokenizer, words)
        if not found:
            raise ValueError(
                f"the tokenizer knows no token for {self.argument!r}; use another word"
            )
        return found

    def keep(
        self, positions: tokens.Positions, *, token_ids: tokens.Ids = (), end_ids: tokens.Ids = ()
    ) -> Bool[tokens.AnyArray, "B P"]:
        """Which positions are selected; `token_ids` are the values of `spellings`."""
        only = self.generated_only
        if self.mode == "all":
            return tokens.everything(positions, generated_only=only)
        if self.mode == "index":
            return tokens.index(positions, self._index(), generated_only=only)
        if self.mode == "range":
            return tokens.interval(positions, *self._range(), generated_only=only)
        if self.mode == "before-special-tokens":
            return tokens.before_special_tokens(positions, end_ids)
        return tokens.token_of_interest(positions, token_ids, generated_only=only)

    def rows(
        self,
        states: Any,
        positions: tokens.Positions,
        *,
        token_ids: tokens.Ids = (),
        end_ids: tokens.Ids = (),
    ) -> tokens.Rows:
        """The rows of a batch: `states` an array [B, P, D] or a tree of them."""
        keep = self.keep(positions, token_ids=token_ids, end_ids=end_ids)
        return tokens.reduce(states, positions, keep, self.how, max_rows=self._max_rows())

    def rows_at_most(self, positions: int) -> int:
        """How many rows a sample of that many positions gives at most."""
        if self.how != "each":
            return 1
        bound = self._max_rows()
        return positions if bound is None else min(bound, positions)

    def _max_rows(self) -> int | None:
        """What no sample has more kept positions than; None when only its length bounds them."""
        if self.mode != "range":
            return None
        start, stop = self._range()
        start = start or 0
        if stop is None:
            return -start if start < 0 else None
        return max(stop - start, 1) if (start < 0) == (stop < 0) else None
