"""Interceptors for `flax.nnx` modules, for `capture` and `steer`.

nnx modules are plain objects, so that their calls are intercepted in their classes: while a wrapped
call runs, each class of the model has a method that asks the running calls what to do with the
output. Instances are not changed, so this works on a model, under `nnx.jit`, `nnx.grad` and
`jax.jit`, and on what `nnx.merge` makes of a split one.
"""

import contextlib
import contextvars
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ports.names import called_name, normal_name

Change = Callable[[str, Any], Any]  # (name of the site, output) -> new output


@dataclasses.dataclass(frozen=True)
class _Call:
    """A running call of a wrapped function: the model's modules and what happens to outputs."""

    names: Mapping[tuple[int, str], str]  # (id of the module, method) -> name
    change: Change
    is_edit: bool  # edits are made before anything is captured


_running: contextvars.ContextVar[tuple[_Call, ...]] = contextvars.ContextVar("nnx", default=())
_lock = threading.RLock()
# (class, method) -> number of running calls that need it, the class's own method.
_patched: dict[tuple[type, str], tuple[int, Any]] = {}


def _nnx() -> Any:
    """Returns `flax.nnx` if something has imported it, else None: then there are no nnx modules."""
    return sys.modules.get("flax.nnx")


@dataclasses.dataclass(frozen=True)
class Bound:
    """A function of (model, ...) with its model, or with the definition of one that is split.

    Attributes:
        function: the function.
        model: an nnx module, or a GraphDef, whose state is then the first argument.
    """

    function: Callable[..., Any]
    model: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function with the model."""
        if isinstance(self.model, _nnx().GraphDef):
            state, *rest = args
            # A copy: the model of the call must not write into the caller's state.
            model = _nnx().merge(self.model, state, copy=True)
            return self.function(model, *rest, **kwargs)
        return self.function(self.model, *args, **kwargs)

    def wrap(self, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "Bound":
        """Returns the same with its function wrapped."""
        return dataclasses.replace(self, function=wrapper(self.function))


def bound(apply: Any) -> Bound | None:
    """Returns an nnx module, or what was made of one, as a function with its model; else None."""
    if isinstance(apply, Bound):
        return apply
    nnx = _nnx()
    if nnx is not None and isinstance(apply, nnx.Module | nnx.GraphDef):
        return Bound(_call_model, apply)
    return None


def _call_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def model_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the first nnx module among arguments, or None."""
    nnx = _nnx()
    if nnx is None:
        return None
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, nnx.Module)), None)


def call(
    model: Any,
    wanted: Iterable[str],
    change: Change,
    function: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
    *,
    is_edit: bool,
) -> tuple[Any, dict[str, None]]:
    """Calls `function`, with the output of each module of `model` routed through `change`.

    Args:
        model: an nnx module among the arguments.
        wanted: normal names of sites; a method other than `__call__` is intercepted if its site is
            among them.
        change: (name, output) -> output.
        function: called with the arguments.
        args: its positional arguments.
        kwargs: its keyword arguments.
        is_edit: whether `change` edits; captured outputs include all edits.

    Returns:
        The result, and the names of the modules that ran.
    """
    names, classes = _modules(model, set(wanted))
    ran: dict[str, None] = {}

    def note(name: str, out: Any) -> Any:
        ran[name] = None
        return change(name, out)

    running = _Call(names, note, is_edit)
    with _patching(classes):
        token = _running.set((*_running.get(), running))
        try:
            return function(*args, **kwargs), ran
        finally:
            _running.reset(token)


def _modules(
    model: Any, wanted: set[str]
) -> tuple[dict[tuple[int, str], str], set[tuple[type, str]]]:
    """Returns the names of a model's calls, and the methods of classes that make them."""
    names: dict[tuple[int, str], str] = {}
    classes: set[tuple[type, str]] = set()
    for path, module in _nnx().iter_modules(model):
        parts = tuple(map(str, path))
        below = normal_name(called_name(parts, "__call__"))
        methods = [
            site.rpartition(".")[2] for site in wanted if parts and site.rpartition(".")[0] == below
        ]
        for method in ("__call__", *methods):
            owner = _owner(type(module), method)
            if owner is not None and parts:
                names[id(module), method] = called_name(parts, method)
                classes.add((owner, method))
    return names, classes


def _owner(cls: type, method: str) -> type | None:
    """Returns the class that defines a method of `cls`; None if it is none of a module's own."""
    owner = next((each for each in cls.__mro__ if method in vars(each)), None)
    if owner is None or owner in (object, type) or not callable(getattr(owner, method)):
        return None
    return owner


@contextlib.contextmanager
def _patching(classes: Iterable[tuple[type, str]]) -> Iterator[None]:
    """Has the methods of classes ask the running calls, until no call needs it."""
    chosen = list(classes)
    with _lock:
        for owner, method in chosen:
            count, own = _patched.get((owner, method), (0, vars(owner)[method]))
            _patched[owner, method] = (count + 1, own)
            if count == 0:
                setattr(owner, method, _asking(owner, method, own))
    try:
        yield
    finally:
        with _lock:
            for owner, method in chosen:
                count, own = _patched.pop((owner, method))
                if count > 1:
                    _patched[owner, method] = (count - 1, own)
                else:
                    setattr(owner, method, own)


def _asking(owner: type, method: str, own: Any) -> Callable[..., Any]:
    """Returns a method like `own` whose output goes through the running calls."""

    @functools.wraps(own)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own.__get__(self, type(self))(*args, **kwargs)
        if _owner(type(self), method) is not owner:
            return out  # called by an overriding method, whose output counts
        key = (id(self), method)
        asked = [each for each in _running.get() if key in each.names]
        # The innermost wrapper edits first.
        for each in [each for each in reversed(asked) if each.is_edit]:
            out = each.change(each.names[key], out)
        for each in [each for each in asked if not each.is_edit]:
            each.change(each.names[key], out)
        return out

    return called
