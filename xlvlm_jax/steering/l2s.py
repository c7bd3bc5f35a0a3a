"""L2S, learning to steer: a network that predicts a shift for each prompt.

From "Learning to Steer: Input-dependent Steering for Multimodal LLMs" (Parekh et al. 2025,
arXiv 2508.12815). For a prompt x with a positive and a negative counterpart x+ and x-, which are
x followed by a completion, or other prompts about the same image:

    z(x) = h_site(x+) - h_site(x-)              at their last tokens
    or the mean over the completion's tokens
    minimise over g   mean over x of |g(h_context(x)) - z(x)|^2 / D

with h_context(x) the state of the prompt's last token; the prompt is then answered with
alpha g(h_context(x)) added at the site. Prompts with equal counterparts teach the network when to
leave an answer alone.

Contrasting prompts suit one-word answers, which the last state of a prompt predicts; the last
state of a completion predicts what follows the answer. N prompts, D width.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int, Shaped

from ports import VLM
from ports.intervene.edits import Edit, add
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.solvers import sums
from xlvlm_jax.steering import files, teacher_forcing
from xlvlm_jax.storage.same_model import model_of

Array = jax.Array | np.ndarray
CONTRASTS = ("completion", "prompt")
STATES = ("last", "mean")
_CHECKED = ("hidden", "validation", "epochs", "rate", "rows_per_step", "patience")


class ShiftNetwork(nn.Module):
    """Two dense layers: normalised states[B, D] -> normalised shifts[B, D]."""

    hidden: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[jax.Array, "B D"]:
        """Maps float32[B, D] to float32[B, D]."""
        x = nn.tanh(nn.Dense(self.hidden, precision="highest", name="hidden")(x))
        return nn.Dense(self.width, precision="highest", name="shift")(x)


@dataclasses.dataclass(frozen=True, repr=False)
class L2S:
    """A network from the state of a prompt's last token to the shift of its answer.

    Attributes:
        params: parameters of `ShiftNetwork`.
        mean, deviation: float32[D], mean and standard deviation of the training contexts.
        scale: root mean square of the training shifts.
        context_site: the site whose state of the last prompt token is the input.
        site: the site whose states the shift is added to.
        source: how and on what it was fitted, as JSON values.
        where: the token positions it is meant for, see `ports.add`.
    """

    params: dict
    mean: np.ndarray
    deviation: np.ndarray
    scale: float
    context_site: str
    site: str
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    def __repr__(self) -> str:
        hidden, width = self.params["shift"]["kernel"].shape
        return (
            f"L2S({hidden} hidden units, width {width}, from {self.context_site!r} to "
            f"{self.site!r}, where={self.where!r})"
        )

    def _repr_html_(self) -> str:
        hidden, width = self.params["shift"]["kernel"].shape
        told = {"context site": self.context_site, "hidden units": hidden, "width": width}
        return files.as_html(self, **told)

    def shift(self, contexts: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Returns the shift for each prompt.

        Args:
            contexts: float[B, D], states of the last prompt tokens at `context_site`.

        Returns:
            float32[B, D].
        """
        scale = jnp.float32(self.scale)
        return _shift(self.params, self.mean, self.deviation, scale, jnp.asarray(contexts))

    def edits_for(
        self, vlm: VLM, inputs: Any, alpha: Any = 1.0, where: Any = None
    ) -> dict[str, Edit]:
        """Returns the edits for a batch of prompts: a vector per prompt.

        Args:
            vlm: the model it was fitted on.
            inputs: the processor's arrays; the prompts run once up to `context_site`.
            alpha: the strength, a number or float[B].
            where: the token positions, see `ports.add`; None for those it is meant for.

        Returns:
            {site: edit}.

        Raises:
            ValueError: it was fitted on another model.
        """
        files.require_fitted_model(self.source, vlm)
        states = vlm.states(inputs, sites=[self.context_site])[self.context_site]
        shifts = np.asarray(self.shift(last_states(states, np.asarray(inputs["attention_mask"]))))
        return {self.site: add(shifts, alpha, self.where if where is None else where)}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; a missing parent directory is created."""
        tensors = {".".join(key): value for key, value in flatten_dict(self.params).items()}
        statistics = {"mean": self.mean, "deviation": self.deviation, "scale": [self.scale]}
        names = ("context_site", "site", "source", "where")
        rest = {name: getattr(self, name) for name in names}
        files.save(path, "l2s", tensors | statistics, rest)

    @classmethod
    def load(cls, path: str | Path) -> "L2S":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds something else, or NaN.
        """
        tensors, rest = files.read_as(path, "l2s")
        files.require_numbers(path, tensors)
        with files.assembling(path):
            mean, deviation = tensors.pop("mean"), tensors.pop("deviation")
            scale = float(tensors.pop("scale")[0])
            params = unflatten_dict({tuple(name.split(".")): x for name, x in tensors.items()})
            return cls(params, mean, deviation, scale, **rest)


@jax.jit
def _shift(
    params: dict, mean: Array, deviation: Array, scale: jax.Array, contexts: jax.Array
) -> jax.Array:
    hidden, width = params["shift"]["kernel"].shape
    x = (contexts.astype(jnp.float32) - mean) / deviation
    return scale * ShiftNetwork(hidden, width).bind({"params": params})(x)


def last_states(
    states: Float[Array, "B T D"], mask: Shaped[np.ndarray, "B T"]
) -> Float[Array, "B D"]:
    """Returns the state of the last token in each row, taken where the states are.

    Args:
        states: float[B, T, D].
        mask: int[B, T], non-zero for tokens.

    Returns:
        float[B, D].
    """
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1] != 0, axis=1)
    return _rows_at(states, last)


@jax.jit
def _rows_at(states: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(states, index[:, None, None], axis=1)[:, 0]


def mean_of_last(
    states: Float[Array, "B T D"], mask: Shaped[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "B D"]:
    """Returns the mean state of the last tokens in each row, computed where the states are.

    Args:
        states: float[B, T, D].
        mask: int[B, T], non-zero for tokens.
        lengths: int[B], the number of tokens to average, at least one.

    Returns:
        float32[B, D].
    """
    behind = np.cumsum((mask != 0)[:, ::-1], axis=1)[:, ::-1]  # this token and those after it
    chosen = (mask != 0) & (behind <= lengths[:, None])
    return np.asarray(teacher_forcing.token_means(states, chosen))


def last_token_states(
    vlm: VLM,
    samples: Sequence[Sample],
    sites: Sequence[str],
    completions: Sequence[str] | None = None,
    *,
    states: str = "last",
    batch_size: int = 16,
    strict: bool = False,
    errors: dict[str, str] | None = None,
    progress: teacher_forcing.Progress | None = None,
) -> dict[str, Float[np.ndarray, "N D"]]:
    """Returns the states of the last token of each prompt, or of the completion after it.

    Args:
        vlm: the model.
        samples: N images and prompts.
        sites: the sites whose states to return.
        completions: a completion per sample; None for prompts alone.
        states: "last", or "mean" for the mean over the tokens of each completion.
        batch_size: samples per batch.
        strict, errors: see `teacher_forcing.batches`.
        progress: called with (samples done, number of samples).

    Returns:
        {site: float32[N, D]}, NaN for a sample that can't be read or processed, or whose state is
        not finite at one of the sites.

    Raises:
        ValueError: the numbers of samples and completions differ, a completion is empty, or no
            sample can be processed.
        FloatingPointError: if strict, for the first state that is not finite.
    """
    errors = {} if errors is None else errors
    found: dict[str, np.ndarray] = {}
    done = good = 0
    options = {"ended": False, "strict": strict, "errors": errors}
    for index, batch in teacher_forcing.batches(vlm, samples, completions, batch_size, **options):
        (inputs,) = batch.inputs
        lengths = np.maximum(batch.answer_lengths, 1)
        if states == "last":
            lengths = np.ones_like(lengths)
        here, bad = [samples[int(i)] for i in index], {}
        for site, given in vlm.states(inputs, sites=sites).items():
            mask = np.asarray(inputs["attention_mask"])
            last = mean_of_last(given, mask, lengths)[: len(index)]
            bad |= teacher_forcing.not_finite(site, last, here, strict=strict)
            if site not in found:
                found[site] = np.full((len(samples), last.shape[1]), np.nan, np.float32)
            found[site][index] = last
        is_bad = np.array([sample.id in bad for sample in here])
        for rows in found.values():
            rows[index[is_bad]] = np.nan
        errors |= bad
        done, good = done + len(index), good + int((~is_bad).sum())
        if progress is not None:
            progress(done, len(samples))
    teacher_forcing.require_some(range(good), samples, errors)
    return found


def contrast_shifts(
    vlm: VLM,
    samples: Sequence[Sample],
    positive: Sequence[str],
    negative: Sequence[str],
    sites: Sequence[str],
    *,
    contrast: str = "completion",
    states: str = "last",
    batch_size: int = 16,
    strict: bool = False,
    errors: dict[str, str] | None = None,
    progress: teacher_forcing.Progress | None = None,
) -> dict[str, Float[np.ndarray, "N D"]]:
    """Returns z of each prompt: the states of its positive minus its negative counterpart.

    Args:
        vlm: the model.
        samples: N images and prompts.
        positive, negative: the counterparts, one each per sample.
        sites: the sites whose states to take.
        contrast, states: as for `fit_l2s`.
        batch_size: samples per batch.
        strict, errors: see `teacher_forcing.batches`.
        progress: called with (runs done, number of runs); there are two runs per sample.

    Returns:
        {site: float32[N, D]}, NaN for a sample that can't be read or processed, or whose state is
        not finite at one of the sites.

    Raises:
        ValueError: the contrast or states are unknown or do not go together, a completion is
            empty, or the numbers of samples and counterparts differ.
        FloatingPointError: if strict, for the first state that is not finite.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast is {contrast!r}; expected {' or '.join(CONTRASTS)}")
    if states not in STATES:
        raise ValueError(f"states is {states!r}; expected {' or '.join(STATES)}")
    if contrast == "prompt" and states == "mean":
        raise ValueError("states 'mean' is over the tokens of a completion; contrast completions")
    if not len(samples) == len(positive) == len(negative):
        raise ValueError(
            f"there are {len(positive)} positive and {len(negative)} negative counterparts of "
            f"{len(samples)} samples; expected one of each per sample"
        )

    def of(counterparts: Sequence[str], before: int) -> dict[str, np.ndarray]:
        asked, completions = samples, counterparts
        if contrast == "prompt":
            pairs = zip(samples, counterparts, strict=True)
            asked = [dataclasses.replace(sample, prompt=prompt) for sample, prompt in pairs]
            completions = None
        return last_token_states(
            vlm,
            asked,
            sites,
            completions,
            states=states,
            batch_size=batch_size,
            strict=strict,
            errors=errors,
            progress=_after(progress, before, 2 * len(samples)),
        )

    towards, away = of(positive, 0), of(negative, len(samples))
    return {site: towards[site] - away[site] for site in towards}


def _after(
    progress: teacher_forcing.Progress | None, before: int, total: int
) -> teacher_forcing.Progress | None:
    """Returns the progress of one of several runs, after `before` of the total."""
    return None if progress is None else lambda done, _: progress(before + done, total)


@functools.partial(jax.jit, static_argnames=("network", "rate"))
def _update(
    network: ShiftNetwork, rate: float, params: dict, moments: Any, x: jax.Array, z: jax.Array
) -> tuple[Any, Any]:
    def loss(params: dict) -> jax.Array:
        return jnp.mean((network.bind({"params": params})(x) - z) ** 2)

    change, moments = optax.adam(rate).update(jax.grad(loss)(params), moments)
    return optax.apply_updates(params, change), moments


@functools.partial(jax.jit, static_argnames="network")
def _error(network: ShiftNetwork, params: dict, x: jax.Array, z: jax.Array) -> jax.Array:
    squares = jnp.mean((network.bind({"params": params})(x) - z) ** 2, axis=1, keepdims=True)
    return sums.column_means(squares).value[0]


def fit_network(
    contexts: Float[Array, "N D"],
    shifts: Float[Array, "N D"],
    *,
    hidden: int = 128,
    validation: float = 0.2,
    epochs: int = 300,
    rate: float = 1e-3,
    rows_per_step: int = 64,
    patience: int = 20,
    seed: int = 0,
) -> tuple[dict, np.ndarray, np.ndarray, float, dict[str, Any]]:
    """Fits the network from contexts to shifts with Adam and early stopping.

    Args:
        contexts: float[N, D], states of the last prompt tokens.
        shifts: float[N, D], the shifts to predict.
        hidden: units of the hidden layer.
        validation: share of the rows held out for early stopping.
        epochs: maximum number of passes over the training rows.
        rate: learning rate of Adam.
        rows_per_step: rows per step of Adam.
        patience: epochs without a lower validation error after which training stops.
        seed: random seed of the split, the parameters and the batches.

    Returns:
        `params`, `mean`, `deviation` and `scale` of `L2S`, and figures: the best epoch, and the
        share of the held-out shifts' squared norm left unexplained by the network and by the mean
        shift.

    Raises:
        ValueError: the shapes differ, an option is out of its range, or there are fewer than two
            rows to train on besides those held out.
        FloatingPointError: a row is not finite, or the error on those held out, and none before it
            was lower than that of epoch 0. Otherwise training stops there with a warning.
    """
    contexts, shifts = (np.asarray(rows, np.float32) for rows in (contexts, shifts))
    if contexts.ndim != 2 or shifts.ndim != 2 or len(contexts) != len(shifts) or len(contexts) < 3:
        raise ValueError(
            f"contexts and shifts have shapes {contexts.shape} and {shifts.shape}; expected "
            "[N, D] and [N, D] with three rows or more: one to hold out and two to train on"
        )
    _require_options(hidden, validation, epochs, rate, rows_per_step, patience)
    for what, rows in (("contexts", contexts), ("shifts", shifts)):
        if not np.isfinite(rows).all():
            raise FloatingPointError(f"the {what} have entries that are not finite")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(contexts))
    held = min(len(contexts) - 2, max(1, round(validation * len(contexts))))
    held_out, train = order[:held], order[held:]
    # In float64, because along columns numpy adds up float32 naively.
    mean = contexts[train].mean(0, dtype=np.float64).astype(np.float32)
    deviation = _deviation(contexts[train])
    scale = float(np.sqrt((shifts[train] ** 2).mean(dtype=np.float64))) or 1.0
    x, z = (contexts - mean) / deviation, shifts / scale
    network = ShiftNetwork(hidden, shifts.shape[1])
    params: Any = network.init(jax.random.key(seed), x[:1])["params"]
    # Starts at the mean shift, so that no steps are spent on learning it.
    params["shift"]["kernel"] = 0.1 * params["shift"]["kernel"]
    params["shift"]["bias"] = jnp.asarray(z[train].mean(0, dtype=np.float64), jnp.float32)
    moments = optax.adam(rate).init(params)
    size = min(rows_per_step, len(train))
    best, best_error, best_epoch = (
        params,
        float(_error(network, params, x[held_out], z[held_out])),
        0,
    )
    for epoch in range(1, epochs + 1):
        rows = rng.permutation(train)
        for first in range(0, len(rows) - size + 1, size):
            chosen = rows[first : first + size]
            params, moments = _update(network, rate, params, moments, x[chosen], z[chosen])
        error = float(_error(network, params, x[held_out], z[held_out]))
        if not np.isfinite(error):
            told = f"after epoch {epoch}, the error on the held-out rows is {error}; lower the rate"
            if best_epoch == 0:
                raise FloatingPointError(told)
            warnings.warn(f"{told}; epoch {best_epoch} is kept", stacklevel=2)
            break
        if error < best_error:
            best, best_error, best_epoch = params, error, epoch
        if epoch - best_epoch == patience:
            break
    whole = float((z[held_out] ** 2).mean(dtype=np.float64)) or 1.0
    figures = {
        "best epoch": best_epoch,
        "unexplained": best_error / whole,
        "unexplained by the mean": float(
            ((z[held_out] - z[train].mean(0, dtype=np.float64)) ** 2).mean()
        )
        / whole,
    }
    return jax.tree.map(np.asarray, best), mean, deviation, scale, figures


def _require_known(options: Mapping[str, Any]) -> None:
    """Checks options of `fit_network`, with its defaults for those that are not given.

    Raises:
        TypeError: it has no such option.
        ValueError: as `fit_network`.
    """
    try:
        given = inspect.signature(fit_network).bind(None, None, **options)
    except TypeError as error:
        raise TypeError(f"fit_network() {error}") from None
    given.apply_defaults()
    _require_options(**{name: given.arguments[name] for name in _CHECKED})


def _require_options(
    hidden: int,
    validation: float,
    epochs: int,
    rate: float,
    rows_per_step: int,
    patience: int,
) -> None:
    """Checks the ranges of the options of `fit_network`."""
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}; expected a share between 0 and 1")
    if epochs < 0:
        raise ValueError(f"epochs is {epochs}; expected at least 0")
    if not rate > 0:
        raise ValueError(f"rate is {rate}; expected a positive number")
    teacher_forcing.require_counts(hidden=hidden, rows_per_step=rows_per_step, patience=patience)


def _deviation(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " D"]:
    """Returns what to divide each coordinate by: its standard deviation.

    For one that is (all but) the same in all rows, the root mean square of all deviations: whatever
    little it differs by in another prompt must not drown the others.
    """
    deviation = rows.std(0, dtype=np.float64)
    overall = float(np.sqrt(np.mean(deviation**2))) or 1.0
    return np.where(deviation > 1e-6 * overall, deviation, overall).astype(np.float32)


def fit_l2s(
    vlm: VLM,
    samples: Sequence[Sample],
    positive: Sequence[str],
    negative: Sequence[str],
    site: str,
    *,
    contrast: str = "completion",
    states: str = "last",
    context_site: str | None = None,
    contexts: Sequence[str] | None = None,
    where: Any = "all",
    batch_size: int = 16,
    strict: bool = False,
    progress: teacher_forcing.Progress | None = None,
    **options: Any,
) -> L2S:
    """Fits a network that predicts the shift each prompt needs, from two counterparts of it.

    Runs on the host and cannot be traced.

    Args:
        vlm: the model.
        samples: images and prompts.
        positive, negative: the counterpart to steer towards and away from, one each per sample.
        site: the site whose states to shift.
        contrast: "completion" if the counterparts are appended to the prompt, "prompt" if they
            replace it.
        states: the state of a completion that counts: "last", that of its last token, or "mean",
            the mean over its tokens.
        context_site: the site whose state of the last prompt token is the input; None for `site`.
        contexts: the prompt of each sample whose last token that is, if the counterparts are of
            other prompts than those to be steered later; None for the prompts of the samples.
        where: the token positions to shift, see `ports.add`.
        batch_size: samples per batch of the model.
        strict: stop at a sample that can't be read or processed, instead of skipping it;
            `source["skipped"]` says why samples were skipped.
        progress: called with (runs done, number of runs); there are three runs per sample.
        options: further arguments of `fit_network`, such as `rows_per_step`.

    Returns:
        The network.

    Raises:
        ValueError: as `contrast_shifts` and `fit_network`, the numbers of samples and contexts
            differ, or there are fewer than three samples.
        FloatingPointError: as `contrast_shifts` and `fit_network`.
    """
    if contexts is not None and len(contexts) != len(samples):
        raise ValueError(
            f"there are {len(contexts)} contexts for {len(samples)} samples; expected one each"
        )
    if len(samples) < 3:
        raise ValueError(
            f"there are {len(samples)} samples; expected three or more, one to hold out and two to "
            "train on"
        )
    _require_known(options)  # before the model runs
    site = vlm.find_site(site, generated=True, one_state=True)
    context_site = (
        site
        if context_site is None
        else vlm.find_site(context_site, generated=True, one_state=True)
    )
    skipped: dict[str, str] = {}
    common: dict[str, Any] = {"batch_size": batch_size, "strict": strict, "errors": skipped}

    contrasted = {"contrast": contrast, "states": states}
    total = 3 * len(samples)
    shifts = contrast_shifts(
        *(vlm, samples, positive, negative, [site]),
        **contrasted,
        **common,
        progress=_after(progress, 0, total),
    )[site]
    read = samples
    if contexts is not None:
        pairs = zip(samples, contexts, strict=True)
        read = [dataclasses.replace(sample, prompt=prompt) for sample, prompt in pairs]
    told = last_token_states(
        vlm, read, [context_site], **common, progress=_after(progress, 2 * len(samples), total)
    )[context_site]
    kept = np.array([sample.id not in skipped for sample in samples], bool)
    params, mean, deviation, scale, figures = fit_network(told[kept], shifts[kept], **options)
    shifted = np.array([a != b for a, b in zip(positive, negative, strict=True)], bool)
    source = {
        **model_of(vlm),
        "method": "l2s",
        "samples": int(kept.sum()),
        "skipped": skipped,
        **contrasted,
        "shifted samples": int((shifted & kept).sum()),
        **options,
        **figures,
    }
    return L2S(params, mean, deviation, scale, context_site, site, source, where)
