"""What commands print: lines as they are, tables within the terminal's width."""

import pytest
from rich.table import Table
from rich.text import Text

from xlvlm_jax.cli.console import console


@pytest.mark.parametrize("kind", [str, Text])
def test_lines_are_not_folded(kind, capsys):
    line = f"3 maps -> /run/{'a long name/' * 20}maps.html"
    console.print(kind(line))
    assert capsys.readouterr().out == f"{line}\n"


def test_tables_are(capsys):
    table = Table("words", box=None)
    table.add_row("many words " * 20)
    console.print(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= console.width
