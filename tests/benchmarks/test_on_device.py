"""The script for a machine with an accelerator: how it ends, here where there is none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import on_device

ROOT = Path(__file__).parents[2]
# As if the limits could not be measured.
ENDLESS = """
import sys, time
from benchmarks import on_device

on_device.BEYOND = 3
on_device.measure_limits = lambda sizes: time.sleep(100)
sys.argv[1:] = ["--tiny", "--parts", "limits", "--budget", "1", "--output", sys.argv[1]]
on_device.main()
"""


def test_values_are_compared_by_their_kind():
    cpu = {
        "a logits": np.float32([1, -4]),
        "b tokens": np.array([1, 2, 3, 4]),
        "c states": np.float32([2.0]),
        "d gradient": np.float32([1, 2]),
    }
    ours = {
        "a logits": np.float32([1, -4.0002]),
        "b tokens": np.array([1, 2, 3, 5]),
        "c states": np.float32([2.0]),
        "d gradient": np.float32([np.nan, 2]),
    }
    rows = {row["value"]: row for row in on_device.compared(ours, cpu)}
    np.testing.assert_allclose(rows["a logits"]["difference"], 5e-5, rtol=1e-2)
    assert rows["b tokens"]["difference"] == 0.25 and rows["b tokens"]["bound"] == 0
    assert [row["ok"] for row in rows.values()] == [True, False, True, False]


def test_without_an_accelerator_it_says_so_in_one_line(tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "on_device.sh", "--output", tmp_path / "results"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "results").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: JAX finds no accelerator here, only the CPU; install jax[cuda]")


def test_it_ends_in_time_with_what_it_has(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 3 and time.monotonic() - began < 60, done.stderr[-500:]
    assert "stopped in limits after 4 s" in done.stdout
    results = json.loads((tmp_path / "on_device-cpu.json").read_text())
    assert results["stopped"] == "limits" and results["seconds"] >= 4
    assert results["rates"] == [] and results["machine"]["devices"] == ["cpu"]
