"""Docstrings name the errors that functions raise, in a `Raises` block, and records' fields."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("ports", "xlvlm_jax")
    for path in sorted((ROOT / package).rglob("*.py"))
}
MODULES = {module: ast.parse(path.read_text("utf-8")) for module, path in FILES.items()}
# Functions and classes at the top of each module, and what their names mean in other modules.
DEFINED = {
    module: {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for module, tree in MODULES.items()
}
IMPORTED = {
    module: {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for module, tree in MODULES.items()
}
# Errors that a caller may cause -> the names for them. A PthError is a ValueError.
NAMED = {
    "FileExistsError": ("FileExistsError",),
    "FileNotFoundError": ("FileNotFoundError",),
    "PthError": ("PthError", "ValueError"),
    "ValueError": ("ValueError",),
}
# Exported functions that always call the others with valid arguments.
NEVER = {"xlvlm_jax.evaluation.caption_effects.count_valid"}
INIT = ("__init__", "__post_init__")


def body(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yields what a function runs itself: not the bodies of functions inside it."""
    stack: list[ast.AST] = list(function.body)
    while stack:
        yield (node := stack.pop())
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            stack += ast.iter_child_nodes(node)


def raised(function: ast.FunctionDef) -> set[str]:
    """Returns the names of the errors that a function raises itself."""
    errors = (node.exc for node in body(function) if isinstance(node, ast.Raise))
    names = (getattr(error, "func", error) for error in errors)
    return {name.id for name in names if isinstance(name, ast.Name) and name.id in NAMED}


def called(module: str, function: ast.FunctionDef) -> Iterator[ast.FunctionDef]:
    """Yields the functions of the two packages that a function calls by name."""
    for node in body(function):
        if not isinstance(node, ast.Call):
            continue
        home, name = module, getattr(node.func, "id", None)
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            home, name = ".".join(IMPORTED[module].get(node.func.value.id, ())), node.func.attr
        elif name in IMPORTED[module]:
            home, name = IMPORTED[module][name]
        found = DEFINED.get(home, {}).get(name)
        if isinstance(found, ast.FunctionDef):
            yield found


def public(module: str) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Yields (name, function, docstring): a constructor's docstring is that of its class."""
    for name, node in DEFINED[module].items():
        if name.startswith("_"):
            continue
        if isinstance(node, ast.FunctionDef):
            yield name, node, ast.get_docstring(node) or ""
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef):
                if method.name in INIT:
                    yield name, method, ast.get_docstring(node) or ""
                elif not method.name.startswith("_"):
                    yield f"{name}.{method.name}", method, ast.get_docstring(method) or ""


def exported() -> set[tuple[str, str]]:
    """Returns (module, name) of everything that a package exports."""
    stubs = {
        module: ast.parse(path.with_suffix(".pyi").read_text("utf-8"))
        for module, path in FILES.items()
        if path.with_suffix(".pyi").exists()
    }
    packages = [tree for module, tree in MODULES.items() if FILES[module].name == "__init__.py"]
    return {
        (str(node.module), alias.name)
        for tree in (*packages, *stubs.values())
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def unnamed(errors: set[str], docstring: str) -> set[str]:
    """Returns the errors that the `Raises` block of a docstring does not name."""
    block = docstring.partition("\nRaises:\n")[2]
    return {e for e in errors if not any(f"    {name}:" in block for name in NAMED[e])}


def test_errors_that_a_function_raises():
    """The docstrings of commands are their help texts, which name no errors."""
    assert not [
        f"{module}.{name}: {', '.join(sorted(missing))}"
        for module in MODULES
        if not module.startswith("xlvlm_jax.cli")
        for name, function, docstring in public(module)
        if (missing := unnamed(raised(function), docstring))
    ]


def test_errors_of_the_functions_that_an_exported_one_calls():
    """At least one error is named; the docstrings of the called functions describe all of them."""
    names = exported()
    assert ("xlvlm_jax.concepts.decomposition", "decompose") in names
    assert not [
        f"{module}.{name}"
        for module in MODULES
        for name, function, docstring in public(module)
        if (module, name.partition(".")[0]) in names
        and f"{module}.{name}" not in NEVER
        and any(map(raised, called(module, function)))
        and "\nRaises:\n" not in docstring
    ]


def test_a_missing_error_is_found():
    docstring = "Returns x.\n\nRaises:\n    ValueError: no."
    assert unnamed({"ValueError", "PthError", "FileExistsError"}, docstring) == {"FileExistsError"}
    code = "def f():\n    raise ValueError('a')\n    def g():\n        raise PthError"
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef)
    assert raised(function) == {"ValueError"}


def test_records_of_the_reference_describe_their_fields():
    """The pages of the reference do not show comments. A base's fields are described there."""
    pages = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    checked, undescribed = 0, []
    for home, name in re.findall(r"^::: (\S+)\.(\w+)$", pages, re.MULTILINE):
        record = getattr(importlib.import_module(home), name, None)  # None for a module
        fields = (*getattr(record, "_fields", ()), *getattr(record, "__dataclass_fields__", ()))
        own = vars(record).get("__annotations__", {}) if fields else {}
        text = inspect.cleandoc(record.__doc__ or "")  # as Python 3.13 and later keep it
        described = re.findall(r"^ {4}([\w, ]+):", text, re.MULTILINE)
        missing = {*fields} & {*own} - {*", ".join(described).split(", ")}
        undescribed += [f"{home}.{name}.{field}" for field in missing if field[0] != "_"]
        checked += len(own)
    assert not undescribed and checked > 200
