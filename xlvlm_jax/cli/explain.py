"""`xlvlm explain`: the concepts that are most active in one sample."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from xlvlm_jax.cli.console import Images, Overwrite, Site, console, refuse_existing


def explain(
    concepts: Annotated[Path, typer.Argument(help="Directory of concepts, grounded.")],
    sample: Annotated[str, typer.Argument(help="ID of the sample, or the name of its image file.")],
    features: Annotated[
        Path | None,
        typer.Option(help="Features of the sample. Default: those that the concepts come from."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also draw it, in this file (.png, .svg or .pdf).")
    ] = None,
    num_concepts: Annotated[int, typer.Option(help="Maximum number of concepts.")] = 3,
    site: Site = None,
    images: Images = None,
    overwrite: Overwrite = False,
) -> None:
    """Explain one sample by its most active concepts, with their words and pictures."""
    from xlvlm_jax import Concepts, Features
    from xlvlm_jax.concepts.explain import explain_sample
    from xlvlm_jax.report.sample_figure import plot_sample

    if output is not None:
        refuse_existing(output, overwrite)
    learnt = Concepts.load(concepts)
    if learnt.words is None:
        raise ValueError(f"{concepts} has no words; run `xlvlm ground` first")
    source = features or learnt.source.get("features")
    if source is None:
        raise ValueError(f"{concepts} does not name its features; give --features")
    opened = Features.open(source, images=images)
    explained = explain_sample(opened, learnt, sample, num_concepts=num_concepts, site=site)
    table = Table("concept", "activation", "words", "images", box=None)
    for active in explained.concepts:
        names = ", ".join(Path(image).name for image in active.images[:5])
        words = ", ".join(active.words)
        table.add_row(str(active.concept), f"{active.activation:.3g}", words, names)
    console.print(table)
    said = "" if explained.prediction is None else f": {explained.prediction}"
    console.print(f"{explained.sample}{said}", markup=False)
    if output is not None:
        plot_sample(explained, output)
        console.print(f"-> {output}")
