"""A few drawn scenes, and the command line in separate processes."""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import scenes
from xlvlm_jax.features.manifest import PICTURES

FOUR_DEVICES = MappingProxyType(
    {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"}
)
COMMAND = [sys.executable, "-c", "from xlvlm_jax.cli import main; main()"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=10, val=40, seed=3)
    return directory


@pytest.fixture(scope="session")
def samples(pictures):
    return data.load("coco", pictures, "train")


def digests(directory: Path) -> dict[str, str]:
    """Returns a digest of each file in a directory, to compare two directories byte by byte.

    Leaves out the file that locates pictures relative to the directory.
    """
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != PICTURES
    }


def run_here(*arguments: object) -> None:
    """Runs the command line in this process, which is quicker than in a separate one."""
    from xlvlm_jax import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xlvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code


def start(
    *arguments: object, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen:
    """Runs the command line in a separate process, with more in its environment."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen, status: int = 0) -> list[tuple[str, str]]:
    """Waits for processes to end with a status; returns (output, errors) of each."""
    ended = [process.communicate(timeout=300) for process in processes]
    for process, (output, errors) in zip(processes, ended, strict=True):
        assert process.returncode == status, output[-1000:] + errors[-2000:]
    return ended


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
