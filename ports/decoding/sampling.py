"""Sampling: which tokens may be drawn, and the draw.

B batch, V vocabulary. The filters and their order are those of transformers' `generate`, each with
at least one token left. Values are arguments of a compiled program; which filters there are is part
of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Number = Array | float


class Sampling(NamedTuple):
    """How tokens are drawn. None leaves a filter out; greedy decoding has no `Sampling`."""

    key: Array
    temperature: Number = 1.0  # logits are divided by it
    top_p: Number | None = 1.0  # the smallest set of tokens whose probability reaches it is kept
    top_k: Array | int | None = None  # so many of the likeliest tokens are kept
    min_p: Number | None = None  # a token's least probability, in shares of the likeliest one's
    typical_p: Number | None = None  # as top_p, of those whose surprise is nearest to the entropy
    epsilon_cutoff: Number | None = None  # a token's least probability
    eta_cutoff: Number | None = None  # the same, less where the entropy is high


def draw(logits: Array, sampling: Sampling, step: Array) -> Array:
    """Draws int32[B] from logits[B, V]; every step with randomness of its own."""
    key = jax.random.fold_in(sampling.key, step)
    return jax.random.categorical(key, keep_likely(logits, sampling))


def keep_likely(logits: Array, sampling: Sampling) -> Array:
    """Logits [B, V] divided by the temperature, and -inf for tokens that are not to be drawn."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        logits = _keep(logits, logits >= _lowest_kept(logits, sampling.top_k, sampling.top_p))
    if sampling.min_p is not None:
        probabilities = jax.nn.softmax(logits)
        likeliest = probabilities.max(-1, keepdims=True)
        logits = _keep(logits, probabilities >= sampling.min_p * likeliest)
    if sampling.typical_p is not None:
        logits = _keep(logits, _is_typical(logits, sampling.typical_p))
    if sampling.epsilon_cutoff is not None:
        logits = _cut_off(logits, sampling.epsilon_cutoff)
    if sampling.eta_cutoff is not None:
        entropy = _entropy(logits)
        root = jnp.sqrt(sampling.eta_cutoff)
        logits = _cut_off(logits, jnp.minimum(sampling.eta_cutoff, root * jnp.exp(-entropy)))
    return logits


def _keep(logits: Array, kept: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)


def _lowest_kept(logits: Array, top_k: Array | int | None, top_p: Number | None) -> Array:
    """[B, 1]: the least of the top k logits, and of the nucleus among them (Holtzman et al. 2020).

    One sorting serves both.
    """
    ordered = jnp.sort(logits, axis=-1)
    lowest = ordered[..., :1]
    if top_k is not None:
        size = logits.shape[-1]
        lowest = jnp.take(ordered, size - jnp.clip(top_k, 1, size), axis=-1)[..., None]
        ordered = _keep(ordered, ordered >= lowest)
    if top_p is not None:
        reached = jnp.cumsum(jax.nn.softmax(ordered), axis=-1)
        kept = (reached > 1 - top_p).at[..., -1].set(True)
        lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return lowest


def _entropy(logits: Array) -> Array:
    """[B, 1], in nats."""
    log_p = jax.nn.log_softmax(logits)
    terms = jnp.where(jnp.isneginf(log_p), 0, jnp.exp(log_p) * log_p)
    return -terms.sum(-1, keepdims=True)


def _is_typical(logits: Array, mass: Number) -> Array:
    """bool[B, V]: those that locally typical sampling keeps (Meister et al. 2023)."""
    away = jnp.abs(-jax.nn.log_softmax(logits) - _entropy(logits))
    order = jnp.argsort(away, axis=-1)
    ordered = jnp.take_along_axis(logits, order, -1)
    reached = jnp.cumsum(jax.nn.softmax(ordered), axis=-1)
    last = jnp.minimum((reached < mass).sum(-1, keepdims=True), logits.shape[-1] - 1)
    return away <= jnp.take_along_axis(jnp.take_along_axis(away, order, -1), last, -1)


def _cut_off(logits: Array, least: Number) -> Array:
    """Without the tokens of a lesser probability, the likeliest excepted (Hewitt et al. 2022)."""
    likeliest = logits >= logits.max(-1, keepdims=True)
    return _keep(logits, (jax.nn.softmax(logits) >= least) | likeliest)
