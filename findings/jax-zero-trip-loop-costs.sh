#!/usr/bin/env bash
# jax 0.10.2 on a CPU: a loop that runs zero times costs as much as one that runs once.
#
# Under vmap, lax.cond computes both branches, so that `fori_loop(0, where(wanted, 1, 0), body, x)`
# is used in its place: one would guess that zero trips cost nothing. But XLA moves what does not
# depend on the loop's carry out of the loop, as if a loop always ran, and a matrix product in the
# body is then computed every time. A barrier around its operand and the carry does not help while
# only the operand is used; a body that uses the loop's counter, or the carry, stays where it is.
#
# Output seen (times differ between machines):
#   plain:   product outside the loop: True;  zero trips take 0.63 times as long as one
#   barrier: product outside the loop: True;  zero trips take 0.98 times as long as one
#   counter: product outside the loop: False; zero trips take 0.00 times as long as one
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$directory/run.py" <<'PYTHON'
import re
import time

import jax
import jax.numpy as jnp


def plain(i, carry, x):
    return jnp.tanh(x @ x).sum(axis=0)


def barrier(i, carry, x):
    x, _ = jax.lax.optimization_barrier((x, carry))
    return jnp.tanh(x @ x).sum(axis=0)


def counter(i, carry, x):
    return jnp.tanh((x + i) @ x).sum(axis=0)


x = jnp.ones((1500, 1500)) / 1500
for body, expected in ((plain, True), (barrier, True), (counter, False)):

    def guarded(x, wanted, body=body):
        start = jnp.zeros(x.shape[1])
        trips = jnp.where(wanted, 1, 0)
        return jax.lax.fori_loop(0, trips, lambda i, carry: body(i, carry, x), start)

    compiled = jax.jit(guarded).lower(x, False).compile()
    best = {}
    for wanted in (False, True):
        spent = []
        for _ in range(7):
            began = time.perf_counter()
            jax.block_until_ready(compiled(x, wanted))
            spent.append(time.perf_counter() - began)
        best[wanted] = min(spent)
    # What the program does outside of all loops.
    outside = bool(re.search("dot|ynn|tanh", compiled.as_text().split("ENTRY")[1]))
    ratio = best[False] / best[True]
    print(
        f"{body.__name__ + ':':9}product outside the loop: {str(outside) + ';':7}"
        f"zero trips take {ratio:.2f} times as long as one"
    )
    assert outside == expected
PYTHON
JAX_PLATFORMS=cpu "$directory/venv/bin/python" "$directory/run.py"
