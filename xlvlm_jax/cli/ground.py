"""`xlvlm ground`: describes concepts by words and images."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from xlvlm_jax.cli.console import (
    Adapter,
    DtypeOfFeatures,
    Images,
    Overwrite,
    ThroughNorm,
    WordRules,
    console,
    dtype_of,
    errors,
    load_model,
    require_counts,
)
from xlvlm_jax.cli.protocol import Protocol


def ground(
    concepts: Annotated[Path, typer.Argument(help="Directory of concepts.")],
    model: Annotated[str, typer.Option(help="Model that the features were extracted from.")],
    adapter: Adapter = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Features that the concepts were learnt on, if they were moved."),
    ] = None,
    num_words: Annotated[int, typer.Option(help="Maximum number of words per concept.")] = 10,
    num_candidates: Annotated[
        int, typer.Option(help="Tokens with the highest logits to search for words.")
    ] = 50,
    num_images: Annotated[int, typer.Option(help="Images per concept.")] = 5,
    through_norm: ThroughNorm = None,
    word_rules: WordRules = "default",
    centred: Annotated[
        bool,
        typer.Option(
            "--centred",
            help="Read the words of centroids from their difference from the mean of centroids, "
            "along which `causal` and `explain` edit, instead of from the centroids.",
        ),
    ] = False,
    dtype: DtypeOfFeatures = None,
    protocol: Protocol = None,
    images: Images = None,
    overwrite: Overwrite = False,
) -> None:
    """Describe concepts by words and images; writes them into the directory of concepts."""
    from xlvlm_jax import Concepts, Features
    from xlvlm_jax.concepts.stage import ground_concepts
    from xlvlm_jax.storage import outputs, pictures

    require_counts(num_words=num_words, num_candidates=num_candidates, num_images=num_images)
    learnt = Concepts.load(concepts)
    if learnt.words is not None and not overwrite:
        raise FileExistsError(f"{concepts} already holds words; replace them with --overwrite")
    outputs.require_writable(concepts)
    source = features or Path(learnt.source.get("features", ""))
    opened = Features.open(source, images=images)
    grounded = ground_concepts(
        concepts,
        load_model(model, dtype_of(dtype, opened), adapter=adapter),
        opened,
        num_words=num_words,
        num_candidates=num_candidates,
        num_images=num_images,
        through_norm=through_norm,
        rules=word_rules,
        centred=centred,
    )
    table = Table("concept", "words", box=None)
    for number, words in enumerate(grounded.words or ()):
        table.add_row(str(number), ", ".join(words))
    console.print(table)
    how = "the final norm and the head" if grounded.through_norm else "the head alone"
    console.print(f"words decoded through {how}")
    shown = [path for paths in grounded.images or () for path in paths]
    if gone := pictures.missing(shown):
        errors.print(
            f"{len(gone)} of {len(set(shown))} images do not exist, for example {gone[0]}; "
            "give the directory that holds them (--images)",
            style="yellow",
        )
