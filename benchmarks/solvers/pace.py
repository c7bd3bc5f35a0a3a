"""Measures one update on the whole of Z relative to the machine's limits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import seconds
from xlvlm_jax.solvers import blas_threads, kmeans, pca, semi_nmf
from xlvlm_jax.solvers.collectives import ONE_DEVICE
from xlvlm_jax.solvers.loop import begin, run

KEY = jax.random.key(0)


def updating(method: str, Z: jax.Array, K: int) -> tuple:
    """Returns (update, problem, state, passes, columns) of a method.

    An update has to read Z `passes` times, and multiplies it with so many columns in all. The state
    is None if the method takes one step.
    """
    active = jnp.ones(K, bool)
    start = Z[:: max(len(Z) // K, 1)][:K]
    if method == "snmf":
        energy = 0.5 * jnp.sum(Z**2, axis=1)
        problem = semi_nmf.Problem(Z, energy, jnp.float32(1), active)
        atoms = start / jnp.linalg.norm(start, axis=1, keepdims=True)
        state = semi_nmf.init(problem, jnp.zeros((K, len(Z))), atoms)
        return semi_nmf.update, problem, state, 1, 2 * K
    if method == "kmeans":
        problem = kmeans.with_leading(kmeans.prepare(Z, len(Z), active), K, KEY, len(Z))
        return kmeans.update, problem, kmeans.init(problem, start - problem.mean), 1, K
    problem = pca.prepare(Z, len(Z))
    plan, _ = pca.plan(KEY, width=Z.shape[1], num_samples=len(Z), num_concepts=(K,))
    if plan.narrow:
        # The covariance (only half is computed), and the scores, which need its axes.

        def whole_solve(problem: pca.Problem, _: None) -> jax.Array:
            problem, state = pca.solved(problem.Z, len(Z), K, K)
            return pca.project(problem, state.basis)

        return whole_solve, problem, None, 2, Z.shape[1] // 2 + K
    if plan.blocks is None:

        def whole(problem: pca.Problem, _: None) -> pca.State:
            directions = pca.whole_space(problem, len(Z), ONE_DEVICE)
            return pca.best_within(problem, directions, K, K)

        # From the rows themselves, and their scores.
        return whole, problem, None, 2, min(Z.shape)
    blocks = plan.blocks
    start = jax.random.normal(KEY, (Z.shape[1], blocks.width))
    state = pca.init(problem, start, K, blocks)
    update = partial(pca.update, num_concepts=K, blocks=blocks.more)
    # A block is the image of the one before.
    return update, problem, state, blocks.more, 2 * blocks.more * blocks.width


@blas_threads.one_thread()
def pace(method: str, Z: jax.Array, K: int, repeats: int) -> dict[str, float]:
    """Measures seconds per update and per read of Z, the rate of a large product, and the share.

    The limit is what an update cannot beat: the longer of reading Z as often as it has to and doing
    its products with Z at the rate of the large product. The bytes are those of the compiled
    program.
    """
    update, problem, state, passes, columns = updating(method, Z, K)
    updates = 1 if state is None else 5

    @jax.jit
    def several(problem: Any, state: Any) -> Any:
        if state is None:
            return update(problem, state)
        # error > -inf always holds, so all updates run.
        return run(partial(update, problem), begin(state, updates), tol=-jnp.inf, max_iter=updates)

    square = jnp.ones((2048, 2048))
    calls = {
        "update": partial(several, problem, state),
        "read": partial(jax.jit(jnp.sum), Z),
        "product": partial(jax.jit(jnp.matmul), square, square),
    }
    for call in calls.values():
        jax.block_until_ready(call())
    # Alternately, so that other load affects all three.
    times = [{name: seconds(call)[0] for name, call in calls.items()} for _ in range(repeats)]
    update, read, product = (np.array([each[name] for each in times]) for name in calls)
    update, rate = update / updates, 2 * 2048**3 / product
    limit = np.maximum(passes * read, 2 * Z.size * columns / rate)
    memory = several.lower(problem, state).compile().memory_analysis()
    return {
        "update_seconds": float(np.median(update)),
        "read_seconds": float(np.median(read)),
        "gflops": float(np.median(rate) / 1e9),
        "limit_seconds": float(np.median(limit)),
        "share_of_limit": float(np.median(limit / update)),
        "beyond_Z": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / Z.nbytes,
    }
