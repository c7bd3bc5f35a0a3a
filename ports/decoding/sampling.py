"""Sampling: filters the likely tokens and draws one.

B batch, V vocabulary. The filters and their order match transformers' `generate`; each keeps at
least one token. Their values are arguments of the compiled program, the set of filters is part of
it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ports.decoding import generation_config
from ports.parallel import sharding
from ports.tracing import is_traced

Array = jax.Array
Number = Array | float


class Sampling(NamedTuple):
    """How tokens are drawn. None turns a filter off; greedy decoding has no `Sampling`.

    Each value is a single number for all rows of a batch (`jax.vmap` gives each row its own).

    Values have the ranges of transformers' `GenerationConfig`: a temperature above 0, top_k of at
    least 0 (off), all others from 0 to 1. Of equal logits at its edge, top_p keeps as many as in
    transformers, which leaves to PyTorch's sort which ones; here they have the highest ids.

    Attributes:
        key: JAX random key.
        temperature: what logits are divided by.
        top_p: keep the smallest set of tokens with at least this probability.
        top_k: keep this many of the likeliest tokens.
        min_p: minimum probability, as a fraction of the likeliest token's.
        typical_p: as `top_p`, but tokens whose surprise is nearest to the entropy come first.
        epsilon_cutoff: minimum probability.
        eta_cutoff: minimum probability, lowered where the entropy is high.

    Examples:
        >>> import jax, jax.numpy as jnp, ports
        >>> from ports.decoding.sampling import draw
        >>> sampling = ports.Sampling(jax.random.key(0), temperature=0.7, top_k=1)
        >>> draw(jnp.array([[0.0, 3.0, 1.0]]), sampling, step=0).tolist()
        [1]
    """

    key: Array
    temperature: Number = 1.0
    top_p: Number | None = None
    top_k: Array | int | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    epsilon_cutoff: Number | None = None
    eta_cutoff: Number | None = None


def check_values(sampling: Sampling) -> None:
    """Checks the temperature and the filters; of traced ones only that they are single numbers.

    Raises:
        ValueError: a value is outside its range, or is not a single number.
    """
    given = sampling._asdict()
    for name in Sampling._fields[1:]:
        value = given[name]
        if np.ndim(value):
            raise ValueError(
                f"sampling: {name} has shape {np.shape(value)}; expected one number for all rows"
            )
        if is_traced(value) or (value is None and name != "temperature"):
            continue
        generation_config.check_sampling(name, np.asarray(value).item())


def without_idle(sampling: Sampling) -> Sampling:
    """Turns off filters whose values keep every token, such as a top_p of 1; traced values stay.

    A filter costs its work whatever its value: top_p sorts the vocabulary at every step.

    Args:
        sampling: settings whose values are in their ranges.

    Returns:
        Settings that draw alike.
    """
    given = sampling._asdict()
    idle = (
        name
        for name in Sampling._fields[2:]
        if given[name] is not None
        and not is_traced(given[name])
        and generation_config.is_idle(name, np.asarray(given[name]).item())
    )
    return sampling._replace(**dict.fromkeys(idle))


def draw(logits: Array, sampling: Sampling, step: Array) -> Array:
    """Draws one token per row.

    Args:
        logits: float[B, V]; computed with in float32, as few values of bfloat16 are near 1 and most
            draws would be of the first tokens.
        sampling: the key, the temperature and the filters.
        step: int32[]; every step uses different randomness.

    Returns:
        Token ids, int32[B].

    Raises:
        ValueError: a value of `sampling` is outside its range (of traced ones this is not known),
            or is not a single number.
    """
    key = jax.random.fold_in(sampling.key, step)
    if jnp.finfo(logits.dtype).bits < 32:
        logits = logits.astype(jnp.float32)
    return jax.random.categorical(key, keep_likely(logits, sampling))


def keep_likely(logits: Array, sampling: Sampling) -> Array:
    """Divides logits [B, V] by the temperature and sets those that the filters exclude to -inf.

    Raises:
        ValueError: as for `draw`.
    """
    check_values(sampling)
    sampling = without_idle(sampling)
    logits = logits / sampling.temperature
    if any(getattr(sampling, name) is not None for name in ("top_k", "top_p", "typical_p")):
        logits = sharding.whole_vocabulary(logits)
    if sampling.top_k is not None or sampling.top_p is not None:
        logits = _keep(logits, _is_likely(logits, sampling.top_k, sampling.top_p))
    if sampling.min_p is not None:
        probabilities = jax.nn.softmax(logits)
        likeliest = probabilities.max(-1, keepdims=True)
        logits = _keep(logits, probabilities >= sampling.min_p * likeliest)
    if sampling.typical_p is not None:
        logits = _keep(logits, _is_typical(logits, sampling.typical_p))
    if sampling.epsilon_cutoff is not None:
        logits = _cut_off(logits, _below_one(sampling.epsilon_cutoff))
    if sampling.eta_cutoff is not None:
        entropy = _entropy(logits)
        cutoff = _below_one(sampling.eta_cutoff)
        least = jnp.minimum(cutoff, jnp.sqrt(cutoff) * jnp.exp(-entropy))
        logits = _cut_off(logits, least)
    return logits


def _keep(logits: Array, kept: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)


def _is_likely(logits: Array, top_k: Array | int | None, top_p: Number | None) -> Array:
    """Returns bool[B, V], the tokens kept by top-k and then by nucleus sampling.

    One sort serves both (nucleus: Holtzman et al. 2020). Of equal logits, top-k keeps all or none,
    and the nucleus as many as it needs, both as in transformers. Which of them it keeps depends on
    PyTorch's sort there; here they are the last ones.
    """
    ordered = jnp.sort(logits, axis=-1)
    lowest = ordered[..., :1]
    if top_k is not None:
        size = logits.shape[-1]
        count = jnp.where(jnp.asarray(top_k) > 0, jnp.minimum(top_k, size), size)
        lowest = jnp.take(ordered, size - count, axis=-1)[..., None]
        ordered = _keep(ordered, ordered >= lowest)
    if top_p is None:
        return logits >= lowest
    reached = jnp.cumsum(jax.nn.softmax(ordered), axis=-1)
    kept = (reached > 1 - top_p).at[..., -1].set(True)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    # Numbered from the end; counting is cheaper than sorting with the places.
    equal = logits == lowest
    number = jax.lax.cumsum(equal.astype(jnp.int32), axis=logits.ndim - 1, reverse=True)
    needed = (kept & (ordered == lowest)).sum(-1, keepdims=True)
    return (logits > lowest) | (equal & (number <= needed))


def _below_one(cutoff: Number) -> Array:
    """Returns a cutoff, or 0 for one of 1, which cuts nothing off in transformers."""
    cutoff = jnp.asarray(cutoff)
    return jnp.where(cutoff < 1, cutoff, 0)


def _entropy(logits: Array) -> Array:
    """Returns the entropy [B, 1] in nats."""
    log_p = jax.nn.log_softmax(logits)
    terms = jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p)
    return -terms.sum(-1, keepdims=True)


def _is_typical(logits: Array, mass: Number) -> Array:
    """Returns bool[B, V], the tokens kept by locally typical sampling (Meister et al. 2023)."""
    away = jnp.abs(-jax.nn.log_softmax(logits) - _entropy(logits))
    order = jnp.argsort(away, axis=-1)
    ordered = jnp.take_along_axis(logits, order, -1)
    reached = jnp.cumsum(jax.nn.softmax(ordered), axis=-1)
    last = jnp.minimum((reached < mass).sum(-1, keepdims=True), logits.shape[-1] - 1)
    return away <= jnp.take_along_axis(jnp.take_along_axis(away, order, -1), last, -1)


def _cut_off(logits: Array, least: Number) -> Array:
    """Removes tokens below a probability, except the likeliest (Hewitt et al. 2022)."""
    likeliest = logits >= logits.max(-1, keepdims=True)
    return _keep(logits, (jax.nn.softmax(logits) >= least) | likeliest)
