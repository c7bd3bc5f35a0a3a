"""On 8 host devices, and on two hosts, training gives what one device gives."""

import functools
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from xlvlm_jax.solvers.sae import METHODS, train

OPTIONS = {"max_iter": 50, "batch_size": 64, "learning_rate": 1e-3, "dead_after": 500}
ROWS = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32) + 1

RUN = """
import sys
import jax, numpy as np
from xlvlm_jax.solvers.collectives import keep_pace
from xlvlm_jax.solvers.sae import METHODS, train, training
if len(sys.argv) > 5:
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[5]}", 2, int(sys.argv[6]))
rows = np.load(sys.argv[1])
options = eval(sys.argv[3])
Auto = jax.sharding.AxisType.Auto
for method, sizes in eval(sys.argv[4]):
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(Auto, Auto))
    widths = (7, 9) if METHODS[method].num_sources == 2 else None
    settings = METHODS[method](k=3, **options)
    taken = []

    def waiting(made):
        taken.append({shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made[0])
                      if leaf.ndim for shard in leaf.addressable_shards})
        return keep_pace(made)

    training.keep_pace = waiting
    training.update.clear_cache()
    found = train(rows, jax.random.key(0), settings, 32, mesh=mesh, widths=widths)
    assert training.update._cache_size() == 1, (method, sizes)
    # States take over the memory of those before them.
    assert taken[-1] == taken[-2], (method, sizes)
    if jax.process_index() == 0:
        np.savez(f"{sys.argv[2]}/{method}-{sizes[0]}.npz", **found.params)
"""


BOTH = [
    (method, sizes)
    for method in ("topk-sae", "topk-transcoder", "batchtopk-crosscoder")
    for sizes in ((8, 1), (2, 4))
]
OTHERS = [
    ("batchtopk-sae", (2, 4)),
    ("matryoshka-sae", (2, 4)),
    ("jumprelu-sae", (8, 1)),
    ("archetypal-sae", (2, 4)),
    ("batchtopk-transcoder", (2, 4)),
    ("topk-crosscoder", (8, 1)),
]


def start(tmp_path, devices, cases, *more):
    np.save(tmp_path / "rows.npy", ROWS)
    # Eight threads wait for each other at every collective, on a busy machine for long.
    flags = (
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    arguments = [str(tmp_path / "rows.npy"), str(tmp_path), repr(OPTIONS), repr(cases), *more]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        env=os.environ | {"XLA_FLAGS": flags},
        stderr=subprocess.PIPE,
        text=True,
    )


@functools.cache
def on_one_device(method):
    settings = METHODS[method](k=3, **OPTIONS)
    widths = (7, 9) if settings.num_sources == 2 else None
    return train(ROWS, jax.random.key(0), settings, 32, widths=widths).params


def compare(tmp_path):
    for file in sorted(tmp_path.glob("*.npz")):
        one = on_one_device(file.stem.rsplit("-", 1)[0])
        with np.load(file) as found:
            for name, value in one.items():
                largest = np.abs(value).max()
                np.testing.assert_allclose(
                    found[name], value, rtol=0, atol=1e-5 * largest, err_msg=f"{file.stem} {name}"
                )


@pytest.mark.parametrize("cases", [BOTH, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_eight_devices_give_the_result_of_one(tmp_path, cases):
    process = start(tmp_path, 8, cases)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    assert len(list(tmp_path.glob("*.npz"))) == len(cases)
    compare(tmp_path)


@pytest.mark.slow
def test_two_hosts_give_the_result_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hosts = [start(tmp_path, 4, BOTH[:1], port, str(index)) for index in range(2)]
    for host in hosts:
        _, errors = host.communicate(timeout=600)
        assert host.returncode == 0, errors[-2000:]
    compare(tmp_path)
