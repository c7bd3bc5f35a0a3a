"""`xlvlm steer fit`: fits steering vectors on features."""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xlvlm_jax.cli.console import (
    Adapter,
    Dtype,
    Images,
    Overwrite,
    Seed,
    Strict,
    bars,
    console,
    load_model,
    parse_where,
    progress_bars,
    refuse_existing,
    require_counts,
    show_skipped,
)
from xlvlm_jax.cli.runtime import DryRun
from xlvlm_jax.storage import outputs

Features = Annotated[
    Path,
    typer.Argument(
        help="Features, the states of answers; for shift what `xlvlm shift` wrote, for concept "
        "what `xlvlm decompose` wrote."
    ),
]
Words = str | None


def fit(
    context: typer.Context,
    features: Features,
    output: Annotated[
        Path,
        typer.Option(
            help="File to write (.safetensors). Several vectors: a new directory, a file per "
            "vector; or, if they are of different sites, a file (.safetensors) for all."
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            help="coarse: difference of means; pca, lat, probe: its part along the principal "
            "direction of differences, that of random pairs, or the normal of a linear probe; "
            "adaptive: coarse, up to the mean target state; conditional: coarse, where a state is "
            "like source states; memory: the difference within the state's cluster; "
            "iti: the attention heads that tell answers apart best; "
            "sae, sae-clamp: features of a sparse autoencoder, added or set; "
            "fine: differences between k-means centroids; "
            "learned: optimised by gradient descent; l2s: a network that predicts a vector for "
            "each prompt; p2s: a vector for each sample; vti-image, vti-text: what masked "
            "pictures, or the counterparts of p2s, share, per layer; shift: the shift of each "
            "concept by fine-tuning; concept: concepts themselves."
        ),
    ] = "coarse",
    source: Annotated[
        Words,
        typer.Option(
            help="Answers to steer from, separated by commas; optional for methods that need no "
            "model. '*' for every sample, such as all captions."
        ),
    ] = None,
    target: Annotated[
        Words,
        typer.Option(
            help="Answers to steer to, separated by commas; learned and l2s use the first; "
            "optional with --target-features or --between-models."
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            help="Site whose states to use, optional if there is only one; methods without a model "
            "also take a pattern ('layers.*') and write a directory, a file per site, or one file "
            "for all; vti: any sites of the model. Default for vti: 'layers.*'; for iti: "
            "every site of heads."
        ),
    ] = None,
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
        str | None,
        typer.Option(
            help="Token positions that the vector is meant for: all, prompt, generated, "
            "last_prompt, predicting, image, text or from:INDEX. Default: all; for iti predicting; "
            "for vti-image image in the decoder."
        ),
    ] = None,
    target_features: Annotated[
        Path | None,
        typer.Option(
            help="Without --model: features with the target's states, if in another directory."
        ),
    ] = None,
    between_models: Annotated[
        bool,
        typer.Option(
            "--between-models",
            help="Methods without a model: steer towards the states of another model, such as a "
            "fine-tuned one, in --target-features, or in the same features (extract --finetuned).",
        ),
    ] = False,
    matched: Annotated[
        bool,
        typer.Option(
            "--matched",
            help="Without --model: only samples with source and target states, in both features.",
        ),
    ] = False,
    penalty: Annotated[
        float, typer.Option(help="probe: weight of the squared norm; larger is closer to coarse.")
    ] = 1.0,
    num_heads: Annotated[int, typer.Option(help="iti: maximum number of heads to steer.")] = 48,
    direction: Annotated[
        Literal["mean", "probe"],
        typer.Option(help="iti: along the difference of means, or the weights of the probe."),
    ] = "mean",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="conditional, memory: least cosine for which a vector is added. Default: what "
            "separates source states best; memory: always."
        ),
    ] = None,
    num_keys: Annotated[int, typer.Option(help="memory: number of clusters.")] = 8,
    dictionary: Annotated[
        Path | None,
        typer.Option(help="sae, sae-clamp: sparse autoencoder of the site, as for `decompose`."),
    ] = None,
    num_features: Annotated[
        int, typer.Option(help="sae, sae-clamp: number of features, those that differ most.")
    ] = 8,
    feature_ids: Annotated[
        str | None,
        typer.Option(help="sae, sae-clamp: the features instead, separated by commas."),
    ] = None,
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
            help="fine: pairs of clusters FROM:TO, separated by commas. Default: every pair. "
            "concept: pairs of concepts."
        ),
    ] = None,
    concepts: Annotated[
        str | None,
        typer.Option(help="concept: numbers, separated by commas. Default: every concept."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="learned, l2s, p2s, vti: model that the features were extracted from."),
    ] = None,
    adapter: Adapter = None,
    share: Annotated[
        float, typer.Option(help="vti-image: share of each picture's cells to mask.")
    ] = 0.99,
    num_masks: Annotated[
        int, typer.Option(help="vti-image: masked versions of each picture, which are averaged.")
    ] = 10,
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
        Literal["prompt", "label", "completion", "forced"],
        typer.Option(
            help="l2s, p2s, vti-text: states to contrast with: another prompt about the image that "
            "has a target answer (prompt), questions about the image with the sample's label and "
            "with the other, as POPE's (label), target and source answers after the same prompt "
            "(completion), or --positive and --negative after the prompt of every sample (forced)."
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
    contrasts: Annotated[
        Path | None,
        typer.Option(
            help="--contrast forced: JSON file of the answers, and of prompts, for each scenario "
            'of MM-SafetyBench: {SCENARIO or "*": {"positive": ..., "negative": ..., "prompt": '
            '"{question} ..."}}.'
        ),
    ] = None,
    context_prompt: Annotated[
        str | None,
        typer.Option(
            help="l2s: prompt whose last token the network reads, with {question} in place of the "
            "question, or without, such as 'Describe the image in detail.' Default: the prompt of "
            "the features."
        ),
    ] = None,
    states: Annotated[
        Literal["last", "mean"],
        typer.Option(
            help="l2s, p2s, vti-text: state of a completion: that of its last token, or the mean "
            "over its tokens."
        ),
    ] = "last",
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="learned, l2s, p2s, vti: maximum number of samples to steer. Default: 128, or all "
            "with --contrast forced or label."
        ),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(
            help="learned, l2s, p2s, vti-text: samples whose answers must stay, per sample that is "
            "steered."
        ),
    ] = 1.5,
    steps: Annotated[int, typer.Option(help="learned: maximum number of optimiser steps.")] = 150,
    batch_size: Annotated[int, typer.Option(help="learned, l2s: samples per batch.")] = 32,
    dtype: Dtype = "float32",
    images: Images = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    dry_run: DryRun = False,
    seed: Seed = 0,
) -> None:
    """Fit steering vectors from source answers to target answers."""
    from ports.messages import few
    from xlvlm_jax import Features as StoredFeatures
    from xlvlm_jax import steering

    _refuse_options_of_others(method, context.params)
    require_counts(num_samples=num_samples, batch_size=batch_size, steps=steps)
    if method in ("shift", "concept"):
        _require_place(output, True, context.params)
        given = (concepts, pairs) if method == "concept" else ()
        write = _write_concepts if method == "concept" else _write_shift
        write(features, output, parse_where(where or "all"), dry_run, site, *given)
        return
    opened = StoredFeatures.open(features, images=images)
    how = steering.method_named(method)
    sources, targets = (
        None if words is None else [word.strip() for word in words.split(",")]
        for words in (source, target)
    )
    sites = how.sites_in(opened, site)
    several = how.makes_several or (len(sites) > 1 and not how.sites)
    _require_place(output, several, context.params)
    asked = steering.Request(
        opened,
        sites[0],
        sources,
        targets,
        key=key,
        match=match,
        where=how.where if where is None else parse_where(where),
        seed=seed,
        num_samples=num_samples,
        keep=keep,
        options=_options(how.options, context.params),
    )
    told = contrast in _TOLD and "contrast" in how.options
    given_otherwise = bool(target_features) or between_models or told
    if how.needs_target and targets is None and not given_otherwise:
        raise ValueError(f"--method {method} needs --target, the answers to steer to")
    if how.examples is None:
        fitted = _of_sites(how, asked, sites)
    else:
        answers_given = sources is not None or told or not how.needs_target
        if model is None or not answers_given:
            missing = "" if answers_given else "--source, the answers to steer from, and "
            raise ValueError(f"--method {method} needs {missing}--model")
        fitted = _learn(how, asked, model, adapter, dtype, batch_size, strict, dry_run)
        if fitted is None:
            return
    if how.sites:  # those of the features that it chose
        sites = [name for each in fitted.steering.values() for name in each.vectors]
    if not dry_run:
        _write(output, fitted.steering, several)
    written = "nothing, a dry run" if dry_run else output
    console.print(
        f"{fitted.figures}, {'sites' if len(sites) > 1 else 'site'} {few(sites)} -> {written}"
    )


def _options(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a method's options from those of the command, with files read and lists parsed."""
    from xlvlm_jax import Concepts, Features, sae, steering

    read: dict[str, Callable[[str], Any]] = {
        "target_features": lambda path: Features.open(Path(path)),
        "source_concepts": lambda path: Concepts.load(Path(path)),
        "dictionary": lambda path: sae.load(Path(path)),
        "feature_ids": lambda text: _whole_numbers(text, "--feature-ids"),
        "contrasts": lambda path: steering.read_contrasts(path),
        "pairs": lambda text: [_pair(each) for each in text.split(",")],
    }
    return {
        name: read[name](given[name]) if name in read and given[name] else given[name]
        for name in names
    }


# Options of the command that concern every method, those that read samples, those that look at
# answers, and those that run the model.
_OF_FILES = ("features", "output", "method", "site", "where", "overwrite", "dry_run", "seed")
_OF_SAMPLES = ("images", "strict")
_OF_ANSWERS = ("source", "target", "key", "match")
_OF_MODEL = ("model", "adapter", "num_samples", "batch_size", "dtype")
# Contrasts that say themselves what is wanted of a sample, whatever was answered.
_TOLD = ("forced", "label")


def _refuse_options_of_others(method: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError if an option was given that only other methods take."""
    from xlvlm_jax.steering.methods import METHODS

    takes = {name: how.options for name, how in METHODS.items()}
    takes |= {"concept": ("concepts", "pairs"), "shift": ()}
    if method not in takes:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(takes)}")
    usual = inspect.signature(fit).parameters
    how = METHODS.get(method)
    reads, among = {*_OF_FILES, *takes[method]}, f"--method {method}"
    if how is not None:
        reads |= {*_OF_SAMPLES, *_OF_ANSWERS}
        reads |= set() if how.examples is None else {*_OF_MODEL, "keep"}
        reads -= {*how.ignores}
        if "contrast" in how.options and given["contrast"] in _TOLD:
            among += f" --contrast {given['contrast']}"
            reads -= {*_OF_ANSWERS, "keep"}
    for option in sorted(given.keys() - reads - {x for each in takes.values() for x in each}):
        if given[option] != usual[option].default:
            raise ValueError(f"--{option.replace('_', '-')} has no effect on {among}; omit it")
    for option in sorted({name for names in takes.values() for name in names}):
        if option in takes[method] or given[option] == usual[option].default:
            continue
        takers = ", ".join(name for name, names in takes.items() if option in names)
        raise ValueError(
            f"--{option.replace('_', '-')} has no effect on --method {method}; omit it, or choose "
            f"one of {takers}"
        )


def _of_sites(how: Any, asked: Any, sites: Sequence[str]) -> Any:
    """Fits a method that needs no model at each site, or at all of them at once."""
    if how.sites:
        return how.fit(dataclasses.replace(asked, sites=sites))
    fitted = [how.fit(dataclasses.replace(asked, site=site)) for site in sites]
    if len(fitted) == 1:
        return fitted[0]
    every = {name: one for each in fitted for name, one in each.steering.items()}
    return fitted[0]._replace(steering=every, figures=f"{len(every)} vectors")


def _write_shift(shift: Path, output: Path, where: Any, dry_run: bool, chosen: str | None) -> None:
    """Writes the shift vectors of an analysis, one file per concept."""
    from xlvlm_jax import steering
    from xlvlm_jax.shift import ShiftAnalysis

    analysis = ShiftAnalysis.load(shift)
    site = analysis.source.get("site")
    if site is None:
        raise ValueError(f"{shift} does not name its site; analyse features with `xlvlm shift`")
    if chosen not in (None, site):
        raise ValueError(f"--site is {chosen!r}; the shift is of {site}: omit it, or give that")
    fitted = steering.shift_vectors(analysis.shifts, analysis.counts, site, analysis.source, where)
    if not dry_run:
        _write(output, fitted, several=True)
    written = "nothing, a dry run" if dry_run else output
    console.print(f"{len(fitted)} shifts of concepts, site {site} -> {written}")


def _write_concepts(
    directory: Path,
    output: Path,
    where: Any,
    dry_run: bool,
    site: str | None,
    concepts: str | None,
    pairs: str | None,
) -> None:
    """Writes concepts as vectors, one file per concept or pair."""
    from ports.messages import counted
    from xlvlm_jax import Concepts, steering

    chosen: list[Any] = _whole_numbers(concepts, "--concepts") or []
    chosen += [] if pairs is None else [_pair(text) for text in pairs.split(",")]
    loaded = Concepts.load(directory)
    fitted = steering.concept_vectors(loaded, chosen or None, site=site, where=where)
    if not dry_run:
        _write(output, fitted, several=True)
    first = next(iter(fitted.values()))
    made = counted(len(fitted), "concept as a vector", "concepts as vectors")
    written = "nothing, a dry run" if dry_run else output
    console.print(f"{made}, site {first.site} -> {written}")


def _learn(
    how: Any,
    asked: Any,
    model: str,
    adapter: str | None,
    dtype: str,
    batch_size: int,
    strict: bool,
    dry_run: bool,
) -> Any:
    """Fits a method that runs the model; for a dry run, prints what it would do, returns None."""
    from ports.messages import few
    from xlvlm_jax import steering
    from xlvlm_jax.features.manifest import model_at

    examples = how.examples(asked)
    vlm = load_model(model, dtype, adapter=adapter, abstract=dry_run)
    if not (dry_run and adapter):  # without weights, nothing is merged in
        steering.files.require_fitted_model(model_at(asked.features.manifest, ""), vlm)
    if dry_run:
        sites = vlm.check_sites(asked.site, one_state=True)
        console.print(
            f"{len(examples.samples)} samples to learn from, {examples.steered} of them to "
            f"steer, in batches of {batch_size}, site {few(sites)} of width "
            f"{vlm.site_shapes[sites[0]][-1]}; nothing written"
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
    show_skipped(
        {k: v for each in fitted.steering.values() for k, v in each.source["skipped"].items()}
    )
    return fitted


def _whole_numbers(text: str | None, option: str) -> list[int] | None:
    try:
        return None if text is None else [int(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} is {text!r}; expected whole numbers separated by commas, such as 3,17"
        ) from None


def _pair(text: str) -> tuple[int, int]:
    try:
        first, second = text.split(":")
        return int(first), int(second)
    except ValueError:
        raise ValueError(
            f"--pairs contains {text!r}; expected FROM:TO pairs, such as 0:3,2:1"
        ) from None


# What names a file or directory that is read.
_READ = (
    *("features", "target_features", "source_concepts", "dictionary", "contrasts", "images"),
    *("model", "adapter"),
)
_VECTORS = ("*.safetensors",)


def _require_place(output: Path, several: bool, given: Mapping[str, Any]) -> None:
    """Checks, before anything is fitted, that the output can be written, and replaced if asked.

    Raises:
        OSError: it can't, or a directory to replace holds more than vectors, or what is read.
    """
    if given["dry_run"]:
        return
    directory = several and output.suffix != ".safetensors"
    refuse_existing(output, given["overwrite"], directory=directory)
    if directory:
        read = [Path(given[name]) for name in _READ if given[name] is not None]
        outputs.require_replaceable(output, _VECTORS, read, "vectors (*.safetensors)")


def _write(output: Path, fitted: Mapping[str, Any], several: bool) -> None:
    """Writes one vector as a file, or several as a directory, all or none.

    Vectors of different sites may also be one file.
    """
    from xlvlm_jax.steering import SiteVectors, SteeringVector

    if not fitted:
        raise ValueError(f"there is no vector to write to {output}")
    if several and output.suffix == ".safetensors":
        if not all(isinstance(each, SteeringVector) for each in fitted.values()):
            raise ValueError(f"--output {output} can hold plain vectors only; name a directory")
        SiteVectors.of(list(fitted.values())).save(output)
        return
    if not several:
        (one,) = fitted.values()
        one.save(output)
        return
    temporary = output.with_name(f"{output.name}.tmp")
    outputs.require_replaceable(temporary, _VECTORS)
    outputs.remove_written(temporary, _VECTORS)  # of a killed process
    for name, each in fitted.items():
        each.save(temporary / f"{name}.safetensors")
    outputs.remove_written(output, _VECTORS)
    os.replace(temporary, output)
