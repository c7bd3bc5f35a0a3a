"""`xlvlm explain`: one sample by the concepts that are active in it, and that its answer needs."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from xlvlm_jax.cli.console import (
    Adapter,
    DtypeOfFeatures,
    Images,
    Overwrite,
    Site,
    bars,
    console,
    dtype_of,
    load_model,
    progress_bars,
    refuse_existing,
    refuse_given,
    require_counts,
)

if TYPE_CHECKING:
    from xlvlm_jax.concepts.explain import SampleExplanation
    from xlvlm_jax.concepts.record import Concepts
    from xlvlm_jax.data.sample import Sample
    from xlvlm_jax.features.reader import Features


def explain(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, Hub ID or 'embedded', with --concepts; or a directory of "
            "grounded concepts, to explain a sample of their features without running a model.",
        ),
    ],
    sample: Annotated[
        str, typer.Argument(help="An image file, or the ID or image name of a sample.")
    ],
    concepts: Annotated[
        Path | None, typer.Option(help="Directory of concepts of MODEL, grounded.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Features of the sample. Default: those that the concepts come from."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What MODEL is asked. Default: the sample's prompt, or for a caption."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Also write a page (.html) or draw a figure (.png, .svg or .pdf)."),
    ] = None,
    num_concepts: Annotated[
        int, typer.Option(help="Concepts with the highest activations and with the most effect.")
    ] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 20,
    site: Site = None,
    images: Images = None,
    adapter: Adapter = None,
    dtype: DtypeOfFeatures = None,
    overwrite: Overwrite = False,
) -> None:
    """Explain one sample by its concepts: words, pictures and, with a model, maps and effects."""
    from xlvlm_jax import Concepts, Features
    from xlvlm_jax.concepts.explain import explain_picture, explain_sample
    from xlvlm_jax.concepts.removal import require_directions
    from xlvlm_jax.report.explain_page import write_explanation
    from xlvlm_jax.report.sample_figure import plot_sample

    if output is not None:
        if output.suffix not in (".html", ".png", ".svg", ".pdf"):
            raise ValueError(f"{output}: expected a file ending in .html, .png, .svg or .pdf")
        refuse_existing(output, overwrite, directory=False)
    if concepts is None:
        _require_concepts(context, model)
    directory = Path(model) if concepts is None else concepts
    require_counts(num_concepts=num_concepts, max_new_tokens=max_new_tokens)
    learnt = Concepts.load(directory)
    if learnt.words is None:
        raise ValueError(f"{directory} has no words; run `xlvlm ground` first")
    source = features or learnt.source.get("features")
    # An image file needs no features, but they tell whether the concepts are of image tokens.
    is_file = concepts is not None and Path(sample).is_file()
    opened = None
    if source is not None and (not is_file or Path(source).is_dir()):
        opened = Features.open(source, images=images)
    if opened is None and not is_file:
        raise ValueError(f"{directory} does not name its features; give --features")
    if concepts is None:
        assert opened is not None
        explained = explain_sample(opened, learnt, sample, num_concepts=num_concepts, site=site)
    else:
        require_directions(learnt)
        asked = _asked(sample, prompt, None if is_file else opened)
        selection = {} if opened is None else opened.manifest.get("selection") or {}
        vlm = load_model(model, dtype_of(dtype, opened), adapter=adapter)
        with progress_bars() as progress:
            explained = explain_picture(
                vlm,
                learnt,
                asked,
                num_concepts=num_concepts,
                site=site,
                of_image=selection.get("mode") == "image",
                max_new_tokens=max_new_tokens,
                progress=bars(progress)("removing"),
            )
    _show(explained, len(learnt.components))
    if output is not None:
        if output.suffix == ".html":
            write_explanation(explained, output, _facts(model, learnt, concepts))
        else:
            plot_sample(explained, output)
        console.print(f"-> {output}")


def _asked(sample: str, prompt: str | None, features: "Features | None") -> "Sample":
    """Returns what the model is asked: about an image file, or a sample of features."""
    from xlvlm_jax.concepts.explain import stored_sample
    from xlvlm_jax.data import prompts
    from xlvlm_jax.data.sample import Sample

    if features is None:
        path = Path(sample)
        return Sample(sample, path, path.name, prompts.CAPTION if prompt is None else prompt)
    asked = stored_sample(features, sample)
    return asked if prompt is None else dataclasses.replace(asked, prompt=prompt)


def _require_concepts(context: typer.Context, model: str) -> None:
    """Checks that MODEL is a directory of concepts, and that no option of a model is given."""
    if not Path(model).is_dir():
        raise ValueError(
            f"{model} is not a directory of concepts; name one, or give the concepts of the model "
            "with --concepts"
        )
    running = ("prompt", "adapter", "dtype", "max_new_tokens")
    refuse_given(context, running, "without --concepts, as no model is run")


def _facts(model: str, learnt: "Concepts", concepts: Path | None) -> list[tuple[str, str]]:
    ran = model if concepts is not None else learnt.source.get("model")
    facts = {"Model": ran, "Site": learnt.source.get("site"), "Method": learnt.method}
    return [(name, str(value)) for name, value in facts.items() if value]


def _show(explained: "SampleExplanation", num_concepts: int) -> None:
    ran = explained.log_probability is not None
    columns = ("effect", "without it") if ran else ("images",)
    table = Table("concept", "activation", "words", *columns, box=None)
    for active in explained.concepts:
        words = ", ".join(active.words)
        cells = [", ".join(Path(image).name for image in active.images[:5])]
        if active.effect is not None:
            cells = [f"{active.effect:.3g}", active.answer_without or ""]
        table.add_row(str(active.concept), f"{active.activation:.3g}", words, *cells)
    console.print(table)
    if explained.num_removed is not None and explained.num_removed < num_concepts:
        most = f"the {explained.num_removed} most active of {num_concepts} concepts"
        console.print(f"effects are of {most}, which alone were removed")
    said = "" if explained.prediction is None else f": {explained.prediction}"
    console.print(f"{explained.sample}{said}")
