"""The loop over batches, with reading, computing and writing in parallel, and its timings."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ports import VLM
from xlvlm_jax.data.batches import Batch, Group, make_batch, read_ahead
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.compute import Computed, ExtractionModel, Ran, run, select
from xlvlm_jax.features.image_cells import BatchCells, Cells, cells_of
from xlvlm_jax.features.settings import ExtractionSettings

_OF_A_RUN = ("error", "prediction", "finetuned prediction")  # what a run adds to a sample

# Takes the number of a group and the arguments of `FeaturesWriter.append`.
Commit = Callable[..., None]


class Clock:
    """Seconds of the run, by what it waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Adds the duration of the block to that of `what`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began


def prepare(vlm: VLM, samples: Group, *, settings: ExtractionSettings, strict: bool) -> Batch:
    """Returns the batch of a group.

    Raises:
        OSError: if strict, a picture can't be read.
        ValueError: a sample has no reference to force or, if strict, the processor refuses it.
    """
    forced = settings.mode == "teacher-forcing"
    answers = [reference(sample) for sample in samples] if forced else None
    return make_batch(vlm, samples, settings.batch_size, answers=answers, strict=strict)


def reference(sample: Sample) -> str:
    """Returns the reference that is forced on a sample.

    Raises:
        ValueError: it has none.
    """
    if not sample.references:
        raise ValueError(
            f"sample {sample.id} has no reference to force; use data with captions or answers"
        )
    return sample.references[0]


def run_groups(
    model: ExtractionModel,
    groups: Sequence[Group],
    commit: Commit,
    *,
    strict: bool,
    workers: int | None,
    clock: Clock,
) -> None:
    """Computes the rows of every group and commits them, in order.

    Raises:
        OSError: from `commit`; if strict, also for a sample that can't be read.
        ValueError: from `commit`; if strict, also for a sample that can't be processed or has a
            state that is not finite. Earlier groups are committed.
    """
    running: list[tuple[int, Batch, Ran | None]] = []  # the batch on the device

    def selected() -> list[tuple[int, Batch, Computed | None]]:
        # Removed from the list so that its states are freed before the next batch allocates its
        # own.
        taken, running[:] = list(running), []
        return [(n, batch, None if ran is None else select(model, ran)) for n, batch, ran in taken]

    def finish(done: list[tuple[int, Batch, Computed | None]]) -> None:
        for number, batch, result in done:
            with clock.waiting("device"):
                described, *arrays = _fetch(model, batch, result, strict)
            with clock.waiting("write"):
                commit(number, described, *arrays)

    make = functools.partial(prepare, model.vlm, settings=model.settings, strict=strict)
    ready = read_ahead(groups, make, workers)
    for number in range(len(groups)):
        try:
            with clock.waiting("input"):
                batch = next(ready)
        except Exception:
            finish(selected())  # keeps what is computed
            raise
        # JAX returns at once: this batch is computed while the previous one is fetched and written.
        # The rows of the previous batch are selected first, or they would wait for this one.
        with clock.waiting("device"):
            done = selected()
            ran = None
            if batch.inputs:
                cells = _cells(model, batch)
                ran = run(model, batch.inputs[0], batch.answer_lengths, cells)
            running.append((number, batch, ran))
        finish(done)
    with clock.waiting("device"):
        done = selected()
    finish(done)


def _cells(model: ExtractionModel, batch: Batch) -> BatchCells | None:
    """Returns the image tokens that the selection chooses; None if it looks for others."""
    selection = model.settings.selection
    if selection.mode != "image":
        return None
    names = [batch.samples[i].id for i in batch.rows]
    return cells_of(
        model.vlm,
        batch.inputs[0],
        batch.sizes,
        names,
        at_most=selection.at_most,
        seed=selection.seed or 0,
    )


def _fetch(model: ExtractionModel, batch: Batch, result: Any, strict: bool) -> tuple[Any, ...]:
    """Returns the arguments of `FeaturesWriter.append` for a batch; waits for the device."""
    described = [sample.to_dict() for sample in batch.samples]
    for entry in described:  # of an earlier run, if the samples come from its features
        for name in _OF_A_RUN:
            entry.pop(name, None)
    for entry, error in zip(described, batch.errors, strict=True):
        if error is not None:
            entry["error"] = error
    has_cells = model.settings.selection.has_cells
    if result is None:
        none = np.zeros(0, int)
        return described, {}, none, none, none, Cells.empty() if has_cells else None
    rows, predicted, finite, cells = result
    states, row, position, token = rows.flat()
    real = row < batch.num_rows
    placed = None
    if cells is not None and has_cells:
        placed = cells.at(row[real], position[real], batch.inputs[0]["attention_mask"])
    states = {site: value[real] for site, value in states.items()}
    index, position, token = batch.rows[row[real]], position[real], token[real]
    for name, ids in predicted.items():
        texts = model.vlm.decode(ids)
        for sample, text in zip(batch.good, texts, strict=False):
            described[sample][name] = text.strip()
    if finite is not None:
        for sample in batch.good[~np.asarray(finite)[: batch.num_rows]]:
            described[sample]["error"] = f"NaN or Inf in the logits {_advice(model)}"
    kept = _keep_finite(model, states, index, position, described, strict)
    states = {site: value[kept] for site, value in states.items()}
    placed = None if placed is None else placed.take(kept)
    return described, states, index[kept], position[kept], token[kept], placed


def _keep_finite(
    model: ExtractionModel,
    states: dict[str, np.ndarray],
    index: np.ndarray,
    position: np.ndarray,
    described: list[dict[str, Any]],
    strict: bool,
) -> np.ndarray:
    """Returns bool[rows]: rows of samples whose states are all finite as stored.

    The other samples get an error.
    """
    disk = jnp.dtype(model.settings.dtype)
    for site, value in states.items():
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(disk, copy=False)).all(axis=1)
        for row in np.flatnonzero(~finite):
            sample = described[index[row]]
            # A site says more than the logits after it, and the first site says most.
            if "at site" not in sample.get("error", ""):
                sample["error"] = _not_finite(model, site, value[row], int(position[row]))
    bad = [sample for sample in described if "error" in sample]
    if strict and bad:
        raise ValueError(f"sample {bad[0]['id']}: {bad[0]['error']}")
    return np.array(["error" not in sample for sample in described])[index]


def _not_finite(model: ExtractionModel, site: str, state: np.ndarray, position: int) -> str:
    where = f"at site {site}, position {position}"
    if np.isfinite(state).all():
        return (
            f"the state {where} reaches {np.abs(state).max():.3g}, beyond {model.settings.dtype}; "
            "store states as bfloat16 or float32"
        )
    kind = "NaN" if np.isnan(state).any() else "Inf"
    return f"{kind} in the state {where} {_advice(model)}"


def _advice(model: ExtractionModel) -> str:
    dtype = model.vlm.dtype.name
    advice = "run the model in bfloat16 or float32" if dtype == "float16" else "check the weights"
    return f"of the model in {dtype}; {advice}"
