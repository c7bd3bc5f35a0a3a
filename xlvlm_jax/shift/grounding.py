"""Grounds original, shifted and fine-tuned concepts in words and images."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from xlvlm_jax.concepts.grounding import Unembed, ground_text, strongest_samples
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.data.word_rules import Rules, is_concept_word
from xlvlm_jax.shift.blocks import activations_of
from xlvlm_jax.shift.pairs import RowIds
from xlvlm_jax.shift.record import ShiftAnalysis
from xlvlm_jax.solvers.validation import StoredMatrix


def ground_words(
    analysis: ShiftAnalysis,
    unembed: Unembed,
    tokenizer: Any,
    *,
    finetuned_unembed: Unembed | None = None,
    num_words: int = 15,
    num_candidates: int = 200,
    through_norm: bool = False,
    rules: Rules = "default",
) -> ShiftAnalysis:
    """Adds the words of the concepts and of the shift vectors to an analysis.

    Runs on the host and cannot be traced.

    Args:
        analysis: the analysis.
        unembed: the original model's head, which decodes the original concepts.
        tokenizer: the model's tokenizer.
        finetuned_unembed: the fine-tuned model's head, which decodes shifted and fine-tuned
            concepts; None for the original's (LoRA and most fine-tunings do not change it).
        num_words, num_candidates: see `ground_text`; 15 and 200 in the paper.
        through_norm: whether to apply the final norm of the same model before each head, to shift
            vectors too; see `ground_text`.
        rules: which tokens count as words, see `ground_text`.

    Returns:
        The analysis with words; a concept without a shift has no shifted words.

    Raises:
        ValueError: as `ground_text`.
    """
    after = finetuned_unembed or unembed

    def words(rows: np.ndarray, head: Unembed) -> list[list[str]]:
        read = iter(
            ground_text(
                rows[present],
                head,
                tokenizer,
                num_words,
                num_candidates,
                through_norm=through_norm,
                rules=rules,
            )
        )
        return [next(read) if here else [] for here in present]

    present = np.ones(len(analysis.counts), bool)
    found = {
        "original": words(analysis.original, unembed),
        "finetuned": words(analysis.finetuned, after),
    }
    present = analysis.moved
    found["shifted"], found["shift"] = [[] for _ in present], [[] for _ in present]
    if present.any():
        found["shifted"] = words(analysis.shifted, after)
        found["shift"] = words(analysis.shifts, after)
    return dataclasses.replace(
        analysis, words=found, num_words=num_words, vocabulary=_vocabulary(tokenizer, rules)
    )


def _vocabulary(tokenizer: Any, rules: Rules) -> int:
    """Returns the number of different words among the tokens that may describe a concept."""
    texts = (tokenizer.decode([i]).lower().strip() for i in range(len(tokenizer)))
    return sum(is_concept_word(text, rules) for text in set(texts))


def ground_samples(
    analysis: ShiftAnalysis,
    concepts: Concepts,
    finetuned_concepts: Concepts,
    Z_original: Float[jax.Array | np.ndarray, "N D"] | StoredMatrix,
    Z_finetuned: Float[jax.Array | np.ndarray, "M D"] | StoredMatrix,
    original_ids: Sequence[str],
    finetuned_ids: Sequence[str],
    *,
    num_images: int = 50,
) -> ShiftAnalysis:
    """Adds the samples that activate the concepts most to an analysis.

    Runs on the host and cannot be traced.

    Original concepts are grounded in the original model's states, shifted and fine-tuned ones in
    the fine-tuned model's. The activations of shifted concepts depend on each other, so a concept
    without a shift takes part unshifted, but gets no images. A sample counts once for a concept,
    with its strongest row, and only if it activates the concept.

    Args:
        analysis: the analysis.
        concepts: the original concepts.
        finetuned_concepts: the fine-tuned model's concepts.
        Z_original, Z_finetuned: the states, or readers of them; see `analyse`.
        original_ids, finetuned_ids: the sample ID of each row of the two matrices.
        num_images: maximum number of samples per concept; 50 in the paper.

    Returns:
        The analysis with images.

    Raises:
        ValueError: concepts have activations for other numbers of rows than the states.
    """
    of_rows = [_samples_of(ids) for ids in (original_ids, finetuned_ids)]
    held = [len(np.unique(each)) for each in of_rows]
    count = min(num_images, *held)
    moved = np.where(analysis.moved[:, None], analysis.shifted, analysis.original)
    # Encoded as the original concepts are; for pca, with the fine-tuned model's mean.
    given = concepts.with_components(moved, finetuned_concepts.mean)

    def top(learnt: Concepts, Z: Any, ids: Sequence[str], samples: np.ndarray) -> list[list[str]]:
        tiles = activations_of(learnt, Z)
        found = strongest_samples(tiles, len(learnt.components), samples, count)
        return [[ids[int(row)] for row in rows] for rows in found]

    before, after = (original_ids, of_rows[0]), (finetuned_ids, of_rows[1])
    shifted = top(given, Z_finetuned, *after)
    finetuned = top(finetuned_concepts, Z_finetuned, *after)
    images = {
        "original": top(concepts, Z_original, *before),
        "shifted": [
            rows if here else [] for rows, here in zip(shifted, analysis.moved, strict=True)
        ],
        "finetuned": [finetuned[k] for k in analysis.matching],
    }
    rows = analysis.rows | {"finetuned samples": held[1]}
    return dataclasses.replace(analysis, images=images, num_images=count, rows=rows)


def _samples_of(ids: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Returns a number for the sample of each row."""
    if isinstance(ids, RowIds):  # read no IDs
        return ids.samples_of_rows
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in ids], np.int64)
