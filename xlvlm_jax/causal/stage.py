"""Scores the concepts of a dictionary: edits over samples, in batches.

K concepts, N samples, W words, D width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ports import VLM
from ports.intervene.edits import Where
from xlvlm_jax.causal.changes import (
    concept_edits,
    effects,
    prepare,
    slopes,
    spliced_losses,
)
from xlvlm_jax.causal.record import CausalRecord
from xlvlm_jax.causal.scores import (
    causal_scores,
    rank_correlation,
    signs,
)
from xlvlm_jax.causal.words import NONE, Vocabulary, filled, own_tokens, vocabulary_of
from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.picture_maps import check_concepts, concept_site
from xlvlm_jax.concepts.reconstruction import reconstruct
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.removal import concept_directions
from xlvlm_jax.data.answers import answered
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.steering.teacher_forcing import batches, require_one_each, require_some
from xlvlm_jax.storage.same_model import model_of, require_model

Progress = Callable[[int, int], None]
ADD, ABLATE = (0.05, 0.1, 0.2), (0.5, 1.0)  # strengths


def require_concepts_of(concepts: Concepts, vlm: VLM, site: str | None) -> str:
    """Returns the site at which to edit concepts.

    Args:
        concepts: the concepts.
        vlm: the model.
        site: a name; None for the site that they were learnt at.

    Raises:
        ValueError: the concepts have no words or were learnt on another model, at another site or
            with another width, or the site is unknown.
    """
    if concepts.words is None or not any(concepts.words):
        raise ValueError("the concepts have no words to score; run `xlvlm ground` first")
    require_model(concepts.written, vlm, "the concepts were learnt on the states of")
    found = concept_site(vlm, site, concepts, written=True)
    width, expected = np.shape(concepts.components)[1], vlm.site_shapes[found][-1]
    if width != expected:
        raise ValueError(
            f"the concepts are {width} wide, but the states at {found!r} have width {expected}; "
            "choose the site and the model that they were learnt on"
        )
    return found


class Measured(NamedTuple):
    """What edits of K concepts change in N samples.

    Attributes:
        vocabulary: the W words.
        changes: float32[K, N, W], of each word's log-probability, see `causal_scores`.
        likelihood: float32[W], mean log-probability of each word without an edit.
        rest: float32[K, N], KL divergence, in nats, of all but the own words, mean over the edits.
        own: float32[K, N], change of the mean log-probability of the own words when the largest
            fraction is removed; NaN if nothing is removed.
        answer: float32[K, N], change of the answer's log-probability by the same edit.
        first_order: float32[K, N], estimate of `own` by gradient x activation.
        integrated: float32[K, N], estimate of `own` by integrated gradients.
        losses: float32[N] by what replaces the states, in nats, see `spliced_losses`; empty without
            answers.
        kept: indices of the samples that could be processed.
    """

    vocabulary: Vocabulary
    changes: Float[np.ndarray, "K N W"]
    likelihood: Float[np.ndarray, " W"]
    rest: Float[np.ndarray, "K N"]
    own: Float[np.ndarray, "K N"]
    answer: Float[np.ndarray, "K N"]
    first_order: Float[np.ndarray, "K N"]
    integrated: Float[np.ndarray, "K N"]
    losses: dict[str, Float[np.ndarray, " N"]]
    kept: list[int]


def measure_concepts(
    concepts: Concepts,
    vlm: VLM,
    samples: Sequence[Sample],
    answers: Sequence[str] | None,
    *,
    site: str | None = None,
    mean: Float[Any, " D"] | None = None,
    add: Sequence[float] = ADD,
    ablate: Sequence[float] = ABLATE,
    where: Where = "predicting",
    steps: int = 5,
    batch_size: int = 16,
    strict: bool = False,
    errors: dict[str, str] | None = None,
    progress: Progress | None = None,
    numbers: Sequence[int] | None = None,
    at_once: int | None = None,
) -> Measured:
    """Adds and removes every concept while the model answers, and measures what changes.

    Runs on the host and cannot be traced.

    Args:
        concepts: K concepts with words.
        vlm: the model that they were learnt on.
        samples: images and prompts.
        answers: the answer to each prompt, such as the model's own; None measures the position
            after each prompt alone.
        site: the site to edit; None for that of the concepts.
        mean: float[D], mean state, for the losses; None leaves them out, which transcoders and
            crosscoders need: no state of the site alone is put back by them.
        add: strengths of additions, as fractions of each state's norm.
        ablate: fractions of the component to remove.
        where: positions to edit, see `prepare`.
        steps: gradients per concept of the integrated gradients.
        batch_size: samples per batch.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        errors: receives {skipped sample: why}.
        progress: called after each batch with (samples done, number of samples).
        numbers: the concepts to edit, which are the K of the result; None for all. The words of the
            others are measured too: their own are compared with those.
        at_once: number of edits, and of gradients, that run side by side; None chooses by backend
            and size.

    Returns:
        The changes.

    Raises:
        ValueError: as for `require_concepts_of`, `concept_edits` and `prepare`, the numbers of
            answers and samples differ, there are no words to compare with, or no sample can be
            processed.
    """
    site = require_concepts_of(concepts, vlm, site)
    if mean is not None:
        concepts.require_one_site("a loss by reconstructed states")
    chosen = list(range(len(concepts.components)) if numbers is None else numbers)
    every = list(concepts.words or ())
    own_lists = [every[k] for k in chosen]
    known = vocabulary_of(own_lists, vlm.tokenizer, vlm.sizes.text.vocab_size, others=every)
    if all(len(set(own)) == len(known.words) for own in known.own if own):
        raise ValueError(
            "the concepts have no other words to compare with; ground more concepts, or with more "
            "words each"
        )
    vectors = concept_directions(concepts)[chosen]
    edits = concept_edits(vectors, add, ablate)
    K, S = len(vectors), len(add) + len(ablate)
    weights = signs(add, ablate) / S
    own_ids, own = own_tokens(known), filled(known.own)
    counts = np.maximum((own != NONE).sum(1), 1)[:, None]
    if answers is not None:
        require_one_each(answers, samples)
    count = None if answers is None else _longest(vlm, samples, answers)
    refused: dict[str, str] = {} if errors is None else errors
    kept: list[int] = []
    parts: list[dict[str, np.ndarray]] = []

    def remade(states: np.ndarray) -> np.ndarray:
        return np.asarray(reconstruct(concepts, np.asarray(project(states, concepts)), states))

    for index, batch in batches(
        vlm, samples, answers, batch_size, ended=False, strict=strict, errors=refused
    ):
        (inputs,) = batch.inputs
        lengths = None if answers is None else batch.answer_lengths
        asked = prepare(vlm, inputs, site, answer_lengths=lengths, count=count, where=where)
        found, plain = effects(asked, edits, known.tokens, own_ids, at_once=at_once)
        moved = np.asarray(found.words).reshape(K, S, *plain.shape)
        said, rest = (np.asarray(x).reshape(K, S, -1) for x in (found.answer, found.rest))
        part = {
            "changes": np.einsum("s,ksbw->kbw", weights, moved),
            "likelihood": np.asarray(plain)[None],
            "rest": rest.mean(1),
        }
        if len(ablate):
            most = int(np.argmax(ablate))
            removed = moved[:, len(add) + most]
            spelt = np.where(own[:, None] == NONE, 0, np.take_along_axis(removed, own[:, None], 2))
            part |= {"own": spelt.sum(2) / counts, "answer": said[:, len(add) + most]}
            # A gradient estimates the removal of the whole component.
            given = (asked, vectors, known.tokens, own)
            for name, number in (("first_order", 1), ("integrated", steps)):
                estimate = slopes(*given, steps=number, at_once=at_once).words
                part[name] = ablate[most] * np.asarray(estimate)
        if answers is not None and mean is not None:
            part |= {f"loss {name}": x for name, x in spliced_losses(asked, remade, mean).items()}
        # The rows after these fill up the batch.
        parts.append({name: _rows(value, len(index)) for name, value in part.items()})
        kept += index.tolist()
        if progress is not None:
            progress(len(kept) + len(refused), len(samples))
    require_some(kept, samples, refused)
    whole = {
        name: np.concatenate([p[name] for p in parts], axis=min(parts[0][name].ndim - 1, 1))
        for name in parts[0]
    }
    none = np.full((K, len(kept)), np.nan)
    return Measured(
        vocabulary=known,
        changes=whole["changes"],
        likelihood=whole["likelihood"][0].mean(0),
        rest=whole["rest"],
        **{n: whole.get(n, none) for n in ("own", "answer", "first_order", "integrated")},
        losses={n.removeprefix("loss "): x for n, x in whole.items() if n.startswith("loss ")},
        kept=kept,
    )


def _rows(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the first samples of an array [B] or [K, B, ...]."""
    return values[:count] if values.ndim == 1 else values[:, :count]


def score_causally(
    concepts: Concepts,
    vlm: VLM,
    samples: Sequence[Sample],
    answers: Sequence[str] | None,
    *,
    site: str | None = None,
    add: Sequence[float] = ADD,
    ablate: Sequence[float] = ABLATE,
    where: Where = "predicting",
    num_matched: int = 3,
    num_shuffles: int = 100,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    **options: Any,
) -> CausalRecord:
    """Measures what edits of every concept change, and scores the concepts by it.

    Runs on the host and cannot be traced.

    Args:
        concepts, vlm, samples, answers, site, add, ablate, where: as for `measure_concepts`.
        num_matched, num_shuffles, seed: as for `causal_scores`.
        numbers: the concepts to score; the others have NaN in their place. None for all.
        **options: further options of `measure_concepts`.

    Returns:
        Scores, effects and losses.

    Raises:
        ValueError: as for `measure_concepts`, or fewer than two samples can be processed.
    """
    site = require_concepts_of(concepts, vlm, site)
    K = len(concepts.components)
    chosen = list(range(K) if numbers is None else dict.fromkeys(numbers))
    check_concepts(chosen, K)
    found = measure_concepts(
        concepts,
        vlm,
        samples,
        answers,
        site=site,
        add=add,
        ablate=ablate,
        where=where,
        numbers=chosen,
        **options,
    )
    own = found.vocabulary.own
    scores = causal_scores(
        found.changes,
        own,
        found.likelihood,
        num_matched=num_matched,
        num_shuffles=num_shuffles,
        seed=seed,
    )
    worded = [k for k, words in enumerate(own) if words]

    def among_all(values: np.ndarray) -> np.ndarray:
        every = np.full(K, np.nan)
        every[chosen] = values
        return every

    columns: dict[str, Any] = {
        name: among_all(value)
        for name, value in dataclasses.asdict(scores).items()
        if name != "confidence"
    }
    return CausalRecord(
        scores=dataclasses.replace(scores, **columns),
        answer=among_all(found.answer.mean(1)),
        rest=among_all(found.rest.mean(1)),
        words=list(concepts.words or ()),
        first_order=rank_correlation(found.first_order[worded], found.own[worded]),
        integrated=rank_correlation(found.integrated[worded], found.own[worded]),
        losses={name: float(values.mean()) for name, values in found.losses.items()},
        settings={
            **model_of(vlm),
            "site": site,
            "where": where,
            "add": [float(s) for s in add],
            "ablate": [float(s) for s in ablate],
            "samples": len(found.kept),
            "answers": answers is not None,
            "matched words": num_matched,
            "shuffles": num_shuffles,
            "seed": seed,
            **({} if numbers is None else {"concepts": chosen}),
            "words without a token": found.vocabulary.unknown,
        },
    )


def _longest(vlm: VLM, samples: Sequence[Sample], answers: Sequence[str]) -> int:
    """Returns the number of tokens of the longest answer, so that all batches share a program."""
    prompts = [vlm.render(sample.prompt) for sample in samples]
    *_, lengths = answered(vlm, prompts, answers, ended=False)
    return int(lengths.max(initial=0))
