"""The benchmark of commands: what it measures of a process."""

import numpy as np
import pytest

from benchmarks import memory, scale


def test_the_peak_of_a_command_is_its_own(tmp_path):
    # Larger than the command, which has to start no model and no solver.
    held = np.ones(2**25)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "file").write_bytes(bytes(1000))
    row = scale.measure(scale.Command("help", ["--help"], tmp_path / "output"))
    assert 10e6 < row["bytes"] < held.nbytes < memory.resident().peak
    assert row["disk"] == 1000 and row["cpu"] > 0 and row["seconds"] > 0


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="xlvlm decompose --wrong ended with 2"):
        scale.measure(scale.Command("wrong", ["decompose", "--wrong"], tmp_path))


def test_sizes_are_those_of_a_status(tmp_path):
    (tmp_path / "status").write_text(
        "Name:\tpython\nVmHWM:\t    3000 kB\nVmRSS:\t    2000 kB\n"
        "RssAnon:\t    1500 kB\nRssFile:\t     500 kB\nThreads:\t3\n"
    )
    found = memory.resident(tmp_path / "status")
    assert found == (2000 * 1024, 3000 * 1024, 1500 * 1024, 500 * 1024)
