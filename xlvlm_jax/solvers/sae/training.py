"""What the training of every sparse autoencoder shares: loss, constraint, schedule, loop.

    x = s z                          s = sqrt(D) / mean |z|, a constant; z a row of Z
    h = (x - b_dec) W_enc + b_enc
    c = codes(h)                     by method
    y = c W_dec + b_dec
    L = mean (x - y)^2 + penalty     the mean is over rows and columns; the penalty by method
      + aux_weight mean (e - c' W_dec)^2

e is x - y, without a derivative. c' are the D / 2 largest h of dead features, those that were zero
for `dead_after` rows; so what lives leaves to do is what dead features learn (Gao et al. 2024,
appendix A.2). The last term is left out while none is dead, and its mean is over the first eighth
of a batch: all rows would double the time of an update.

Adam (0.9, 0.999) minimises L. Rows of W_dec keep length one: the derivative's part along them is
taken off, and they are divided by their length after each update (Bricken et al. 2023). Update i of
T has the learning rate

    learning_rate min((i + 1) / (warm_up T), 1, (T - i) / (decay T))

The start: b_dec is the geometric median of a sample of rows, W_dec random, W_enc its transpose,
b_enc zero. At the end s is folded into the parameters, so that they take z.

Transcoders and crosscoders (see there) learn from rows of two sources that stand side by side; each
source has its own s, of the mean norm of z - mean z, so that none outweighs the other.

N rows, D width, K features, B rows per batch.
"""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from xlvlm_jax.solvers.collectives import keep_pace
from xlvlm_jax.solvers.linalg import matmul
from xlvlm_jax.solvers.phases import Standing, Tell
from xlvlm_jax.solvers.sae import batches
from xlvlm_jax.solvers.sae.products import PRODUCTS, product
from xlvlm_jax.solvers.sae.selection import cut_above
from xlvlm_jax.solvers.sae.sharding import spread, spread_state
from xlvlm_jax.solvers.sae.start import (
    Start,
    per_column,
    start,
    unit_directions,
    unit_length,
)
from xlvlm_jax.solvers.validation import StoredMatrix, check_number, check_whole

if TYPE_CHECKING:
    import optax

Params = dict[str, Array]
AUX_SHARE = 8  # one in so many rows revives dead features
SAMPLE_ROWS = 4096  # that the start is computed from
MOMENTS, EPSILON = (0.9, 0.999), 1e-10
FORGET = 0.99  # what the running threshold of batchtopk keeps per update
TELL_EVERY = 16  # updates
LOOK_EVERY = 100  # updates between two looks at whether the loss is finite, which wait for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How to train; each method adds its own options and what it computes.

    Attributes:
        max_iter: T, the number of updates.
        batch_size: B, rows per update.
        learning_rate: the highest one; None for a value by the number of features.
        warm_up: share of the updates over which it rises from zero.
        decay: share of the updates over which it falls to zero at the end.
        aux_weight: weight of the term that revives dead features.
        dead_after: a feature is dead if it was zero for so many rows.
        input_scale: s, of two sources one for each; None for sqrt(D) over the mean norm of a
            sample of rows.
        products: "float32", or "bfloat16" for products of rounded factors with float32 sums, fast
            on accelerators.
    """

    max_iter: int = 4000
    batch_size: int = 4096
    learning_rate: float | None = None
    warm_up: float = 0.05
    decay: float = 0.2
    aux_weight: float = 1 / 32
    dead_after: int = 200_000
    input_scale: float | tuple[float, ...] | None = None
    products: str = "float32"

    # Name in the files of SAELens.
    architecture = "standard"
    # Whether the decoder's rows are kept at length one.
    unit_norm = True
    # Number of sources whose rows stand side by side.
    num_sources = 1

    def check(self, num_concepts: int) -> None:
        """Checks the options.

        Raises:
            ValueError: one is invalid.
        """
        for name, lowest in (("max_iter", 0), ("batch_size", 1), ("dead_after", 1)):
            check_whole(name, getattr(self, name), lowest)
        for name in ("aux_weight", "warm_up", "decay"):
            check_number(name, getattr(self, name), 0)
        if self.warm_up > 1 or self.decay > 1:
            raise ValueError(
                f"warm_up and decay are shares of the updates, from 0 to 1; got {self.warm_up} and "
                f"{self.decay}"
            )
        scales = self.input_scale if isinstance(self.input_scale, tuple) else (self.input_scale,)
        if self.input_scale is not None and len(scales) != self.num_sources:
            raise ValueError(
                f"input_scale is {self.input_scale}; expected {self.num_sources} of them, one per "
                "source of the rows"
            )
        named = ("learning_rate", self.learning_rate), *(("input_scale", each) for each in scales)
        for name, value in named:
            if value is not None:
                check_number(name, value, 0)
                if value == 0:
                    raise ValueError(f"{name} must be positive; got 0")
        if self.products not in PRODUCTS:
            raise ValueError(
                f"products is {self.products!r}; expected one of {', '.join(PRODUCTS)}"
            )
        if self.batch_size * num_concepts >= 2**31:
            raise ValueError(
                f"batch_size={self.batch_size} and num_concepts={num_concepts} make 2^31 codes or "
                "more per batch; use a smaller batch"
            )

    def rows_to_start(self, num_concepts: int) -> int:
        """Returns how many rows the start is computed from, if there are as many."""
        return max(SAMPLE_ROWS, 2 * num_concepts)

    def rate(self, iteration: Any) -> Float[Array, ""]:
        """Returns the learning rate of an update."""
        assert self.learning_rate is not None, "chosen before training"
        T = self.max_iter
        rising = (iteration + 1) / max(self.warm_up * T, 1)
        falling = (T - iteration) / max(self.decay * T, 1)
        return self.learning_rate * jnp.minimum(jnp.minimum(rising, 1), falling)

    def optimizer(self) -> "optax.GradientTransformation":
        """Returns Adam with the schedule."""
        import optax  # as late as here, so that importing the package is cheap

        return optax.adam(self.rate, *MOMENTS, eps=EPSILON)

    def begin(self, begun: Start, key: PRNGKeyArray, num_concepts: int) -> tuple[Params, Params]:
        """Returns the parameters before the first update, and those that are not trained."""
        W_dec = unit_directions(key, num_concepts, len(begun.median))
        # A copy: states are donated.
        return {
            "W_enc": W_dec.T.copy(),
            "W_dec": W_dec,
            "b_enc": jnp.zeros(num_concepts, jnp.float32),
            "b_dec": begun.median.copy(),
        }, {}

    def columns(self, params: Params) -> tuple[slice, slice]:
        """Returns which columns of the rows are encoded, and which are explained: here all."""
        return slice(None), slice(None)

    def offset(self, params: Params) -> Float[Array, " K"]:
        """Returns what is added to x W_enc."""
        # b_dec by itself: its derivative then needs no product of B rows.
        return params["b_enc"] - matmul(params["b_dec"], params["W_enc"])

    def codes(
        self, hidden: Float[Array, "B K"], params: Params
    ) -> tuple[Float[Array, "B K"], Float[Array, ""]]:
        """Returns the codes, and the value above which they are nonzero, if it is the same for all.

        Args:
            hidden: h.
            params: all parameters.
        """
        raise NotImplementedError

    def decoder(self, params: Params) -> Float[Array, "K D"]:
        """Returns W_dec."""
        return params["W_dec"]

    def reconstructions(
        self, codes: Float[Array, "B K"], decoder: Float[Array, "K D"], b_dec: Float[Array, " D"]
    ) -> Float[Array, "M B D"]:
        """Returns y for some parts of the codes, whose errors are averaged; the last is of all."""
        return (product(codes, decoder, self.products) + b_dec)[None]

    def penalty(
        self, hidden: Float[Array, "B K"], codes: Float[Array, "B K"], params: Params, D: int
    ) -> Float[Array, ""]:
        """Returns what is added to the error."""
        return jnp.zeros((), jnp.float32)

    def constrain(self, params: Params) -> Params:
        """Returns the parameters after an update as they must be."""
        return params | {"W_dec": unit_length(params["W_dec"])}

    def finish(self, params: Params, scale: Any, threshold: Float[Array, ""]) -> Params:
        """Returns SAELens' parameters for rows that are not scaled.

        Args:
            params: all parameters.
            scale: s, of two sources one for each.
            threshold: running mean of the value above which codes are nonzero.
        """
        # The codes of s z are s times those of z, for any of the methods.
        folded = {name: params[name] / scale for name in ("b_enc", "b_dec")}
        return {"W_enc": params["W_enc"], "W_dec": params["W_dec"], **folded}


class State(NamedTuple):
    """State of training. Each update overwrites its buffers."""

    params: Params
    moments: Any  # of the optimizer
    idle: Int[Array, " K"]  # rows since a feature was last active
    threshold: Float[Array, ""]  # running sum, see `running`
    history: Float[Array, " T"]  # L of each update
    iteration: Int[Array, ""]


class Given(NamedTuple):
    """What training does not change."""

    fixed: Params
    scale: Float[Array, "*D"]  # a number, or one per column


class Figures(NamedTuple):
    """What is told of an update."""

    loss: Float[Array, ""]
    l0: Float[Array, ""]  # mean number of active features per row
    explained: Float[Array, ""]  # share of the batch's variance
    dead: Float[Array, ""]  # share of features


class Trained(NamedTuple):
    """A trained sparse autoencoder."""

    params: dict[str, Float[np.ndarray, "..."]]  # SAELens' names, for rows that are not scaled
    settings: Training  # with everything that was chosen
    history: Float[np.ndarray, " T"]  # L of each update


class DivergedError(ValueError):
    """The loss ceased to be finite."""


@runtime_checkable
class Checkpoint(Protocol):
    """Keeps states of an unfinished run."""

    def restore(self, state: State) -> State:
        """Returns the last kept state, on the devices of this one; this one if there is none."""
        ...

    def offer(self, iteration: int, state: State) -> None:
        """Keeps a state, if it is time to."""
        ...


def loss(
    params: Params,
    given: Given,
    x: Float[Array, "B D"],
    settings: Training,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, "B K"], Float[Array, "B E"], Float[Array, ""]]]:
    """Returns L without its last term, and with it the codes, the error and the cut of the codes.

    Args:
        params: the trained parameters.
        given: what is not trained.
        x: scaled rows.
        settings: the method and its options.
        mesh: the devices.
    """
    params = given.fixed | params
    encoded, explained = settings.columns(params)
    hidden = _hidden(params, x[:, encoded], settings, mesh)
    codes, cut = settings.codes(hidden, params)
    y = settings.reconstructions(codes, settings.decoder(params), params["b_dec"])
    errors = x[:, explained] - y
    if "W_skip" in params:
        errors = errors - product(x[:, encoded], params["W_skip"].T, settings.products)
    total = jnp.mean(errors**2) + settings.penalty(hidden, codes, params, errors.shape[-1])
    return total, (codes, errors[-1], cut)


def loss_of_dead(
    params: Params,
    given: Given,
    x: Float[Array, "B D"],
    error: Float[Array, "B E"],
    dead: Bool[Array, " K"],
    settings: Training,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """Returns the last term of L.

    Args:
        params: the trained parameters.
        given: what is not trained.
        x: scaled rows.
        error: e.
        dead: which features are dead.
        settings: the method and its options.
        mesh: the devices.
    """
    params = given.fixed | params
    encoded, _ = settings.columns(params)
    alone = jnp.where(dead, _hidden(params, x[:, encoded], settings, mesh), -jnp.inf)
    count = min(max(error.shape[1] // 2, 1), alone.shape[1])
    chosen = dead & (alone >= cut_above(alone, count))
    drawn = product(jnp.where(chosen, alone, 0), settings.decoder(params), settings.products)
    return settings.aux_weight * jnp.mean((error - drawn) ** 2)


def _hidden(params: Params, x: Array, settings: Training, mesh: Mesh | None) -> Array:
    hidden = product(x, params["W_enc"], settings.products) + settings.offset(params)
    return spread(hidden, mesh, "data", "model")


def slopes(
    params: Params,
    given: Given,
    x: Float[Array, "B D"],
    dead: Bool[Array, " K"],
    settings: Training,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Params, tuple[Array, Array, Array]]:
    """Returns L, its derivatives, and what `loss` returns with it; arguments as for both terms."""
    of_rows = jax.value_and_grad(loss, has_aux=True)
    (total, found), gradient = of_rows(params, given, x, settings, mesh)
    if settings.aux_weight == 0:
        return total, gradient, found

    # Differentiated inside: the other way round the two branches would hand on arrays of codes.
    def of_dead() -> tuple[Array, Params]:
        some = slice(max(len(x) // AUX_SHARE, 1))
        both = jax.value_and_grad(loss_of_dead)
        return both(params, given, x[some], found[1][some], dead, settings, mesh)

    def of_none() -> tuple[Array, Params]:
        return jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params)

    more, change = jax.lax.cond(jnp.any(dead), of_dead, of_none)
    return total + more, jax.tree.map(jnp.add, gradient, change), found


@partial(jax.jit, static_argnames=("settings", "mesh"), donate_argnames="state")
def update(
    state: State,
    given: Given,
    rows: Shaped[Array, "B D"],
    *,
    settings: Training,
    mesh: Mesh | None = None,
) -> tuple[State, Figures]:
    """Returns the state after one more batch, and its figures.

    Args:
        state: the state; its buffers are donated.
        given: what is not trained.
        rows: rows of Z.
        settings: the method and its options.
        mesh: the devices.
    """
    x = spread(rows.astype(jnp.float32) * given.scale, mesh, "data")
    dead = state.idle >= settings.dead_after
    total, gradient, found = slopes(state.params, given, x, dead, settings, mesh)
    codes, error, cut = found
    if settings.unit_norm:
        W_dec = state.params["W_dec"]
        along = jnp.sum(gradient["W_dec"] * W_dec, axis=1, keepdims=True)
        gradient = gradient | {"W_dec": gradient["W_dec"] - along * W_dec}
    change, moments = settings.optimizer().update(gradient, state.moments, state.params)
    params: Any = jax.tree.map(jnp.add, state.params, change)
    counts = jnp.sum(codes > 0, axis=0, dtype=jnp.int32)
    idle = jnp.where(counts > 0, 0, state.idle + len(x))
    new = State(
        settings.constrain(params),
        moments,
        # Long runs must not overflow.
        jnp.minimum(idle, settings.dead_after).astype(jnp.int32),
        FORGET * state.threshold + (1 - FORGET) * cut,
        state.history.at[state.iteration].set(total),
        state.iteration + 1,
    )
    meant = x[:, settings.columns(given.fixed | state.params)[1]]
    squares = jnp.sum((meant - meant.mean(axis=0)) ** 2)
    figures = Figures(
        loss=total,
        l0=jnp.sum(counts) / len(x),
        explained=1 - jnp.sum(error**2) / jnp.where(squares > 0, squares, jnp.nan),
        dead=jnp.mean(new.idle >= settings.dead_after, dtype=jnp.float32),
    )
    return spread_state(new, mesh), figures


def train(
    Z: Shaped[Array | np.ndarray, "N D"] | StoredMatrix,
    key: PRNGKeyArray,
    settings: Training,
    num_concepts: int,
    *,
    mesh: Mesh | None = None,
    tell: Tell | None = None,
    every: int = TELL_EVERY,
    checkpoint: Checkpoint | None = None,
    widths: tuple[int, ...] | None = None,
) -> Trained:
    """Trains a sparse autoencoder, transcoder or crosscoder.

    Args:
        Z: finite rows [N, D], or an object that reads them, which is never held as a whole.
        key: random key, of the start and of the order of the rows.
        settings: the method and its options.
        num_concepts: K.
        mesh: devices that hold the rows of a batch along "data" and features along "model"; None
            for one device.
        tell: called with the state of the run after every few updates.
        every: number of updates between calls.
        checkpoint: keeps states, and gives the one to go on from.
        widths: widths of the sources whose rows stand side by side in Z (see `side_by_side`); None
            for one source.

    Returns:
        The parameters for rows that are not scaled.

    Raises:
        ValueError: an option is invalid, or rows of a source are not finite.
        DivergedError: the loss ceases to be finite, which is looked at before `tell`.
    """
    settings.check(num_concepts)
    N, D = Z.shape
    if len(widths or (D,)) != settings.num_sources:
        raise ValueError(
            f"rows have {len(widths or (D,))} sources; expected {settings.num_sources} for "
            f"{settings.architecture}"
        )
    seed = tuple(int(word) for word in np.asarray(jax.random.key_data(key)).ravel())
    sample = batches.sample(Z, settings.rows_to_start(num_concepts), seed)
    begun = start(sample.astype(np.float32, copy=False), settings.input_scale, widths)
    scale = begun.scale
    settings = dataclasses.replace(
        settings,
        batch_size=min(settings.batch_size, N),
        learning_rate=settings.learning_rate or learning_rate_for(num_concepts),
        input_scale=scale,
    )
    params, fixed = settings.begin(begun, key, num_concepts)
    given = Given(fixed, jnp.float32(per_column(scale, begun.widths)))
    # Programs are for every scale of the rows, which is an argument.
    compiled = dataclasses.replace(settings, input_scale=None)
    state = _begin(params, settings=compiled, mesh=mesh)
    del sample, begun, params  # memory may have room for one copy of the parameters
    if checkpoint is not None:
        state = checkpoint.restore(state)
    done = int(state.iteration)
    order: Any = batches.batches(Z, settings.batch_size, seed, done, mesh)
    for iteration in range(done + 1, settings.max_iter + 1):
        rows = next(order)
        state, figures = keep_pace(update(state, given, rows, settings=compiled, mesh=mesh))
        telling = tell is not None and (iteration % every == 0 or iteration == settings.max_iter)
        if telling or iteration % LOOK_EVERY == 0:
            _check_loss(np.asarray(state.history)[:iteration], settings)
        if telling and tell is not None:
            tell(_standing(figures, num_concepts, iteration, settings.max_iter))
        if checkpoint is not None:
            checkpoint.offer(iteration, state)
    order.close()
    history = np.asarray(state.history)
    _check_loss(history, settings)
    # The mean without what the first value, zero, still weighs.
    threshold = state.threshold / max(1 - FORGET**settings.max_iter, 1e-30)
    found = settings.finish(fixed | state.params, scale, threshold)
    return Trained({name: _whole(value) for name, value in found.items()}, settings, history)


def _check_loss(history: Float[np.ndarray, " T"], settings: Training) -> None:
    """Raises DivergedError unless the loss of every update is finite."""
    if not np.isfinite(history).all():
        bad = int(np.argmin(np.isfinite(history)))
        raise DivergedError(
            f"the loss is {history[bad]} at update {bad + 1}: training diverged; lower "
            f"learning_rate, which is {settings.learning_rate:.3g}"
        )


def learning_rate_for(num_concepts: int) -> float:
    """Returns the default learning rate, which falls with the root of the number of features.

    Source: the root is Gao et al.'s, 2024; the constant is measured on planted dictionaries of
    1,024 features (benchmarks/sae.py), where the rate is 0.003.
    """
    return 7.5e-4 * (2**14 / num_concepts) ** 0.5


@partial(jax.jit, static_argnames=("settings", "mesh"))
def _begin(params: Params, *, settings: Training, mesh: Mesh | None) -> State:
    state = State(
        params,
        settings.optimizer().init(params),
        jnp.zeros(len(params["b_enc"]), jnp.int32),
        jnp.zeros((), jnp.float32),
        jnp.full(settings.max_iter, jnp.nan, jnp.float32),
        jnp.zeros((), jnp.int32),
    )
    return spread_state(state, mesh)


def _standing(figures: Figures, num_concepts: int, iteration: int, max_iter: int) -> Standing:
    values = {name: float(value) for name, value in figures._asdict().items()}
    return Standing(
        num_concepts,
        iteration,
        max_iter,
        values["loss"],
        float("nan"),
        {
            "L0": values["l0"],
            "explained variance": values["explained"],
            "dead share": values["dead"],
        },
    )


def _whole(value: Array) -> Float[np.ndarray, "..."]:
    """Returns an array of all hosts on this one."""
    if value.is_fully_addressable:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
