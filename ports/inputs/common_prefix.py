"""Finds rows of a batch that begin alike: several questions about one picture.

B rows, T positions, U pictures, P positions of the common beginnings, R positions of what remains.

The beginning of such rows, up to where they differ, needs to be computed only once per picture. A
row is laid out anew as its picture's beginning, padded on the left to P, and its own remainder,
padded on the left to R, so that padding may also lie between the two.
"""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ports.inputs import padding
from ports.intervene import edits

Arrays = Mapping[str, np.ndarray]


class Shared(NamedTuple):
    """A batch divided into common beginnings and remainders."""

    prefix: dict[str, np.ndarray]  # the model's inputs [U, P], with each picture once
    picture: np.ndarray  # int32[B], the beginning of each row
    tokens: np.ndarray  # int32[B, R], the remainders
    kinds: np.ndarray  # int32[B, R], see `edits.Places`
    ordinals: np.ndarray  # int32[B, R], likewise, their `index`
    columns: np.ndarray  # int32[B, R], likewise
    # int32[B, T up to its bucket's length], where each position of the batch is now, 0 for padding.
    order: np.ndarray


def pictures_of_rows(
    arrays: Arrays, pictures: Arrays, image_tokens: Sequence[int], tokens_per_image: int | None
) -> dict[str, np.ndarray] | None:
    """Divides arrays of pictures, in the order of their tokens, among the rows of a batch.

    Args:
        arrays: input_ids and attention_mask, [B, T].
        pictures: the arrays to divide.
        image_tokens: ids of the tokens that stand for an image.
        tokens_per_image: how many tokens stand for an image, if that is always the same; rows may
            then have several.

    Returns:
        Name -> [B, pictures of a row, ...]; None unless each row surely has the same number of
        pictures, of the same kinds, and at least one.
    """
    if not image_tokens:
        return None
    ids, real = arrays["input_ids"], arrays["attention_mask"] != 0
    counts = np.stack([((ids == token) & real).sum(1) for token in image_tokens])
    kinds = counts[counts.any(1)] > 0
    if not pictures or not kinds.any() or not kinds.all():
        return None
    batch, tokens = len(ids), counts.sum(0)
    # As many as there are rows, each of which has at least one.
    count = 1
    if tokens_per_image is not None and (tokens == tokens[0]).all():
        count = int(tokens[0]) // tokens_per_image
    if any(len(x) not in (batch, batch * count) for x in pictures.values()):
        return None
    return {name: x.reshape(batch, -1, *x.shape[1:]) for name, x in pictures.items()}


def share(
    arrays: Arrays,
    pictures: Arrays,
    image_tokens: Sequence[int],
    pad_token: int,
    own: Mapping[str, int],
    blocks: np.ndarray | None = None,
    least: int = 16,
) -> Shared | None:
    """Divides a batch if it has at least two questions per picture and that saves work.

    Args:
        arrays: the arrays with a column per position, the tokens of each row at its end.
        pictures: those of each row, [B, pictures of a row, ...], see `pictures_of_rows`.
        image_tokens: ids of the tokens that stand for an image.
        pad_token: fills input_ids.
        own: the port's own per-position arrays and their fill values (`Port.per_position`).
        blocks: int[B, T], positions that see each other both ways have the same number, and others
            -1; None if all positions see only earlier ones.
        least: smallest number of positions that is worth it.

    Returns:
        The divided batch, of which P, R and U are rounded up so that a run compiles only a few
        programs; None if that would not save work.
    """
    ids, real = arrays["input_ids"], arrays["attention_mask"] != 0
    per_position = padding.FILL | {"input_ids": pad_token, **own}
    if "position_ids" in arrays or len(ids) == 1:
        return None
    lengths, is_image = real.sum(1), np.isin(ids, image_tokens) & real
    # Of what is seen by earlier positions nothing may remain.
    is_joined = is_image if blocks is None else is_image | (blocks >= 0) & real
    before = ids.shape[1] - lengths
    rows = [row[len(row) - length :] for row, length in zip(ids, lengths, strict=True)]
    # One past the last such position, counted from the row's first token.
    heads = lengths - np.argmax(is_joined[:, ::-1], axis=1)
    compared = [arrays[name] for name in ("input_ids", *own) if name in arrays]
    begins = [
        b"".join(values[i, first : first + head].tobytes() for values in compared)
        for i, (first, head) in enumerate(zip(before, heads, strict=True))
    ]
    picture, firsts = _group(begins, pictures)
    count = 1 << (len(firsts) - 1).bit_length()
    # Copies that fill a batch do not count: a last batch would need a program of its own.
    distinct = {(group, row.tobytes()) for group, row in zip(picture, rows, strict=True)}
    if 2 * count > len(distinct):
        return None
    starts = _common_lengths(rows, heads, picture, len(firsts))
    ends = lengths - starts[picture]
    width, rest = (padding.bucket_length(int(size.max())) for size in (starts, ends))
    computed = count * width + len(ids) * rest
    apart = len(ids) * padding.bucket_length(ids.shape[1])
    # What remains is text.
    if starts.min() < least or computed >= apart or (starts[picture] < heads).any():
        return None
    chosen = np.array(firsts + firsts[:1] * (count - len(firsts)))
    begun = starts[picture]
    # The position in the batch of each position of the new layout; T for padding.
    place = np.arange(width) - (width - starts[picture[chosen]])[:, None]
    prefix_from = np.where(place >= 0, before[chosen, None] + place, ids.shape[1])
    place = np.arange(rest) - (rest - (lengths - begun))[:, None]
    rest_from = np.where(place >= 0, (before + begun)[:, None] + place, ids.shape[1])

    def taken(name: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        filled = np.pad(arrays[name], ((0, 0), (0, 1)), constant_values=per_position[name])
        return filled[rows[:, None], columns]

    columns = np.arange(ids.shape[1], dtype=np.int32)[None].repeat(len(ids), 0)
    arrays = {"columns": columns, **arrays}
    kinds = np.where(is_image, edits.IMAGE, edits.TEXT).astype(np.int32)
    kinds = np.pad(kinds, ((0, 0), (0, 1)), constant_values=edits.PADDING)
    prefix = {name: taken(name, chosen, prefix_from) for name in arrays if name in per_position}
    prefix["position_kinds"] = kinds[chosen[:, None], prefix_from]
    for name, parts in pictures.items():
        prefix[name] = np.concatenate([parts[row] for row in chosen])
    kinds = np.where(rest_from == ids.shape[1], edits.PADDING, edits.TEXT).astype(np.int32)
    kinds[:, -1] = edits.LAST_PROMPT
    column = np.arange(ids.shape[1]) - before[:, None]
    order = np.where(
        column < begun[:, None],
        column + (width - begun)[:, None],
        column + (width + rest - lengths)[:, None],
    )
    order = np.where(column >= 0, order, 0).astype(np.int32)
    missing = padding.bucket_length(ids.shape[1]) - ids.shape[1]
    return Shared(
        prefix,
        picture.astype(np.int32),
        taken("input_ids", np.arange(len(ids)), rest_from),
        kinds,
        (begun[:, None] + place).astype(np.int32),
        taken("columns", np.arange(len(ids)), rest_from),
        np.pad(order, ((0, 0), (missing, 0))),
    )


def _group(begins: Sequence[bytes], pictures: Arrays) -> tuple[np.ndarray, list[int]]:
    """Groups rows that begin alike and have the same pictures.

    Returns the group of each row, int[B], and the first row of each group.
    """
    firsts: list[int] = []
    groups = np.zeros(len(begins), int)
    seen: dict[int, list[int]] = defaultdict(list)  # digest -> groups
    for i, begin in enumerate(begins):
        digest = zlib.crc32(begin)
        for parts in pictures.values():
            digest = zlib.crc32(np.ascontiguousarray(parts[i]).data.cast("B"), digest)
        for group in seen[digest]:
            other = firsts[group]
            if begins[other] == begin and all(
                np.array_equal(parts[other], parts[i]) for parts in pictures.values()
            ):
                groups[i] = group
                break
        else:
            groups[i] = len(firsts)
            seen[digest].append(len(firsts))
            firsts.append(i)
    return groups, firsts


def _common_lengths(
    rows: Sequence[np.ndarray], heads: np.ndarray, groups: np.ndarray, count: int
) -> np.ndarray:
    """Returns int[U], how many tokens the rows of each group share; one of each row remains.

    A row that is alone keeps as many as it may without making what remains any longer.
    """
    shared = np.zeros(count, int)
    alone = []
    for group in range(count):
        members = np.flatnonzero(groups == group)
        shortest = min(len(rows[i]) for i in members) - 1
        first = rows[members[0]][:shortest]
        differ = np.zeros(shortest, bool)
        for i in members[1:]:
            differ |= rows[i][:shortest] != first
        shared[group] = np.argmax(differ) if differ.any() else shortest
        if len(members) == 1:
            alone.append(group)
    longest = max(
        (len(row) - shared[group] for row, group in zip(rows, groups, strict=True)), default=1
    )
    for group in alone:
        (i,) = np.flatnonzero(groups == group)
        shared[group] = max(heads[i], len(rows[i]) - longest)
    return shared
