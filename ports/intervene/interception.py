"""Linen interceptors that also work below `nn.jit` and do not leak into later runs."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import CollectionFilter, DenyList, union_filters

_numbers = itertools.count()


def marked(mutable: CollectionFilter, mark: str) -> CollectionFilter:
    """Adds a name that no collection has to a filter of mutable collections.

    `nn.jit` caches one program per filter. With the mark it neither reuses a program that was
    compiled without these interceptors, nor leaves one behind for runs without them.
    """
    if mutable is True:
        return DenyList((mark,))
    if isinstance(mutable, DenyList):
        return DenyList(union_filters(mutable.deny, mark))
    return union_filters(mutable, mark)


def call_intercepted(
    intercept: Callable[..., Any], apply: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """Calls apply(*args, **kwargs) with every Linen method call routed through `intercept`.

    Args:
        intercept: an interceptor, as for `nn.intercept_methods`.
        apply: `module.apply`, or a function that calls it.
        args: positional arguments of `apply`.
        kwargs: keyword arguments of `apply`.

    Returns:
        The result of `apply`.

    Raises:
        ValueError: `apply` is already jitted; its cached program would ignore the interceptor, or
            keep it forever.
    """
    check_not_compiled(apply)
    mark = f"intercepted {next(_numbers)}"

    def mark_and_intercept(method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        scope = context.module.scope
        if scope is not None:
            scope.mutable = marked(scope.mutable, mark)
        return intercept(method, args, kwargs, context)

    with nn.intercept_methods(mark_and_intercept):
        if not _is_module_apply(inspect.unwrap(apply, stop=_is_module_apply)):
            return apply(*args, **kwargs)
        # The module itself may be wrapped in `nn.jit`, which runs before any interceptor.
        mutable = kwargs.get("mutable", False)
        result = apply(*args, **{**kwargs, "mutable": marked(mutable, mark)})
        return split_variables(apply, result)[0] if mutable is False else result


def _is_module_apply(function: Callable[..., Any]) -> bool:
    return getattr(function, "__func__", None) is nn.Module.apply


def split_variables(apply: Callable[..., Any], result: Any) -> tuple[Any, Any]:
    """Splits the result of an `apply` with mutable collections into (out, variables).

    A wrapper marked `adds_to_result` returns ((out, variables), more); `more` stays with `out`.
    """
    if getattr(apply, "adds_to_result", False):
        (out, variables), more = result
        return (out, more), variables
    return result


def check_not_compiled(apply: Callable[..., Any]) -> None:
    """Checks that `apply` is not jitted yet.

    Raises:
        ValueError: it is.
    """
    if isinstance(apply, jax.stages.Wrapped):
        raise ValueError(
            "apply is already jitted, and its modules can't be intercepted; wrap first, then jit: "
            "jax.jit(steer(module.apply, edits)), jax.jit(capture(module.apply, sites))"
        )
