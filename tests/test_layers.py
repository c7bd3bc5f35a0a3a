"""Imports go one way: each subpackage imports those before it, and none after it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From what knows nothing to what knows everything. A line's rooms do not know each other.
LAYERS = (
    (
        "ports.lazy_names",
        "ports.messages",
        "ports.names",
        "ports.programs",
        "ports.tables",
        "ports.torch_notice",
        "ports.tracing",
    ),
    ("ports.parallel",),
    ("ports.intervene",),
    ("ports.inputs", "ports.nn"),
    ("ports.checkpoint",),
    ("ports.decoding", "ports.description", "ports.models"),
    ("ports.passes",),
    ("ports.loaded_model",),
    ("ports.vlm",),
    ("ports.loading",),
    ("ports.inspection", "ports.paired"),
    ("xlvlm_jax.storage",),
    ("xlvlm_jax.data", "xlvlm_jax.solvers"),
    ("xlvlm_jax.metrics",),
    ("xlvlm_jax.features",),
    ("xlvlm_jax.sae",),
    ("xlvlm_jax.concepts", "xlvlm_jax.finetune"),
    ("xlvlm_jax.lenses", "xlvlm_jax.shift", "xlvlm_jax.steering"),
    ("xlvlm_jax.causal", "xlvlm_jax.evaluation"),
    ("xlvlm_jax.report",),
    ("xlvlm_jax.concept_benchmark", "xlvlm_jax.demo", "xlvlm_jax.playground"),
    ("xlvlm_jax.cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# `xlvlm_jax.metrics` still has names that need concepts, and looks them up when they are asked for.
LATE = {("xlvlm_jax/metrics/__init__.py", "xlvlm_jax.concepts")}


def room_of(module: str) -> str | None:
    """Returns a module's subpackage; None for the packages, which export what is in them."""
    room = ".".join(module.split(".")[:2])
    return room if room in LEVEL else None


def imported(file: Path) -> Iterator[str]:
    """Returns the absolute names of everything that a file of the two packages imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = {
    str(file.relative_to(ROOT)): sorted(set(imported(file)))
    for package in ("ports", "xlvlm_jax")
    for pattern in ("*.py", "*.pyi")  # a stub imports what its package exports
    for file in sorted((ROOT / package).rglob(pattern))
}


def test_every_file_is_in_a_room():
    rooms = {".".join(Path(file).with_suffix("").parts[:2]) for file in FILES}
    assert rooms - {"ports.__init__", "xlvlm_jax.__init__"} == set(LEVEL)


def test_the_ports_know_nothing_of_the_toolkit():
    for file, names in FILES.items():
        if file.startswith("ports/"):
            assert not [name for name in names if name.startswith("xlvlm_jax")], file


def test_the_solvers_know_no_model():
    for file, names in FILES.items():
        if file.startswith("xlvlm_jax/solvers/"):
            known = [name for name in names if name.split(".")[0] in ("ports", "flax")]
            assert not known, file


def test_nothing_imports_the_command_line():
    for file, names in FILES.items():
        if not file.startswith("xlvlm_jax/cli/"):
            assert not [name for name in names if name.startswith("xlvlm_jax.cli")], file


def test_rooms_do_not_go_through_the_front_door():
    """Only commands import from the packages themselves, which are above all other rooms."""
    for file, names in FILES.items():
        package = file.split("/")[0]
        if file.count("/") > 1 and not file.startswith("xlvlm_jax/cli/"):
            front = [n for n in names if n.split(".")[0] == package and room_of(n) is None]
            assert not front, file


@pytest.mark.parametrize("room", LEVEL)
def test_no_import_runs_up_the_layers(room):
    found = [
        f"{file} imports {name}"
        for file, names in FILES.items()
        if room_of(".".join(Path(file).with_suffix("").parts)) == room
        for name in names
        if (other := room_of(name)) not in (None, room)
        and LEVEL[other] >= LEVEL[room]
        and (file, other) not in LATE
    ]
    assert not found


def test_commands_are_short():
    """A command parses, calls and prints: what it does is in the rooms below."""
    for file in sorted((ROOT / "xlvlm_jax" / "cli").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{file.name}: {node.name} has {lines} lines"
