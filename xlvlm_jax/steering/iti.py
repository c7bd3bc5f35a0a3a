"""Inference-time intervention (ITI): shifts the outputs of the few attention heads that know most.

For each head, with outputs x_i after source answers and z_j after target answers, a logistic
regression tells the two apart; the heads whose probe is right most often on held-out samples are
steered, each along

    theta = (mean(z) - mean(x)) / |mean(z) - mean(x)|      mass mean shift
    theta = w / |w|                                        of the probe's weights w, on request

by sigma, the standard deviation of <x, theta> and <z, theta> together. The vector of a site is
sigma theta in the coordinates of its chosen heads and zero in those of the others, so that strength
alpha adds alpha sigma theta before the output projection, as in the paper.

Li et al. 2023, "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model"
(arXiv 2306.03341), section 3; the states are those that predict the answer.

L sites, H heads of a site, C their width, N and M source and target states.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ports.messages import counted, few
from xlvlm_jax.features.manifest import module_of
from xlvlm_jax.features.reader import Features
from xlvlm_jax.solvers.blas_threads import one_thread
from xlvlm_jax.steering.fit import answer_states
from xlvlm_jax.steering.site_vectors import SiteVectors

DIRECTIONS = ("mean", "probe")


class Head(NamedTuple):
    """A head, its vector, and how well its probe does on the held-out samples."""

    site: str
    number: int
    vector: Float[np.ndarray, " C"]  # sigma theta
    accuracy: float
    loss: float  # mean negative log-likelihood, natural logarithm


def fit_iti(
    features: Features,
    sites: Sequence[str],
    source: Sequence[str] | None,
    target: Sequence[str] | None = None,
    *,
    num_heads: int = 48,
    direction: str = "mean",
    validation: float = 0.2,
    heads_per_site: int | None = None,
    seed: int = 0,
    where: Any = "predicting",
    **chosen: Any,
) -> SiteVectors:
    """Fits a vector for the heads whose outputs tell target from source answers best.

    Runs on the host and cannot be traced.

    Args:
        features: states of the samples' answers at sites of heads, such as `layers.*.heads`.
        sites: those to choose heads from.
        source, target: as for `answer_states`.
        num_heads: maximum number of heads to steer.
        direction: "mean" (mass mean shift) or "probe" (the probe's weights).
        validation: share of each group's samples that the probes are not fitted on, but compared.
        heads_per_site: H; None for what the features say.
        seed: random seed of the held-out samples.
        where: the token positions that the vectors are meant for, stored with them.
        chosen: further arguments of `answer_states`.

    Returns:
        The vectors, float32[H * C] per site that has a chosen head, whose `source["heads"]` lists
        [site, head, accuracy], the best first; equally accurate heads come in order of their loss.

    Raises:
        ValueError: the direction is unknown, a number is out of range, the number of heads is
            unknown, a group has fewer than two samples, or as `answer_states`.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; expected {' or '.join(DIRECTIONS)}")
    if not sites or num_heads < 1 or not 0 < validation < 1:
        raise ValueError(
            f"there are {len(sites)} sites, num_heads is {num_heads} and validation {validation}; "
            "expected at least one site and one head, and a share between 0 and 1"
        )
    others = chosen.get("target_features") or features
    found: list[Head] = []
    described: dict[str, Any] = {}
    for site in sites:
        count = heads_per_site or _count_heads(features, site)
        states = answer_states(features, site, source, target, **chosen)
        described = states.described
        groups = (
            features.sample_rows[states.source_rows],
            others.sample_rows[states.target_rows],
        )
        held_out = [_hold_out(group, validation, seed) for group in groups]
        both = np.asarray(states.source), np.asarray(states.target)
        heads = _fit_heads(*both, held_out, count, direction)
        found += [Head(module_of(site), number, *each) for number, each in enumerate(heads)]
    best = sorted(found, key=lambda head: (-head.accuracy, head.loss))[:num_heads]
    at = {head.site for head in best}
    vectors = {site: _in_place(site, best, found) for site in map(module_of, sites) if site in at}
    told = {
        "method": "iti",
        "direction": direction,
        "heads": [[head.site, head.number, round(head.accuracy, 4)] for head in best],
        "validation": validation,
        "seed": seed,
    }
    return SiteVectors(vectors, described | told, where)


def _count_heads(features: Features, site: str) -> int:
    known = features.manifest.get("attention heads", {})
    if module_of(site) not in known:
        raise ValueError(
            f"{features.path} does not tell the number of heads at {site}; expected one of "
            f"{few(known) or 'no site'}: extract sites such as 'layers.*.heads', or give "
            "heads_per_site"
        )
    return known[module_of(site)]


def _hold_out(samples: Int[np.ndarray, " N"], share: float, seed: int) -> Bool[np.ndarray, " N"]:
    """Returns which rows are those of randomly drawn samples, at least one and not all of them."""
    distinct = np.unique(samples)
    if len(distinct) < 2:
        raise ValueError(
            f"there is {counted(len(distinct), 'sample')} of an answer; expected at least two, one "
            "to fit probes on and one to compare them"
        )
    count = min(max(round(share * len(distinct)), 1), len(distinct) - 1)
    return np.isin(samples, np.random.default_rng(seed).permutation(distinct)[:count])


@one_thread()
def _fit_heads(
    source: Float[np.ndarray, "N D"],
    target: Float[np.ndarray, "M D"],
    held_out: Sequence[Bool[np.ndarray, " _"]],
    count: int,
    direction: str,
) -> list[tuple[np.ndarray, float, float]]:
    """Returns (vector, accuracy, loss) of each head of a site."""
    if source.shape[1] % count:
        raise ValueError(
            f"the states have width {source.shape[1]}, not a multiple of {count} heads; expected "
            "states of a site of heads"
        )
    both = np.concatenate([source, target]).astype(np.float64)
    is_target = np.arange(len(both)) >= len(source)
    validates = np.concatenate(held_out)
    by_head = np.moveaxis(both.reshape(len(both), count, -1), 1, 0)
    fit = functools.partial(_fit_head, is_target=is_target, validates=validates)
    return [fit(states, direction=direction) for states in by_head]


def _fit_head(
    states: Float[np.ndarray, "N C"],
    is_target: Bool[np.ndarray, " N"],
    validates: Bool[np.ndarray, " N"],
    direction: str,
) -> tuple[np.ndarray, float, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    # The settings of the authors' code: scikit-learn's penalty of 1.
    probe = LogisticRegression(max_iter=1000).fit(states[~validates], is_target[~validates])
    accuracy = probe.score(states[validates], is_target[validates])
    loss = log_loss(is_target[validates], probe.predict_proba(states[validates]), labels=[0, 1])
    if direction == "probe":
        theta = probe.coef_[0]
    else:
        theta = states[is_target].mean(axis=0) - states[~is_target].mean(axis=0)
    theta = theta / max(np.linalg.norm(theta), np.finfo(float).tiny)
    return (np.std(states @ theta) * theta).astype(np.float32), accuracy, loss


def _in_place(site: str, best: Sequence[Head], found: Sequence[Head]) -> Float[np.ndarray, " D"]:
    """Returns the vector of a site: those of its chosen heads in place, zero elsewhere."""
    chosen = {head.number for head in best if head.site == site}
    return np.concatenate(
        [
            h.vector if h.number in chosen else np.zeros_like(h.vector)
            for h in found
            if h.site == site
        ]
    )
