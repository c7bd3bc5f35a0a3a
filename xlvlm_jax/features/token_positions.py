"""Token selections: which positions of which samples become rows.

The state that belongs to a token is the state from which that token was predicted: at index p,
`states[:, p]` is the state and `positions.predicted[:, p]` the token that it predicted. The last
prompt position therefore belongs both to the prompt and, as the state that predicted the first
answer token, to the generated part.

Everything here is a pure function of arrays and masks and can be jitted; the result for a sample
does not depend on its padding. Where tokens spell a word is determined on the host
(`xlvlm_jax.features.spelling`) and passed as an array. Axes: B batch, T prompt positions, M
generated tokens, P positions of the selection, R rows per sample, D width. The selections are those
of CoX-LMM (NeurIPS 2024), section 3.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

AnyArray = jax.Array | np.ndarray
Ids = int | Sequence[int] | AnyArray  # one token id or several


class Positions(NamedTuple):
    """What is known about every position, each field [B, P].

    A position may be in the prompt and generated at once: the last prompt position is. Padding is
    whatever no selection may keep: input padding, and states that predicted nothing (after the
    end-of-sequence token, or at the end of a sequence under teacher forcing).
    """

    predicted: AnyArray  # int32, the token that was predicted from the state here
    is_prompt: AnyArray  # bool, the token that was read here belongs to the prompt
    is_generated: AnyArray  # bool, the token that was predicted here belongs to the answer
    is_image: AnyArray  # bool, the token that was read here represents part of an image
    is_padding: AnyArray  # bool

    @staticmethod
    def of_generation(
        prompt_ids: Int[AnyArray, "B T"],
        attention_mask: Int[AnyArray, "B T"] | Bool[AnyArray, "B T"],
        tokens: Int[AnyArray, "B M"],
        *,
        image_token_ids: Ids = (),
        end_ids: Ids = (),
    ) -> "Positions":
        """Returns the positions of prompt and generated part, P = T + M - 1.

        The states are those of the prompt, then of tokens[:, :-1]. Prompts may be padded on either
        side. `tokens` after one of `end_ids` count as padding; the state that predicted the end
        token does not.

        Args:
            prompt_ids: int[B, T].
            attention_mask: [B, T], 0 for padding.
            tokens: int[B, M], the generated tokens.
            image_token_ids: ids of the tokens that represent an image.
            end_ids: ids of the end-of-sequence tokens.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        real = jnp.asarray(attention_mask, bool)
        B, T = real.shape
        M = tokens.shape[1]
        # index of the last prompt token: T - 1 unless padded on the right
        last = T - 1 - jnp.argmax(real[:, ::-1], axis=1)
        at_last = jnp.arange(T) == last[:, None]  # [B, T]
        following = jnp.roll(jnp.asarray(prompt_ids, jnp.int32), -1, axis=1)
        in_prompt = jnp.where(at_last, tokens[:, :1], following)
        after = jnp.zeros((B, M - 1), bool)

        return Positions(
            predicted=jnp.concatenate([in_prompt, tokens[:, 1:]], axis=1),
            is_prompt=jnp.concatenate([real, after], axis=1),
            is_generated=jnp.concatenate([at_last, ~after], axis=1),
            is_image=jnp.concatenate([_isin(prompt_ids, image_token_ids) & real, after], axis=1),
            is_padding=jnp.concatenate([~real, _ended(tokens, end_ids)[:, 1:]], axis=1),
        )

    @staticmethod
    def of_generated(tokens: Int[AnyArray, "B M"], *, end_ids: Ids = ()) -> "Positions":
        """Returns the positions of the generated part, P = M; state m predicted tokens[:, m]."""
        tokens = jnp.asarray(tokens, jnp.int32)
        none = jnp.zeros(tokens.shape, bool)
        return Positions(
            predicted=tokens,
            is_prompt=none.at[:, 0].set(True),
            is_generated=~none,
            is_image=none,
            is_padding=_ended(tokens, end_ids),
        )

    @staticmethod
    def of_teacher_forcing(
        input_ids: Int[AnyArray, "B T"],
        attention_mask: Int[AnyArray, "B T"] | Bool[AnyArray, "B T"],
        answer_mask: Int[AnyArray, "B T"] | Bool[AnyArray, "B T"],
        *,
        image_token_ids: Ids = (),
    ) -> "Positions":
        """Returns the positions of prompt and given answer in one forward pass, P = T.

        The last state of a row predicts nothing known, and counts as padding.

        Args:
            input_ids: int[B, T].
            attention_mask: [B, T], 0 for padding.
            answer_mask: [B, T], marks the answer's tokens among `input_ids`.
            image_token_ids: ids of the tokens that represent an image.
        """
        real = jnp.asarray(attention_mask, bool)
        answer = jnp.asarray(answer_mask, bool) & real

        def following(x: AnyArray) -> jax.Array:
            return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)

        return Positions(
            predicted=following(jnp.asarray(input_ids, jnp.int32)),
            is_prompt=real & ~answer,
            is_generated=following(answer),
            is_image=_isin(input_ids, image_token_ids) & real,
            is_padding=~(real & following(real)),
        )


def _isin(tokens: AnyArray, ids: Ids) -> jax.Array:
    return jnp.isin(jnp.asarray(tokens), jnp.asarray(ids, jnp.int32).reshape(-1))


def _ended(tokens: AnyArray, end_ids: Ids) -> jax.Array:
    """Returns bool[B, M]: whether an end token precedes this one."""
    is_end = _isin(tokens, end_ids).astype(jnp.int32)
    return jnp.cumsum(is_end, axis=1) - is_end > 0


# Selections: Positions -> keep, bool[B, P]. A sample in which nothing is kept has no row in Z.


def everything(positions: Positions, *, generated_only: bool = False) -> Bool[AnyArray, "B P"]:
    """Selects every position that is not padding.

    Args:
        positions: the positions of a batch.
        generated_only: leave out the prompt.

    Returns:
        bool[B, P].
    """
    keep = ~positions.is_padding
    return keep & positions.is_generated if generated_only else keep


def index(
    positions: Positions, i: int | Int[AnyArray, ""], *, generated_only: bool = False
) -> Bool[AnyArray, "B P"]:
    """Selects one position by number; nothing in samples that are too short.

    Args:
        positions: the positions of a batch.
        i: the number, not counting padding; a negative one counts from the end.
        generated_only: only count generated positions.

    Returns:
        bool[B, P].
    """
    eligible = everything(positions, generated_only=generated_only)
    rank, count = _rank(eligible)
    return eligible & (rank == jnp.where(i < 0, i + count, i))


def interval(
    positions: Positions,
    start: int | None = None,
    stop: int | None = None,
    *,
    generated_only: bool = False,
) -> Bool[AnyArray, "B P"]:
    """Selects the positions start <= p < stop, counted and clipped like Python slices.

    Args:
        positions: the positions of a batch.
        start: first position, not counting padding; None for the first of all.
        stop: position after the last; None for the end.
        generated_only: only count generated positions.

    Returns:
        bool[B, P].
    """
    eligible = everything(positions, generated_only=generated_only)
    rank, count = _rank(eligible)
    first = 0 if start is None else jnp.where(start < 0, start + count, start)
    end = count if stop is None else jnp.where(stop < 0, stop + count, stop)
    return eligible & (rank >= first) & (rank < end)


def searched(
    positions: Positions, *, generated_only: bool = True, start: int | None = None
) -> Int[AnyArray, "B P"]:
    """Returns the predicted tokens to search for words.

    Args:
        positions: the positions of a batch.
        generated_only: do not search the prompt, whose words would match before the answer's.
        start: the first position to search, counted among a sample's positions, or from their end
            if negative; None for all.

    Returns:
        int32[B, P], -1 where there is no token.
    """
    eligible = _searchable(positions, generated_only, start)
    return jnp.where(eligible, positions.predicted, -1)


def _searchable(positions: Positions, generated_only: bool, start: int | None) -> AnyArray:
    eligible = everything(positions, generated_only=generated_only)
    if start is None:
        return eligible
    rank, total = _rank(everything(positions))
    return eligible & (rank >= (start if start >= 0 else total + start))


def spans(positions: Positions, places: Int[AnyArray, "B 2"]) -> Bool[AnyArray, "B P"]:
    """Selects the positions of words.

    Args:
        positions: the positions of a batch.
        places: int[B, 2], from `WordFinder`: first position, and the position after the last.

    Returns:
        bool[B, P].
    """
    p = jnp.arange(positions.predicted.shape[1])
    return everything(positions) & (p >= places[:, :1]) & (p < places[:, 1:])


def image(
    positions: Positions, chosen: Bool[AnyArray, "B T"] | None = None
) -> Bool[AnyArray, "B P"]:
    """Selects the positions of image tokens.

    Args:
        positions: the positions of a batch.
        chosen: which prompt positions to select instead; those that are not chosen are left out.

    Returns:
        bool[B, P].
    """
    keep = positions.is_image
    if chosen is not None:
        beyond = positions.is_prompt.shape[1] - chosen.shape[1]
        keep = jnp.pad(jnp.asarray(chosen, bool), ((0, 0), (0, beyond)))
    return keep & positions.is_prompt & ~positions.is_padding


def token_of_interest(
    positions: Positions,
    token_ids: Ids,
    *,
    generated_only: bool = True,
    start: int | None = None,
) -> Bool[AnyArray, "B P"]:
    """Selects the first position whose predicted token is given, whatever it spells.

    For words see `xlvlm_jax.find_word` and `spans`.

    Args:
        positions: the positions of a batch.
        token_ids: one or more token ids.
        generated_only: do not search the prompt.
        start: the first position to search, as for `searched`.

    Returns:
        bool[B, P].
    """
    eligible = _searchable(positions, generated_only, start)
    return _first(eligible & _isin(positions.predicted, token_ids))


def before_special_tokens(positions: Positions, end_ids: Ids) -> Bool[AnyArray, "B P"]:
    """Selects the positions that predicted the answer, without its first end token.

    Args:
        positions: the positions of a batch.
        end_ids: ids of the end-of-sequence tokens.

    Returns:
        bool[B, P].
    """
    answer = everything(positions, generated_only=True)
    is_end = answer & _isin(positions.predicted, end_ids)
    return answer & (jnp.cumsum(is_end, axis=1) == 0)


def _rank(eligible: AnyArray) -> tuple[jax.Array, jax.Array]:
    """Returns int32[B, P], eligible positions before each one, and int32[B, 1], in total."""
    counted = jnp.cumsum(eligible.astype(jnp.int32), axis=1)
    return counted - eligible, counted[:, -1:]


def _first(keep: AnyArray) -> AnyArray:
    return keep & (_rank(keep)[0] == 0)


# Rows: the kept states, and where each comes from.


HOWS = ("first", "last", "mean", "each")


class SelectedRows(NamedTuple):
    """The rows of Z that a batch gives, R slots per sample.

    `states` is the tree of arrays passed to `reduce`, each [B, R, D] here.
    """

    states: Any
    valid: AnyArray  # bool[B, R]; the other slots are empty
    position: AnyArray  # int32[B, R], not counting padding; for a mean, the first position
    token: AnyArray  # int32[B, R], predicted from that position

    def flat(self) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Returns host arrays: states [N, D], batch index int64[N], position and token int32[N]."""
        valid, position, token = jax.device_get((self.valid, self.position, self.token))
        states = jax.tree.map(lambda x: np.asarray(x)[valid], jax.device_get(self.states))
        return states, np.nonzero(valid)[0], position[valid], token[valid]


def reduce(
    states: Any,
    positions: Positions,
    keep: Bool[AnyArray, "B P"],
    how: str = "first",
    *,
    max_rows: int | None = None,
) -> SelectedRows:
    """Converts the kept positions to rows.

    Args:
        states: an array [B, P, D] or, of heads, [B, P, H, C]; or a tree of them ({site: states}).
        positions: the positions of the batch.
        keep: bool[B, P], from a selection.
        how: "first" or "last" kept position, or the "mean" of the kept positions (in float32), all
            with R = 1; or "each" kept position as its own row.
        max_rows: R for "each", by default P. Further rows are dropped, so pass a bound that holds
            for every sample.

    Raises:
        ValueError: `how` is unknown, or states have another number of positions than `keep`.
    """
    if how not in HOWS:
        raise ValueError(f"how must be one of {', '.join(HOWS)}, got {how!r}")
    P = keep.shape[1]
    # An index beyond the states would give NaN, and a wrong one the state of another position.
    if odd := [x.shape for x in jax.tree.leaves(states) if x.shape[1] != P]:
        raise ValueError(f"states have shape {odd[0]}, expected [B, {P}, D], one per position")
    R = 1 if how != "each" else keep.shape[1] if max_rows is None else min(max_rows, keep.shape[1])
    if how == "last":
        where = keep.shape[1] - 1 - jnp.argmax(keep[:, ::-1], axis=1, keepdims=True)
    else:
        # stable sort: kept positions first, in order
        where = jnp.argsort(~keep, axis=1, stable=True)[:, :R]
    real, _ = _rank(~positions.is_padding)

    def over(x: AnyArray, per_position: AnyArray) -> AnyArray:
        return per_position.reshape(*per_position.shape, *(1,) * (x.ndim - 2))

    def mean(x: AnyArray) -> jax.Array:
        # where, not a product with the mask: states of padding may be NaN
        total = jnp.where(over(x, keep), x.astype(jnp.float32), 0).sum(axis=1, keepdims=True)
        return total / over(x, jnp.maximum(keep.sum(axis=1, keepdims=True), 1))

    def gather(x: AnyArray) -> jax.Array:
        return jnp.take_along_axis(x, over(x, where), axis=1)

    return SelectedRows(
        states=jax.tree.map(mean if how == "mean" else gather, states),
        valid=jnp.take_along_axis(keep, where, axis=1),
        position=jnp.take_along_axis(real, where, axis=1),
        token=jnp.take_along_axis(positions.predicted, where, axis=1),
    )
