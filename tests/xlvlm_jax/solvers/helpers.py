"""Helpers for the tests of the solvers."""

import jax


def alone(method):
    """A method's solver for one number of concepts; the solver itself takes several."""

    def solve(Z, key, *, num_concepts, **options):
        result = method.solve(Z, key, num_concepts=(num_concepts,), **options)
        return jax.tree.map(lambda leaf: leaf[0], result)

    return solve
