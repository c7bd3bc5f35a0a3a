"""Interceptors of Linen modules that hold below `nn.jit` too, and reach nothing that runs later."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core.scope import CollectionFilter, DenyList, union_filters

_numbers = itertools.count()


def marked(mutable: CollectionFilter, mark: str) -> CollectionFilter:
    """The filter of mutable collections with one more name in it, which no collection has.

    `nn.jit` keeps a program per filter: with a mark it neither takes one that was compiled without
    these interceptors, nor leaves one for runs without them.
    """
    if mutable is True:
        return DenyList((mark,))
    if isinstance(mutable, DenyList):
        return DenyList(union_filters(mutable.deny, mark))
    return union_filters(mutable, mark)


def call_intercepted(
    intercept: Callable[..., Any], apply: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """apply(*args, **kwargs), with every method of a Linen module called through `intercept`.

    Args:
        intercept: as for `nn.intercept_methods`.
        apply: `module.apply`, or a function that passes on to one.
        args, kwargs: its arguments.

    Raises ValueError for a function of `jax.jit`, which would keep the interceptor for ever or,
    once compiled, pay no attention to it.
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
        # The module itself may be under `nn.jit`, which comes before any interceptor.
        mutable = kwargs.get("mutable", False)
        result = apply(*args, **{**kwargs, "mutable": marked(mutable, mark)})
        return split_variables(apply, result)[0] if mutable is False else result


def _is_module_apply(function: Callable[..., Any]) -> bool:
    return getattr(function, "__func__", None) is nn.Module.apply


def split_variables(apply: Callable[..., Any], result: Any) -> tuple[Any, Any]:
    """(out, variables) of what `apply` returns when collections are mutable.

    A wrapper that says `adds_to_result` returns ((out, variables), more); `more` stays with out.
    """
    if getattr(apply, "adds_to_result", False):
        (out, variables), more = result
        return (out, more), variables
    return result


def check_not_compiled(apply: Callable[..., Any]) -> None:
    """ValueError for a function of `jax.jit`."""
    if isinstance(apply, jax.stages.Wrapped):
        raise ValueError(
            "apply is a function of jax.jit, which nothing reaches into; wrap first and compile "
            "then: jax.jit(steer(module.apply, edits)), jax.jit(capture(module.apply, sites))"
        )
