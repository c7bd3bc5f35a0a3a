"""`xlvlm shift`: measures how fine-tuning moves concepts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.table import Table

from xlvlm_jax.cli.console import (
    DtypeOfFeatures,
    Images,
    Overwrite,
    Seed,
    Site,
    ThroughNorm,
    WordRules,
    console,
    dtype_of,
    load_model,
    refuse_existing,
    require_counts,
    spinner,
)
from xlvlm_jax.cli.protocol import Protocol


def shift(
    original: Annotated[
        Path,
        typer.Argument(
            help="Features of the original model, or of both models (extract --finetuned)."
        ),
    ],
    finetuned: Annotated[
        Path | None, typer.Argument(help="Features of the fine-tuned model on the same data.")
    ] = None,
    *,
    concepts: Annotated[Path, typer.Option(help="Concepts learnt on the original features.")],
    model: Annotated[str, typer.Option(help="Original model, whose head decodes words.")],
    output: Annotated[Path, typer.Option(help="Directory to write, such as RUN/shift.")],
    finetuned_model: Annotated[
        str | None, typer.Option(help="Fine-tuned model, if its head differs.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="LoRA adapter (directory or Hub ID) of the fine-tuned model, instead of "
            "--finetuned-model."
        ),
    ] = None,
    finetuned_concepts: Annotated[
        Path | None,
        typer.Option(
            help="Concepts of the fine-tuned model. Default: learnt here, with the method and "
            "options of --concepts."
        ),
    ] = None,
    site: Site = None,
    alpha: Annotated[float, typer.Option(help="Shifted concept = concept + alpha x shift.")] = 1.0,
    reduce: Annotated[
        str,
        typer.Option(help="How samples' shifts are averaged: mean, median or trimmed_mean."),
    ] = "mean",
    assign_by: Annotated[
        str,
        typer.Option(
            help="How a sample's concept is found: the most active one (activation), or the most "
            "similar one to its state (cosine or l2)."
        ),
    ] = "activation",
    normalise_shifts: Annotated[
        bool,
        typer.Option(
            "--normalise-shifts", help="Divide the shifts by the norm of their whole matrix."
        ),
    ] = False,
    normalise_shifted: Annotated[
        bool,
        typer.Option("--normalise-shifted", help="Divide each shifted concept by its norm."),
    ] = False,
    num_words: Annotated[int, typer.Option(help="Maximum number of words per concept.")] = 15,
    num_candidates: Annotated[
        int, typer.Option(help="Tokens with the highest logits to search for words.")
    ] = 200,
    num_images: Annotated[
        int, typer.Option(help="Most activating samples per concept to compare.")
    ] = 50,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            help="Other shifts to draw in the same figures (overlap-beside.svg, "
            "recovery-beside.svg), such as those of other fine-tunings; may be repeated."
        ),
    ] = None,
    store_samples: Annotated[
        bool,
        typer.Option(
            "--store-samples", help="Also write each sample's shift (sample-shifts.safetensors)."
        ),
    ] = False,
    through_norm: ThroughNorm = None,
    word_rules: WordRules = "default",
    dtype: DtypeOfFeatures = None,
    protocol: Protocol = None,
    images: Images = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Measure how fine-tuning moves concepts, and how well mean shifts explain it."""
    from xlvlm_jax import Concepts, Features
    from xlvlm_jax.concepts.methods import method_named
    from xlvlm_jax.report.shift_figures import draw_all, draw_beside
    from xlvlm_jax.shift import match_samples, shift_features
    from xlvlm_jax.shift.pairs import common_site

    if finetuned_model and adapter:
        raise ValueError("--finetuned-model and --adapter both name the fine-tuned model; give one")
    refuse_existing(output, overwrite, directory=True)
    _require(reduce, assign_by, num_words, num_candidates, num_images)
    own, others = _named(output, beside or ())
    before = Features.open(original, images=images)
    after = None if finetuned is None else Features.open(finetuned, images=images)
    learnt = Concepts.load(concepts)
    site = site or learnt.source.get("site")
    pairs = None
    if after is not None:  # check first: loading a model takes long
        common_site(before, after, site)
        pairs = match_samples(before, after)
    theirs = None if finetuned_concepts is None else Concepts.load(finetuned_concepts)
    vlm, other = _models(model, finetuned_model, adapter, dtype_of(dtype, before))
    with spinner("analysing"):
        analysis = shift_features(
            before,
            after,
            learnt,
            vlm,
            output,
            finetuned_vlm=other,
            finetuned_concepts=theirs,
            pairs=pairs,
            site=site,
            alpha=alpha,
            reduce=cast(Any, reduce),  # `shift_features` checks it
            assign_by=cast(Any, assign_by),
            normalise_shifts=normalise_shifts,
            normalise_shifted=normalise_shifted,
            num_words=num_words,
            num_candidates=num_candidates,
            num_images=num_images,
            through_norm=through_norm,
            rules=word_rules,
            store_samples=store_samples,
            seed=seed,
        )
        draw_all(analysis, output)
        if others:
            draw_beside({own: analysis, **others}, output)
    show(analysis)
    if not method_named(learnt.method).is_centroids:
        norm = analysis.summary()["means"]["magnitude"]
        console.print(
            f"{learnt.method} concepts have norm 1, but shifts have norm {norm:.3g} on average;"
            " choose --alpha to match, or learn concepts with kmeans as in the paper",
            style="yellow",
        )
    console.print(f"-> {output}")


def _models(
    model: str, finetuned: str | None, adapter: str | None, dtype: str
) -> tuple[Any, Any | None]:
    """Loads the original model, and the fine-tuned one if it is named."""
    vlm = load_model(model, dtype)
    if adapter:
        return vlm, load_model(model, dtype, adapter=adapter)
    return vlm, load_model(finetuned, dtype) if finetuned else None


def _named(output: Path, beside: Sequence[Path]) -> tuple[str, dict[str, Any]]:
    """Returns a name of the output, and the other shifts by names that tell them all apart."""
    from xlvlm_jax.shift import ShiftAnalysis
    from xlvlm_jax.storage.names import distinct_ends

    own, *names = distinct_ends([output, *beside])
    if len({own, *names}) <= len(beside):
        raise ValueError("--beside names a shift twice, or the output; give each once")
    return own, {name: ShiftAnalysis.load(path) for name, path in zip(names, beside, strict=True)}


def _require(reduce: str, assign_by: str, words: int, candidates: int, images: int) -> None:
    """Checks options that need no model, before one is loaded."""
    from xlvlm_jax.shift.vectors import AssignBy, Reduce

    require_counts(num_words=words, num_candidates=candidates, num_images=images)
    for name, value, kind in (("reduce", reduce, Reduce), ("assign-by", assign_by, AssignBy)):
        if value not in get_args(kind):
            raise ValueError(f"--{name} is {value!r}; expected one of {', '.join(get_args(kind))}")


def show(analysis) -> None:
    """Prints a line per concept, the means and the correlations."""
    from xlvlm_jax.report.shift_section import overlap_rows

    table = Table("concept", "match", "samples", box=None)
    names = ("recovery", "recovery_l2", "consistency", "magnitude")
    for name in ("T-Overlap", "shifted", *(name.replace("_", " ") for name in names)):
        table.add_column(name, justify="right")
    table.add_column("words of the shift")
    before, after = analysis.overlap("original"), analysis.overlap("shifted")
    for k, samples in enumerate(analysis.counts):
        line = [str(k), str(analysis.matching[k]), str(samples), f"{100 * before[k]:.0f} %"]
        if analysis.moved[k]:
            line += [f"{100 * after[k]:.0f} %", *(f"{analysis.figure(n)[k]:.2f}" for n in names)]
            line.append(", ".join(analysis.words["shift"][k][:6]))
        else:
            line += ["no shift: fewer than two common samples"]
        table.add_row(*line)
    console.print(table)
    for name, original, shifted, chance in overlap_rows(analysis):
        console.print(
            f"mean overlap of {name}: original {original}, shifted {shifted}, unmatched {chance}"
        )
    for name, c in analysis.correlations.items():
        console.print(
            f"{name.replace('-', ' and ')}: r = {c.r:.2f}, p = {c.p_value:.2g}, {c.count} concepts"
        )
