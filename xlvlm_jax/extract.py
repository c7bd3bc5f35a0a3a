"""Model x data -> features: the rows of Z of every captured site, written batch by batch.

B batch, T prompt positions, M new tokens, D width.

Images are read and preprocessed ahead of the model; while one batch is computed, the one before it
is written. Only the selected rows leave the device.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from ports import VLM
from ports.checkpoint import fingerprint
from xlvlm_jax import tokens
from xlvlm_jax.answers import answered
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.paired import Params, check_alike, finetuned_site, paired_states, share_params
from xlvlm_jax.selection import Selection, not_found
from xlvlm_jax.store import Features, FeaturesWriter

MODES = ("generate", "teacher-forcing")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is extracted from each sample.

    Attributes:
        sites: whose states.
        selection: which positions of a sample make rows.
        mode: "generate" (greedy, states come out of the decode loop) or "teacher-forcing" (one pass
            over prompt and first reference; what lies behind the last site is not computed).
        max_new_tokens: M, in generation.
        batch_size: B, of every batch: the last one is filled up.
        dtype: of the states on disk.

    Raises ValueError for a mode, batch size or length that can't be.
    """

    sites: tuple[str, ...]
    selection: Selection
    mode: str = "generate"
    max_new_tokens: int = 20
    batch_size: int = 16
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if not self.sites:
            raise ValueError("no site to capture; name one, as `xlvlm sites MODEL` lists them")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Summary(NamedTuple):
    """What a run did; numbers are of the whole directory, seconds of this run."""

    samples: int
    rows: int
    without_token: int  # samples of which the selection kept nothing
    failed: tuple[tuple[str, str], ...]  # (sample, reason): images that could not be read
    seconds: float


class _Batch(NamedTuple):
    samples: tuple[Sample, ...]
    errors: tuple[str | None, ...]  # why a sample has no image, else None
    rows: np.ndarray  # int[B]: the sample of `samples` that each row of the batch belongs to
    num_rows: int  # the rows behind only fill the batch up
    inputs: dict[str, np.ndarray] | None  # None if no image could be read
    answer_lengths: np.ndarray  # int[B]: how many of the last tokens are forced


def extract(
    vlm: VLM,
    samples: Sequence[Sample],
    output: str | Path,
    settings: Settings,
    *,
    finetuned: VLM | None = None,
    source: dict[str, Any] | None = None,
    strict: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> Summary:
    """Extracts features into a directory; goes on where an interrupted run of the same stopped.

    Args:
        vlm: the model.
        samples: the data, in order.
        output: the directory of features, new or of a run that was interrupted.
        settings: what to extract.
        finetuned: a fine-tuned version of the model, run on the same batches: its states stand
            beside the model's, site by site, as `finetuned_site(site)`. Samples are stored once;
            a row is one that both have. What the two models share is computed once under teacher
            forcing; in generation each goes its own way, and `tokens` and `positions` are the
            model's.
        source: where the samples come from, free for the caller; kept in the manifest.
        strict: stop at an image that can't be read, instead of recording and skipping it.
        progress: called after each batch with (samples done, samples in all, rows).

    Raises:
        ValueError: an unknown site, no samples, other arguments than the directory was begun with,
            a selection that keeps nothing of any sample (the spellings looked for are named), or,
            if strict, an image that can't be read.
        OSError: the directory can't be written.
    """
    began = time.perf_counter()
    if not samples:
        raise ValueError("there are no samples to extract from; check the data and its selection")
    spellings = settings.selection.spellings(vlm.tokenizer)
    arguments = {
        **_described(vlm),
        "model dtype": jnp.dtype(vlm.module.dtype).name,
        **dataclasses.asdict(settings),
        "selection": dataclasses.asdict(settings.selection),
        "samples": len(samples),
        "samples digest": _digest(samples),
        "source": source or {},
    }
    vlm.check_sites(settings.sites, generated=settings.mode == "generate" or finetuned is not None)
    if finetuned is not None:
        arguments["finetuned"] = _described(finetuned)
        check_alike(vlm.params, finetuned.params)
    with FeaturesWriter(output, arguments, dtype=settings.dtype) as writer:
        if not writer.complete:
            forced = finetuned is not None and settings.mode == "teacher-forcing"
            shared = share_params(vlm.params, finetuned.params) if forced else None
            run = _Run(vlm, finetuned, shared, settings, tuple(spellings.values()))
            _run(run, samples, writer, strict, progress)
            if writer.rows_done == 0:
                reason = _why_no_rows(Path(output), settings.selection, spellings)
                shutil.rmtree(output)
                raise ValueError(reason)
            writer.close()
    return _summary(Features.open(output), time.perf_counter() - began)


def _described(vlm: VLM) -> dict[str, Any]:
    """The model, so that a run goes on with no other; the fingerprint is the checkpoint's."""
    described: dict[str, Any] = {
        "model": vlm.directory.name if vlm.directory else None,
        "fingerprint": fingerprint(vlm.directory) if vlm.directory else None,
    }
    if vlm.adapter is not None:
        weights = (vlm.adapter / "adapter_model.safetensors").read_bytes()
        digest = hashlib.sha256(weights).hexdigest()[:16]
        described |= {"adapter": vlm.adapter.name, "adapter fingerprint": digest}
    return described


class _Run(NamedTuple):
    """What is the same for every batch."""

    vlm: VLM
    finetuned: VLM | None
    shared: Params | None  # of the fine-tuned model under teacher forcing, see share_params
    settings: Settings
    token_ids: tuple[int, ...]  # spellings of the token of interest


def _run(
    run: _Run,
    samples: Sequence[Sample],
    writer: FeaturesWriter,
    strict: bool,
    progress: Callable[[int, int, int], None] | None,
) -> None:
    running: tuple[_Batch, Any] | None = None

    def finish() -> None:
        if running is not None:
            _write(run.vlm, writer, *running)
            if progress is not None:
                progress(writer.samples_done, len(samples), writer.rows_done)

    for batch in _batches(run.vlm, samples[writer.samples_done :], run.settings, strict):
        # JAX returns at once: this batch is computed while the one before is fetched and written.
        result = None if batch.inputs is None else _compute(run, batch)
        finish()
        running = batch, result
    finish()


def _batches(
    vlm: VLM, samples: Sequence[Sample], settings: Settings, strict: bool
) -> Iterator[_Batch]:
    """Batches of samples, read and preprocessed by threads ahead of the model."""
    size = settings.batch_size
    prepare = functools.partial(_prepare, vlm, settings=settings, strict=strict)
    groups = [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]
    # What the processor reads once is read before the threads ask for it.
    vlm.processor  # noqa: B018
    dataset = grain.MapDataset.source(groups).map(prepare)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=3)))


def _prepare(vlm: VLM, samples: tuple[Sample, ...], *, settings: Settings, strict: bool) -> _Batch:
    images, errors = [], []
    for sample in samples:
        try:
            images.append(read_image(sample.image))
            errors.append(None)
        except (OSError, ValueError) as error:
            if strict:
                raise
            errors.append(str(error))
    good = [i for i, error in enumerate(errors) if error is None]
    if not good:
        none = np.zeros(0, int)
        return _Batch(samples, tuple(errors), none, 0, None, none)
    # Filled up by its first row, so that every batch runs the same program.
    fill = settings.batch_size - len(good)
    rows = np.array(good + good[:1] * fill)
    images += images[:1] * fill
    prompts = [vlm.render(samples[i].prompt) for i in rows]
    lengths = np.zeros(len(rows), int)
    if settings.mode == "teacher-forcing":
        prompts, lengths = answered(vlm, prompts, [_reference(samples[i]) for i in rows])
    inputs = vlm.process(prompts, images)
    return _Batch(samples, tuple(errors), rows, len(good), inputs, lengths)


def _reference(sample: Sample) -> str:
    if not sample.references:
        raise ValueError(
            f"sample {sample.id} has no reference to force; use data with captions or answers"
        )
    return sample.references[0]


def _compute(run: _Run, batch: _Batch) -> tuple[tokens.Rows, dict[str, Any]]:
    """Runs a batch: rows, and predicted tokens by name; on the device and perhaps not there yet."""
    settings = run.settings
    if settings.mode == "teacher-forcing":
        return _forced(run, batch), {}
    rows, predicted = _generated(run, run.vlm, batch)
    if run.finetuned is None:
        return rows, {"prediction": predicted}
    other, finetuned = _generated(run, run.finetuned, batch)
    states = {finetuned_site(site): value for site, value in other.states.items()}
    both = rows._replace(states=rows.states | states, valid=rows.valid & other.valid)
    return both, {"prediction": predicted, "finetuned prediction": finetuned}


def _forced(run: _Run, batch: _Batch) -> tokens.Rows:
    vlm, sites, inputs = run.vlm, run.settings.sites, batch.inputs
    if run.shared is None:
        states = vlm.states(inputs, sites=sites)
    else:
        states, other = paired_states(vlm, vlm.params, run.shared, inputs, sites)
        states |= {finetuned_site(site): value for site, value in other.items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    order = np.cumsum(mask, 1) * mask
    answer = order > order[:, -1:] - batch.answer_lengths[:, None]
    return _selecting(run)("forced", ids, mask, answer, states)


def _generated(run: _Run, vlm: VLM, batch: _Batch) -> tuple[tokens.Rows, Any]:
    settings, inputs = run.settings, batch.inputs
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
    return _selecting(run)(kind, ids, mask, generation.tokens, states), generation.tokens


def _selecting(run: _Run) -> Callable[..., tokens.Rows]:
    vlm = run.vlm
    return functools.partial(
        _select, run.settings.selection, run.token_ids, vlm.eos_tokens, vlm.image_tokens
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


def _write(vlm: VLM, writer: FeaturesWriter, batch: _Batch, result: Any) -> None:
    described = [sample.to_dict() for sample in batch.samples]
    for entry, error in zip(described, batch.errors, strict=True):
        if error is not None:
            entry["error"] = error
    if result is None:
        none = np.zeros(0, int)
        writer.append(described, {}, none, none, none)
        return
    rows, predicted = result
    states, row, position, token = rows.flat()
    real = row < batch.num_rows
    for name, ids in predicted.items():
        texts = vlm.tokenizer.batch_decode(np.asarray(ids), skip_special_tokens=True)
        for index, text in zip(batch.rows[: batch.num_rows], texts, strict=False):
            described[index][name] = text.strip()
    writer.append(
        described,
        {site: value[real] for site, value in states.items()},
        batch.rows[row[real]],
        position[real],
        token[real],
    )


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.prompt, *sample.references]).encode())
    return digest.hexdigest()[:16]


def _why_no_rows(output: Path, selection: Selection, spellings: dict[str, int]) -> str:
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    errors = [sample["error"] for sample in samples if "error" in sample]
    if len(errors) == len(samples):
        return f"none of the {len(samples)} images could be read; the first: {errors[0]}"
    if spellings:
        return not_found(selection.argument, spellings, len(samples))
    return (
        f"the selection {selection} keeps no position of any of {len(samples)} samples; "
        "choose another"
    )


def _summary(features: Features, seconds: float) -> Summary:
    failed = tuple((s["id"], s["error"]) for s in features.samples if "error" in s)
    with_rows = len(np.unique(features.sample_rows))
    return Summary(
        samples=len(features.samples),
        rows=len(features.tokens),
        without_token=len(features.samples) - len(failed) - with_rows,
        failed=failed,
        seconds=seconds,
    )
