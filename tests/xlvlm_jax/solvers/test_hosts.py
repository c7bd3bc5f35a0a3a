"""Two processes of `jax.distributed` on one machine give the result of one."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from xlvlm_jax.concepts.decomposition import decompose

HOST = """
import sys
import jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from xlvlm_jax.concepts.decomposition import decompose

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
Z = np.load(sys.argv[3])
half = len(Z) // 2
mine = Z[half * jax.process_index() :][:half]
rows = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine, Z.shape)
for method in ("snmf", "kmeans", "pca", "simple"):
    # As many updates on both: where they end, equal objectives leave atoms 1e-4 apart.
    options = {"tol": 0, "max_iter": 15, "init": Z[:3]} if method == "snmf" else {}
    found = decompose(rows, 3, method, key=jax.random.key(1), mesh=mesh, **options)
    if jax.process_index() == 0:
        np.savez(f"{sys.argv[4]}/{method}.npz", components=found.components,
                 objective=found.objective)
"""


@pytest.mark.slow
def test_two_hosts_give_the_result_of_one(tmp_path):
    rng = np.random.default_rng(0)
    codes = 10 * rng.exponential(size=(64, 3)) * (rng.random((64, 3)) < 0.5)
    Z = (codes @ rng.normal(size=(3, 10)) + 0.1 * rng.normal(size=(64, 10))).astype(np.float32)
    np.save(tmp_path / "Z.npy", Z)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags}
    paths = [str(tmp_path / "Z.npy"), str(tmp_path)]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, port, str(index), *paths],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for host in hosts:
        _, errors = host.communicate(timeout=300)
        assert host.returncode == 0, errors[-2000:]
    for method in ("snmf", "kmeans", "pca", "simple"):
        options = {"tol": 0, "max_iter": 15, "init": Z[:3]} if method == "snmf" else {}
        one = decompose(Z, 3, method, key=jax.random.key(1), **options)
        found = np.load(tmp_path / f"{method}.npz")
        np.testing.assert_allclose(found["objective"], one.objective, rtol=1e-5, err_msg=method)
        largest = np.abs(one.components).max()
        np.testing.assert_allclose(
            found["components"], one.components, atol=1e-5 * largest, err_msg=method
        )
