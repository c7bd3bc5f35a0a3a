"""Token selections as users name them: by word, class of words, or position.

Words are found by `spelling`; the selections themselves are the pure functions of
`token_positions`.
"""

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Bool, Int

from xlvlm_jax.data.words import class_words
from xlvlm_jax.features import spelling, token_positions

_DEFAULT_HOW = {
    "all": "mean",
    "index": "first",
    "range": "mean",
    "token-of-interest": "first",
    "class": "first",
    "token-id": "first",
    "before-special-tokens": "mean",
    "image": "each",
}
MODES = tuple(_DEFAULT_HOW)
WORD_MODES = ("token-of-interest", "class")  # modes that look for words
SEARCHES = (*WORD_MODES, "token-id")


@dataclass(frozen=True)
class Selection:
    """A token selection and how its positions become rows; hashable, so static under `jax.jit`.

    Selection("token-of-interest", "dog")    Selection("index", "-1")    Selection("all")
    Selection("class", "colours")            Selection("range", "3:7")
    Selection("before-special-tokens")       Selection("before-special-tokens", ". </s>")
    Selection("token-id", "29871")           Selection("image")    Selection("image", "16")

    Attributes:
        mode: one of MODES.
        argument: the word, the class (or words separated by commas), the index, the range, the id
            of a token (or several, separated by commas), end tokens besides the model's own,
            separated by spaces, or the maximum number of image tokens per sample.
        generated_only: by default True for token-of-interest, class, token-id and
            before-special-tokens.
        how: one of token_positions.HOWS; by default "mean" for all, range and
            before-special-tokens, "each" for image, else "first". The positions of a word are those
            of its tokens: "first" is the one from which its first token was predicted.
        match: for the two modes that look for words, one of spelling.MATCHES: "word" (the default),
            the first place where the tokens spell the word; or "first-token", the rule of XL-VLMs,
            the first token that can start the word. None for the other modes.
        start: where the search for words or a token begins, counted among a sample's positions,
            prompt and answer together, or from their end if negative; None for the beginning.
        seed: for a number of image tokens, the seed of the choice; None for the other modes.

    Raises:
        ValueError: the mode is unknown, or the argument does not fit it.

    Examples:
        >>> import xlvlm_jax
        >>> xlvlm_jax.Selection.parse("token-of-interest:dog").how
        'first'
    """

    mode: str
    argument: str = ""
    generated_only: bool | None = None
    how: str | None = None
    match: str | None = None
    start: int | None = None
    seed: int | None = None

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
            fill(self, "generated_only", self.mode in (*SEARCHES, "before-special-tokens"))
        if self.match is None and self.mode in WORD_MODES:
            fill(self, "match", "word")
        if self.how not in token_positions.HOWS:
            raise ValueError(
                f"rows must be one of {', '.join(token_positions.HOWS)}; got {self.how!r}"
            )
        if self.match not in (spelling.MATCHES if self.mode in WORD_MODES else (None,)):
            raise ValueError(
                f"match must be one of {', '.join(spelling.MATCHES)}, and only for "
                f"{' or '.join(WORD_MODES)}; got {self.match!r} for {self.mode}"
            )
        if self.start is not None and self.mode not in SEARCHES:
            raise ValueError(
                f"start is {self.start} for {self.mode}; only a search for words or a token has one"
            )
        if self.mode == "index":
            self._index()
        elif self.mode == "token-id":
            self._token_ids()
        elif self.mode == "range":
            self._range()
        elif self.mode == "class":
            if not class_words(self.argument):
                raise ValueError(
                    f"class needs a class or words, got {self.argument!r}; e.g. class:cup, mug"
                )
        elif self.mode == "token-of-interest" and not self.argument.strip():
            raise ValueError("token-of-interest needs a word, got none; e.g. token-of-interest:dog")
        elif self.mode == "image":
            if self.generated_only:
                raise ValueError(
                    "image tokens are in the prompt; set generated_only to False, got True"
                )
            if self.at_most is not None and self.seed is None:
                fill(self, "seed", 0)
        elif self.mode == "all" and self.argument:
            raise ValueError(f"{self.mode} takes no argument, got {self.argument!r}")
        if self.seed is not None and self.at_most is None:
            raise ValueError(
                f"seed is {self.seed} for {self}; only a number of image tokens has one, such as "
                "image:16"
            )
        if self.mode == "before-special-tokens" and not self.generated_only:
            raise ValueError(
                "before-special-tokens only selects in the generated part; set generated_only to "
                "True"
            )

    @classmethod
    def parse(cls, text: str, **options: Any) -> "Selection":
        """Parses "mode" or "mode:argument": "all", "index:-1", "range:3:7", "class:colours"."""
        mode, _, argument = text.partition(":")
        return cls(mode.strip(), argument.strip(), **options)

    def __str__(self) -> str:
        return f"{self.mode}:{self.argument}" if self.argument else self.mode

    @property
    def at_most(self) -> int | None:
        """The maximum number of image tokens per sample; None for all, and in other modes.

        Raises:
            ValueError: it is not a number above 0.
        """
        if self.mode != "image" or not self.argument:
            return None
        if not self.argument.isdecimal() or not int(self.argument):
            raise ValueError(
                f"image takes a number of tokens per sample, got {self.argument!r}; e.g. image:16"
            )
        return int(self.argument)

    @property
    def has_cells(self) -> bool:
        """Whether each row is one image token, which lies in one cell of its picture."""
        return self.mode == "image" and self.how != "mean"

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

    def _token_ids(self) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in self.argument.split(","))
        except ValueError:
            raise ValueError(
                f"token-id needs whole numbers, got {self.argument!r}; e.g. token-id:29871"
            ) from None

    def describe(self) -> dict[str, Any]:
        """Returns JSON values for a manifest, omitting what does not apply to the mode."""
        known = asdict(self).items()
        return {k: v for k, v in known if v is not None or k not in ("match", "start", "seed")}

    def end_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Returns the ids of the end tokens that are given: of each the first token, as in XL-VLMs,
        and that behind a letter (see `spelling.end_tokens`).
        """
        if self.mode != "before-special-tokens":
            return ()
        found = (spelling.end_tokens(tokenizer, text) for text in self.argument.split())
        return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))

    @property
    def words(self) -> tuple[str, ...]:
        """The words to look for; empty in modes that look for none.

        Raises:
            ValueError: the class of words is unknown.
        """
        if self.mode == "class":
            return tuple(class_words(self.argument))
        return (self.argument,) if self.mode == "token-of-interest" else ()

    def finder(self, tokenizer: Any) -> spelling.WordFinder | None:
        """Returns what finds the words in `token_positions.searched`; None if there are none.

        Raises:
            ValueError: the tokenizer has no token for any spelling of the words.
        """
        if not self.words:
            return None
        if not spelling.spellings(tokenizer, self.words):
            raise ValueError(f"the tokenizer has no token for {self.argument!r}; use another word")
        return spelling.WordFinder(tokenizer, self.words, str(self.match))

    def keep(
        self,
        positions: token_positions.Positions,
        *,
        found: Int[token_positions.AnyArray, "B 2"] | None = None,
        end_ids: token_positions.Ids = (),
        chosen: Bool[token_positions.AnyArray, "B T"] | None = None,
    ) -> Bool[token_positions.AnyArray, "B P"]:
        """Returns which positions are selected.

        Args:
            positions: the positions of a batch.
            found: int32[B, 2], what the finder returns for `token_positions.searched`; only for
                modes that look for words.
            end_ids: ids of the end-of-sequence tokens.
            chosen: bool[B, T], which image tokens of the prompt are chosen, from
                `xlvlm_jax.features.image_cells.batch_cells`; None for all.

        Returns:
            bool[B, P].

        Raises:
            ValueError: the mode looks for words, and `found` is missing; or it chooses some of the
                image tokens, and `chosen` is missing.
        """
        only = bool(self.generated_only)
        if self.mode == "all":
            return token_positions.everything(positions, generated_only=only)
        if self.mode == "index":
            return token_positions.index(positions, self._index(), generated_only=only)
        if self.mode == "range":
            return token_positions.interval(positions, *self._range(), generated_only=only)
        if self.mode == "token-id":
            ids = self._token_ids()
            return token_positions.token_of_interest(
                positions, ids, generated_only=only, start=self.start
            )
        if self.mode == "before-special-tokens":
            return token_positions.before_special_tokens(positions, end_ids)
        if self.mode == "image":
            if chosen is None and self.at_most is not None:
                raise ValueError(f"{self} needs the chosen tokens; pass chosen, from batch_cells")
            return token_positions.image(positions, chosen)
        if found is None:
            raise ValueError(
                f"{self} needs the positions of its words; pass found, from its finder"
            )
        return token_positions.spans(positions, found)

    def rows(
        self,
        states: Any,
        positions: token_positions.Positions,
        *,
        found: Int[token_positions.AnyArray, "B 2"] | None = None,
        end_ids: token_positions.Ids = (),
        chosen: Bool[token_positions.AnyArray, "B T"] | None = None,
    ) -> token_positions.SelectedRows:
        """Returns the rows of a batch.

        Args:
            states: an array [B, P, D] or [B, P, H, C], or a tree of them.
            positions: as for `keep`.
            found: as for `keep`.
            end_ids: as for `keep`.
            chosen: as for `keep`.

        Raises:
            ValueError: as for `keep`.
        """
        keep = self.keep(positions, found=found, end_ids=end_ids, chosen=chosen)
        how = str(self.how)
        return token_positions.reduce(states, positions, keep, how, max_rows=self._max_rows())

    def rows_at_most(self, positions: int) -> int:
        """Returns the maximum number of rows of a sample with this many positions."""
        if self.how != "each":
            return 1
        bound = self._max_rows()
        return positions if bound is None else min(bound, positions)

    def _max_rows(self) -> int | None:
        """Returns a bound on the kept positions per sample; None if only its length bounds them."""
        if self.mode == "image":
            return self.at_most
        if self.mode in ("index", "token-id") or self.match == "first-token":
            return 1
        if self.mode in WORD_MODES:
            return _most_tokens(self.words)
        if self.mode != "range":
            return None
        start, stop = self._range()
        start = start or 0
        if stop is None:
            return -start if start < 0 else None
        return max(stop - start, 1) if (start < 0) == (stop < 0) else None


def _most_tokens(words: Sequence[str]) -> int | None:
    """Returns a bound on the tokens that spell one of the words; None if there is none."""
    if any(len(word.split()) > 1 for word in words):
        return None  # a space in a word is any white space in a text
    # A token of a word has a byte of it or more. Capitals may have more bytes than their letters,
    # and the apostrophe of a text three.
    return 3 * max(len(unicodedata.normalize("NFD", word).encode()) for word in words)
