"""Helpers for the tests of the solvers."""

import jax
from jax import monitoring


class Compilations:
    """Counts compiled programs while it is open."""

    def __enter__(self):
        self.names = []
        monitoring.register_event_duration_secs_listener(self._count)
        return self

    def _count(self, event, _, fun_name="", **others):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(fun_name)

    def __exit__(self, *_):
        monitoring.unregister_event_duration_listener(self._count)


def alone(method):
    """Returns a method's solver for one number of concepts; the solver itself takes several."""

    def solve(Z, key, *, num_concepts, **options):
        result = method.solve(Z, key, num_concepts=(num_concepts,), **options)
        one = jax.tree.map(lambda leaf: leaf[0], result)
        # A program may compute more concepts than it is asked for.
        return one._replace(
            components=one.components[:num_concepts],
            activations=one.activations[:, :num_concepts],
            starts=None if one.starts is None else one.starts[:, :num_concepts],
            history=one.history[: int(options.get("max_iter", len(one.history) - 1)) + 1],
        )

    return solve
