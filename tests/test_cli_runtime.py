"""The count of programs, hosts, and signals that end a command."""

import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from xlvlm_jax.cli import runtime


def test_programs_are_counted():
    x = jnp.ones(3)
    with runtime.Programs() as programs:
        jax.jit(lambda x: x * 3.25)(x).block_until_ready()
    assert (programs.compiled, programs.kept) == (1, 0)
    assert str(programs).startswith("1 programs compiled, 0 from the cache, ")
    jax.jit(lambda x: x * 4.25)(x).block_until_ready()
    assert programs.compiled == 1


WAITING = """
import sys, time
from xlvlm_jax import cli

def work(*arguments, **options):
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
def test_a_signal_ends_a_command_with_a_line(number, body):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(body=body)],
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
    assert "the same command goes on from there" in errors
