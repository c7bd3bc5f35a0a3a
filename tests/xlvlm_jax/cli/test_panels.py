"""Help in panels, and the version."""

import tomllib
from pathlib import Path
from typing import Annotated

import pytest
import typer

import xlvlm_jax
from xlvlm_jax.cli import app, panels
from xlvlm_jax.cli.panels import FEW, PANELS, into_panels


def every_command(command):
    below = getattr(command, "commands", {})
    return [each for one in below.values() for each in every_command(one)] or [command]


COMMANDS = {command.name: command for command in every_command(typer.main.get_command(app))}


def options_of(command):
    return [p for p in command.params if p.param_type_name == "option" and p.name != "help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_long_commands_stand_in_panels(name):
    found = {option.name: option.rich_help_panel for option in options_of(COMMANDS[name])}
    if len(found) > FEW:
        assert (
            set(found.values()) <= set(PANELS)
            and found["overwrite" if "overwrite" in found else "output"] == "Run"
        )
    else:
        assert set(found.values()) == {None}


def test_each_name_has_one_panel_and_belongs_to_an_option():
    names = " ".join(PANELS.values()).split()
    assert len(names) == len(set(names))
    assert set(names) <= {option.name for c in COMMANDS.values() for option in options_of(c)}


def test_help_of_a_long_command_shows_the_panels(xlvlm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = xlvlm("extract", "--help")
    assert status == 0
    for panel in ("Data", "Selection", "Model", "Scale", "Run"):
        assert f" {panel} " in out


def test_commands_do_not_share_the_help_of_an_option(monkeypatch):
    shared = Annotated[int, typer.Option(help="Random seed.")]

    def long(seed: shared = 0, other: Annotated[int, typer.Option(rich_help_panel="Own")] = 1):
        pass

    def short(seed: shared = 0):
        pass

    monkeypatch.setattr(panels, "FEW", 1)
    into_panels(long)
    into_panels(short)
    seed, other = (long.__annotations__[name].__metadata__[0] for name in ("seed", "other"))
    assert (seed.rich_help_panel, other.rich_help_panel, seed.help) == (
        "Run",
        "Own",
        "Random seed.",
    )
    assert short.__annotations__["seed"].__metadata__[0].rich_help_panel is None
    assert into_panels(short) is short


def test_an_option_without_a_panel(monkeypatch):
    def long(nowhere: Annotated[int, typer.Option()] = 0):
        pass

    monkeypatch.setattr(panels, "FEW", 0)
    with pytest.raises(KeyError, match="nowhere"):
        into_panels(long)


def test_the_version_is_that_of_the_package(xlvlm):
    pyproject = Path(__file__).parents[3] / "pyproject.toml"
    assert xlvlm_jax.__version__ == tomllib.loads(pyproject.read_text())["project"]["version"]
    assert xlvlm("--version") == (0, f"xlvlm {xlvlm_jax.__version__}\n", "")
