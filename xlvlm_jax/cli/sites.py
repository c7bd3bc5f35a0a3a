"""`xlvlm sites`: lists the sites of a checkpoint."""

from typing import Annotated

import typer

from xlvlm_jax.cli.console import Model, load_model


def sites(
    model: Model,
    pattern: Annotated[
        str, typer.Option(help="Only names that contain this text or match it: 'layers.*'.")
    ] = "",
) -> None:
    """List a checkpoint's sites (modules whose states can be captured); reads no weights."""
    from ports.intervene.sites import match_sites

    vlm = load_model(model, abstract=True)
    for site in vlm.sites:
        if pattern in site or match_sites(pattern, [site], vlm.hub_names):
            print(site)
