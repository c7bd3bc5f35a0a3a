"""`xlvlm steer`: fits, ranks, sweeps over and applies steering vectors."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli import steer_fit, steer_rank, steer_sweep
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
    load_model,
    parse_where,
    progress_bars,
    refuse_existing,
    require_counts,
)
from xlvlm_jax.cli.evaluate import finish, show_preflight
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
    samples_to_choose_on,
    vectors_at,
)
from xlvlm_jax.cli.panels import into_panels
from xlvlm_jax.cli.protocol import Protocol
from xlvlm_jax.cli.runtime import Command, DryRun
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

steer = typer.Typer(
    help="Fit, rank, compare and apply steering vectors: directions that, added to a model's "
    "states, change its answers.",
    no_args_is_help=True,
)
steer.command(cls=Command)(into_panels(steer_fit.fit))
steer.command(cls=Command)(into_panels(steer_rank.rank))
steer.command(cls=Command)(into_panels(steer_sweep.sweep))


@steer.command(cls=Command)
@into_panels
def apply(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Output,
    vector: Annotated[list[Path], typer.Option(help="Steering vector; may be repeated.")],
    task: TaskName = None,
    dataset: Dataset = None,
    split: Split = None,
    negatives: Negatives = "all",
    adapter: Adapter = None,
    choose_on: Annotated[
        str | None,
        typer.Option(
            help="Split on which to try every combination of vector, site, strength and positions; "
            "the best one is then applied to --split."
        ),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Strength; may be repeated. Default: 1.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Site to steer instead of the vector's own, or a pattern ('layers.*'); may be "
            "repeated."
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="Token positions to steer: all, prompt, generated, last_prompt, predicting, "
            "image, text or from:INDEX; may be repeated. Default: those stored with the vector."
        ),
    ] = None,
    edit: Annotated[list[str] | None, Edit] = None,
    together: Annotated[
        bool, typer.Option(help="Apply all vectors at once, instead of each by itself.")
    ] = False,
    wanted: Annotated[
        float | None,
        typer.Option(
            help="--choose-on: wanted effect, as the share of source answers that move (default "
            "0.95), of captions that gain a word, or, for pope, chair and descriptions, of "
            "hallucinations that are gone (default 0.5)."
        ),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            help="--choose-on: maximum cost, as points of accuracy that any other answer type "
            "loses (default 5), the share of CIDEr that is lost (default 0.25), or points that the "
            "other questions (pope, descriptions) or the recall of objects (chair) lose (default "
            "1)."
        ),
    ] = None,
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
    num_choose: Annotated[
        int | None, typer.Option(help="--choose-on: maximum number of samples.")
    ] = None,
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
    """Steer answers or captions, and compare them with the unsteered ones.

    Tries every combination of vectors, sites, strengths and positions, or only the best of them.
    """
    from xlvlm_jax import evaluation, steering

    require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, num_samples=num_samples)
    loaded = [steering.load(path) for path in vector]
    meant = [None] if where is None else [parse_where(text) for text in where]
    dataset_name = dataset_of(task, dataset)
    measured = parse_task(
        *(dataset_name, loaded, source, target, words, java, vqa_protocol, without, answer_types),
        task=task,
        data=data,
    )
    refuse_ignored(context, measured)
    limits = {"wanted": wanted, "max_cost": max_cost}
    measured = dataclasses.replace(measured, **{k: v for k, v in limits.items() if v is not None})
    sites = load_model(model, abstract=True).check_sites(site, generated=True) if site else ()
    placed = vectors_at(loaded, sites, together)
    tried = [
        condition
        for kind in edit or ["add"]
        for condition in evaluation.grid(placed, alpha or [1.0], meant, kind)
    ]
    told: Any = dict(prompt=prompt, annotations=annotations, questions=questions, objects=objects)
    told |= reading_of(task, dataset_name, split, negatives)
    drawn = read_samples(dataset_name, data, dataset_size=dataset_size, seed=seed, **told)
    samples = few_samples(drawn, num_samples, seed, sample_ids)
    require_before(measured, samples, baseline)
    others: Sequence[Any] = []
    if choose_on is not None:
        of = read_samples(dataset_name, data, **{**told, "split": choose_on})
        others = samples_to_choose_on(samples, of, choose_on, num_choose, seed)
        measured.require_trial(others)
    if dry_run:  # with --choose-on of one condition, besides plain answers and an instruction
        count = (1 if others else len(tried)) + (baseline is None) + (instruction is not None)
        shapes = load_model(model, dtype, abstract=True, adapter=adapter)
        vlm = as_it_generates(shapes, ignore_generation_config)
        show_preflight(vlm, samples, count, measured, max_new_tokens, batch_size)
        if others:
            show_preflight(vlm, others, 1 + len(tried), measured, max_new_tokens, batch_size)
        return
    refuse_existing(output, overwrite, directory=True)
    vlm = as_it_generates(load_model(model, dtype, adapter=adapter), ignore_generation_config)
    with progress_bars() as progress:
        summary = evaluation.evaluate_steering(
            vlm,
            samples,
            measured,
            output,
            tried,
            others=others,
            split=choose_on,
            instruction=instruction,
            baseline=baseline,
            about=describe_run(data, dataset_name, told["split"], seed, vector, loaded),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            strict=strict,
            stage=bars(progress),
        )
    finish(summary, output)
