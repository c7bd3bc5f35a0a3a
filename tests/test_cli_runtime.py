"""Kept programs, their count, hosts, and signals that end a command."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from xlvlm_jax.cli import runtime


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = jax.config.jax_compilation_cache_dir
    try:
        for before, after in (("told", "told"), (None, str(tmp_path / "xlvlm-jax" / "programs"))):
            jax.config.update("jax_compilation_cache_dir", before)
            runtime.keep_programs()
            assert jax.config.jax_compilation_cache_dir == after
    finally:
        jax.config.update("jax_compilation_cache_dir", told)


def test_programs_are_counted():
    x = jnp.ones(3)
    with runtime.Programs() as programs:
        jax.jit(lambda x: x * 3.25)(x).block_until_ready()
    assert (programs.compiled, programs.kept) == (1, 0)
    assert str(programs).startswith("1 programs compiled, 0 from the cache, ")
    jax.jit(lambda x: x * 4.25)(x).block_until_ready()
    assert programs.compiled == 1


TWICE = """
from xlvlm_jax.cli import runtime
runtime.keep_programs()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x = jnp.ones((8, 8))
with runtime.Programs() as programs:
    jax.jit(lambda x: jnp.linalg.eigh(x @ x)[0])(x).block_until_ready()
print(programs.compiled, programs.kept)
"""


def test_a_second_process_takes_them_from_the_cache(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    found = [
        subprocess.run(
            [sys.executable, "-c", TWICE], env=environment, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert found == ["1 0\n", "1 1\n"]


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
