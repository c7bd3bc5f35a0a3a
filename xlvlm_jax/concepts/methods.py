"""The methods by which concepts are found: their names, solvers and options."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from xlvlm_jax.solvers import kmeans, largest_norm, pca, semi_nmf
from xlvlm_jax.solvers.validation import check_number, check_whole

METHODS = {"snmf": semi_nmf, "kmeans": kmeans, "pca": pca, "simple": largest_norm}
ALIASES = {"nndl": "snmf"}
# What a user calls `init` is given to the solver under the name of what it holds.
INIT = {"snmf": "init_atoms", "kmeans": "init_centroids"}
NOT_OPTIONS = ("width", "num_samples", "num_concepts", "unit", "mesh", "sample_weight")
RELATIVE = "relative_alpha"  # whether alpha is in units of the rows' root mean square norm


def method_named(name: str) -> str:
    """The method of a name or an alias. ValueError, with the nearest names, for another."""
    names = (*METHODS, *ALIASES)
    if name not in names:
        raise ValueError(
            f"unknown method {name!r}; expected one of {', '.join(names)}" + _nearest(name, names)
        )
    return ALIASES.get(name, name)


def options_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's defaults overlaid with the given options, checked."""
    solver = METHODS[method]
    # A method without updates has no plan, but for its one program.
    parameters = inspect.signature(getattr(solver, "plan", solver.solve)).parameters.values()
    renamed = {INIT.get(method): "init"}
    options = {
        renamed.get(parameter.name, parameter.name): parameter.default
        for parameter in parameters
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in NOT_OPTIONS
    }
    if method == "snmf":
        options[RELATIVE] = False
    for name in given:
        if name not in options:
            known = f"its options are {', '.join(options)}" if options else "it has none"
            raise ValueError(
                f"method {method!r} has no option {name!r}; {known}" + _nearest(name, options)
            )
    options |= given
    if not isinstance(options.get(RELATIVE, False), bool):
        raise ValueError(f"{RELATIVE} must be True or False; got {options[RELATIVE]!r}")
    for name, lowest in {"alpha": 0, "tol": 0}.items():
        if name in options:
            check_number(name, options[name], lowest)
            options[name] = float(options[name])
    for name, lowest in {"max_iter": 0, "n_init": 1}.items():
        if options.get(name) is not None:
            check_whole(name, options[name], lowest)
            options[name] = int(options[name])
    return options


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=2)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
