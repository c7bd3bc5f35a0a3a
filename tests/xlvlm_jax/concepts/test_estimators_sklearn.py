"""Runs scikit-learn's own tests on our estimators: see `in_place_of_scikit_learns`."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "least"),
    [("sklearn.cluster.tests.test_k_means", 50), ("sklearn.decomposition.tests.test_pca", 35)],
)
def test_scikit_learns_tests_pass(module, least, tmp_path):
    if find_spec(module) is None:
        pytest.skip(f"this scikit-learn came without {module}")
    paths = [str(TESTS), str(TESTS.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_ENABLE_X64": "1"}
    plugins = ["-p", "in_place_of_scikit_learns", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", *plugins, "--pyargs", module],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= least, done.stdout[-500:]
