"""The number of programs, hosts, and signals that end a command."""

import ast
import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from ports import programs
from xlvlm_jax import cli
from xlvlm_jax.cli import console, runtime
from xlvlm_jax.solvers.phases import Standing


def test_programs_are_counted():
    x = jnp.ones(3)
    with runtime.Programs() as programs:
        jax.jit(lambda x: x * 3.25)(x).block_until_ready()
    assert (programs.compiled, programs.kept) == (1, 0)
    assert str(programs).startswith("1 programs compiled, 0 from the cache, ")
    jax.jit(lambda x: x * 4.25)(x).block_until_ready()
    assert programs.compiled == 1


@pytest.fixture
def screen(monkeypatch) -> io.StringIO:
    """Returns what a terminal shows."""
    text = io.StringIO()
    terminal = Console(force_terminal=True, file=text, width=120)
    monkeypatch.setattr(console, "console", terminal)
    monkeypatch.setattr(runtime, "console", terminal)
    return text


def test_a_terminal_shows_long_compilations(screen, monkeypatch):
    monkeypatch.setattr(programs, "_PATIENCE", 0.02)
    x = jnp.ones(8)

    def named(x):
        for i in range(60):
            x = jnp.sort(jnp.sin(x) * i)
        return x

    with runtime.saying_compilations(), console.solver_bar("snmf"):
        jax.jit(named)(x).block_until_ready()
    assert "compiling named" in screen.getvalue()


def test_a_terminal_shows_the_objective(screen):
    with console.solver_bar("snmf") as tell:
        tell(Standing(4, 5, 300, 1.25, 0.1))
        assert tell is not None
    assert "5/5" in screen.getvalue()
    assert "objective 1.25" in screen.getvalue()


def test_names_of_models_are_no_markup(screen):
    name = "/data/[/old]/m"
    with console.spinner(f"loading {name}"):
        pass
    assert f"loading {name}" in screen.getvalue()
    with pytest.raises(FileNotFoundError, match=r"/data/\[/old\]/m"):
        console.load_model(name)


def test_without_a_terminal_nothing_is_shown(capsys):
    with runtime.saying_compilations(), console.solver_bar("snmf") as tell:
        assert tell is None
    assert capsys.readouterr().out == ""


WAITING = """
import sys, time
from xlvlm_jax import cli

def work(*arguments, **options):
    {first}
    print("ready", flush=True)
    {body}

cli.app.registered_commands.clear()
cli.app.command()(lambda: work())
cli.app.command("other")(lambda: None)
cli.runtime._GRACE_SECONDS = 0.5
sys.argv = ["xlvlm", "<lambda>"]
cli.main()
"""
# What waits in Python, and a call of a library that does not come back, whatever happens.
IN_PYTHON = "time.sleep(60)"
IN_A_LIBRARY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", [IN_PYTHON, IN_A_LIBRARY], ids=["python", "library"])
@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("cli.runtime.resumes()", "run the same command to resume"),
        ("pass", "the same command starts over"),
    ],
    ids=["resumes", "begins"],
)
def test_a_signal_ends_a_command_with_a_line(number, body, first, said):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(body=body, first=first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 10
    assert process.returncode == 128 + number
    assert said in errors


def test_whatever_prints_reads_no_markup():
    """A path or an answer such as "[/INST] yes" would vanish, or end the command.

    `Console.status` and `Status.update` read markup, whatever the console does.
    """
    printing = []
    for file in sorted(Path(console.__file__).parents[1].rglob("*.py")):
        text = file.read_text()
        if "rich" not in text and "console" not in text:
            continue
        for call in ast.walk(ast.parse(text)):
            name = ast.unparse(call.func).split(".")[-1] if isinstance(call, ast.Call) else ""
            if name in ("Console", "TextConsole", "TextColumn"):
                printing.append(name)
                assert "markup=False" in ast.unparse(call), file
            if name in ("status", "Status", "Spinner", "from_markup"):
                assert ast.unparse(call) == "console.status(Text(text))", file
    assert printing == ["TextConsole", "Console", "TextColumn", "TextColumn"]


@pytest.mark.parametrize("said", ["[red]a", "[/x] b", "a[/red]", ":cat:", "[link=c]d[/link]"])
def test_bars_and_errors_show_text_as_it_is(said, screen, capsys):
    with console.progress_bars() as bars:
        bars.add_task(said, total=1, note=f"{said}!")
    shown = re.sub("\x1b\\[[^a-zA-Z]*[a-zA-Z]", "", screen.getvalue())
    assert said in shown and f"{said}!" in shown
    with pytest.raises(SystemExit, match="2"), cli._one_line_errors():
        raise ValueError(f"{said}: no such file")
    assert capsys.readouterr().err == f"error: {said}: no such file\n"
