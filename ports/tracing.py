"""Tells values from tracers, which stand for values while JAX traces a function."""

from typing import Any

from jax.core import Tracer


def is_traced(*values: Any) -> bool:
    """Returns whether one of the values is a tracer, which has no concrete value yet."""
    return any(isinstance(value, Tracer) for value in values)
