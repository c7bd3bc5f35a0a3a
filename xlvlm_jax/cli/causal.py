"""`xlvlm causal`: whether concepts cause what their words say."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from xlvlm_jax.cli.console import (
    Adapter,
    DtypeOfFeatures,
    Images,
    Overwrite,
    Seed,
    Site,
    Strict,
    bars,
    console,
    dtype_of,
    load_model,
    named_features,
    parse_where,
    progress_bars,
    require_counts,
    show_skipped,
)

Strengths = Annotated[
    list[float] | None,
    typer.Option(
        "--add",
        help="Strength of an addition, as a fraction of each state's norm; may be repeated. "
        "Default: 0.05, 0.1, 0.2, unless --ablate is given.",
    ),
]
Fractions = Annotated[
    list[float] | None,
    typer.Option(
        "--ablate",
        help="Fraction of the component to remove; may be repeated. Default: 0.5, 1, "
        "unless --add is given.",
    ),
]


def causal(
    concepts: Annotated[Path, typer.Argument(help="Directory of concepts, grounded.")],
    model: Annotated[str, typer.Option(help="Model that the features were extracted from.")],
    adapter: Adapter = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Features whose samples to ask. Default: those that the concepts come from."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Maximum number of samples to ask.")] = 64,
    concept: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of a concept to score; may be repeated. Default: the --num-concepts that "
            "are active in most states."
        ),
    ] = None,
    num_concepts: Annotated[int, typer.Option(help="Maximum number of concepts to score.")] = 64,
    add: Strengths = None,
    ablate: Fractions = None,
    where: Annotated[
        str,
        typer.Option(
            help="Positions to edit: predicting (those that predict the answer), all, prompt, "
            "generated, last_prompt, image, text or from:INDEX."
        ),
    ] = "predicting",
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 16,
    dtype: DtypeOfFeatures = None,
    site: Site = None,
    images: Images = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    seed: Seed = 0,
) -> None:
    """Add and remove concepts while the model answers; writes causal.json beside them."""
    from xlvlm_jax import Concepts, Features
    from xlvlm_jax.causal import record as files
    from xlvlm_jax.causal import stage
    from xlvlm_jax.concepts.methods import method_named
    from xlvlm_jax.concepts.stage import most_active
    from xlvlm_jax.data import select
    from xlvlm_jax.features.reader import samples_of
    from xlvlm_jax.storage import outputs

    require_counts(batch_size=batch_size, num_samples=num_samples, num_concepts=num_concepts)
    learnt = Concepts.load(concepts)
    if (concepts / files.FILE).exists() and not overwrite:
        raise FileExistsError(f"{concepts} already holds {files.FILE}; replace it with --overwrite")
    outputs.require_writable(concepts)
    places: Any = parse_where(where)
    K = len(learnt.components)
    if wrong := [number for number in concept or () if not 0 <= number < K]:
        raise ValueError(f"--concept is {wrong[0]}; {concepts} has concepts 0 to {K - 1}")
    opened = Features.open(named_features(features, learnt.source, concepts), images=images)
    samples = select.subsample(samples_of(opened), num_samples, seed)
    said = [_answer(sample) for sample in samples]
    answers = [text for text in said if text]
    if len(answers) < len(samples):
        console.print("samples without an answer: measuring the position after each prompt")
    vlm = load_model(model, dtype_of(dtype, opened), adapter=adapter)
    site = stage.require_concepts_of(learnt, vlm, site)
    mean = None
    if site in opened.sites and not method_named(learnt.method).takes_target:
        mean = opened.mean(site)
    numbers = concept or None
    if numbers is None and num_concepts < K:
        numbers = most_active(learnt, num_concepts)
        console.print(f"scoring {num_concepts} of {K} concepts, those active in most states")
    errors: dict[str, str] = {}
    with progress_bars() as progress:
        record = stage.score_causally(
            learnt,
            vlm,
            samples,
            answers if len(answers) == len(samples) else None,
            site=site,
            mean=mean,
            add=stage.ADD if not add and not ablate else add or (),
            ablate=stage.ABLATE if not add and not ablate else ablate or (),
            where=places,
            batch_size=batch_size,
            seed=seed,
            strict=strict,
            errors=errors,
            progress=bars(progress)("editing"),
            numbers=numbers,
        )
    show_skipped(errors)
    path = files.save(record, concepts)
    _show(record)
    console.print(f"{record.settings['samples']} samples -> {path}")


def _answer(sample: Any) -> str:
    """Returns the model's own answer to a sample, else the first reference, else ""."""
    said = sample.metadata.get("prediction") or next(iter(sample.references), "")
    return str(said).strip()


def _show(record: Any) -> None:
    scores = record.scores
    table = Table("concept", "score", "interval", "shuffled", "own", "others", "answer", box=None)
    table.add_column("words")
    for k, words in enumerate(record.words):
        if k not in record.settings.get("concepts", [k]):
            continue
        found = [scores.score[k], scores.null_high[k], scores.own[k], scores.others[k]]
        score, null, own, others = (f"{value:.2f}" for value in found)
        marked = " *" if scores.includes_null[k] else ""
        table.add_row(
            str(k),
            score + marked,
            f"{scores.low[k]:.2f} to {scores.high[k]:.2f}",
            null,
            own,
            others,
            f"{record.answer[k]:.2f}",
            ", ".join(words[:5]),
        )
    console.print(table)
    console.print(
        f"* its interval reaches into the scores of shuffled words. {record.first_order:.2f} and "
        f"{record.integrated:.2f}: rank correlation of gradient x activation and integrated "
        "gradients with the effect of removing a concept",
    )
    if record.recovered:
        shown = ", ".join(f"{share:.3f} ({name})" for name, share in record.recovered.items())
        console.print(f"loss recovered by the dictionary, relative to ablation: {shown}")
