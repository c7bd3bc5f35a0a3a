"""Several processes of `jax.distributed` on one machine write the same bytes as one."""

import signal
import time

import numpy as np
import pytest

from xlvlm_jax import Concepts, Features
from xlvlm_jax.features.manifest import manifest_of

from .conftest import FOUR_DEVICES, digests, finish, free_port, run_here, start

NORM = "language_model.model.norm"


@pytest.fixture(scope="module")
def extraction(pictures):
    """extraction(output): the command of an extraction in three blocks, batches of one."""

    def arguments(output, batch_size=1):
        return (
            *("extract", "embedded", pictures, "--split", "val", "--output", output),
            *("--site", NORM, "--tokens", "index:-1", "--generated-only"),
            *("--max-new-tokens", 3, "--batch-size", batch_size),
        )

    return arguments


@pytest.fixture(scope="module")
def run(extraction):
    """run(output, hosts) starts the processes of an extraction."""

    def start_all(output, hosts, **options):
        port = free_port()
        return [
            start(*extraction(output, **options), "--hosts", f"127.0.0.1:{port},{hosts},{index}")
            for index in range(hosts)
        ]

    return start_all


@pytest.fixture(scope="module")
def alone(extraction, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "features"
    run_here(*extraction(output))
    return output


@pytest.mark.slow
def test_two_hosts_write_the_bytes_of_one(run, alone, tmp_path):
    finish(*run(tmp_path / "features", 2))
    assert digests(tmp_path / "features") == digests(alone)
    assert len(Features.open(tmp_path / "features").tokens) == 40


@pytest.mark.slow
def test_what_a_dead_host_left_is_used_by_any_number(run, alone, tmp_path):
    """Three new processes for the two remaining blocks: one has nothing to do."""
    output = tmp_path / "features"
    first, second = run(output, 2)
    # The second host writes the second block.
    part = output / "parts" / "000000016"
    deadline = time.monotonic() + 200
    while (manifest_of(part) or {"samples": 0})["samples"] < 3:
        assert time.monotonic() < deadline and second.poll() is None
        time.sleep(0.02)
    for host in (second, first):
        host.send_signal(signal.SIGKILL)
        host.communicate()
    assert not (manifest_of(output) or {"complete": False})["complete"]
    finish(*run(output, 3))
    assert digests(output) == digests(alone)


@pytest.mark.slow
def test_two_hosts_of_four_devices_split_one_model(alone, pictures, tmp_path):
    """The features of one device to 1e-5; they continue what a single host left."""
    output = tmp_path / "features"
    arguments = ["extract", "embedded", pictures, "--split", "val", "--output", output]
    arguments += ["--site", NORM, "--tokens", "index:-1", "--generated-only"]
    arguments += ["--max-new-tokens", 3, "--batch-size", 2, "--num-samples", 8, "--first"]
    single = start(*arguments)
    deadline = time.monotonic() + 250
    while (manifest_of(output) or {"samples": 0})["samples"] < 2:
        assert time.monotonic() < deadline and single.poll() is None
        time.sleep(0.02)
    single.send_signal(signal.SIGKILL)
    single.communicate()
    assert 2 <= manifest_of(output)["samples"] < 8
    text = f"127.0.0.1:{free_port()},2,{{}}"
    more = ("--mesh", "2x4", "--hosts")
    hosts = [start(*arguments, *more, text.format(i), environment=FOUR_DEVICES) for i in range(2)]
    finish(*hosts)
    ours, theirs = Features.open(output), Features.open(alone)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens[:8])
    np.testing.assert_array_equal(ours.sample_rows, theirs.sample_rows[:8])
    assert list(ours.samples) == theirs.samples[:8]
    largest = np.abs(theirs.matrix(NORM)).max()
    np.testing.assert_allclose(ours.matrix(NORM), theirs.matrix(NORM)[:8], atol=1e-5 * largest)


@pytest.mark.slow
def test_every_host_says_what_is_wrong(run, alone):
    """With another batch size on the same directory, no host waits for another."""
    for _, errors in finish(*run(alone, 2, batch_size=2), status=2):
        assert "batch_size: expected 1, got 2" in errors


@pytest.mark.slow
def test_hosts_decompose_as_one(alone, tmp_path):
    """Each host reads the rows of its devices; 40 rows on two devices, 20 each."""
    arguments = ["decompose", alone, "--num-concepts", 3, "--method", "kmeans"]
    run_here(*arguments, "--output", tmp_path / "one")
    port = free_port()
    hosts = [
        start(
            *arguments,
            *("--output", tmp_path / "two", "--hosts", f"127.0.0.1:{port},2,{index}"),
        )
        for index in range(2)
    ]
    finish(*hosts)
    one, two = Concepts.load(tmp_path / "one"), Concepts.load(tmp_path / "two")
    np.testing.assert_allclose(two.objective, one.objective, rtol=1e-5)
    largest = np.abs(one.components).max()
    np.testing.assert_allclose(two.components, one.components, atol=1e-5 * largest)
    np.testing.assert_allclose(two.activations, one.activations, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host", "expected auto or ADDRESS:PORT,COUNT,INDEX"),
        ("host:1,2,x", "expected auto or ADDRESS:PORT,COUNT,INDEX"),
        ("host:1,2,2", "host index is 2; expected 0 to 1 for 2 hosts"),
    ],
)
def test_invalid_hosts(xlvlm, tmp_path, text, message):
    status, _, errors = xlvlm("decompose", tmp_path, "--output", tmp_path / "c", "--hosts", text)
    assert status == 2
    assert message in errors


def test_auto_without_a_cluster(tmp_path):
    """Runs in a separate process: hosts are joined before JAX does anything else."""
    output = tmp_path / "c"
    arguments = ("decompose", tmp_path, "--output", output, "--hosts", "auto")
    ((_, errors),) = finish(start(*arguments), status=2)
    assert "the cluster does not provide the hosts" in errors
    assert "or give ADDRESS:PORT,COUNT,INDEX" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not output.exists()
