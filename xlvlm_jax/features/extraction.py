"""Extracts features from data with a model: rows of Z for every captured site, batch by batch.

Images are read and preprocessed ahead of the model; while one batch is computed, the previous one
is written. Only the selected rows leave the device, in as many slots per sample as a selection
may need (`Selection.rows_at_most`).
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ports import VLM
from ports.paired import check_alike, share_params, with_like_heads
from ports.parallel import hosts
from xlvlm_jax.data.batches import groups_of
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features import multi_host
from xlvlm_jax.features.compute import EditsFor, ExtractionModel
from xlvlm_jax.features.manifest import manifest_of
from xlvlm_jax.features.pipeline import Clock, reference, run_groups
from xlvlm_jax.features.preflight import disk_needs, require_disk, sites_of
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.settings import ExtractionSettings, ExtractionSummary
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.storage.pictures import name_in
from xlvlm_jax.storage.same_model import adapter_of, checkpoint_of, processor_of

Progress = Callable[[int, int, int], None]


def extract(
    vlm: VLM,
    samples: Sequence[Sample],
    output: str | Path,
    settings: ExtractionSettings,
    *,
    finetuned: VLM | None = None,
    edits: EditsFor | None = None,
    steering: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    strict: bool = False,
    workers: int | None = None,
    ignore_disk: bool = False,
    progress: Progress | None = None,
) -> ExtractionSummary:
    """Extracts features into a directory, resuming an interrupted run with the same arguments.

    With several hosts (`jax.distributed`) each calls this with the same arguments; `output` is on a
    disk that all of them see. If the model is on each host's own devices, the hosts divide the
    samples (see `xlvlm_jax.features.multi_host`); if it is split over the devices of all hosts,
    they compute every batch together, and host 0 writes.

    Args:
        vlm: the model.
        samples: the data, in order.
        output: directory of the features: new, or of an interrupted run.
        settings: what to extract.
        finetuned: a fine-tuned version of the model, run on the same batches: its states are stored
            next to the model's, site by site, as `finetuned_site(site)`. Samples are stored once; a
            row is one that both have. Under teacher forcing, what the two models share is computed
            once; in generation each continues with its own tokens, and `tokens` and `positions` are
            the model's.
        edits: (vlm, inputs) -> the edits under which states are captured, see `VLM.generate`.
        steering: what these edits are, as JSON values; kept in the manifest, so that a run is only
            resumed with the same ones. Needed with `edits`.
        source: where the samples come from, JSON values; kept in the manifest.
        strict: stop at an image that can't be read, a sample that the processor refuses, or a state
            that is NaN, Inf or beyond the dtype on disk, instead of recording and skipping the
            sample. What was computed before is kept.
        workers: number of threads that read images; None for one per core, at most 16.
        ignore_disk: start even if the disk may be too small.
        progress: called after each batch with (samples done, total, rows); with several hosts,
            those of this host.

    Returns:
        counts of the whole directory, and timings of this run.

    Raises:
        ValueError: a site is unknown or lacks a state at some positions, there are no samples, the
            directory was started with other arguments or pictures, `edits` come without `steering`,
            the selection keeps nothing of any sample (the words are named), or, if strict, a sample
            gives no rows.
        OSError: the directory can't be written, or its disk has no room for all rows that the
            samples may give.
    """
    began = time.perf_counter()
    if edits is not None and finetuned is not None and settings.mode == "teacher-forcing":
        raise ValueError(
            "states of two models under teacher forcing can't be steered; extract each by itself"
        )
    if edits is not None and steering is None:
        raise ValueError(
            "edits are given without steering, which says what they are; pass it, so that the run "
            "is only resumed with the same edits"
        )
    if not samples:
        raise ValueError(
            "there are no samples to extract from; check the data and the options that select "
            "samples"
        )
    if settings.mode == "teacher-forcing":
        for sample in samples:
            reference(sample)
    sites = sites_of(vlm, settings)
    settings = dataclasses.replace(settings, sites=sites)
    finder = settings.selection.finder(vlm.tokenizer)
    arguments = {
        **_described(vlm, settings),
        "model dtype": vlm.dtype.name,
        **dataclasses.asdict(settings),
        "selection": settings.selection.describe(),
        "samples": len(samples),
        "samples digest": _digest(samples),
        "source": source or {},
        **({} if steering is None else {"steering": steering}),
    }
    if heads := {site: n for site, n in vlm.attention_heads.items() if site in sites}:
        arguments["attention heads"] = heads
    if finetuned is not None:
        arguments["finetuned"] = _described(finetuned, settings)
        vlm, finetuned = with_like_heads(vlm, finetuned)
        check_alike(vlm.params, finetuned.params)
    if not ignore_disk:
        _require_disk(vlm, samples, Path(output), settings, 1 if finetuned is None else 2)
    shared = None
    if finetuned is not None and settings.mode == "teacher-forcing":
        shared = share_params(vlm.params, finetuned.params)
    model = ExtractionModel(vlm, finetuned, shared, settings, finder, edits)
    run = _Run(model, samples, Path(output), arguments, strict, workers)
    several = jax.process_count() > 1 or multi_host.exist(run.output)
    if hosts.span(vlm.mesh):
        _together(run, progress)
    else:
        (_over_hosts if several else _alone)(run, progress)
    features = Features.open(output)
    return _summary(features, time.perf_counter() - began, dict(run.clock.seconds))


def _require_disk(
    vlm: VLM, samples: Sequence[Sample], output: Path, settings: ExtractionSettings, models: int
) -> None:
    state = manifest_of(output)
    left = samples[0 if state is None else state["samples"] :]
    require_disk(output, disk_needs(vlm, left, settings, models=models)[1])


@dataclasses.dataclass(frozen=True)
class _Run:
    model: ExtractionModel
    samples: Sequence[Sample]
    output: Path
    arguments: dict[str, Any]
    strict: bool
    workers: int | None
    clock: Clock = dataclasses.field(default_factory=Clock)

    def write(self, groups: Sequence[Any], commit: Callable[..., None], root: Path | None) -> None:
        """Runs the groups; `root` is what the names of pictures are relative to."""

        def named(number: int, described: list[dict[str, Any]], *arrays: Any) -> None:
            for entry in described:
                entry["image"] = name_in(root, entry["image"])
            commit(number, described, *arrays)

        run_groups(
            self.model,
            groups,
            named,
            strict=self.strict,
            workers=self.workers,
            clock=self.clock,
        )

    def record_pictures(self, writer: FeaturesWriter) -> Path | None:
        return writer.record_pictures([sample.image for sample in self.samples])

    def open(self) -> FeaturesWriter:
        return FeaturesWriter(self.output, self.arguments, dtype=self.model.settings.dtype)


def _alone(run: _Run, progress: Progress | None) -> None:
    """Writes one batch after another into the final features."""
    with run.open() as writer:
        root = run.record_pictures(writer)
        if writer.complete:
            return

        def commit(number: int, *batch: Any) -> None:
            writer.append(*batch)
            if progress is not None:
                progress(writer.samples_done, len(run.samples), writer.rows_done)

        left = run.samples[writer.samples_done :]
        run.write(groups_of(left, run.model.settings.batch_size), commit, root)
        _complete(run, writer)


def _together(run: _Run, progress: Progress | None) -> None:
    """Computes every batch on all hosts in step; host 0 writes."""
    writer, begun = _begin_on_host_0(run)
    if begun.complete:
        return
    done, rows = begun.done, begun.rows

    def commit(number: int, *batch: Any) -> None:
        nonlocal done, rows
        if writer is not None:
            writer.append(*batch)
        described, _, index, *_ = batch
        done, rows = done + len(described), rows + len(index)
        if progress is not None:
            progress(done, len(run.samples), rows)

    # Parts are of a run whose hosts each had the whole model; these samples are computed again.
    if writer is not None:
        shutil.rmtree(run.output / multi_host.FOLDER, ignore_errors=True)
    try:
        left = run.samples[begun.done :]
        run.write(groups_of(left, run.model.settings.batch_size), commit, begun.root)
        if writer is None:
            multi_host.await_whole(run.output)
        else:
            _complete(run, writer)
    finally:
        if writer is not None:
            writer.release()


class _Begun(NamedTuple):
    """What host 0 found in the output directory."""

    complete: bool
    done: int  # number of samples
    rows: int
    root: Path | None  # what the names of pictures are relative to


def _begin_on_host_0(run: _Run) -> tuple[FeaturesWriter | None, _Begun]:
    """Opens the output on host 0 alone, and tells all hosts what is there.

    Raises:
        OSError: it can't be written. Raised on every host, so that none waits for another.
        ValueError: it can't be opened, as for `FeaturesWriter`; on every host too.
    """
    writer, told = None, {}
    if hosts.is_first():
        try:
            writer = run.open()
            root = run.record_pictures(writer)
            told = {
                "complete": writer.complete,
                "done": writer.samples_done,
                "rows": writer.rows_done,
                "root": None if root is None else str(root),
            }
        except (OSError, ValueError) as error:
            told = {"error": str(error), "is OSError": isinstance(error, OSError)}
            if writer is not None:
                writer.release()
    told = hosts.tell(told)
    if "error" in told:
        raise (OSError if told["is OSError"] else ValueError)(told["error"])
    root = told.get("root")
    root = None if root is None else Path(root)
    return writer, _Begun(told["complete"], told["done"], told["rows"], root)


def _over_hosts(run: _Run, progress: Progress | None) -> None:
    """Writes this host's blocks as parts, which host 0 merges."""
    writer, begun = _begin_on_host_0(run)
    if begun.complete:
        return
    size = run.model.settings.batch_size
    blocks = multi_host.blocks_of(run.output, len(run.samples), begun.done, size)
    mine = multi_host.Parts(blocks, run.samples, run.arguments, run.model.settings.dtype, size)
    total, done, rows = sum(map(len, mine.groups)), 0, 0

    def commit(number: int, *batch: Any) -> None:
        nonlocal done, rows
        mine.commit(number, *batch)
        described, _, index, *_ = batch
        done, rows = done + len(described), rows + len(index)
        if writer is not None:
            multi_host.merge_ready(writer, blocks, size)
        if progress is not None:
            progress(done, total, rows)

    try:
        run.write(mine.groups, commit, begun.root)
        if writer is None:
            multi_host.await_whole(run.output)
            return
        with run.clock.waiting("other hosts"):
            multi_host.merge_all(writer, blocks, size)
        _complete(run, writer)
    finally:
        mine.release()
        if writer is not None:
            writer.release()


def _complete(run: _Run, writer: FeaturesWriter) -> None:
    if writer.rows_done == 0:
        reason = _why_no_rows(run.output, run.model)
        writer.remove()
        raise ValueError(reason)
    writer.close()


def _described(vlm: VLM, settings: ExtractionSettings) -> dict[str, Any]:
    """Describes the model, so that a run is only resumed with the same one, by its fingerprint."""
    # Without an adapter, manifests name none, so that runs of earlier releases are resumed.
    described: dict[str, Any] = dict(checkpoint_of(vlm))
    if settings.mode == "generate" and vlm.logits_options:
        described["generation_config"] = vlm.logits_options
    if vlm.adapter is not None:
        described |= adapter_of(vlm)
    # None for the model's own: a run that tells of no processor is one of an earlier release.
    return {**described, "processor": None, **processor_of(vlm)}


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.prompt, *sample.references]).encode())
    return digest.hexdigest()[:16]


def _why_no_rows(output: Path, model: ExtractionModel) -> str:
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    errors = [sample["error"] for sample in samples if "error" in sample]
    if len(errors) == len(samples):
        return f"none of the {len(samples)} samples gave a state; the first: {errors[0]}"
    selection, read = model.settings.selection, len(samples) - len(errors)
    rest = f" ({len(errors)} more gave no state, the first: {errors[0]})" if errors else ""
    if model.finder is not None:
        return (
            f"no sample of {read} predicted {selection.argument!r}; looked for {model.finder}; "
            f"use more samples, or a word that occurs in the model's answers{rest}"
        )
    return (
        f"the selection {selection} keeps no position of any of {read} samples; choose another "
        f"selection{rest}"
    )


def _summary(features: Features, seconds: float, seconds_of: dict[str, float]) -> ExtractionSummary:
    failed = tuple((s["id"], s["error"]) for s in features.samples if "error" in s)
    with_rows = len(np.unique(features.sample_rows))
    return ExtractionSummary(
        samples=len(features.samples),
        rows=features.num_rows,
        without_token=len(features.samples) - len(failed) - with_rows,
        failed=failed,
        seconds=seconds,
        seconds_of=seconds_of,
    )
