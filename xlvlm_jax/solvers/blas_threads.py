"""Limits LAPACK to one thread, so that it leaves the cores to the rest of the program.

On a CPU, XLA calls SciPy's LAPACK for small factorisations. After a call, OpenBLAS's threads keep
spinning for a while, waiting for the next one, on the cores that XLA's own products need.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import scipy.linalg  # noqa: F401 - loads the library so that it can be limited
from threadpoolctl import ThreadpoolController

_lock = threading.Lock()
_limits: list = []  # the current limit, once per active block


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs LAPACK and BLAS calls in this block on one thread.

    The limit is lifted when the last block ends. Also works as a decorator. The matrices here are
    small: a second thread would gain almost nothing.
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
