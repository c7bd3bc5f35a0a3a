"""Rows through a sparse autoencoder: codes, reconstructions, and how good they are.

N rows, M of them, D width, K features.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped

from xlvlm_jax.sae import Dictionary
from xlvlm_jax.solvers.buckets import bucket_of_rows
from xlvlm_jax.solvers.sae.batches import take_rows
from xlvlm_jax.solvers.validation import (
    StoredMatrix,
    as_matrix,
    check_finite,
    narrow,
    padded,
    shard_rows,
)

AnyArray = jax.Array | np.ndarray
CODE_BYTES = 2**26  # codes that are computed together


class Quality(NamedTuple):
    """How well a sparse autoencoder describes rows."""

    error: float  # mean over rows of |row - reconstruction|^2; NaN if what is meant is not known
    explained_variance: float  # 1 - |Z - reconstruction|^2 / |Z - mean|^2; NaN for equal rows
    l0: float  # mean number of active features per row
    dead_share: float  # of the features, those that no row activates

    def as_source(self) -> dict[str, float | None]:
        """Returns what is stored in the source of concepts."""
        explained = self.explained_variance
        return {
            "explained_variance": None if math.isnan(explained) else explained,
            "l0": self.l0,
            "dead_share": self.dead_share,
        }


def encode(
    dictionary: Dictionary, Z: Any, mesh: Mesh | None = None, first_row: int = 0
) -> Float[Array, "N K"]:
    """Returns the codes of rows.

    Args:
        dictionary: of width D.
        Z: real numbers[N, D].
        mesh: shards the rows on its "data" axis.
        first_row: number of the first row, for error messages.

    Raises:
        TypeError: Z is not an array of numbers.
        ValueError: Z is not a matrix of finite real numbers, or has another width.
    """
    Z = narrow(as_matrix(Z, "Z", row="sample"))
    N = Z.shape[0]
    _check_width(dictionary, Z.shape[1])
    if isinstance(Z, Tracer):
        return _encode(dictionary, Z)
    check_finite(Z, "Z", first_row)
    K = len(dictionary.params["W_dec"])
    size = max(CODE_BYTES // (4 * K), 1)
    if mesh is not None or size >= N:
        rows = padded(Z) if mesh is None else shard_rows(Z, mesh)
        return _encode(dictionary, rows)[:N]
    return jnp.concatenate(
        [_encode(dictionary, padded(Z[at : at + size]))[: N - at] for at in range(0, N, size)]
    )


def decode(
    dictionary: Dictionary,
    codes: Float[AnyArray, "N K"],
    states: Shaped[AnyArray, "N D"] | None = None,
) -> Float[Array, "N E"]:
    """Returns the reconstructions of rows, in float32; of a transcoder of width E.

    Args:
        dictionary: of width D.
        codes: float[N, K].
        states: the rows that were encoded, where a normaliser needs them.

    Raises:
        ValueError: `states` are needed and not given.
    """
    N = codes.shape[0]
    # Another number of rows in each call, as tokens of batches are, shares a program.
    traced = isinstance(codes, Tracer) or isinstance(states, Tracer)
    missing = 0 if traced else bucket_of_rows(*codes.shape) - N
    rows = None if states is None else _with_heads(dictionary, _longer(states, missing))
    found = _decode(dictionary, _longer(codes, missing), rows)[:N]
    return found.reshape(N, -1).astype(jnp.float32)


def _longer(rows: Shaped[AnyArray, "N D"], missing: int) -> Shaped[Array, "M D"]:
    """Returns rows with so many rows of zeros after them."""
    if not missing:
        return jnp.asarray(rows)
    xp = np if isinstance(rows, np.ndarray) else jnp  # on the host, without a program for this N
    return jnp.asarray(xp.pad(rows, ((0, missing), (0, 0))))


def encode_all(
    dictionary: Dictionary,
    Z: Shaped[AnyArray, "N D"] | StoredMatrix,
    write: Callable[[int, Float[np.ndarray, "M K"]], None],
    mesh: Mesh | None = None,
) -> Quality:
    """Computes the codes of all rows in one pass, and how well they describe them.

    Args:
        dictionary: of width D.
        Z: rows, or what reads them; of a crosscoder those of both sources side by side, whose
            errors are in units of its scales. Of a transcoder those of the second site may follow
            those of the first; without them only the codes' figures are known.
        write: called with (first row, codes) in order.
        mesh: shards the rows on its "data" axis; all of its devices are this host's.

    Raises:
        ValueError: a row is not finite, or of another width.
    """
    N, K = Z.shape[0], len(dictionary.components)
    settings, D = dictionary.settings, dictionary.width
    check_columns(dictionary, Z.shape[1])
    known = not settings.is_transcoder or Z.shape[1] != D
    centre = np.asarray(dictionary.params["b_dec"], np.float64)
    unit = np.repeat(settings.scales, settings.widths) if settings.is_crosscoder else 1.0
    left = squares = active = 0.0
    moment, alive = np.zeros_like(centre), np.zeros(K, bool)
    for start, rows in _blocks(Z, max(CODE_BYTES // (4 * K), 1)):
        states, meant = (rows[:, :D], rows[:, D:]) if settings.is_transcoder else (rows, rows)
        codes = encode(dictionary, states, mesh, first_row=start)
        if known:
            wide = np.asarray(meant, np.float64)
            if settings.is_transcoder:  # `encode` looks at the others
                _check_target(wide, start)
            error = (wide - np.asarray(decode(dictionary, codes, states))) * unit
            off = (wide - centre) * unit
            left += np.sum(error**2)
            squares, moment = squares + np.sum(off**2), moment + off.sum(axis=0)
        found = np.asarray(codes, np.float32)
        active += np.count_nonzero(found)
        alive |= (found != 0).any(axis=0)
        write(start, found)
    variance = squares - np.sum(moment**2) / N
    return Quality(
        error=float(left / N) if known else math.nan,
        explained_variance=float(1 - left / variance) if variance > 0 else math.nan,
        l0=active / N,
        dead_share=float(1 - alive.mean()),
    )


def _check_target(rows: Float[np.ndarray, "M E"], first_row: int) -> None:
    """Raises ValueError if a row of a transcoder's second site is not finite."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ValueError(
            f"target has NaN or Inf in row {first_row + bad[0]}, or values beyond float32; drop "
            "these rows or fix their source"
        )


def check_columns(dictionary: Dictionary, columns: int) -> None:
    """Checks that a dictionary encodes rows of so many columns, see `encode_all`.

    Raises:
        ValueError: it does not.
    """
    D, E = dictionary.width, dictionary.params["W_dec"].shape[1]
    if not dictionary.settings.is_transcoder or columns == D:
        _check_width(dictionary, columns)
    elif columns != D + E:
        raise ValueError(
            f"the states of both sites have {columns} columns; expected {D} to encode and {E} "
            "to compare with"
        )


def _check_width(dictionary: Dictionary, columns: int) -> None:
    if dictionary.width != columns:
        both = dictionary.settings.widths
        raise ValueError(
            f"Z has {columns} columns but the concepts have {dictionary.width}; project states "
            "from the site and model that the concepts were learnt on"
            + (f": of both sources side by side, {both[0]} and {both[1]} wide" if both else "")
        )


def _blocks(
    Z: Shaped[AnyArray, "N D"] | StoredMatrix, size: int
) -> Iterator[tuple[int, Shaped[AnyArray, "M D"]]]:
    N = Z.shape[0]
    for start in range(0, N, size):
        yield start, take_rows(Z, np.arange(start, min(start + size, N)))


def _with_heads(dictionary: Dictionary, rows: Array) -> Array:
    """Returns rows of attention heads with an axis of heads, of which all are one here."""
    return rows[:, None] if dictionary.settings.hook_z else rows


@jax.jit
def _encode(dictionary: Dictionary, rows: Array) -> Array:
    return dictionary.encode(_with_heads(dictionary, rows))


@jax.jit
def _decode(dictionary: Dictionary, codes: Array, states: Array | None) -> Array:
    return dictionary.decode(codes, states)
