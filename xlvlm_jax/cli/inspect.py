"""`xlvlm inspect`: shows a checkpoint's parts and sites, and the memory a run needs."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from xlvlm_jax.cli.console import (
    Dtype,
    Mesh,
    Model,
    console,
    load_model,
    parse_mesh,
    require_counts,
)

if TYPE_CHECKING:
    from ports.inspection import Inspection


def show(inspection: "Inspection", console: Console) -> None:
    """Prints an inspection as tables."""
    needs = inspection.needs
    total = sum(inspection.parts.values())
    console.print(f"{inspection.model_type}, {total:,} parameters, {inspection.dtype}\n")
    table = Table("part", "parameters", "share", box=None)
    table.columns[1].justify = table.columns[2].justify = "right"
    for part, count in inspection.parts.items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    console.print(table)
    table = Table("sites", "count", "width", box=None)
    table.columns[0].overflow = "fold"
    table.columns[1].justify = table.columns[2].justify = "right"
    for pattern, (count, width) in inspection.sites.items():
        table.add_row(pattern, str(count), str(width))
    console.print()
    console.print(table)
    console.print()
    if inspection.prompt is None:
        console.print(f"prompt: unknown, {inspection.no_prompt}")
    else:
        console.print(f"prompt: {inspection.prompt!r}")
    what = "the port's example image"
    if needs.image_size is not None:
        what = "an image of {} x {} pixels".format(*needs.image_size)
    console.print(
        f"{what}: {needs.prompt_tokens} prompt tokens, {needs.image_tokens} of them for the "
        f"image; compiled for {needs.bucket}"
    )
    table = Table(f"a batch of {needs.batch_size}, {needs.new_tokens} new tokens", "", box=None)
    table.columns[1].justify = "right"
    for label, size in (
        ("parameters", needs.parameters),
        ("keys and values", needs.cache),
        ("stored states of the chosen sites", needs.states),
        ("largest output of one module", needs.largest),
        ("minimum total on one device", needs.total),
        ("logits of all positions (forward only)", needs.logits),
    ):
        table.add_row(label, f"{size / 1e9:,.3f} GB")
    console.print(table)
    if inspection.placement is not None:
        placement = inspection.placement
        data, model = placement.mesh
        console.print(
            f"mesh {data} x {model}: parameters {placement.device_bytes / 1e9:,.3f} GB per device, "
            f"{placement.share * model:.3f} x (model / {model}); minimum total "
            f"{placement.total / 1e9:,.3f} GB per device",
            highlight=False,
        )
        for note in placement.notes:
            console.print(note, highlight=False)
    memory = inspection.device_bytes
    each = "" if inspection.shared_memory else " each"
    have = "unknown memory" if memory is None else f"{memory / 1e9:,.1f} GB{each}"
    verdict = {True: "fits", False: "does not fit", None: "can't tell whether it fits"}[
        inspection.fits
    ]
    console.print(f"{inspection.devices} with {have}: {verdict}", highlight=False)


def inspect(
    model: Model,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = 16,
    image_size: Annotated[
        str, typer.Option(help="Size of the images in pixels, as WIDTHxHEIGHT.")
    ] = "640x480",
    max_new_tokens: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 20,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Site whose states to store, or a pattern ('layers.*'); may be repeated."
        ),
    ] = None,
    dtype: Dtype = "float32",
    mesh: Mesh = None,
) -> None:
    """Show a checkpoint's parts, sites and prompt, and the memory a run needs; reads no weights."""
    from ports import inspection

    try:
        width, height = (int(number) for number in image_size.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 1:
        raise ValueError(f"--image-size is {image_size!r}; expected WIDTHxHEIGHT, such as 640x480")
    require_counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
    described = inspection.inspect(
        load_model(model, dtype, abstract=True),
        batch_size=batch_size,
        image_size=(width, height),
        new_tokens=max_new_tokens,
        sites=site or (),
        mesh=parse_mesh(mesh),
    )
    show(described, console)
