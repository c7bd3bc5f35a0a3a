"""LAPACK that leaves the cores to the rest of the program.

On a CPU, XLA calls SciPy's LAPACK for small factorisations. After a call OpenBLAS's threads go on
spinning for a while, in wait of another, on the cores that XLA's own products would run on next.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import scipy.linalg  # noqa: F401 - loads the library, so that it is there to be limited
from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_limits: list = []  # the limit that is set, once for each block that is in it


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK and BLAS called within take one thread each; as before when the last block is left.

    Also a decorator. What they are given here is small: two threads would gain next to nothing.
    """
    with _lock:
        _limits.append(_limits[-1] if _limits else _libraries().limit(limits=1))
    try:
        yield
    finally:
        with _lock:
            limit = _limits.pop()
            if not _limits:
                limit.restore_original_limits()
