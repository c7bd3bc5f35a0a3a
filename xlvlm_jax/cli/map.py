"""`xlvlm map`: where in pictures a concept, a word, a vector or an answer is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xlvlm_jax.cli.console import (
    Adapter,
    DtypeOfFeatures,
    Model,
    Overwrite,
    ThroughNorm,
    bars,
    console,
    dtype_of,
    load_model,
    named_features,
    progress_bars,
    refuse_existing,
    refuse_given,
)

if TYPE_CHECKING:
    from xlvlm_jax import Concepts, Features


def map_(
    context: typer.Context,
    model: Model,
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Image files, or folders of them. None: the pictures that activate each concept "
            "most; their maps are stored beside the concepts, and `xlvlm report` shows them.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write: a page (.html) or a figure (.png, .svg or .pdf)."),
    ] = None,
    concepts: Annotated[
        Path | None, typer.Option(help="Directory of concepts, mapped at their own site.")
    ] = None,
    concept: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of a concept to map; may be repeated. Default: the five that are most "
            "active in the pictures."
        ),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(
            help="Map the log-probability of this word, read from the states by the logit lens; "
            "may be repeated."
        ),
    ] = None,
    vector: Annotated[
        list[Path] | None,
        typer.Option(help="Map the cosine with this steering vector; may be repeated."),
    ] = None,
    answer: Annotated[
        list[str] | None,
        typer.Option(
            help="Map the length of the gradient of this answer's log-probability with respect to "
            "the states; may be repeated."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What the model is asked. Default: for a caption.")
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            help="Site for words and answers. Default: that of the concepts or of the vector."
        ),
    ] = None,
    adapter: Adapter = None,
    dtype: DtypeOfFeatures = None,
    through_norm: ThroughNorm = None,
    overwrite: Overwrite = False,
) -> None:
    """Map concepts, words, vectors and answers on pictures."""
    import numpy as np

    from ports.messages import counted
    from xlvlm_jax import Concepts
    from xlvlm_jax.concepts.picture_maps import map_pictures
    from xlvlm_jax.data import folder, prompts
    from xlvlm_jax.report.heat_maps import MOST_COLUMNS, plot_maps
    from xlvlm_jax.report.map_page import write_map_page
    from xlvlm_jax.steering import SteeringVector, files
    from xlvlm_jax.storage.names import distinct_ends

    if not pictures:
        if concepts is None or word or vector or answer or concept or output is not None:
            raise ValueError(
                "no pictures given; name image files or folders, or give --concepts alone to map "
                "each concept on its own pictures"
            )
        refuse_given(context, ("prompt", "site", "through_norm"), "without pictures")
        _store(model, concepts, dtype, adapter, overwrite)
        return
    if output is None:
        raise ValueError("no file to write; give --output, such as maps.html or maps.png")
    if output.suffix not in (".html", ".png", ".svg", ".pdf"):
        raise ValueError(f"{output}: expected a file ending in .html, .png, .svg or .pdf")
    refuse_existing(output, overwrite, directory=False)
    if concept and concepts is None:
        raise ValueError(f"--concept {concept[0]} needs the directory of concepts; give --concepts")
    samples = folder.samples_of(pictures, prompts.CAPTION if prompt is None else prompt)
    if output.suffix != ".html" and len(samples) > MOST_COLUMNS:
        raise ValueError(
            f"{len(samples)} pictures are too many for a figure; write a page (.html), or give at "
            f"most {MOST_COLUMNS}"
        )
    learnt = None if concepts is None else Concepts.load(concepts)
    names = distinct_ends([path.with_suffix("") for path in vector or ()])
    loaded = {n: SteeringVector.load(path) for n, path in zip(names, vector or (), strict=True)}
    vlm = load_model(model, dtype or dtype_of(None, _features_of(learnt)), adapter=adapter)
    for each in loaded.values():
        files.require_fitted_model(each.source, vlm)
    found = map_pictures(
        vlm,
        samples,
        site=site,
        concepts=learnt,
        numbers=concept or (),
        words=word or (),
        vectors={name: (each.site, np.asarray(each.vector)) for name, each in loaded.items()},
        answers=answer or (),
        through_norm=through_norm,
    )
    if output.suffix == ".html":
        asked = samples[0].prompt.strip()
        own = None if learnt is None else learnt.source.get("site")
        facts = {"Model": model, "Concepts": concepts and concepts.name, "Site": own or site}
        told = [(name, str(value)) for name, value in facts.items() if value]
        write_map_page(found, output, [*told, ("Prompt", asked)])
    else:
        plot_maps(found, output)
    shown = counted(len(found.samples), "picture")
    console.print(f"{counted(len(found.rows), 'map')} of {shown} -> {output}", highlight=False)


def _features_of(learnt: "Concepts | None") -> "Features | None":
    """Returns the features of concepts, if they can be read: pictures do not need them."""
    from xlvlm_jax import Features

    source = None if learnt is None else learnt.source.get("features")
    try:
        return None if source is None else Features.open(source)
    except (OSError, ValueError):
        return None


def _store(
    model: str, directory: Path, dtype: str | None, adapter: str | None, overwrite: bool
) -> None:
    """Maps each concept over the pictures that activate it most, and stores the maps."""
    from ports.messages import counted
    from xlvlm_jax import Concepts, Features
    from xlvlm_jax.concepts.stored_maps import FILE, map_top_pictures, save_maps

    refuse_existing(directory / FILE, overwrite, directory=False)
    learnt = Concepts.load(directory)
    source = named_features(None, learnt.source, directory, "pictures to map")
    opened = Features.open(source)
    if learnt.dead.all():
        raise ValueError(f"no row activates a concept of {directory}, so there is nothing to map")
    vlm = load_model(model, dtype_of(dtype, opened), adapter=adapter)
    with progress_bars() as progress:
        advance = bars(progress)("mapping")
        found = map_top_pictures(vlm, learnt, opened, progress=advance)
    save_maps(directory, learnt, found)
    shown = counted(len({sample for _, sample in found}), "picture")
    console.print(f"{counted(len(found), 'map')} of {shown} -> {directory / FILE}", highlight=False)
