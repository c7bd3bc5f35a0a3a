"""Commands about answers: how good they are, and how steering changes them."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from xlvlm_jax.cli.console import Model, Seed, Site, bars, console, load_model, progress_bars

steer = typer.Typer(help="Steering vectors.", no_args_is_help=True)


@steer.command()
def fit(
    features: Annotated[Path, typer.Argument(help="States of answers: a directory of features.")],
    source: Annotated[str, typer.Option(help="Answers to steer from, with commas.")],
    target: Annotated[str, typer.Option(help="Answers to steer to, with commas.")],
    output: Annotated[Path, typer.Option(help="The vector to write, .safetensors.")],
    site: Site = None,
    key: Annotated[str, typer.Option(help="Whose answers: prediction, or answer (people's).")] = (
        "prediction"
    ),
) -> None:
    """The coarse vector: mean of the target answers' states minus mean of the source answers'."""
    from xlvlm_jax import Features, stages
    from xlvlm_jax.steering import fit_coarse

    opened = Features.open(features)
    vector = fit_coarse(
        opened, stages.choose_site(opened, site), source.split(","), target.split(","), key=key
    )
    vector.save(output)
    rows = vector.source
    console.print(
        f"{rows['source rows']} source and {rows['target rows']} target rows, "
        f"norm {float((vector.vector**2).sum() ** 0.5):.3g}, site {vector.site} -> {output}"
    )


def evaluate(
    model: Model,
    data: Annotated[Path, typer.Argument(help="The directory of the data set, VQAv2's layout.")],
    output: Annotated[Path, typer.Option(help="Where predictions.jsonl and scores.json go.")],
    split: Annotated[str | None, typer.Option(help="train, val or test.")] = None,
    vector: Annotated[Path | None, typer.Option(help="A steering vector to compare with.")] = None,
    alpha: Annotated[float, typer.Option(help="Its strength.")] = 1.0,
    where: Annotated[
        str, typer.Option(help="all, prompt, generated, last_prompt, image, text or from:INDEX.")
    ] = "all",
    num_samples: Annotated[int | None, typer.Option(help="At most so many questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16.")] = (
        "float32"
    ),
    seed: Seed = 0,
) -> None:
    """Answers questions and scores the answers; with a vector, before and after steering."""
    from xlvlm_jax import SteeringVector, atomic, evaluation
    from xlvlm_jax import data as datasets
    from xlvlm_jax.data import select

    steering = None if vector is None else SteeringVector.load(vector)
    samples = select.subsample(datasets.load("vqav2", data, split), num_samples, seed)
    vlm = load_model(model, dtype)
    edits = None if steering is None else steering.edits(alpha, _where(where))
    output.mkdir(parents=True, exist_ok=True)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with progress_bars() as progress:
        start = bars(progress)
        answers = {
            "plain": evaluation.predict(vlm, samples, progress=start("answering"), **options)
        }
        if edits is not None:
            answers["steered"] = evaluation.predict(
                vlm, samples, edits=edits, progress=start("steered"), **options
            )
    scores = {name: evaluation.vqa_scores(samples, given) for name, given in answers.items()}
    result: dict = {name: evaluation.describe(score) for name, score in scores.items()}
    if steering is not None:
        words = [steering.source.get(name, []) for name in ("source", "target")]
        truths = [sample.metadata.get("answer") for sample in samples]
        changes = evaluation.answer_changes(answers["plain"], answers["steered"], *words, truths)
        result["changes"] = changes._asdict()
        result["steering"] = {
            "vector": steering.source,
            "site": steering.site,
            "alpha": alpha,
            "where": where,
        }
    rows = (
        {"id": sample.id, **{name: given[i] for name, given in answers.items()}}
        for i, sample in enumerate(samples)
    )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    atomic.write(output / "predictions.jsonl", lines)
    atomic.write(output / "scores.json", json.dumps(result, indent=2) + "\n")
    table = Table("accuracy %", "questions", *scores, *(f"{n}, XL-VLMs" for n in scores), box=None)
    for kind in scores["plain"]:
        both = [score[kind] for score in scores.values()]
        figures = [f"{100 * each.official:.2f}" for each in both]
        figures += [f"{100 * each.reference:.2f}" for each in both]
        table.add_row(kind, str(both[0].count), *figures)
    console.print(table)
    if steering is not None:
        console.print(
            f"{changes.changed} of {changes.samples} answers changed; source answers "
            f"{changes.source_before} -> {changes.source_after}, target answers "
            f"{changes.target_before} -> {changes.target_after}; {changes.moved} moved from source "
            f"to target; {changes.others_changed} of {changes.others} others changed -> {output}"
        )


def _where(text: str) -> str | dict[str, int]:
    """--where as `add` takes it."""
    if not text.startswith("from:"):
        return text
    try:
        return {"from": int(text.removeprefix("from:"))}
    except ValueError:
        raise ValueError(f"--where is {text!r}; expected from:INDEX, such as from:5") from None
