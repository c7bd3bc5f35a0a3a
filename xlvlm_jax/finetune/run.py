"""Fine-tunes a model on samples and writes the result atomically; resumable."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ports import VLM, checkpoint
from ports.checkpoint import peft_io, quantised
from ports.intervene import lora
from xlvlm_jax.data import files
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.finetune import examples
from xlvlm_jax.finetune.settings import FinetuneSettings
from xlvlm_jax.finetune.training import State, Trainer, initial_adapter
from xlvlm_jax.storage import atomic

RECORD = "training.json"
_TAUGHT = "pictures and answers digest"  # which runs of earlier releases did not record
# Files that a checkpoint needs besides its weights.
_COMPANIONS = (
    "*config*.json",
    "*token*",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)


class FinetuneSummary(NamedTuple):
    """The summary of a run.

    Attributes:
        steps: updates made in all, with those of earlier calls.
        loss: nats per token of the answers, mean over the last updates.
        evaluations: step -> loss on the evaluation split.
        seconds: duration of this call.
        skipped: sample -> why it cannot be read or processed.
    """

    steps: int
    loss: float
    evaluations: dict[int, float]
    seconds: float
    skipped: dict[str, str]


def finetune(
    vlm: VLM,
    samples: Sequence[Sample],
    output: str | Path,
    settings: FinetuneSettings,
    *,
    evaluation: Sequence[Sample] = (),
    evaluate_every: int | None = None,
    save_every: int = 100,
    log_every: int = 10,
    base_model: str | None = None,
    source: dict[str, Any] | None = None,
    command: str | None = None,
    strict: bool = False,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> FinetuneSummary:
    """Fine-tunes a model on the references of samples; resumes an interrupted run.

    The loss is the cross-entropy of the answers' tokens, including the end token, given the
    prompts.

    Args:
        vlm: the model; not changed.
        samples: the data; see `examples.training_answers` for the answers that each provides.
        output: the directory to write: an adapter in PEFT's format, or, if all parameters are
            trained, a checkpoint in the Hugging Face layout in the model's dtype.
            `<output>.training` beside it holds the state of an unfinished run.
        settings: how to train.
        evaluation: samples to compute the loss on before, during and after training.
        evaluate_every: steps between evaluations; None for only before and after.
        save_every: steps between saved states, rounded up to a multiple of `log_every`.
        log_every: steps between records of the mean loss, gradient norm and learning rate.
        base_model: the base model that the adapter names; None for the checkpoint's directory.
        source: where the samples come from, in any form; recorded.
        command: the command line, if any; recorded.
        strict: stop at a sample whose image can't be read, or that the processor refuses, instead
            of recording and skipping it.
        progress: called with (steps done, number of steps, {"loss", "norm", "rate", ...}).

    Returns:
        The summary.

    Raises:
        ValueError: there are no samples, a sample has no references, no sample of a batch (if
            strict, not every sample) can be processed, the targets match no linear layer, or the
            arguments differ from the interrupted run's, or a number of steps is less than 1.
        FloatingPointError: a loss, or a gradient's norm, is NaN or infinite; nothing is saved from
            then on.
        FileExistsError: the output exists and was not made with these arguments.
    """
    began = time.perf_counter()
    output = Path(output)
    steps = {"evaluate": evaluate_every, "save": save_every, "log": log_every}
    for name, number in steps.items():
        if number is not None and number < 1:
            raise ValueError(f"{name}_every must be at least 1 step, got {number}")
    if not samples:
        raise ValueError("there are no samples to learn from; check the data and its selection")
    if vlm.adapter is not None:
        raise ValueError("the model has an adapter merged in; load it without the adapter")
    if settings.method != "lora" and vlm.directory is None:
        raise ValueError(
            "the model has no directory to copy the configuration and tokenizer from; load it "
            "from a saved checkpoint, or train with LoRA"
        )
    for sample in (*samples, *evaluation):
        examples.training_answers(sample)
    # A run may be continued with another value of what does not change its result.
    given = dataclasses.asdict(settings)
    arguments = {
        "base model": base_model or str(vlm.directory),
        "fingerprint": vlm.fingerprint,
        "dtype": vlm.dtype.name,
        **{name: value for name, value in given.items() if name != "recompute"},
        "samples": len(samples),
        "samples digest": _digest(samples),
        "evaluation digest": _digest(evaluation),
        _TAUGHT: _taught([*samples, *evaluation]),
        "evaluate every": evaluate_every,
        "log every": log_every,
        "source": source or {},
    }
    # In the form in which they are read back from the file.
    arguments = json.loads(json.dumps(arguments))
    work = output.with_name(output.name + ".training")
    if output.exists():
        log = _finished_log(output, arguments)
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed at its very end
        return _summary(log, time.perf_counter() - began)
    if settings.method == "lora":
        initial_adapter(vlm, settings)  # raises before anything is written
    numbers = evaluate_every, save_every, log_every
    run = _Run(vlm, samples, settings, evaluation, *numbers, strict, progress)
    _begin(work, arguments)
    trainer, state, log = _train(run, work)
    part = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    made = trainer.finished(state)
    if isinstance(made, lora.Adapter):
        _write_adapter(part, trainer, made, arguments["base model"])
    else:
        _write_checkpoint(part, vlm, made)
    record = {"command": command, "arguments": arguments, "log": log}
    atomic.write(part / RECORD, json.dumps(record, indent=1) + "\n")
    os.rename(part, output)
    shutil.rmtree(work)
    return _summary(log, time.perf_counter() - began)


class _Run(NamedTuple):
    """The arguments that all steps share."""

    vlm: VLM
    samples: Sequence[Sample]
    settings: FinetuneSettings
    evaluation: Sequence[Sample]
    evaluate_every: int | None
    save_every: int
    log_every: int
    strict: bool
    progress: Callable[[int, int, dict[str, float]], None] | None


def _train(run: _Run, work: Path) -> tuple[Trainer, State, list[dict[str, Any]]]:
    """Trains to the end, resuming from the state in `work`, if any."""
    settings = run.settings
    total = settings.num_steps(len(run.samples))
    trainer = Trainer(run.vlm, settings, total)
    state, log = trainer.begin(), []

    def record(step: int, figures: dict[str, float]) -> None:
        # Before the next state is saved. Adam keeps what is not finite for ever.
        if wrong := [name for name, value in figures.items() if not np.isfinite(value)]:
            kept = manager.latest_step()
            left = f"; {work} holds the state of step {kept}: delete it to start over"
            raise FloatingPointError(
                f"at step {step}, {wrong[0]} is {figures[wrong[0]]}; lower the learning rate, or "
                "load the model in float32 or bfloat16 (numbers above 65,504 overflow in float16)"
                + (left if kept else "")
            )
        log.append({"step": step, **{k: float(f"{v:.6g}") for k, v in figures.items()}})
        if run.progress is not None:
            run.progress(step, total, figures)

    def skipping(
        step: int, batches: Iterable[examples.TrainingBatch]
    ) -> Iterator[examples.TrainingBatch]:
        """Yields the batches that have rows; records each skipped sample once."""
        for batch in batches:
            known = {entry["skipped"] for entry in log if "skipped" in entry}
            new = {name: why for name, why in batch.skipped.items() if name not in known}
            log.extend({"step": step, "skipped": name, "why": why} for name, why in new.items())
            if batch.inputs:
                yield batch

    def evaluate(step: int) -> None:
        split = examples.evaluation_batches(
            run.vlm, run.evaluation, settings.batch_size, strict=run.strict
        )
        record(step, {"evaluation": trainer.evaluate(state, skipping(step, split))})

    # A multiple of log_every: all records up to a saved state are then complete.
    interval = -(-run.save_every // run.log_every) * run.log_every
    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=interval)
    with ocp.CheckpointManager((work / "states").absolute(), options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            template, state = without_values(state)
            saved = manager.restore(
                start,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(template),
                    log=ocp.args.JsonRestore(),
                ),
            )
            state, log = resumed(state, saved["state"], run.vlm), saved["log"]
        elif run.evaluation:
            evaluate(0)
        recent: list[dict[str, jax.Array]] = []
        groups = _groups(run, start, total)
        for step, group in enumerate(groups, start + 1):
            state, figures = trainer.update(state, list(skipping(step, group)))
            recent.append(figures)
            if step % run.log_every == 0 or step == total:
                means = {k: float(np.mean([f[k] for f in recent])) for k in recent[0]}
                record(step, {**means, "rate": float(np.asarray(trainer.rate(step - 1)))})
                recent = []
            is_due = run.evaluate_every and step % run.evaluate_every == 0
            if run.evaluation and (is_due or step == total):
                evaluate(step)
            if step % interval == 0:
                saved = ocp.args.StandardSave(stored(state))
                # A copy: it is written in the background while further steps extend the log.
                kept: Any = list(log)  # JsonSave accepts any JSON value, unlike its annotation
                args = ocp.args.Composite(state=saved, log=ocp.args.JsonSave(kept))
                manager.save(step, args=args)
        manager.wait_until_finished()
    return trainer, state, log


def stored(state: State) -> dict[str, Any]:
    """Returns what resuming needs; between two updates no gradient is pending."""
    return lora.joined({"trained": state.trained, "moments": state.moments})


def without_values(state: State) -> tuple[dict[str, Any], State]:
    """Returns shapes and shardings in place of arrays: of what `stored` gives, and the state's own.

    Memory has no room for what is restored beside what it replaces.
    """

    def shapes(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
        )

    replaced = {"trained": state.trained, "moments": state.moments}
    return shapes(stored(state)), state._replace(**shapes(replaced))


def resumed(state: State, values: dict[str, Any], vlm: VLM) -> State:
    """Returns the state with the values that `stored` gave; on a mesh their buffers are reused.

    They are placed as the state's own are, which may be shapes and shardings alone.
    """
    if vlm.mesh is None:
        state = state._replace(**lora.by_part(values, vlm.params))
        # What is restored is committed to its device. An update commits the rest too, and would be
        # compiled again.
        return jax.device_put(state, *state.loss.devices())
    where = {
        name: jax.tree.map(lambda leaf: leaf.sharding, getattr(state, name)) for name in values
    }
    structure, leaves, staying = jax.tree.structure(values), _by_name(values), _by_name(where)
    kept = {name: leaf for name, leaf in leaves.items() if name in staying}
    # Those of fused layers, whose buffers no part of them can take over.
    split = {name: leaf for name, leaf in leaves.items() if name not in staying}

    def place(kept: dict[str, jax.Array], split: dict[str, jax.Array]) -> dict[str, Any]:
        every = kept | split
        return lora.by_part(structure.unflatten([every[name] for name in leaves]), vlm.params)

    # One program: by itself, each layer would send its parts around.
    placed = jax.jit(place, out_shardings=where, donate_argnums=0)(kept, split)
    return state._replace(**placed)


def _by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def _groups(run: _Run, start: int, stop: int) -> Iterator[Sequence[examples.TrainingBatch]]:
    """Yields the batches of each update."""
    each = run.settings.accumulate
    row = examples.batches(
        run.vlm,
        run.samples,
        run.settings.batch_size,
        run.settings.seed,
        start * each,
        stop * each,
        strict=run.strict,
    )
    for _ in range(start, stop):
        yield list(itertools.islice(row, each))


def _begin(work: Path, arguments: dict[str, Any]) -> None:
    """Creates the directory of the run, or checks that it holds the same run."""
    file = work / "arguments.json"
    if not any((work / "states").glob("*")):
        work.mkdir(parents=True, exist_ok=True)
        atomic.write(file, json.dumps(arguments, indent=1) + "\n")
        return
    before = files.read_json(file)
    if not isinstance(before, dict):
        raise ValueError(f"{file}: expected a JSON object; delete {work} and start over")
    before = _comparable(before, arguments)
    for name in before | arguments:
        if before.get(name) != arguments.get(name):
            raise ValueError(
                f"{work} holds an interrupted run with {name} {before.get(name)!r}, now it is "
                f"{arguments.get(name)!r}; give the same arguments, another output, or delete it"
            )


def _comparable(before: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an earlier run as this release would have recorded them."""
    before = {_TAUGHT: arguments[_TAUGHT], **before}
    name = "base model"
    # Earlier releases named a directory as it was given; its contents are in the fingerprint.
    if os.path.abspath(str(before.get(name))) == os.path.abspath(arguments[name]):
        before[name] = arguments[name]
    return before


def _finished_log(output: Path, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the log of a finished run; FileExistsError if its arguments differ."""
    try:
        written = json.loads((output / RECORD).read_text())
        if _comparable(written["arguments"], arguments) == arguments:
            return written["log"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise FileExistsError(
        f"{output} exists and was not made with these arguments; choose another output or delete it"
    )


def _write_adapter(
    directory: Path, trainer: Trainer, adapter: lora.Adapter, base_model: str
) -> None:
    vlm = trainer.vlm
    _, ranks = initial_adapter(vlm, trainer.settings)
    kind = type(vlm.config)
    library = kind.__module__.replace("configuration_", "modeling_")
    architecture = vlm.architecture if kind.__module__.startswith("transformers.models.") else None
    peft_io.write(
        directory,
        adapter,
        ranks,
        vlm.module_names,
        base_model=base_model,
        base_class=None if architecture is None else (architecture, library),
    )


def _write_checkpoint(directory: Path, vlm: VLM, params: dict) -> None:
    """Writes the parameters and the files that a checkpoint needs besides them."""
    assert vlm.directory is not None, "checked before training"
    directory.mkdir(parents=True)
    for pattern in _COMPANIONS:
        for file in vlm.directory.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
    config = json.loads((directory / "config.json").read_text())
    name = vlm.dtype.name
    # The weights are written as they were trained, whatever those of the original were packed in.
    config = quantised.without_quantisation(config)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & set(part):
            part[key] = name
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    checkpoint.save_params(params, directory, dtype=vlm.dtype)


def _digest(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.prompt, *sample.references]).encode())
    return digest.hexdigest()[:16]


def _taught(samples: Sequence[Sample]) -> str:
    """Returns a digest of the pictures' names and of the answers to learn.

    Names are those below the directory that holds all pictures, which may be moved.
    """
    digest = hashlib.sha256()
    pictures = [os.path.abspath(sample.image) for sample in samples]
    root = os.path.commonpath([os.path.dirname(picture) for picture in pictures])
    for picture, sample in zip(pictures, samples, strict=True):
        learnt = [os.path.relpath(picture, root), *examples.training_answers(sample)]
        digest.update(json.dumps(learnt).encode())
    return digest.hexdigest()[:16]


def _summary(log: Sequence[dict[str, Any]], seconds: float) -> FinetuneSummary:
    losses = [entry for entry in log if "loss" in entry]
    evaluations = {e["step"]: e["evaluation"] for e in log if "evaluation" in e}
    skipped = {entry["skipped"]: entry["why"] for entry in log if "skipped" in entry}
    return FinetuneSummary(losses[-1]["step"], losses[-1]["loss"], evaluations, seconds, skipped)
