"""The limit on BLAS threads: nested, after errors, as a decorator."""

import pytest
import scipy.linalg  # noqa: F401 - the library that is limited
from threadpoolctl import threadpool_info, threadpool_limits

from xlvlm_jax.solvers import blas_threads


def threads() -> set[int]:
    return {
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    }


@pytest.fixture(autouse=True)
def two_threads():
    with threadpool_limits(2, user_api="blas"):
        yield


def test_one_thread_within_and_as_many_as_before_after():
    assert threads() == {2}
    with blas_threads.one_thread():
        assert threads() == {1}
    assert threads() == {2}


def test_blocks_that_overlap_end_with_the_last():
    first, second = blas_threads.one_thread(), blas_threads.one_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert threads() == {1}
    second.__exit__(None, None, None)
    assert threads() == {2}


def test_an_error_within_restores_them():
    with pytest.raises(ZeroDivisionError), blas_threads.one_thread():
        1 / 0  # noqa: B018
    assert threads() == {2}


def test_as_a_decorator():
    assert blas_threads.one_thread()(threads)() == {1}
    assert threads() == {2}
