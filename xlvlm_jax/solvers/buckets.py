"""Sizes that programs are compiled for, so that a program serves many numbers of rows and concepts.

Rows of zeros pad Z[N, D] to a few sizes; the program gets the number of rows that count as an
argument. A compiled program is worth a few seconds, a row that pads Z costs as much as any other:
the larger Z is, the closer are the sizes, and a Z beyond PADDED is used as it is, since a padded
copy would also take as much memory again, which on an accelerator is the scarcer good.
"""

SMALL, PADDED = 2**20, 2**24  # elements of Z: sizes in steps of at most a half; of a sixteenth
LEAST_ROWS, LEAST_CONCEPTS, CONCEPTS_STEP = 16, 16, 8
# Multiplications of an update with every row and centroid: up to so many, a fraction of a
# millisecond, Z is clustered as it is and the concepts are padded too.
SMALL_UPDATE = 2**24


def bucket_of_rows(N: int, D: int) -> int:
    """Returns the number of rows that Z[N, D] is padded to."""
    if N * D > PADDED:
        return N
    N = max(N, LEAST_ROWS)
    return _rounded(N, 2 if N * D <= SMALL else 16)


def is_small(N: int, D: int, K: int) -> bool:
    """Returns whether an update of K concepts takes so little time that compiling counts more."""
    return bucket_of_rows(N, D) * D * K <= SMALL_UPDATE


def bucket_of_concepts(K: int, N: int, D: int, step: int | None = None) -> int:
    """Returns the number of concepts that a program for Z[N, D] computes.

    Args:
        K: number of concepts that is asked for.
        N: number of rows.
        D: number of columns.
        step: the number is a multiple of it; None for multiples of 8 from 16 on.
    """
    if step is None:
        step, least = CONCEPTS_STEP, LEAST_CONCEPTS
    else:
        least = 1
    padded = -(-max(K, least) // step) * step
    padded = min(padded, N)
    return max(padded, K) if is_small(N, D, padded) else K


def room_for(max_iter: int) -> int:
    """Returns the number of updates that a history has room for."""
    return _rounded(max(max_iter, LEAST_ROWS), 1)


def _rounded(number: int, steps: int) -> int:
    """Returns the next number of at least `number`, of which there are `steps` per octave."""
    octave = 1 << (number - 1).bit_length() >> 1  # the power of two below
    step = max(octave // steps, 1)
    return -(-number // step) * step
