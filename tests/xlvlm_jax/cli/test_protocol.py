"""`--protocol xl-vlms` sets existing options; options on the command line take precedence."""

import pytest
import typer

from xlvlm_jax.cli import app
from xlvlm_jax.cli.protocol import XL_VLMS

ARGUMENTS = {
    "extract": ["m", "d", "--output", "o", "--site", "s", "--tokens", "all"],
    "ground": ["c", "--model", "m"],
    "score": ["c", "--output", "o"],
    "shift": ["a", "b", "--concepts", "c", "--model", "m", "--output", "o"],
    "evaluate": ["m", "d", "--output", "o"],
    "apply": ["m", "d", "--output", "o", "--vector", "v"],
}


def command(name):
    commands = typer.main.get_command(app).commands
    return {**commands, **commands["steer"].commands}[name]


@pytest.mark.parametrize("name", XL_VLMS)
def test_each_option_is_set(name):
    given = command(name).make_context(name, [*ARGUMENTS[name], "--protocol", "xl-vlms"])
    assert {key: given.params[key] for key in XL_VLMS[name]} == XL_VLMS[name]
    plain = command(name).make_context(name, list(ARGUMENTS[name]))
    # None of them is the default anyway, so the test sees what the protocol does.
    assert all(plain.params[key] != value for key, value in XL_VLMS[name].items())


def test_an_option_on_the_command_line_takes_precedence():
    arguments = ["c", "--through-norm", "--protocol", "xl-vlms", "--model", "m"]
    params = command("ground").make_context("ground", arguments).params
    assert params["through_norm"] is True and params["word_rules"] == "xl-vlms"
