"""Programs for TPU, compiled by the TPU's own compiler; skipped where it is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu import measured
from benchmarks.tpu.chips import CHIPS, Place, place

ROOT = Path(__file__).parents[2]
has_libtpu = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed")
ONE = Place("v5e:1", CHIPS["v5e"], (), None)


def benchmark(*arguments):
    """Runs in a separate process: functions traced for a TPU cannot run here."""
    command = [sys.executable, "-m", "benchmarks.tpu", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_DEFAULT_MATMUL_PRECISION"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_one_line_where_libtpu_is_missing(tmp_path):
    if has_libtpu:
        pytest.skip("libtpu is installed")
    done = benchmark("--output", tmp_path / "tpu.json")
    assert done.returncode == 0 and not (tmp_path / "tpu.json").exists()
    assert done.stdout.startswith("libtpu is not installed: pip install")
    assert done.stdout.count("\n") == 1


def test_a_program_that_does_not_fit():
    refusal = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 33.00G of 15.75G hbm. Exceeded hbm capacity by 17.25G.\n\nTotal hbm usage"
    )
    line = measured.too_large(refusal, "kmeans solve", ONE)
    assert line == (
        "kmeans solve does not fit v5e:1: it needs 33.00G of 15.75G hbm, 17.25G too many; use 3 "
        "times as many devices, or 1/3 of the rows"
    )
    assert measured.too_large("INTERNAL: no\nmore", "x", ONE) == (
        "x does not compile for v5e:1: INTERNAL: no"
    )


def test_an_unknown_chip():
    with pytest.raises(ValueError, match=r"topology 'v9x:2x2' is of no chip in v5e, v5p, v6e;"):
        place("v9x:2x2")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--topologies", "v5e:3x5"], "error: libtpu does not know topology 'v5e:3x5': "),
        (["--mesh", "3x1", "--topologies", "v5e:2x2"], "error: mesh 3x1 has 3 devices, v5e:2x2"),
        (["--programs", "kmeens"], "error: no program 'kmeens'; choose solvers, models, or of "),
    ],
)
def test_bad_arguments(arguments, line):
    done = benchmark(*arguments)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(line)


@needs_libtpu
@pytest.mark.slow
def test_small_programs_keep_all_rules(tmp_path):
    names = ["semi-nmf tile", "kmeans tile", "pca tile", "semi-nmf update", "kmeans update"]
    names += ["pca update", "kmeans 16384 update", "semi-nmf 1024 update"]
    done = benchmark(
        "--programs", *names, "--topologies", "v5e:1", "--output", tmp_path / "one.json"
    )
    assert done.returncode == 0, done.stdout
    rows = {row["program"]: row for row in json.loads((tmp_path / "one.json").read_text())["rows"]}
    assert set(rows) == set(names)
    assert all(not row["broken"] and row["cycles"] > 0 for row in rows.values())
    done = benchmark(
        "--programs", "kmeans update", "semi-nmf update", "--growth",
        "--topologies", "v5e:2x2", "--output", tmp_path / "four.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "four.json").read_text())["rows"]
    assert all({each["kind"] for each in row["collectives"]} == {"all-reduce"} for row in rows)
