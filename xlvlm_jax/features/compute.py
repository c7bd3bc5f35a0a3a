"""From a batch to rows: the jitted forward pass or generation, and the selection after it.

B batch, T prompt positions, M new tokens, P positions of the selection, D width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ports import VLM
from ports.intervene.edits import Edits
from ports.paired import Params, paired_states
from ports.parallel import hosts
from xlvlm_jax.data.batches import Arrays
from xlvlm_jax.features import token_positions
from xlvlm_jax.features.image_cells import BatchCells
from xlvlm_jax.features.manifest import finetuned_site
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.features.settings import ExtractionSettings
from xlvlm_jax.features.spelling import WordFinder

EditsFor = Callable[[VLM, Arrays], Edits]


class ExtractionModel(NamedTuple):
    """What is the same for every batch."""

    vlm: VLM
    finetuned: VLM | None
    shared: Params | None  # of the fine-tuned model under teacher forcing, see share_params
    settings: ExtractionSettings
    finder: WordFinder | None  # finds the words of interest
    edits: EditsFor | None = None  # steers while states are captured


class Pass(NamedTuple):
    """States before the selection of rows, on the device and perhaps still being computed."""

    kind: str  # "forced", "generated", or "sequence" for prompt and generated part
    lengths: np.ndarray  # int32[B], tokens of each prompt
    positions: token_positions.Positions
    searched: token_positions.AnyArray  # int32[B, P], tokens to search for words
    states: dict[str, Any]


class Ran(NamedTuple):
    """The model's output for a batch; with a fine-tuned model that generates, also its output."""

    passes: tuple[Pass, ...]
    predicted: dict[str, jax.Array]  # tokens int32[B, M] by the name under which they are stored
    finite: jax.Array | None = None  # bool[B], whether all logits are finite
    cells: BatchCells | None = None  # the chosen image tokens; None for other selections


class Computed(NamedTuple):
    """Result of a batch, on the device and perhaps still being computed."""

    rows: token_positions.SelectedRows
    predicted: dict[str, jax.Array]
    finite: jax.Array | None = None
    cells: BatchCells | None = None


def run(
    model: ExtractionModel,
    inputs: Arrays,
    answer_lengths: np.ndarray,
    cells: BatchCells | None = None,
) -> Ran:
    """Runs a batch (see `Batch`) without waiting for the device."""
    settings = model.settings
    if settings.mode == "teacher-forcing":
        return Ran((_forced(model, inputs, answer_lengths),), {}, cells=cells)
    first, predicted, finite = _generated(model, model.vlm, inputs)
    if model.finetuned is None:
        return Ran((first,), {"prediction": predicted}, finite, cells)
    second, other, finite_too = _generated(model, model.finetuned, inputs)
    both = {"prediction": predicted, "finetuned prediction": other}
    return Ran((first, second), both, finite & finite_too, cells)


def select(model: ExtractionModel, ran: Ran) -> Computed:
    """Selects the rows; waits for the tokens if they are searched for words."""
    chosen = None if ran.cells is None else ran.cells.chosen
    first, *others = [_rows(model, each, chosen) for each in ran.passes]
    for other in others:
        states = {finetuned_site(site): value for site, value in other.states.items()}
        first = first._replace(states=first.states | states, valid=first.valid & other.valid)
    computed = (first, ran.predicted, ran.finite)
    first, predicted, finite = hosts.readable(computed, model.vlm.mesh)
    return Computed(first, predicted, finite, ran.cells)


def _forced(model: ExtractionModel, inputs: Arrays, answer_lengths: np.ndarray) -> Pass:
    vlm, sites = model.vlm, model.settings.sites
    if model.shared is None:
        states = vlm.states(inputs, sites=sites, edits=_edits(model, vlm, inputs))
    else:
        states, other = paired_states(vlm, vlm.params, model.shared, inputs, sites)
        states |= {finetuned_site(site): value for site, value in other.items()}
    mask = inputs["attention_mask"]
    order = np.cumsum(mask, 1) * mask
    answer = order > order[:, -1:] - answer_lengths[:, None]
    return _pass(model, vlm, "forced", inputs, answer, states)


def _edits(model: ExtractionModel, vlm: VLM, inputs: Arrays) -> Edits | None:
    return None if model.edits is None else dict(model.edits(vlm, inputs))


def _generated(
    model: ExtractionModel, vlm: VLM, inputs: Arrays
) -> tuple[Pass, jax.Array, jax.Array]:
    """Returns the pass, the tokens int32[B, M], and whether all logits are finite, bool[B]."""
    settings = model.settings
    whole = not settings.selection.generated_only
    generation = vlm.generate(
        inputs,
        max_new_tokens=settings.max_new_tokens,
        sites=settings.sites,
        edits=_edits(model, vlm, inputs),
        prompt_states=whole,
    )
    kind, states = "generated", generation.states
    if whole:
        kind = "sequence"
        states = {site: (generation.prompt_states[site], states[site]) for site in settings.sites}
    made = _pass(model, vlm, kind, inputs, generation.tokens, states)
    return made, generation.tokens, generation.finite


def _pass(
    model: ExtractionModel,
    vlm: VLM,
    kind: str,
    inputs: dict[str, np.ndarray],
    answer: jax.Array | np.ndarray,
    states: dict[str, Any],
) -> Pass:
    mask = inputs["attention_mask"]
    selection = model.settings.selection
    # Without the prompt, one program serves all its lengths.
    prompt = (None, None) if kind == "generated" else (inputs["input_ids"], mask)
    positions, searched = _positions(
        kind, selection, vlm.eos_tokens, vlm.image_tokens, *prompt, answer
    )
    # The host looks for words in these, and arrays of one device do not mix with global ones.
    positions, searched = hosts.readable((positions, searched), vlm.mesh)
    return Pass(kind, mask.sum(1, dtype=np.int32), positions, searched, states)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _positions(
    kind: str,
    selection: Selection,
    end_ids: tuple[int, ...],
    image_tokens: tuple[int, ...],
    ids: jax.Array | None,
    mask: jax.Array | None,
    answer: jax.Array,
) -> tuple[token_positions.Positions, token_positions.AnyArray]:
    """Returns the positions and `token_positions.searched` of a batch.

    ids, mask: int[B, T] of the prompt; not needed for "generated".
    answer: generated tokens [B, M], or the mask of forced tokens [B, T].
    """
    if ids is None or mask is None:
        positions = token_positions.Positions.of_generated(answer, end_ids=end_ids)
    elif kind == "forced":
        positions = token_positions.Positions.of_teacher_forcing(
            ids, mask, answer, image_token_ids=image_tokens
        )
    else:
        positions = token_positions.Positions.of_generation(
            ids, mask, answer, image_token_ids=image_tokens, end_ids=end_ids
        )
    only = bool(selection.generated_only)
    return positions, token_positions.searched(
        positions, generated_only=only, start=selection.start
    )


def _rows(
    model: ExtractionModel, made: Pass, chosen: np.ndarray | None
) -> token_positions.SelectedRows:
    found = None if model.finder is None else model.finder(made.searched)
    selection = model.settings.selection
    ends = (*model.vlm.eos_tokens, *selection.end_ids(model.vlm.tokenizer))
    arrays = made.lengths, made.positions, found, chosen, made.states
    return _select(selection, ends, made.kind, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _select(
    selection: Selection,
    end_ids: tuple[int, ...],
    kind: str,
    lengths: jax.Array,
    positions: token_positions.Positions,
    found: jax.Array | None,
    chosen: jax.Array | None,
    states: dict[str, Any],
) -> token_positions.SelectedRows:
    """Returns the rows of a batch.

    lengths: tokens of each prompt, int32[B]; found: positions of its words, int32[B, 2]; chosen:
    its chosen image tokens, bool[B, T].
    """
    if kind == "sequence":
        # The last prompt state predicted the first token, so it is in both parts.
        states = {
            site: jnp.concatenate([prompt, generated[:, 1:]], axis=1)
            for site, (prompt, generated) in states.items()
        }
    rows = selection.rows(states, positions, found=found, end_ids=end_ids, chosen=chosen)
    if kind == "generated":
        # Counted from the start of the sequence, as in the other two kinds.
        rows = rows._replace(position=rows.position + lengths[:, None] - 1)
    return rows
