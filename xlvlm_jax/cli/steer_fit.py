"""`xlvlm steer fit`: fits steering vectors on features."""

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

Features = Annotated[
    Path,
    typer.Argument(help="Features, the states of answers; or what `xlvlm shift` wrote, for shift."),
]
Words = str | None


def fit(
    features: Features,
    output: Annotated[
        Path, typer.Option(help="File to write (.safetensors); for fine, a new directory.")
    ],
    method: Annotated[
        str,
        typer.Option(
            help="coarse: difference of means; fine: differences between k-means centroids; "
            "learned: optimised by gradient descent; l2s: a network that predicts a vector for "
            "each prompt; p2s: a vector for each sample; shift: the shift of each concept by "
            "fine-tuning."
        ),
    ] = "coarse",
    source: Annotated[
        Words,
        typer.Option(
            help="Answers to steer from, separated by commas; optional for coarse and fine. '*' "
            "for every sample, such as all captions."
        ),
    ] = None,
    target: Annotated[
        Words,
        typer.Option(
            help="Answers to steer to, separated by commas; learned and l2s use the first; "
            "optional with --target-features or --between-models."
        ),
    ] = None,
    site: Site = None,
    key: Annotated[
        str,
        typer.Option(
            help="Answers to match: the model's (prediction), the data set's (answer), or both "
            "(outcome), such as 'yes for no', a false yes."
        ),
    ] = "prediction",
    match: Annotated[
        Literal["equals", "contains"],
        typer.Option(help="Whether an answer has to equal or contain one of the words."),
    ] = "equals",
    where: Annotated[
        str,
        typer.Option(
            help="Token positions that the vector is meant for: all, prompt, generated, "
            "last_prompt, predicting, image, text or from:INDEX."
        ),
    ] = "all",
    target_features: Annotated[
        Path | None,
        typer.Option(help="coarse: features with the target's states, if in another directory."),
    ] = None,
    between_models: Annotated[
        bool,
        typer.Option(
            "--between-models",
            help="coarse: steer towards the states of another model, such as a fine-tuned one, in "
            "--target-features, or in the same features (extract --finetuned).",
        ),
    ] = False,
    matched: Annotated[
        bool, typer.Option("--matched", help="coarse: only samples with rows in both features.")
    ] = False,
    source_concepts: Annotated[
        Path | None,
        typer.Option(help="coarse: steer from the mean of these concepts, not of the states."),
    ] = None,
    decomposition: Annotated[
        str, typer.Option(help="fine: kmeans, snmf, pca or another method of `decompose`.")
    ] = "kmeans",
    num_concepts: Annotated[
        int, typer.Option(help="fine: number of clusters of the source states.")
    ] = 5,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="fine: pairs of clusters FROM:TO, separated by commas. Default: every pair."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="learned, l2s: model that the features were extracted from."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="learned: fit a low-rank map of this rank instead of a vector."),
    ] = None,
    context_site: Annotated[
        str | None,
        typer.Option(
            help="l2s: site whose state of the last prompt token the network takes as input."
        ),
    ] = None,
    contrast: Annotated[
        Literal["prompt", "completion", "forced"],
        typer.Option(
            help="l2s, p2s: states to contrast with: another prompt about the image that has a "
            "target answer (prompt), target and source answers after the same prompt (completion), "
            "or --positive and --negative after the prompt of every sample (forced)."
        ),
    ] = "prompt",
    positive: Annotated[
        str | None,
        typer.Option(
            help="--contrast forced: beginning of the wanted answer. Default: 'Yes, the image' or "
            "'No, the image', whichever is right."
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(help="--contrast forced: beginning of the unwanted answer."),
    ] = None,
    states: Annotated[
        Literal["last", "mean"],
        typer.Option(
            help="l2s, p2s: state of a completion: that of its last token, or the mean over its "
            "tokens."
        ),
    ] = "last",
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="learned, l2s, p2s: maximum number of samples to steer. Default: 128, or all with "
            "--contrast forced."
        ),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(
            help="learned, l2s: samples whose answers must stay, per sample that is steered."
        ),
    ] = 1.5,
    steps: Annotated[int, typer.Option(help="learned: maximum number of optimiser steps.")] = 150,
    batch_size: Annotated[int, typer.Option(help="learned, l2s: samples per batch.")] = 32,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the model's parameters: float32, bfloat16 or float16.")
    ] = "float32",
    images: Images = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    seed: Seed = 0,
) -> None:
    """Fit steering vectors from source answers to target answers."""
    from xlvlm_jax import Concepts, steering
    from xlvlm_jax import Features as StoredFeatures
    from xlvlm_jax.features.reader import choose_site

    if not dry_run:
        refuse_existing(output, overwrite)
    if method == "shift":
        _write_shift(features, output, parse_where(where))
        return
    opened = StoredFeatures.open(features, images=images)
    how = steering.method_named(method)
    options = {
        "target_features": target_features and StoredFeatures.open(target_features),
        "between_models": between_models,
        "matched": matched,
        "source_concepts": source_concepts and Concepts.load(source_concepts),
        "decomposition": decomposition,
        "num_concepts": num_concepts,
        "pairs": None if pairs is None else [_pair(text) for text in pairs.split(",")],
        "rank": rank,
        "steps": steps,
        "contrast": contrast,
        "context_site": context_site,
        "positive": positive,
        "negative": negative,
        "states": states,
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
    forced = contrast == "forced" and "contrast" in how.options
    given_otherwise = bool(target_features) or between_models or forced
    if how.needs_target and targets is None and not given_otherwise:
        raise ValueError(f"--method {method} needs --target, the answers to steer to")
    if how.examples is None:
        fitted = how.fit(asked)
    else:
        if model is None or (sources is None and not forced):
            missing = "" if forced else "--source, the answers to steer from, and "
            raise ValueError(f"--method {method} needs {missing}--model")
        fitted = _learn(how, asked, model, dtype, batch_size, strict, dry_run)
        if fitted is None:
            return
    if not dry_run:
        _write(output, fitted.steering, how.makes_several)
    written = "nothing, a dry run" if dry_run else output
    console.print(f"{fitted.figures}, site {asked.site} -> {written}")


def _write_shift(shift: Path, output: Path, where: Any) -> None:
    """Writes the shift vectors of an analysis, one file per concept."""
    from xlvlm_jax import steering
    from xlvlm_jax.shift import ShiftAnalysis

    analysis = ShiftAnalysis.load(shift)
    site = analysis.source.get("site")
    if site is None:
        raise ValueError(f"{shift} does not name its site; analyse features with `xlvlm shift`")
    fitted = steering.shift_vectors(analysis.shifts, analysis.counts, site, analysis.source, where)
    _write(output, fitted, several=True)
    console.print(f"{len(fitted)} shifts of concepts, site {site} -> {output}")


def _learn(
    how: Any, asked: Any, model: str, dtype: str, batch_size: int, strict: bool, dry_run: bool
) -> Any:
    """Fits a method that runs the model; for a dry run, prints what it would do, returns None."""
    from xlvlm_jax import steering

    examples = how.examples(asked)
    vlm = load_model(model, dtype, abstract=dry_run)
    steering.files.require_fitted_model(asked.features.manifest, vlm)
    if dry_run:
        console.print(
            f"{len(examples.samples)} samples to learn from, {examples.steered} of them to "
            f"steer, in batches of {batch_size}, site {asked.site} of width "
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
        raise ValueError(
            f"--pairs contains {text!r}; expected FROM:TO pairs, such as 0:3,2:1"
        ) from None


def _write(output: Path, fitted: Mapping[str, Any], several: bool) -> None:
    """Writes one vector as a file, or several as a directory, all or none."""
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
