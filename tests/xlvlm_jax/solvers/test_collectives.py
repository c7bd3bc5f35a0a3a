"""Rows on one device and on eight, and what an update sends between devices."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from xlvlm_jax.solvers.collectives import ONE_DEVICE, keep_pace

MESH = """
import re
from functools import partial
from unittest import mock
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from xlvlm_jax.solvers import kmeans, kmeans_assignment, kmeans_leading, pca, semi_nmf
from xlvlm_jax.solvers.loop import Result
from xlvlm_jax.solvers.collectives import Rows, keep_pace
from xlvlm_jax.solvers.restarts import draw_rows, draw_weighted

mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = Rows("data")
spread = partial(jax.shard_map, mesh=mesh, check_vma=False)
"""

PRIMITIVES = (
    MESH
    + """
values = np.random.default_rng(0).random((24, 3)).astype(np.float32)
numbers = jnp.array([23, 0, 7, 7])
take = spread(rows.take, in_specs=(P("data"), P()), out_specs=P())
np.testing.assert_array_equal(take(values, numbers), values[numbers])
columns = spread(rows.take_columns, in_specs=(P(None, "data"), P()), out_specs=P())
with mock.patch("jax.default_backend", return_value="tpu"):
    np.testing.assert_array_equal(columns(values.T, numbers), values[numbers])
largest = spread(lambda s: rows.largest(s, 5), in_specs=P("data"), out_specs=P())
np.testing.assert_array_equal(largest(values[:, 0]), np.argsort(-values[:, 0])[:5])
np.testing.assert_allclose(
    spread(lambda v: rows.total(v.sum(0)), in_specs=P("data"), out_specs=P())(values),
    values.sum(0), rtol=1e-6)
draw = spread(rows.draw, in_specs=(P("data"), P()), out_specs=P())
uniform = np.linspace(0.01, 0.99, 7, dtype=np.float32)
expected = np.searchsorted(np.cumsum(values[:, 1]), uniform * values[:, 1].sum(), side="right")
np.testing.assert_array_equal(draw(values[:, 1], uniform), expected)
key, weights = jax.random.key(1), values[:, 2]
drawn = spread(lambda w: draw_rows(key, 20, 5, len(w), rows), in_specs=P("data"), out_specs=P())
np.testing.assert_array_equal(drawn(weights), draw_rows(key, 20, 5, 24))
# No device draws for the rows of others.
text = jax.jit(drawn).lower(jax.ShapeDtypeStruct((800,), jnp.float32)).compile().as_text()
assert "f32[100]" in text and "f32[800]" not in text.partition("ENTRY")[2].partition("\\n")[2]
drawn = spread(lambda w: draw_weighted(key, w, 5, 20, rows), in_specs=P("data"), out_specs=P())
for of_eight, of_one in zip(drawn(weights), draw_weighted(key, weights, 5, 20)):
    np.testing.assert_array_equal(of_eight, of_one)
# A loop that looks at no result has one program in flight.
step = jax.jit(spread(lambda v: v + rows.total(v.sum()), in_specs=P("data"), out_specs=P("data")))
value = jnp.ones(8)
for count in range(50):
    value, number = keep_pace((step(value), count))
    assert value.is_ready() and number == count
# Sums of clusters that follow the rows that change are those of all rows, on each device.
kmeans_leading.COLUMNS, kmeans_leading.LEAST_WIDTH, kmeans_leading.LEAST_SCORES = 9, 40, 1
kmeans_assignment.FEW = 2
N, D = 1600, 40
rng = np.random.default_rng(0)
Z = 3 + (rng.normal(size=(N, D)) / np.arange(1, D + 1)).astype(np.float32)


def follow(Z, K, kind, size):
    problem = kmeans.prepare(Z, N, jnp.ones(K, bool), rows)
    problem = kmeans.with_leading(problem, K, key, N, rows)
    start, kept = jnp.asarray(centroids) - problem.mean, kmeans_assignment.nothing(problem)
    assert isinstance(kept, kind)

    def step(carry, move):
        kept, before, first = carry
        shifts = jnp.where(first, jnp.inf, jnp.linalg.norm(start + move - before, axis=1))
        kept, labels, sums = kmeans_assignment.renew(problem, kept, start + move, shifts)
        # A device that summed all rows once more would lose what is added here.
        kept = kept._replace(sums=sums._replace(totals=sums.totals + first * jnp.ones((K, D))))
        return (kept, start + move, False), labels

    moves = size * jax.random.normal(key, (10, K, D))
    (kept, *_), labels = jax.lax.scan(step, (kept, start, True), moves)
    return rows.total(kept.sums), labels, problem.mean


for K, kind, size in (
    (6, kmeans_assignment.Bounds, 0.001), (140, kmeans_assignment.Ruled, 0.01)
):
    centroids = Z[:K]
    run = partial(follow, K=K, kind=kind, size=size)
    run = spread(run, in_specs=P("data"), out_specs=(P(), P(None, "data"), P()))
    (counts, totals), labels, mean = jax.jit(run)(Z)
    assert 5 < (labels[1:] != labels[:-1]).sum() < N
    members = np.asarray(labels[-1]) == np.arange(K)[:, None]
    np.testing.assert_array_equal(counts.value, members.sum(axis=1))
    expected = members @ (Z.astype(np.float64) - np.asarray(mean))
    np.testing.assert_allclose(totals.value - 8, expected, atol=1e-5)
print("equal")
"""
)

COMMUNICATION = (
    MESH
    + """
D, K = 48, 5
WIDE, MANY = 300, 40


def sent(method, N):
    '''Numbers in the collectives of a compiled update that every iteration runs.'''
    Z = jnp.ones((N, D))
    active = jnp.ones(K, bool)

    def update(Z):
        if method == "snmf":
            problem = semi_nmf.Problem(Z, jnp.ones(len(Z)), jnp.float32(1), active)
            state = semi_nmf.init(problem, jnp.ones((K, len(Z))), jnp.eye(K, D), rows)
            step = partial(semi_nmf.update, problem, rows=rows)
        elif method == "kmeans":
            problem = kmeans.prepare(Z, N, active, rows)
            state = kmeans.init(problem, jnp.eye(K, D))
            step = partial(kmeans.update, problem, rows=rows)
        elif method == "pca":
            problem = pca.prepare(Z, N, rows)
            state = pca.init(problem, jnp.eye(D, K), K, pca.Blocks(K, 0, 1, K), rows)
            step = partial(pca.update, problem, num_concepts=K, rows=rows)
        else:
            problem = pca.prepare(jnp.ones((len(Z), WIDE)), N, rows)
            blocks = pca.blocks_for(MANY, 10 * WIDE, WIDE)
            state = pca.init(problem, jnp.eye(WIDE, blocks.width), MANY, blocks, rows)
            step = partial(pca.update, problem, num_concepts=MANY, rows=rows, blocks=blocks.more)
        return jax.lax.while_loop(lambda s: s.error > 0, step, state).error

    # The optimiser's passes are run, so that this is what the devices do.
    text = jax.jit(spread(update, in_specs=P("data"), out_specs=P())).lower(Z).compile().as_text()
    bodies = set(re.findall(r"body=%?([\\w.-]+)", text))
    count, other = 0, set()
    for part in re.split(r"\\n(?=%?[\\w.-]+ \\(|ENTRY)", text):
        name = re.match(r"%?([\\w.-]+)", part).group(1)
        for line in part.splitlines():
            found = re.search(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute)[(-]",
                              line)
            if found and name in bodies:
                shapes = re.findall(r"\\w+\\[([\\d,]*)\\]", found.group(1))
                count += sum(int(np.prod([int(d) for d in s.split(",") if d])) for s in shapes)
                if found.group(2) != "all-reduce":
                    other.add(found.group(2))
    return count, other


for method in ("snmf", "kmeans", "pca", "blocks"):
    few, more = sent(method, 80), sent(method, 800)
    print(method, few == more, few[0], sorted(few[1]))
"""
)


def run(script):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_on_one_device():
    values = jnp.arange(12.0).reshape(6, 2)
    assert ONE_DEVICE.total(3) == 3
    np.testing.assert_array_equal(ONE_DEVICE.numbers(4), [0, 1, 2, 3])
    np.testing.assert_array_equal(ONE_DEVICE.take(values, jnp.array([5, 0])), [[10, 11], [0, 1]])
    np.testing.assert_array_equal(ONE_DEVICE.largest(jnp.array([1.0, 3, 2]), 2), [1, 2])
    # Weights 1, 0, 3: a quarter of the unit interval belongs to the first, the rest to the last.
    drawn = ONE_DEVICE.draw(jnp.array([1.0, 0, 3]), jnp.array([0.0, 0.2, 0.3, 0.99]))
    np.testing.assert_array_equal(drawn, [0, 0, 2, 2])
    # Rounded, the product with the sum of 4.0000005 is that sum: it is not beyond the last weight.
    last = ONE_DEVICE.draw(jnp.array([1.0, 3.0000005, 0]), jnp.array([1 - 2.0**-24]))
    np.testing.assert_array_equal(last, [1])


def test_one_device_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", None)
    value = {"a": jnp.ones(3), "b": 2}
    assert keep_pace(value) is value
    assert keep_pace(()) == ()


def test_on_eight_devices_as_on_one():
    assert run(PRIMITIVES) == "equal\n"


def test_an_update_sends_no_more_for_more_rows():
    sent = {}
    for line in run(COMMUNICATION).splitlines():
        method, same, count, _ = re.match(r"(\w+) (\w+) (\d+) (.*)", line).groups()
        assert same == "True", line
        sent[method] = int(count)
    D, K = 48, 5
    # The sums: K x D products, K x K overlaps, K uses, the objective; counts and totals;
    # images, and the overlaps of the last scores and the new ones, most of them once.
    assert sent["snmf"] == K * D + K * K + K + 1
    assert sent["kmeans"] == 2 * K * D + 2 * K  # totals and counts as pairs
    assert sent["pca"] == K * D + 3 * 10 + 4 * 7 + 3 * 3
    # The images of a block at the start and in an update, which runs this for each of its blocks;
    # overlaps of 96 axes and two blocks of 32 columns.
    assert sent["blocks"] == 2 * 32 * 300 + 53 * 160 + 54 * 107 + 53 * 53
