"""Batch -> rows: the jitted forward pass or generation, and the selection behind it.

B batch, T prompt positions, M new tokens, D width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ports import VLM, Generation
from xlvlm_jax import tokens
from xlvlm_jax.extract.batches import Batch
from xlvlm_jax.extract.settings import Settings
from xlvlm_jax.paired import Params, finetuned_site, paired_states
from xlvlm_jax.selection import Selection


class Model(NamedTuple):
    """What is the same for every batch."""

    vlm: VLM
    finetuned: VLM | None
    shared: Params | None  # of the fine-tuned model under teacher forcing, see share_params
    settings: Settings
    token_ids: tuple[int, ...]  # spellings of the token of interest


class Computed(NamedTuple):
    """A batch's result, on the device and perhaps not there yet."""

    rows: tokens.Rows
    predicted: dict[str, jax.Array]  # tokens int32[B, M] by the name under which they are kept
    finite: jax.Array | None = None  # bool[B], whether no logits were NaN or Inf


def compute(model: Model, batch: Batch) -> Computed:
    """Runs a batch."""
    settings = model.settings
    if settings.mode == "teacher-forcing":
        return Computed(_forced(model, batch), {})
    rows, generation = _generated(model, model.vlm, batch)
    predicted = {"prediction": generation.tokens}
    if model.finetuned is None:
        return Computed(rows, predicted, generation.finite)
    other, second = _generated(model, model.finetuned, batch)
    states = {finetuned_site(site): value for site, value in other.states.items()}
    both = rows._replace(states=rows.states | states, valid=rows.valid & other.valid)
    predicted["finetuned prediction"] = second.tokens
    return Computed(both, predicted, generation.finite & second.finite)


def _forced(model: Model, batch: Batch) -> tokens.Rows:
    vlm, sites, inputs = model.vlm, model.settings.sites, batch.inputs
    if model.shared is None:
        states = vlm.states(inputs, sites=sites)
    else:
        states, other = paired_states(vlm, vlm.params, model.shared, inputs, sites)
        states |= {finetuned_site(site): value for site, value in other.items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    order = np.cumsum(mask, 1) * mask
    answer = order > order[:, -1:] - batch.answer_lengths[:, None]
    return _selecting(model)("forced", ids, mask, answer, states)


def _generated(model: Model, vlm: VLM, batch: Batch) -> tuple[tokens.Rows, Generation]:
    settings, inputs = model.settings, batch.inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = not settings.selection.generated_only
    generation = vlm.generate(
        inputs,
        max_new_tokens=settings.max_new_tokens,
        sites=settings.sites,
        prompt_states=whole,
    )
    kind, states = "generated", generation.states
    if whole:
        kind = "sequence"
        states = {site: (generation.prompt_states[site], states[site]) for site in settings.sites}
    return _selecting(model)(kind, ids, mask, generation.tokens, states), generation


def _selecting(model: Model) -> Callable[..., tokens.Rows]:
    vlm = model.vlm
    return functools.partial(
        _select, model.settings.selection, model.token_ids, vlm.eos_tokens, vlm.image_tokens
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _select(
    selection: Selection,
    token_ids: tuple[int, ...],
    end_ids: tuple[int, ...],
    image_tokens: tuple[int, ...],
    kind: str,
    ids: jax.Array,
    mask: jax.Array,
    answer: jax.Array,
    states: dict[str, Any],
) -> tokens.Rows:
    """The rows of a batch. answer: generated tokens [B, M], or the mask of forced ones [B, T]."""
    if kind == "forced":
        positions = tokens.Positions.of_teacher_forcing(
            ids, mask, answer, image_token_ids=image_tokens
        )
    elif kind == "sequence":
        positions = tokens.Positions.of_generation(
            ids, mask, answer, image_token_ids=image_tokens, end_ids=end_ids
        )
        # The last prompt state is the one that predicted the first token: it is there twice.
        states = {
            site: jnp.concatenate([prompt, generated[:, 1:]], axis=1)
            for site, (prompt, generated) in states.items()
        }
    else:
        positions = tokens.Positions.of_generated(answer, end_ids=end_ids)
    rows = selection.rows(states, positions, token_ids=token_ids, end_ids=end_ids)
    if kind == "generated":
        # Counted from the beginning of the sequence, as in the other two.
        rows = rows._replace(position=rows.position + mask.sum(1, dtype=jnp.int32)[:, None] - 1)
    return rows
