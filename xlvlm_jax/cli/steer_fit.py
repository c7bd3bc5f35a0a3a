"""`xlvlm steer fit`: steering vectors from features."""

import os
import shutil
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
        Literal["coarse", "fine", "learned", "l2s"],
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
    from xlvlm_jax.steering import lessons

    if not dry_run:
        refuse_existing(output, overwrite)
    opened = StoredFeatures.open(features, images=images)
    site = choose_site(opened, site)
    answers: dict[str, Any] = {"key": key, "match": match}
    meant = parse_where(where)
    sources, targets = (None if words is None else words.split(",") for words in (source, target))

    if method == "fine":
        chosen = None if pairs is None else [_pair(text) for text in pairs.split(",")]
        vectors, fine = steering.fit_fine(
            opened,
            site,
            num_concepts,
            sources,
            pairs=chosen,
            seed=seed,
            where=meant,
            **answers,
        )
        if not dry_run:
            _write_all(output, {f"{v.source['from']}-{v.source['to']}": v for v in vectors})
        sizes = ", ".join(str(len(fine.samples(i))) for i in range(num_concepts))
        console.print(
            f"{len(vectors)} vectors between {num_concepts} concepts of {sizes} rows, "
            f"site {site} -> {'nothing, a dry run' if dry_run else output}"
        )
        return
    if targets is None:
        raise ValueError(f"--method {method} needs --target, the answers to steer to")
    if method == "coarse":
        others = None if target_features is None else StoredFeatures.open(target_features)
        vector = steering.fit_coarse(
            opened, site, sources, targets, target_features=others, where=meant, **answers
        )
        if not dry_run:
            vector.save(output)
        rows = vector.source
        console.print(
            f"{rows['source rows']} source and {rows['target rows']} target rows, "
            f"norm {_norm(vector):.3g}, site {vector.site} -> "
            f"{'nothing, a dry run' if dry_run else output}"
        )
        return

    if sources is None or model is None:
        raise ValueError(
            f"--method {method} needs --source, the answers to steer from, and --model"
        )
    lesson = lessons.lesson(
        opened, sources, targets[0], num_samples=num_samples, keep=keep, seed=seed, **answers
    )
    trios = lesson.samples, lesson.wanted, lesson.given
    if method == "l2s" and contrast == "prompt":
        trios = steering.contrast_prompts(opened, lesson, targets, key=key)
    if dry_run:
        vlm = load_model(model, dtype, abstract=True)
        steering.files.require_model(opened.manifest, vlm)
        steered = sum(given != wanted for given, wanted in zip(*lesson[1:], strict=True))
        console.print(
            f"{len(trios[0])} samples to learn from, {steered} of them to be steered, in batches "
            f"of {batch_size}, site {site} of width {vlm.site_shapes[site][-1]}; nothing written"
        )
        return
    vlm = load_model(model, dtype)
    steering.files.require_model(opened.manifest, vlm)
    with progress_bars() as progress:
        advance = bars(progress)("learning" if method == "learned" else "running counterparts")
        common = {"where": meant, "seed": seed, "progress": advance, "batch_size": batch_size}
        common["strict"] = strict
        if method == "learned":
            fitted = steering.fit_learned(
                vlm, lesson.samples, lesson.wanted, site, rank=rank, steps=steps, **common
            )
        else:
            fitted = steering.fit_l2s(
                vlm, *trios, site, contrast=contrast, context_site=context_site, **common
            )
    fitted.source.update(
        features=str(features.resolve()), source=sources, target=targets, **answers
    )
    fitted.save(output)
    show_skipped(fitted.source["skipped"])
    if method == "learned":
        look = min(fitted.source["history"], key=lambda look: look["validation"])
        before = fitted.source["history"][0]["validation"]
        figures = f"validation loss {before:.3g} -> {look['validation']:.3g} at step {look['step']}"
    else:
        left, mean = (fitted.source[f"unexplained{of}"] for of in ("", " by the mean"))
        figures = f"{100 * left:.0f} % of the shifts unexplained ({100 * mean:.0f} % by their mean)"
    console.print(f"{fitted.source['samples']} samples, {figures}, site {site} -> {output}")


def _pair(text: str) -> tuple[int, int]:
    try:
        first, second = text.split(":")
        return int(first), int(second)
    except ValueError:
        raise ValueError(f"--pairs has {text!r}; expected FROM:TO, such as 0:3,2:1") from None


def _norm(vector: Any) -> float:
    return float((vector.vector**2).sum() ** 0.5)


def _write_all(output: Path, vectors: dict[str, Any]) -> None:
    """All of the vectors or none."""
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, vector in vectors.items():
        vector.save(temporary / f"{name}.safetensors")
    if output.is_dir():
        shutil.rmtree(output)
    os.replace(temporary, output)
