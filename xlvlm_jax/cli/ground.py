"""`xlvlm ground`: concepts -> words and images."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from xlvlm_jax.cli.console import Images, Overwrite, ThroughNorm, console, errors, load_model


def ground(
    concepts: Annotated[Path, typer.Argument(help="A directory of concepts.")],
    model: Annotated[str, typer.Option(help="The model that the states came from.")],
    features: Annotated[
        Path | None, typer.Option(help="Where they were learnt from, if it was moved.")
    ] = None,
    num_words: Annotated[int, typer.Option(help="Words a concept.")] = 10,
    num_candidates: Annotated[int, typer.Option(help="Highest logits looked through.")] = 50,
    num_images: Annotated[int, typer.Option(help="Images a concept.")] = 5,
    through_norm: ThroughNorm = None,
    images: Images = None,
    overwrite: Overwrite = False,
) -> None:
    """Concepts -> words and images, written into the same directory."""
    from xlvlm_jax import Concepts, Features
    from xlvlm_jax.concepts.stage import ground_concepts
    from xlvlm_jax.storage import pictures

    learnt = Concepts.load(concepts)
    if learnt.words is not None and not overwrite:
        raise FileExistsError(f"{concepts} holds words already; replace them by --overwrite")
    source = features or Path(learnt.source.get("features", ""))
    grounded = ground_concepts(
        concepts,
        load_model(model),
        Features.open(source, images=images),
        num_words=num_words,
        num_candidates=num_candidates,
        num_images=num_images,
        through_norm=through_norm,
    )
    table = Table("concept", "words", box=None)
    for number, words in enumerate(grounded.words or ()):
        table.add_row(str(number), ", ".join(words))
    console.print(table)
    how = "through the final norm" if grounded.through_norm else "by the head alone"
    console.print(f"words read {how}")
    shown = [path for paths in grounded.images or () for path in paths]
    if gone := pictures.missing(shown):
        errors.print(
            f"{len(gone)} of {len(set(shown))} images are not there, such as {gone[0]}; "
            "give the directory that they lie in (--images)",
            style="yellow",
            markup=False,
        )
