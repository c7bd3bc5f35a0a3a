"""`xlvlm steer fit`: steering vectors from features."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xlvlm_jax.cli.console import (
    Images,
    Overwrite,
    Seed,
    Site,
    Strict,
    bars,
    console,
    load_model,
    parse_where,
    progress_bars,
    refuse_existing,
    show_skipped,
)
from xlvlm_jax.cli.runtime import DryRun

Features = Annotated[Path, typer.Argument(help="States of answers: a directory of features.")]
Words = str | None


def fit(
    features: Features,
    output: Annotated[
        Path, typer.Option(help="What to write: .safetensors, or for fine a new directory.")
    ],
    method: Annotated[
        str,
        typer.Option(
            help="coarse: difference of means; fine: between the centroids of a k-means; learned: "
            "by gradients; l2s: a network that gives each prompt its own."
        ),
    ] = "coarse",
    source: Annotated[
        Words, typer.Option(help="Answers to steer from, with commas. coarse, fine: may be none.")
    ] = None,
    target: Annotated[
        Words, typer.Option(help="Answers to steer to, with commas; learned, l2s: the first.")
    ] = None,
    site: Site = None,
    key: Annotated[str, typer.Option(help="Whose answers: prediction, or answer (people's).")] = (
        "prediction"
    ),
    match: Annotated[
        Literal["equals", "contains"], typer.Option(help="An answer is, or contains, a word.")
    ] = "equals",
    where: Annotated[
        str, typer.Option(help="Meant for the positions all, prompt, generated, last_prompt, ...")
    ] = "all",
    target_features: Annotated[
        Path | None, typer.Option(help="coarse: where the target's states are, if elsewhere.")
    ] = None,
    num_concepts: Annotated[int, typer.Option(help="fine: clusters of the source states.")] = 5,
    pairs: Annotated[
        str | None, typer.Option(help="fine: FROM:TO with commas; left out, every pair.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="learned, l2s: the checkpoint that the features are of.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="learned: a low-rank map of so many directions.")
    ] = None,
    context_site: Annotated[
        str | None, typer.Option(help="l2s: whose state of the last prompt token goes in.")
    ] = None,
    contrast: Annotated[
        Literal["prompt", "completion"],
        typer.Option(
            help="l2s: another prompt about the image, answered with a target; or the answers "
            "behind the prompt."
        ),
    ] = "prompt",
    num_samples: Annotated[int, typer.Option(help="learned, l2s: samples to steer, at most.")] = (
        128
    ),
    keep: Annotated[
        float, typer.Option(help="learned, l2s: for each of them, so many others that stay.")
    ] = 1.5,
    steps: Annotated[int, typer.Option(help="learned: of the optimiser, at most.")] = 150,
    batch_size: Annotated[int, typer.Option(help="learned, l2s: samples a batch.")] = 32,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16.")] = (
        "float32"
    ),
    images: Images = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    seed: Seed = 0,
) -> None:
    """Steering vectors from source to target answers, with their whole specification."""
    from xlvlm_jax import Features as StoredFeatures
    from xlvlm_jax import steering
    from xlvlm_jax.features.reader import choose_site

    if not dry_run:
        refuse_existing(output, overwrite)
    opened = StoredFeatures.open(features, images=images)
    how = steering.method_named(method)
    options = {
        "target_features": target_features and StoredFeatures.open(target_features),
        "num_concepts": num_concepts,
        "pairs": None if pairs is None else [_pair(text) for text in pairs.split(",")],
        "rank": rank,
        "steps": steps,
        "contrast": contrast,
        "context_site": context_site,
    }
    sources, targets = (None if words is None else words.split(",") for words in (source, target))
    asked = steering.Request(
        opened,
        choose_site(opened, site),
        sources,
        targets,
        key=key,
        match=match,
        where=parse_where(where),
        seed=seed,
        num_samples=num_samples,
        keep=keep,
        options={name: options[name] for name in how.options},
    )
    if how.needs_target and targets is None:
        raise ValueError(f"--method {method} needs --target, the answers to steer to")
    if how.examples is None:
        fitted = how.fit(asked)
    else:
        if sources is None or model is None:
            raise ValueError(
                f"--method {method} needs --source, the answers to steer from, and --model"
            )
        fitted = _learn(how, asked, model, dtype, batch_size, strict, dry_run)
        if fitted is None:
            return
    if not dry_run:
        _write(output, fitted.steering, how.makes_several)
    written = "nothing, a dry run" if dry_run else output
    console.print(f"{fitted.figures}, site {asked.site} -> {written}")


def _learn(
    how: Any, asked: Any, model: str, dtype: str, batch_size: int, strict: bool, dry_run: bool
) -> Any:
    """What a method makes that runs the model; None of a dry run, which says what it would do."""
    from xlvlm_jax import steering

    examples = how.examples(asked)
    vlm = load_model(model, dtype, abstract=dry_run)
    steering.files.require_model(asked.features.manifest, vlm)
    if dry_run:
        console.print(
            f"{len(examples.samples)} samples to learn from, {examples.steered} of them to be "
            f"steered, in batches of {batch_size}, site {asked.site} of width "
            f"{vlm.site_shapes[asked.site][-1]}; nothing written"
        )
        return None
    with progress_bars() as progress:
        fitted = how.fit(
            asked,
            examples,
            vlm,
            batch_size=batch_size,
            strict=strict,
            progress=bars(progress)(how.doing),
        )
    for each in fitted.steering.values():
        show_skipped(each.source["skipped"])
    return fitted


def _pair(text: str) -> tuple[int, int]:
    try:
        first, second = text.split(":")
        return int(first), int(second)
    except ValueError:
        raise ValueError(f"--pairs has {text!r}; expected FROM:TO, such as 0:3,2:1") from None


def _write(output: Path, fitted: Mapping[str, Any], several: bool) -> None:
    """One as a file; of several all or none, as a directory."""
    if not several:
        (one,) = fitted.values()
        one.save(output)
        return
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, each in fitted.items():
        each.save(temporary / f"{name}.safetensors")
    if output.is_dir():
        shutil.rmtree(output)
    os.replace(temporary, output)
