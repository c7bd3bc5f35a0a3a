"""The methods that find concepts: one record per method, the only place that knows its name.

N samples, M of them, K concepts, D width.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xlvlm_jax.sae import dictionary
from xlvlm_jax.solvers import kmeans, largest_norm, pca, sae, semi_nmf, streamed
from xlvlm_jax.solvers.linalg import matmul
from xlvlm_jax.solvers.validation import check_number, check_whole

AnyArray = jax.Array | np.ndarray
# Parameters that are not options of the method.
NOT_OPTIONS = (
    *("width", "num_samples", "num_concepts", "unit"),
    *("mesh", "sample_weight", "activations"),
)
RELATIVE = "relative_alpha"  # whether alpha is in units of the rows' root mean square norm


class ScaledRows(NamedTuple):
    """Rows and concepts as a solver takes them: in a unit, and centred in float64 if needed."""

    Z: Float[Array, "M D"]
    components: Float[Array, "K D"]
    mean: Float[Array, " D"]
    unit: float  # of Z, components and mean; atoms have length one and are not scaled
    num_samples: int  # leading rows that count; the others pad Z


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to find concepts. A new one needs a solver and one of these records, nothing else.

    Sparse autoencoders have no solver, and their concepts carry what encodes rows.

    Attributes:
        name: name of the method for users.
        solver: a module with `solve`, and `plan` if it has updates (see `solvers.phases`). Its
            keyword arguments, except NOT_OPTIONS, are the method's options. None for sparse
            autoencoders.
        encode: (rows, options) -> activations[M, K] of rows on given components; None for sparse
            autoencoders.
        streamed: the module that solves for rows on disk (see `solvers.streamed`); None if there is
            none.
        init: name of the solver's argument for initial components; None if it takes none.
        is_centroids: whether components are points among the rows, each row has a nearest one, and
            activations are not coefficients. If not, rows are activations times components.
        is_centred: whether shifting all rows only shifts the mean, so that the mean of the rows can
            be subtracted first, in float64.
        has_mean: whether the solver finds a mean and subtracts it from every row.
        is_sparse: whether it has an alpha, so that rows may have no nonzero code and concepts may
            be dead.
        max_per_width: whether there are at most as many concepts as columns.
        takes_weights: whether rows may have different weights.
        can_omit_activations: whether it saves work if nobody wants the activations.
        training: for sparse autoencoders that can be trained here, the class of their options (see
            `solvers.sae`).
    """

    name: str
    solver: ModuleType | None = None
    encode: Callable[[ScaledRows, Mapping[str, Any]], Float[Array, "M K"]] | None = None
    streamed: ModuleType | None = None
    init: str | None = None
    is_centroids: bool = False
    is_centred: bool = False
    has_mean: bool = False
    is_sparse: bool = False
    max_per_width: bool = False
    takes_weights: bool = False
    can_omit_activations: bool = False
    training: type[sae.Training] | None = None

    @property
    def has_encoder(self) -> bool:
        """Whether it is a sparse autoencoder, whose concepts carry what encodes rows."""
        return self.encode is None

    @property
    def takes_target(self) -> bool:
        """Whether it learns from the states of two sites or models."""
        return self.name.endswith(("transcoder", "crosscoder"))

    def check_target(self, given: bool) -> None:
        """Checks that there are states of another site or model where it learns from two.

        Raises:
            ValueError: it is otherwise.
        """
        if given and not self.takes_target:
            raise ValueError(
                f"{self.name!r} learns from one matrix; omit target, or use a transcoder or "
                "crosscoder"
            )
        if self.takes_target and not given:
            raise ValueError(
                f"{self.name!r} learns from two matrices; give the states of the other site or "
                "model as target"
            )

    def reconstruct(
        self,
        activations: Float[AnyArray, "N K"],
        components: Float[AnyArray, "K D"],
        mean: Float[AnyArray, " D"] | None = None,
    ) -> Float[AnyArray, "N D"]:
        """Reconstructs rows from activations.

        Args:
            activations: float[N, K].
            components: float[K, D].
            mean: float[D] to add; None for none.

        Returns:
            float[N, D], in numpy if the first two are numpy, else in JAX.
        """
        if self.is_centroids:
            return components[activations.argmax(axis=1)]  # of several the first
        if isinstance(activations, np.ndarray) and isinstance(components, np.ndarray):
            product = activations @ components
        else:
            product = matmul(jnp.asarray(activations), jnp.asarray(components))
        return product if mean is None else product + mean

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the defaults overlaid with the given options, checked.

        Raises:
            ValueError: an option is unknown or invalid.
        """
        if self.has_encoder and self.training is None:
            if given:
                raise ValueError(f"method {self.name!r} is read from files and has no options")
            return {}
        # A method without updates has no plan, only a single program.
        solve = getattr(self.solver, "plan", getattr(self.solver, "solve", None))
        options = {
            "init" if name == self.init else name: default
            for name, default in _defaults(self.training or solve).items()
        }
        if self.is_sparse:
            options[RELATIVE] = False
        switches = [name for name, value in options.items() if isinstance(value, bool)]
        for name in given:
            if name not in options:
                known = f"its options are {', '.join(options)}" if options else "it has no options"
                raise ValueError(
                    f"method {self.name!r} has no option {name!r}; {known}"
                    + _nearest(name, options)
                )
        options |= given
        if self.training is not None:  # constants of its programs, and JSON
            options = {name: _plain(value) for name, value in options.items()}
        for name in switches:
            if not isinstance(options[name], bool | np.bool_):
                raise ValueError(f"{name} must be True or False; got {options[name]!r}")
            options[name] = bool(options[name])
        for name, lowest in {"alpha": 0, "tol": 0}.items():
            if name in options:
                check_number(name, options[name], lowest)
                options[name] = float(options[name])
        for name, lowest in {"max_iter": 0, "n_init": 1}.items():
            if options.get(name) is not None:
                check_whole(name, options[name], lowest)
                options[name] = int(options[name])
        return options


def _plain(value: Any) -> Any:
    """Returns numbers of numpy and JAX as Python's, and arrays and lists of them as tuples."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        value = np.asarray(value).tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


@functools.cache
def _defaults(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Returns the options of a solver with their defaults."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in NOT_OPTIONS
    }


def _encode_sparse(rows: ScaledRows, options: Mapping[str, Any]) -> Float[Array, "M K"]:
    alpha = options.get("alpha", 1.0) / rows.unit
    nonnegative = options.get("nonnegative", True)
    return _times(rows.unit, semi_nmf.activations(rows.Z, rows.components, alpha, nonnegative))


def _encode_by_distance(rows: ScaledRows, options: Mapping[str, Any]) -> Float[Array, "M K"]:
    return kmeans.activations(rows.Z, rows.components, rows.unit)


def _encode_as_scores(rows: ScaledRows, options: Mapping[str, Any]) -> Float[Array, "M K"]:
    count = np.int32(rows.num_samples)  # an argument: one program for all numbers of rows
    return _times(rows.unit, pca.activations(rows.Z, rows.components, rows.mean, count))


def _times(unit: float, values: Float[Array, "M K"]) -> Float[Array, "M K"]:
    return values if unit == 1 else unit * values


METHODS = {
    method.name: method
    for method in (
        Method(
            "snmf",
            semi_nmf,
            _encode_sparse,
            streamed=streamed.semi_nmf,
            init="init_atoms",
            is_sparse=True,
        ),
        Method(
            "kmeans",
            kmeans,
            _encode_by_distance,
            streamed=streamed.kmeans,
            init="init_centroids",
            is_centroids=True,
            is_centred=True,
            takes_weights=True,
            can_omit_activations=True,
        ),
        Method(
            "pca",
            pca,
            _encode_as_scores,
            streamed=streamed.pca,
            is_centred=True,
            has_mean=True,
            max_per_width=True,
        ),
        Method("simple", largest_norm, _encode_by_distance, is_centroids=True),
    )
}
ALIASES = {"nndl": "snmf"}
# Sparse autoencoders: those that can be trained, and others that only files hold.
AUTOENCODERS = {
    name: Method(name, training=sae.METHODS.get(name), can_omit_activations=name in sae.METHODS)
    for name in dict.fromkeys((*sae.METHODS, *dictionary.METHODS.values()))
}
TRAINED = tuple(sae.METHODS)


def method_named(name: str) -> Method:
    """Returns the method with a name or alias.

    Raises:
        ValueError: there is none; the message names the closest ones.
    """
    if name in AUTOENCODERS:
        return AUTOENCODERS[name]
    if name in METHODS or name in ALIASES:
        return METHODS[ALIASES.get(name, name)]
    names = (*METHODS, *ALIASES, *sae.METHODS)
    raise ValueError(
        f"unknown method {name!r}; expected one of {', '.join(names)}" + _nearest(name, names)
    )


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=2)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
