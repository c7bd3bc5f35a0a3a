"""`xlvlm steer sweep`: methods x sites x strengths, the best within a budget, and its curve."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xlvlm_jax.cli import runtime
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
    refuse_given,
    require_counts,
    show_skipped,
)
from xlvlm_jax.cli.evaluate import finish
from xlvlm_jax.cli.evaluate_options import (
    BatchSize,
    Data,
    Dataset,
    Edit,
    Instruction,
    Negatives,
    NewTokens,
    NumSamples,
    Output,
    Source,
    Split,
    Target,
    TaskName,
    VqaProtocol,
    Words,
    dataset_of,
    describe_run,
    parse_task,
    reading_of,
    refuse_ignored,
    samples_to_choose_on,
)
from xlvlm_jax.cli.sample_options import Objects, few_samples, read_samples
from xlvlm_jax.storage import outputs

# What a sweep, the evaluation of its best trials and a judge of these write.
_WRITTEN = (
    *("sweep.json", "plain.json", "trials.jsonl", "trials.csv", "vectors/*.safetensors"),
    *("summary.json", "predictions.jsonl", "judge.json", "verdicts.jsonl"),
    *("answers.svg", "sweep.svg", "tradeoff.svg"),
)


def sweep(
    context: typer.Context,
    model: Model,
    data: Data,
    output: Output,
    choose_on: Annotated[
        str, typer.Option(help="Split to try all combinations on; the best one is chosen there.")
    ],
    features: Annotated[
        Path | None, typer.Option(help="Features to fit the methods on, the states of answers.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method of `xlvlm steer fit` that needs no more than answers; may be repeated. "
            "Default: coarse."
        ),
    ] = None,
    vector: Annotated[
        list[Path] | None,
        typer.Option(
            help="Also a vector that is fitted already (a file, or a directory of them); may be "
            "repeated."
        ),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Site to fit and steer at, or a pattern ('layers.*'); may be repeated. Default: "
            "all in --features."
        ),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Strength; may be repeated. Default: 1.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Token positions, see `xlvlm steer apply`; may be repeated."),
    ] = None,
    edit: Annotated[str, Edit] = "add",
    budget: Annotated[
        float,
        typer.Option(help="Maximum of --budget-of; the largest effect within it is chosen."),
    ] = math.inf,
    budget_of: Annotated[
        Literal["off_target", "cost"],
        typer.Option(
            help="off_target: share of other answers (captions: of all) that change; cost: as for "
            "--max-cost of `xlvlm steer apply`."
        ),
    ] = "off_target",
    task: TaskName = None,
    dataset: Dataset = None,
    split: Split = None,
    negatives: Negatives = "all",
    adapter: Adapter = None,
    instruction: Instruction = None,
    source: Source = None,
    target: Target = None,
    key: Annotated[
        str, typer.Option(help="Answers to fit on, as for `xlvlm steer fit`.")
    ] = "prediction",
    fit_source: Annotated[
        str | None,
        typer.Option(help="Answers to fit on, if other than --source, such as 'yes for no'."),
    ] = None,
    fit_target: Annotated[
        str | None, typer.Option(help="Answers to fit on, if other than --target.")
    ] = None,
    words: Words = None,
    vqa_protocol: VqaProtocol = "official",
    objects: Objects = None,
    num_samples: NumSamples = None,
    num_choose: Annotated[
        int | None, typer.Option(help="Maximum number of samples of --choose-on.")
    ] = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = 16,
    at_once: Annotated[
        int, typer.Option(help="Combinations per group; each finished group is saved.")
    ] = 32,
    dtype: Dtype = "float32",
    ignore_generation_config: IgnoreGenerationConfig = False,
    overwrite: Overwrite = False,
    strict: Strict = False,
    seed: Seed = 0,
) -> None:
    """Try methods, sites and strengths on one split, and apply each method's best to another.

    Run again with the same output to resume, or to add methods, sites and strengths. Without
    --split only the trials are written.
    """
    from xlvlm_jax import evaluation
    from xlvlm_jax.report.steering_figures import plot_tradeoff

    runtime.resumes()
    _check_options(context)
    _require_place(output, overwrite, [features, data, *(vector or ())])
    wheres = [None] if where is None else [parse_where(text) for text in where]
    fitted: list[tuple[str, Any]] = []
    words_fitted = (fit_source or source, fit_target or target)
    if features is not None:
        fitted += _fit(features, method or ["coarse"], site, words_fitted, key, seed)
    files = [file for path in vector or () for file in _files(path)]
    fitted += (loaded := _load(files))
    of_vectors = [one for _, one in fitted if key == "prediction"]
    dataset_name = dataset_of(task, dataset)
    measured = parse_task(
        *(dataset_name, of_vectors, source, target, words, False, vqa_protocol, None),
        task=task,
        data=data,
    )
    refuse_ignored(context, measured)
    tried = evaluation.attempts(fitted, alpha or [1.0], wheres, edit)
    told = {"objects": objects, **reading_of(task, dataset_name, split, negatives)}
    drawn = [] if split is None else read_samples(dataset_name, data, **told)
    samples = few_samples(drawn, num_samples, seed)
    of = read_samples(dataset_name, data, **{**told, "split": choose_on})
    others = samples_to_choose_on(samples, of, choose_on, num_choose, seed)
    measured.require_trial(others)
    if split is not None:
        measured.require(samples)
    vlm = as_it_generates(load_model(model, dtype, adapter=adapter), ignore_generation_config)
    if overwrite and output.is_dir():  # after all that may be wrong with the arguments
        outputs.remove_written(output, _WRITTEN)
    with progress_bars() as progress:
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "strict": strict,
            "stage": bars(progress),
        }
        limits: dict[str, Any] = {"budget": budget, "axis": budget_of, "at_once": at_once}
        found = evaluation.run_sweep(vlm, others, measured, tried, output, **limits, **options)
        _show(found, measured)
        conditions = _save_best(found, output / "vectors")
        answered = len(others) - len(found.skipped or ())
        tried_on = found.describe(measured, split=choose_on, samples=answered)
        if split is None:
            plot_tradeoff({"sweep": tried_on}, output / "tradeoff.svg")
            show_skipped(found.skipped or {})
            console.print(f"{len(found.trials)} trials -> {output}")
            return
        if instruction is not None:
            conditions["instruction"] = evaluation.Condition(instruction=instruction)
        about = describe_run(data, dataset_name, split, seed, files, [one for _, one in loaded])
        summary = evaluation.evaluate(
            *(vlm, samples, measured, output, conditions), about=about, sweep=tried_on, **options
        )
    finish(summary, output)


def _require_place(output: Path, overwrite: bool, read: Sequence[Path | None]) -> None:
    """Checks that the output can be written: new, a sweep to resume, or one to replace if asked.

    Raises:
        OSError: it can't, or a directory to replace holds more than a sweep, or what is read.
    """
    if overwrite or not (output / "sweep.json").is_file():
        refuse_existing(output, overwrite, directory=True)
    if overwrite:
        inputs = [path for path in read if path is not None]
        outputs.require_replaceable(output, _WRITTEN, inputs, "files of a sweep")


def _check_options(context: typer.Context) -> None:
    """Checks, before anything is fitted, counts and options that have no effect."""
    given = context.params
    counts = ("max_new_tokens", "batch_size", "num_samples", "at_once")
    require_counts(**{name: given[name] for name in counts})
    if given["features"] is None and not given["vector"]:
        raise ValueError("there is nothing to try; give --features to fit methods on, or --vector")
    if given["features"] is None:
        of_fits = ("method", "site", "fit_source", "fit_target")
        refuse_given(context, of_fits, "without --features")
    if given["split"] is None:
        refuse_given(context, ("instruction", "num_samples"), "without --split")


def _fit(
    path: Path,
    methods: Sequence[str],
    sites: Sequence[str] | None,
    words: tuple[str | None, str | None],
    key: str,
    seed: int,
) -> list[tuple[str, Any]]:
    """Returns each method fitted at each site of features, the methods of one site side by side.

    A method of several sites, such as ITI, is fitted once, at those of them that it takes.
    """
    from xlvlm_jax import Features, steering
    from xlvlm_jax.features.reader import choose_sites

    hows = [steering.method_named(name) for name in methods]
    unfit = [
        how
        for how in hows
        if how.examples is not None or how.makes_several or "dictionary" in how.options
    ]
    if unfit:
        raise ValueError(
            f"--method {unfit[0].name} needs more than answers; fit it with `xlvlm steer fit` and "
            "give the result as --vector"
        )
    source, target = (
        None if text is None else [word.strip() for word in text.split(",")] for text in words
    )
    if source is None or target is None:
        raise ValueError("--features needs --source and --target, the answers to steer from and to")
    features = Features.open(path)
    named = [found for each in sites or () for found in choose_sites(features, each)]
    chosen = list(dict.fromkeys(named or features.sites))
    places = [(how, [site]) for site in chosen for how in hows if not how.sites]
    for how in hows:
        if how.sites:
            taken = choose_sites(features, how.sites)
            places.append((how, [site for site in taken if site in chosen] or taken))
    fitted = []
    for how, at in places:
        options: dict[str, Any] = {"key": key, "where": how.where, "seed": seed, "sites": at}
        asked = steering.Request(features, at[0], source, target, **options)
        (one,) = how.fit(asked).steering.values()
        fitted.append((how.name, one))
    return fitted


def _files(path: Path) -> list[Path]:
    """Returns a file, or the vectors in a directory."""
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{path} holds no vectors; expected what `xlvlm steer fit` wrote")
    return found


def _load(files: Sequence[Path]) -> list[tuple[str, Any]]:
    """Returns vectors with the names of their methods."""
    from xlvlm_jax import steering

    loaded = [(file, steering.load(file)) for file in files]
    named = [(str(one.source.get("method", file.stem)), one) for file, one in loaded]
    for name, _ in named:
        if name in ("plain", "instruction"):
            raise ValueError(
                f"a vector is called {name!r}, as an unsteered condition is; rename it"
            )
    return named


def _save_best(found: Any, directory: Path) -> dict[str, Any]:
    """Writes the vector of each method's best trial; returns these trials' conditions."""
    from xlvlm_jax.steering.methods import Savable

    conditions = {name: found.chosen(name).condition for name in dict.fromkeys(found.methods)}
    for name, condition in conditions.items():
        (best,) = condition.vectors
        if isinstance(best, Savable):
            best.save(directory / f"{name}.safetensors")
    return conditions


def _show(found: Any, task: Any) -> None:
    """Prints each method's best trial."""
    from rich.table import Table

    from xlvlm_jax.evaluation.sweep import OFF_TARGET

    quantities = {"effect": task.effect, "off_target": OFF_TARGET, "cost": task.cost}
    of_budget = quantities[found.axis]
    limit = f", {of_budget.name}: at most {of_budget.shown(found.budget)}"
    table = Table("method", "site", "alpha", *(each.name for each in quantities.values()))
    table.title = f"best of each method{'' if math.isinf(found.budget) else limit}"
    for name in dict.fromkeys(found.methods):
        trial = found.chosen(name)
        told = trial.describe()
        mark = " *" if trial is found.chosen() else ""
        table.add_row(
            name + mark,
            " + ".join(told["sites"]),
            f"{trial.condition.alpha:g}",
            *(quantity.shown(told[each]) for each, quantity in quantities.items()),
        )
    console.print(table)
