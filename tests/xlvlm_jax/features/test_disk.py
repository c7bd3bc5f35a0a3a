"""A disk that is too small is refused in advance, or noticed while writing."""

import re
import shutil
import subprocess

import pytest

from xlvlm_jax.features import preflight
from xlvlm_jax.features.preflight import require_disk

from .conftest import COMMAND, digests, run_here

# In a mount namespace of its own: a small tmpfs, the command, the same command with more room.
SMALL_DISK = """
set -e
mkdir -p "$1"
mount -t tmpfs -o size="$2" none "$1"
shift 2
status=0
"$@" --output disk/features || status=$?
echo "status $status" >&2
mount -o remount,size=100m disk
"$@" --output disk/features
cp -r disk/features found
"""


@pytest.fixture(scope="module")
def namespaces():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")


def test_too_small_in_advance(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(
        OSError, match=r"needs up to 6e-09 GB and its disk has 5e-09 GB free; free some"
    ):
        require_disk(tmp_path / "not" / "there", 6)
    require_disk(tmp_path, 5)


@pytest.mark.slow
def test_full_during_the_run(namespaces, pictures, tmp_path):
    """There is room for one chunk of states at both sites, but not for two."""
    arguments = ["extract", "embedded", str(pictures), "--split", "val"]
    arguments += ["--tokens", "all", "--rows", "each", "--include-prompt", "--max-new-tokens", "3"]
    for site in ("language_model.model.norm", "language_model.model.layers.4"):
        arguments += ["--site", site]
    run_here(*arguments, "--output", tmp_path / "whole")
    size = sum(f.stat().st_size for f in (tmp_path / "whole").rglob("*") if f.is_file())
    script = tmp_path / "script.sh"
    script.write_text(SMALL_DISK)
    limited = ("unshare", "-rm", "sh", script, "disk", str(size - 2**19))
    run = subprocess.run(
        [*limited, *COMMAND, *arguments, "--ignore-disk"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "status 1" in run.stderr
    told = next(line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert (
        re.search(r"cannot write features to \S+/disk/features: ", told) and "enough space" in told
    )
    assert digests(tmp_path / "found") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_the_preflight_predicts_the_size_of_a_run(vlm, samples, tmp_path):
    """Rows and bytes are upper bounds, and close ones if every sample has one row."""
    from xlvlm_jax.features import ExtractionSettings, extract
    from xlvlm_jax.features.selection import Selection

    settings = ExtractionSettings(
        ("language_model.model.norm",), Selection.parse("index:-1"), batch_size=4, max_new_tokens=2
    )
    output = tmp_path / "features"
    needs = preflight(vlm, samples, output, settings)
    assert not output.exists()
    assert needs.samples == needs.rows == len(samples) == 10
    assert (needs.done, needs.missing, needs.fits) == (0, (), True)
    summary = extract(vlm, samples, output, settings)
    assert summary.rows == needs.rows
    width = vlm.site_shapes[settings.sites[0]][-1]
    written = (output / "samples.jsonl").stat().st_size + summary.rows * (4 * width + 16)
    assert 0.9 * written < needs.disk < 1.2 * written
    assert [count for _, count in needs.programs] == [3]
    weights = sum(leaf.nbytes for leaf in vlm.params["language_model"]["model"]["norm"].values())
    assert needs.parameters > weights and needs.temporaries > 0
    assert preflight(vlm, samples, output, settings).done == 10
