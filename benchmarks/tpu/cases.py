"""What is compiled: a function, its arguments, and what is promised of the program."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.tpu.chips import Place
from benchmarks.tpu.hlo import Array


class Built(NamedTuple):
    """A program that is not compiled yet."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    # Of a solver: its matrix on one device, and how often an update may read it.
    matrix: Array | None = None
    reads: float | None = None
    # Bytes that the device holds per row of Z besides Z: temporaries may grow by so many.
    row_bytes: float | None = None
    # Of a model: its abstract parameters.
    params: Any = None


class Case(NamedTuple):
    """A program for any devices."""

    name: str
    build: Callable[[Place, int], Built]  # devices, and what the number of rows is multiplied by
    is_solver: bool = True
    # Raises ValueError if the mesh does not divide the program.
    check: Callable[[Place], None] | None = None
    # What the number of rows is multiplied by to see what grows.
    times: tuple[int, int] = (1, 2)
