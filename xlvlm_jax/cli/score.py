"""`xlvlm score`: scores concepts, or compares methods and numbers of concepts."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from xlvlm_jax.cli.console import (
    DtypeOfFeatures,
    Images,
    Overwrite,
    Seed,
    Site,
    Strict,
    ThroughNorm,
    WordRules,
    bars,
    console,
    dtype_of,
    load_model,
    named_features,
    progress_bars,
    refuse_given,
    show_skipped,
    spinner,
)
from xlvlm_jax.cli.protocol import Protocol

Directories = Annotated[
    list[Path] | None,
    typer.Argument(help="Directories of concepts to score; omit to compare --methods."),
]


def score(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Directory to write scores.json to, such as the run directory.")
    ],
    concepts: Directories = None,
    test: Annotated[
        Path | None,
        typer.Option(help="Features to score on. Default: those that the concepts were learnt on."),
    ] = None,
    features: Annotated[Path | None, typer.Option(help="--methods: features to learn on.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to compare, separated by commas: snmf,kmeans,pca,simple,random."
        ),
    ] = None,
    num_concepts: Annotated[
        str,
        typer.Option(help="--methods: numbers of concepts to compare, separated by commas."),
    ] = "5,10,20,50",
    model: Annotated[
        str | None, typer.Option(help="--methods: model that the features were extracted from.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="--methods: LoRA adapter that it was extracted with.")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP model (directory, Hub ID or 'embedded'): also compute CLIPScore and "
            "monosemanticity."
        ),
    ] = None,
    bert: Annotated[
        str | None,
        typer.Option(help="BERT or RoBERTa model (directory or Hub ID): also compute BERTScore."),
    ] = None,
    bert_layer: Annotated[
        int | None,
        typer.Option(help="Layer of --bert to compare. Default: the one recommended for it."),
    ] = None,
    bert_idf: Annotated[
        bool,
        typer.Option(help="Weight tokens by their inverse document frequency in the captions."),
    ] = False,
    bert_baseline: Annotated[
        Path | None,
        typer.Option(help="Rescale BERTScore by the baseline in this file of LAYER,P,R,F lines."),
    ] = None,
    stability: Annotated[
        list[Path] | None,
        typer.Option(
            help="Concepts learnt with another seed, to measure stability; may be repeated."
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            help="--methods: seeds per method and number. With more than two, each is scored, and "
            "scores are means with their spread over the seeds."
        ),
    ] = 2,
    through_norm: ThroughNorm = None,
    word_rules: WordRules = "default",
    dtype: DtypeOfFeatures = None,
    protocol: Protocol = None,
    site: Site = None,
    images: Images = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    seed: Seed = 0,
) -> None:
    """Score concepts (CLIPScore, BERTScore, overlap, sparsity, ...) and write scores.json."""
    from ports.messages import counted
    from xlvlm_jax import Features
    from xlvlm_jax.concepts.scores.comparison import (
        compare,
        load_dictionaries,
        names_of,
        require_no_scores,
        write_scores,
    )
    from xlvlm_jax.features.reader import choose_site, site_of
    from xlvlm_jax.report.score_figures import draw_all

    _require_either(context, concepts, methods)
    directories = concepts or []
    if stability and len(directories) != 1:
        raise ValueError(
            f"--stability needs exactly one directory of concepts, got {len(directories)}; give one"
        )
    require_no_scores(output, overwrite)
    of_bert: dict[str, Any] = {"layer": bert_layer, "idf": bert_idf, "baseline": bert_baseline}
    scorer_of = functools.partial(_scorer, clip=clip, bert=bert, seed=seed, strict=strict)
    if methods:
        if features is None or model is None:
            missing = "--features" if features is None else "--model"
            raise ValueError(f"--methods needs {missing}; give it too")
        names, counts = _compared(methods, num_concepts, seeds)
        train = Features.open(features)
        stored = Features.open(test or features, images=images)
        scorer = scorer_of(stored, choose_site(train, site), **of_bert)
        with progress_bars() as progress:
            rows = compare(
                train,
                load_model(model, dtype_of(dtype, train), adapter=adapter),
                scorer,
                methods=names,
                num_concepts=counts,
                num_seeds=seeds,
                average=seeds > 2,
                through_norm=through_norm,
                rules=word_rules,
                seed=seed,
                progress=bars(progress)("scoring"),
            )
    else:
        learnt = load_dictionaries(directories, with_words=bool(clip or bert))
        source = learnt[0].source
        test = named_features(test, source, directories[0], "--test")
        stored = Features.open(test, images=images)
        scorer = scorer_of(stored, site or site_of(source, stored), **of_bert)
        others = load_dictionaries(stability or (), with_words=False)
        rows = [
            scorer.score(each, name=name, others=others)
            for name, each in zip(names_of(directories), learnt, strict=True)
        ]
    show_skipped(scorer.skipped)
    draw_all(rows, output)
    path = write_scores(output, scorer.describe(), rows)
    _show(rows)
    scored = counted(len(rows), "dictionary", "dictionaries")
    console.print(f"{scored} scored on {counted(len(scorer.stored), 'row')} -> {path}")


def _compared(methods: str, num_concepts: str, seeds: int) -> tuple[list[str], list[int]]:
    """Returns the methods and numbers of concepts, checked before a model is loaded."""
    from xlvlm_jax.concepts.scores.comparison import require_methods

    names, counts = [name.strip() for name in methods.split(",")], _numbers(num_concepts)
    require_methods(names, counts, seeds)
    return names, counts


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--num-concepts is {text!r}; expected whole numbers separated by commas, such as 5,10"
        ) from None


def _scorer(
    features: Any,
    site: str | None,
    *,
    clip: str | None,
    bert: str | None,
    layer: int | None,
    idf: bool,
    baseline: Path | None,
    seed: int,
    strict: bool,
) -> Any:
    from ports.models import bert as bert_port
    from ports.models import clip as clip_port
    from xlvlm_jax import metrics
    from xlvlm_jax.concepts.scores.scorer import Scorer, captions
    from xlvlm_jax.demo import embedded

    if bert is None and (layer is not None or idf or baseline is not None):
        raise ValueError("--bert-layer, --bert-idf and --bert-baseline need --bert; give it too")
    judge, encoder = None, None
    if bert is not None:
        said = captions(features)  # before anything is loaded
        with spinner(f"loading {bert}"):
            judge = bert_port.load_text_encoder(bert)
        layer = metrics.default_layer(judge) if layer is None else layer
        judge = metrics.BertScorer(
            judge,
            layer=layer,
            idf=[text for texts in said for text in texts] if idf else None,
            baseline=None if baseline is None else metrics.read_baseline(baseline, layer),
        )
    if clip is not None:
        with spinner(f"loading {clip}"):
            encoder = clip_port.load_dual_encoder(embedded.CLIP if clip == "embedded" else clip)
    with spinner("reading and encoding the samples"):
        return Scorer(features, site, clip=encoder, bert=judge, seed=seed, strict=strict)


def _require_either(context: typer.Context, concepts: Any, methods: str | None) -> None:
    """Checks that one of the two is given, and no option that has no effect on it."""
    if bool(concepts) == bool(methods):
        raise ValueError("give either directories of concepts or --methods to compare")
    if not methods:
        learning = ("features", "num_concepts", "model", "adapter", "dtype", "seeds")
        decoding = ("through_norm", "word_rules", "protocol")
        refuse_given(context, (*learning, *decoding), "without --methods")


def _show(rows: list[Any]) -> None:
    from xlvlm_jax.report.scores_section import score_tables

    for scores in score_tables(rows):
        names = (column.name for column in scores.columns)
        table = Table("", *names, title=scores.title, box=None, pad_edge=False)
        table.columns[0].no_wrap = True
        for row, cells in scores.rows:
            shown = (Text(cell.text, style="bold" if cell.best else "") for cell in cells)
            table.add_row(row.name, *shown)
        console.print(table)
    for row in rows:
        if row.spread:
            shown = (f"{name} {spread:.3f}" for name, spread in row.spread.items())
            console.print(f"{row.name}: spread over {row.seeds} seeds: {', '.join(shown)}")
