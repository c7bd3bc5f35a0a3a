"""`xlvlm evaluate`: scores answers or captions, before and after steering."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import (
    Adapter,
    Dtype,
    IgnoreGenerationConfig,
    Model,
    Overwrite,
    Seed,
    Strict,
    as_it_generates,
    bars,
    console,
    load_model,
    parse_where,
    progress_bars,
    refuse_existing,
    require_counts,
    show_skipped,
)
from xlvlm_jax.cli.evaluate_options import (
    AnswerTypes,
    Baseline,
    BatchSize,
    Data,
    Dataset,
    Edit,
    Instruction,
    Java,
    Negatives,
    NewTokens,
    NumSamples,
    Output,
    Source,
    Split,
    Target,
    TaskName,
    VqaProtocol,
    Without,
    Words,
    dataset_of,
    describe_run,
    parse_task,
    reading_of,
    refuse_ignored,
    require_before,
)
from xlvlm_jax.cli.evaluate_tables import show, show_needs
from xlvlm_jax.cli.protocol import Protocol
from xlvlm_jax.cli.runtime import DryRun
from xlvlm_jax.cli.sample_options import (
    Annotations,
    DatasetSize,
    Objects,
    Prompt,
    QuestionsFile,
    SampleIds,
    few_samples,
    read_samples,
)


def evaluate(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Output,
    task: TaskName = None,
    dataset: Dataset = None,
    split: Split = None,
    negatives: Negatives = "all",
    adapter: Adapter = None,
    vector: Annotated[
        Path | None, typer.Option(help="Steering vector: also evaluate with it applied.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of the vector.")] = 1.0,
    where: Annotated[
        str | None,
        typer.Option(
            help="Token positions to steer: all, prompt, generated, last_prompt, predicting, "
            "image, text or from:INDEX. Default: those stored with the vector."
        ),
    ] = None,
    edit: Annotated[str, Edit] = "add",
    instruction: Instruction = None,
    source: Source = None,
    target: Target = None,
    words: Words = None,
    vqa_protocol: VqaProtocol = "official",
    protocol: Protocol = None,
    without: Without = None,
    answer_types: AnswerTypes = None,
    baseline: Baseline = None,
    prompt: Prompt = None,
    annotations: Annotations = None,
    questions: QuestionsFile = None,
    objects: Objects = None,
    dataset_size: DatasetSize = None,
    sample_ids: SampleIds = None,
    num_samples: NumSamples = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    java: Java = False,
    ignore_generation_config: IgnoreGenerationConfig = False,
    overwrite: Overwrite = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    seed: Seed = 0,
) -> None:
    """Score answers or captions; with a vector, before and after steering."""
    from xlvlm_jax import evaluation, steering

    require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, num_samples=num_samples)
    loaded = [] if vector is None else [steering.load(vector)]
    meant = None if where is None else parse_where(where)
    dataset_name = dataset_of(task, dataset)
    measured = parse_task(
        *(dataset_name, loaded, source, target, words, java, vqa_protocol, without, answer_types),
        task=task,
        data=data,
    )
    refuse_ignored(context, measured)
    told: dict[str, Any] = {
        "prompt": prompt,
        "annotations": annotations,
        "questions": questions,
        "objects": objects,
    }
    told |= reading_of(task, dataset_name, split, negatives)
    drawn = read_samples(dataset_name, data, dataset_size=dataset_size, seed=seed, **told)
    samples = few_samples(drawn, num_samples, seed, sample_ids)
    conditions = {}
    if loaded:
        conditions["steered"] = evaluation.Condition(tuple(loaded), alpha, meant, edit)
    if instruction is not None:
        conditions["instruction"] = evaluation.Condition(instruction=instruction)
    require_before(measured, samples, baseline)
    if dry_run:
        vlm = load_model(model, dtype, abstract=True, adapter=adapter)
        vlm = as_it_generates(vlm, ignore_generation_config)
        count = len(conditions) + (baseline is None)
        show_preflight(vlm, samples, count, measured, max_new_tokens, batch_size)
        return
    refuse_existing(output, overwrite, directory=True)
    vlm = as_it_generates(load_model(model, dtype, adapter=adapter), ignore_generation_config)
    with progress_bars() as progress:
        summary = evaluation.evaluate(
            vlm,
            samples,
            measured,
            output,
            conditions,
            baseline=baseline,
            about=describe_run(
                data, dataset_name, told["split"], seed, [vector] if vector else [], loaded
            ),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            strict=strict,
            stage=bars(progress),
        )
    finish(summary, output)


def show_preflight(
    vlm: Any,
    samples: Sequence[Any],
    count: int,
    task: Any,
    max_new_tokens: int | None,
    batch_size: int,
) -> None:
    """Prints what --dry-run says about answering the samples under `count` conditions."""
    from xlvlm_jax import evaluation

    needs = evaluation.preflight(
        vlm,
        samples,
        count,
        max_new_tokens=task.max_new_tokens if max_new_tokens is None else max_new_tokens,
        batch_size=batch_size,
    )
    show_needs(needs, console)


def finish(summary: dict[str, Any], output: Path) -> None:
    """Draws the figures and prints the tables and a line per skipped sample."""
    from ports.messages import counted
    from xlvlm_jax.report.steering_figures import draw_all

    draw_all(summary, output)
    show_skipped(summary["unreadable"])
    show_skipped(summary.get("sweep", {}).get("unreadable", {}))
    show(summary, console)
    console.print(
        f"{counted(summary['samples'], 'sample')}, {len(summary['unreadable'])} unreadable -> "
        f"{output}"
    )
