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
from xlvlm_jax.cli import play, runtime
from xlvlm_jax.playground.pictures import Pictures


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


class StillCompiling:
    """A worker that does not end; a second Ctrl-C may come while it is waited for."""

    def __init__(self, also: BaseException | None = None):
        self.also = also

    def end(self, patience: float) -> bool:
        assert patience + 1 < runtime._GRACE_SECONDS  # with what open tabs get
        if self.also is not None:
            raise self.also
        return False


@pytest.mark.parametrize(
    ("also", "error", "status"),
    [
        (None, runtime.Interrupted(signal.SIGINT), 130),
        (None, runtime.Interrupted(signal.SIGTERM), 143),
        (runtime.Interrupted(signal.SIGINT), runtime.Interrupted(signal.SIGTERM), 143),
        (None, OSError("no browser"), 1),
    ],
)
def test_pictures_are_deleted_though_a_program_is_still_compiled(
    monkeypatch, capsys, also, error, status
):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    kept = Pictures()
    play._end(StillCompiling(also), kept, error)
    assert ended == [status] and not kept.folder.exists()
    assert ("no browser" in capsys.readouterr().err) == isinstance(error, OSError)
