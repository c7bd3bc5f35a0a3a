"""`xlvlm play`: what it says when it can't begin, and that it serves and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from xlvlm_jax import playground


def test_a_port_in_use_is_said_before_the_model_is_loaded(xlvlm):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, _, said = xlvlm("play", "no-such-model", "--port", port)
    assert status == 2
    assert said.strip() == (
        f"error: port {port} is in use; choose another with --port, or --port 0 for any free one"
    )


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(xlvlm, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    # Imported again, as in a new process.
    monkeypatch.delitem(sys.modules, "xlvlm_jax.playground.server", raising=False)
    monkeypatch.delattr(playground, "server", raising=False)
    if missing == "starlette":
        monkeypatch.setitem(sys.modules, "starlette.applications", None)
    status, _, said = xlvlm("play", "embedded", "--port", 0)
    assert status == 2
    assert re.fullmatch(
        rf"error: xlvlm play needs {missing}\S*, which is not installed; run "
        r"`pip install 'xlvlm-jax\[play\]'`",
        said.strip(),
    )


def test_a_vector_of_another_model_is_bad_input(xlvlm, tmp_path):
    import numpy as np

    from xlvlm_jax import steering

    source = {"model": "another", "fingerprint": "0" * 16}
    path = tmp_path / "v.safetensors"
    steering.SteeringVector(np.ones(192, np.float32), "language_model.model.norm", source).save(
        path
    )
    status, _, said = xlvlm("play", "embedded", "--vector", path, "--port", 0)
    assert status == 2 and "fitted on 'another'" in said


def test_it_serves_to_who_has_the_address_and_ends(tmp_path):
    command = [sys.executable, "-c", "from xlvlm_jax.cli import main; main()"]
    with subprocess.Popen(
        [*command, "play", "embedded", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as server:
        assert server.stdout is not None
        try:
            line = next(line for line in server.stdout if line.startswith("http://127.0.0.1:"))
            address = line.strip()
            with urllib.request.urlopen(address) as page:
                assert b"Playground" in page.read()
            root = address.rstrip("/").rpartition("/")[0]
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"{root}/state")
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) in (0, 130)
