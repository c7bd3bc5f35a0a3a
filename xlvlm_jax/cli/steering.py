"""Commands about answers and captions: how good they are, and how steering changes them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xlvlm_jax.cli import steering_fit
from xlvlm_jax.cli.console import (
    Model,
    Seed,
    bars,
    console,
    errors,
    load_model,
    parse_where,
    progress_bars,
)
from xlvlm_jax.cli.steering_tables import show

steer = typer.Typer(help="Steering vectors.", no_args_is_help=True)
steer.command()(steering_fit.fit)
steer.command()(steering_fit.rank)

Data = Annotated[Path, typer.Argument(help="The directory of the data set.")]
Output = Annotated[Path, typer.Option(help="The directory to write, such as RUN/steering/NAME.")]
Dataset = Annotated[
    Literal["vqav2", "coco"], typer.Option(help="vqav2: questions; coco: captions.")
]
Split = Annotated[str | None, typer.Option(help="train, val or test.")]
Instruction = Annotated[
    str | None,
    typer.Option(help='Also with these words behind the prompt, such as "Answer no.".'),
]
Words = Annotated[
    str | None,
    typer.Option(
        help="Captions: colours, places, sentiments, scenes:colour (place, mood), or words with "
        "commas; left out, the vector's target words."
    ),
]
Source = Annotated[
    str | None, typer.Option(help="Answers steered from, with commas; left out, the vector's.")
]
Target = Annotated[
    str | None, typer.Option(help="Answers steered to, with commas; left out, the vector's.")
]
NumSamples = Annotated[int | None, typer.Option(help="At most so many samples.")]
NewTokens = Annotated[
    int | None, typer.Option(help="Tokens at most; left out, 10 of an answer, 32 of a caption.")
]
BatchSize = Annotated[int, typer.Option(help="Samples a batch.")]
Dtype = Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16.")]
Java = Annotated[bool, typer.Option(help="Captions: METEOR and SPICE too, where Java is.")]


def evaluate(
    model: Model,
    data: Data,
    output: Output,
    dataset: Dataset = "vqav2",
    split: Split = None,
    vector: Annotated[Path | None, typer.Option(help="A steering vector to compare with.")] = None,
    alpha: Annotated[float, typer.Option(help="Its strength.")] = 1.0,
    where: Annotated[
        str | None,
        typer.Option(
            help="all, prompt, generated, last_prompt, image, text or from:INDEX; left out, those "
            "that the vector is meant for."
        ),
    ] = None,
    instruction: Instruction = None,
    source: Source = None,
    target: Target = None,
    words: Words = None,
    num_samples: NumSamples = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    java: Java = False,
    seed: Seed = 0,
) -> None:
    """Accuracy of answers, or scores of captions; with a vector, before and after steering."""
    from xlvlm_jax import evaluation, steering

    loaded = [] if vector is None else [steering.load(vector)]
    meant = None if where is None else parse_where(where)
    task = _task(dataset, loaded, source, target, words, java)
    samples = _samples(dataset, data, split, num_samples, seed)
    conditions = {}
    if loaded:
        conditions["steered"] = evaluation.Condition(tuple(loaded), alpha, meant)
    if instruction is not None:
        conditions["instruction"] = evaluation.Condition(instruction=instruction)
    task.require(samples)
    vlm = load_model(model, dtype)
    with progress_bars() as progress:
        summary = evaluation.evaluate(
            vlm,
            samples,
            task,
            output,
            conditions,
            about=_about(data, dataset, split, seed, [vector] if vector else [], loaded),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stage=bars(progress),
        )
    _finish(summary, output)


@steer.command()
def apply(
    model: Model,
    data: Data,
    output: Output,
    vector: Annotated[list[Path], typer.Option(help="A steering vector; may be repeated.")],
    dataset: Dataset = "vqav2",
    split: Split = None,
    choose_on: Annotated[
        str | None,
        typer.Option(
            help="A split: every vector, site, strength and where is tried on it, and the best "
            "of them is applied to --split."
        ),
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="A strength; may be repeated. 1 if left out.")
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Instead of the vector's own; may be repeated.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="all, prompt, generated, last_prompt, image, text or from:INDEX; may be repeated. "
            "Left out, those that the vector is meant for."
        ),
    ] = None,
    together: Annotated[
        bool, typer.Option(help="All vectors at once, instead of one after the other.")
    ] = False,
    wanted: Annotated[
        float | None,
        typer.Option(
            help="--choose-on: the share of source answers to move (.95 if left out), or of "
            "captions to gain (.5)."
        ),
    ] = None,
    max_cost: Annotated[
        float | None,
        typer.Option(
            help="--choose-on: points that another answer type may fall (5 if left out), or the "
            "share of CIDEr that may be lost (.25)."
        ),
    ] = None,
    instruction: Instruction = None,
    source: Source = None,
    target: Target = None,
    words: Words = None,
    num_samples: NumSamples = None,
    num_choose: Annotated[
        int | None, typer.Option(help="--choose-on: at most so many samples.")
    ] = None,
    max_new_tokens: NewTokens = None,
    batch_size: BatchSize = 16,
    dtype: Dtype = "float32",
    java: Java = False,
    seed: Seed = 0,
) -> None:
    """Steers answers or captions: every vector, site, strength and where, or the best of them."""
    from xlvlm_jax import evaluation, steering

    loaded = [steering.load(path) for path in vector]
    meant = [None] if where is None else [parse_where(text) for text in where]
    task = _task(dataset, loaded, source, target, words, java)
    chosen = {"wanted": wanted, "max_cost": max_cost}
    task = dataclasses.replace(task, **{k: v for k, v in chosen.items() if v is not None})
    tried = evaluation.grid(_steerings(loaded, site or [], together), alpha or [1.0], meant)
    samples = _samples(dataset, data, split, num_samples, seed)
    task.require(samples)
    about = _about(data, dataset, split, seed, vector, loaded)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    others: Sequence[Any] = []
    if choose_on is not None:
        held_out = {sample.id for sample in samples}
        others = [
            sample
            for sample in _samples(dataset, data, choose_on, None, seed)
            if sample.id not in held_out
        ][:num_choose]
        if not others:
            raise ValueError(
                f"--choose-on {choose_on}: all of its samples are evaluated on; give another split"
            )
        task.require(others)
    vlm = load_model(model, dtype)
    with progress_bars() as progress:
        options["stage"] = bars(progress)
        sweep = None
        if choose_on is not None:
            best, trials = evaluation.select(vlm, others, task, tried, **options)
            of = {"split": choose_on, "samples": len(others)}
            sweep = evaluation.describe_sweep(best, trials, task, **of)
            tried = [best.condition]
        conditions = dict(zip(evaluation.names(tried), tried, strict=True))
        if instruction is not None:
            conditions["instruction"] = evaluation.Condition(instruction=instruction)
        summary = evaluation.evaluate(
            vlm, samples, task, output, conditions, about=about, sweep=sweep, **options
        )
    _finish(summary, output)


def _task(
    dataset: str,
    vectors: Sequence[Any],
    source: str | None,
    target: str | None,
    words: str | None,
    java: bool,
) -> Any:
    """What is measured: words that are not given are those that the first vector was fitted on."""
    from xlvlm_jax import evaluation
    from xlvlm_jax.words import class_words

    fitted = vectors[0].source if vectors else {}
    if dataset == "coco":
        if source is not None or target is not None:
            raise ValueError("--source and --target are of questions; give captions --words")
        return evaluation.Captions(
            tuple(class_words(words) if words is not None else fitted.get("target") or ()), java
        )
    if words is not None:
        raise ValueError("--words are of captions; give questions --source and --target")
    given = {
        name: tuple(fitted.get(name) or ()) if text is None else tuple(text.split(","))
        for name, text in (("source", source), ("target", target))
    }
    if bool(given["source"]) != bool(given["target"]):
        missing = "source" if given["target"] else "target"
        raise ValueError(f"--{missing} is missing: the {missing} answers, with commas")
    return evaluation.Questions(**given)


def _steerings(vectors: Sequence[Any], sites: Sequence[str], together: bool) -> list[Any]:
    """What is tried: each vector at each site, or all of them at once."""
    if not sites:
        placed = [tuple(vectors)] if together else [(vector,) for vector in vectors]
    elif together:
        placed = [tuple(dataclasses.replace(v, site=site) for v in vectors) for site in sites]
    else:
        placed = [(dataclasses.replace(v, site=site),) for v in vectors for site in sites]
    return placed


def _samples(
    dataset: str, data: Path, split: str | None, num_samples: int | None, seed: int
) -> list[Any]:
    from xlvlm_jax import data as datasets
    from xlvlm_jax.data import select

    return select.subsample(datasets.load(dataset, data, split), num_samples, seed)


def _about(
    data: Path,
    dataset: str,
    split: str | None,
    seed: int,
    files: Sequence[Path],
    vectors: Sequence[Any],
) -> dict[str, Any]:
    """Where samples and vectors come from, for the summary."""
    names = ("method", "features", "source rows", "target rows", "model", "fingerprint")
    return {
        "data": str(data),
        "dataset": dataset,
        "split": split,
        "seed": seed,
        "vectors": [
            {"file": str(file), "site": vector.site, "where": vector.where}
            | {name: vector.source[name] for name in names if name in vector.source}
            for file, vector in zip(files, vectors, strict=True)
        ],
    }


def _finish(summary: dict[str, Any], output: Path) -> None:
    """Figures, the table, and a line for each unreadable image."""
    from xlvlm_jax.report.steering_figures import draw_all

    draw_all(summary, output)
    for name, reason in summary["unreadable"].items():
        errors.print(f"skipped sample {name}: {reason}", style="yellow")
    show(summary, console)
    console.print(
        f"{summary['samples']} samples, {len(summary['unreadable'])} unreadable -> {output}"
    )
