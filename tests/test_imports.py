"""Modules are imported when first used: a first import and the help of a command are cheap."""

import json
import subprocess
import sys

import pytest

# Prints which of the modules named in the arguments are imported after the script.
PRINT_IMPORTED = """
import json, sys
print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]))
"""
HEAVY = (
    *("grain", "jinja2", "matplotlib", "optax", "orbax", "pandas", "scipy.optimize", "scipy.stats"),
    *("sklearn", "torch", "transformers"),
)


def imported(script: str, modules: tuple[str, ...]) -> list[str]:
    command = [sys.executable, "-c", script + "\n" + PRINT_IMPORTED, *modules]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("script", "unused"),
    [
        ("import ports, xlvlm_jax", ("jax", "flax", "numpy", "scipy", "PIL", *HEAVY)),
        ("from xlvlm_jax import decompose", ("flax", "PIL", *HEAVY)),
        ("from xlvlm_jax import Concepts, project", ("flax", "PIL", *HEAVY)),
        ("from ports import VLM, add, load", HEAVY),
        (
            "from xlvlm_jax import Features, ground_text, metrics, shift",
            tuple(name for name in HEAVY if name != "optax"),
        ),
    ],
    ids=["the packages", "decompose", "concepts", "models", "features and metrics"],
)
def test_a_first_use_does_not_import(script, unused):
    assert imported(script, unused) == []


def test_the_module_list_shows_what_was_imported():
    assert imported("import xlvlm_jax; xlvlm_jax.decompose", ("jax", "flax")) == ["jax"]
    assert "sklearn" in imported("from xlvlm_jax import KMeans", HEAVY)


# Runs every command with --help, and a few with arguments that parsing refuses.
COMMANDS = """
from typer.testing import CliRunner
from xlvlm_jax.cli import app

def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output

def named(app):
    return [c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands]

groups = {group.name: group.typer_instance for group in app.registered_groups}
commands = [[name] for name in named(app)]
commands += [[group, name] for group, members in groups.items() for name in named(members)]
assert len(commands) >= 19, commands
for command in [[], *commands, *([group] for group in groups)]:
    code, text = run(*command, "--help")
    assert code == 0 and "Usage:" in text and " ".join(command) in text, (command, text)
assert run("--version")[1].startswith("xlvlm ")
assert run("decompose", "features", "--outputt", "x")[0] == 2
assert run("decompose")[0] == 2
"""


def test_help_version_and_refused_arguments_import_no_jax():
    assert imported(COMMANDS, ("jax", "flax", "numpy", *HEAVY)) == []
