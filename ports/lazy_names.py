"""Imports what a package exports when it is first used, so that importing the package is cheap."""

import ast
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def attach(package: str) -> None:
    """Gives a package the names that its stub imports; each is imported when it is first used.

    The stub, `__init__.pyi`, is also what type checkers and editors read, so that every name is
    written once. Submodules are imported at first use too.

    Args:
        package: the name of the package, whose `__init__.py` makes this call; `__all__` and
            `__getattr__` are set there.

    Source: Scientific Python's SPEC 1, lazy loading of submodules and functions.
    """
    module = sys.modules[package]
    stub = ast.parse(Path(str(module.__file__)).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes: dict[str, tuple[str, str]] = {}
    exported: list[str] = []
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.module not in (None, package):
            for alias in node.names:
                homes[alias.asname or alias.name] = (str(node.module), alias.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)

    def get(name: str) -> Any:
        if name in homes:
            value = _imported(*homes[name])
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            value = importlib.import_module(f"{package}.{name}")
        else:
            text = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=module)
        setattr(module, name, value)  # the next use finds it without this function
        return value

    vars(module).update(
        __all__=exported,
        __getattr__=get,
        __dir__=lambda: sorted({*vars(module), *homes, *exported}),
    )


def _imported(home: str, name: str) -> Any:
    """Returns what `from home import name` gives."""
    module = importlib.import_module(home)
    if hasattr(module, name):
        return getattr(module, name)
    return importlib.import_module(f"{home}.{name}")
