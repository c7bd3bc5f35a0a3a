"""`xlvlm import-pth` and `export-pth`: exchange features, concepts and vectors with XL-VLMs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import Overwrite, console, parse_where, refuse_existing, refuse_given

Sites = Annotated[
    list[str] | None,
    typer.Option(
        help="Site or pattern; may be repeated. Default: all. For concepts and vectors, the one "
        "that they belong to."
    ),
]


def import_pth(
    context: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="Hidden states, concepts, vectors or networks saved by XL-VLMs.")
    ],
    output: Annotated[
        Path,
        typer.Option(help="Directory of features or concepts, or file (.safetensors), to write."),
    ],
    site: Sites = None,
    rows: Annotated[
        str,
        typer.Option(
            help="Rows per sample: each of its positions (each), their mean (mean), or the one "
            "with this number, counted from 0, or from the end if negative."
        ),
    ] = "each",
    key: Annotated[
        str, typer.Option(help="Which vector of a file, such as steering_vector_concept_0_to_1.")
    ] = "steering_vector",
    where: Annotated[
        str, typer.Option(help="Token positions that a vector is meant for, as in `steer fit`.")
    ] = "all",
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the stored states. Default: that of the file.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Directory that holds the images now, if they were moved.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model, recorded with what is written.")
    ] = None,
    sample_ids: Annotated[
        Path | None,
        typer.Option(
            help="Vectors of samples (P2S): file of the samples' IDs, in the order of the vectors."
        ),
    ] = None,
    context_site: Annotated[
        str | None,
        typer.Option(
            help="L2S networks (.pt): site whose state of the last prompt token the network takes. "
            "Default: --site."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Import what XL-VLMs saved; executes nothing in the file."""
    from ports.messages import counted
    from xlvlm_jax.concepts.pth import import_concepts
    from xlvlm_jax.data.select import read_ids
    from xlvlm_jax.features.pth import import_features
    from xlvlm_jax.features.pth.reader import read_pth
    from xlvlm_jax.steering.pth import (
        import_l2s,
        import_sample_vectors,
        import_vector,
    )

    data = read_pth(file, opaque=True)
    meant: dict[str, Any] = {"where": parse_where(where), "model": model}
    kind = _kind_of(data, sample_ids)
    others = {name for names in _TAKEN.values() for name in names} - {*_TAKEN[kind]}
    refuse_given(context, sorted(others), f"on {kind}")
    if kind == "a network":
        refuse_existing(output, overwrite, directory=False)
        chosen = _only(site, "--site names the module that the network steers")
        network = import_l2s(file, chosen, context_site=context_site, **meant)
        network.save(output)
        console.print(f"{network!r} -> {output}")
    elif sample_ids is not None:
        refuse_existing(output, overwrite, directory=False)
        chosen = _only(site, "--site names the module that the vectors steer")
        vectors = import_sample_vectors(file, chosen, read_ids(sample_ids), key=key, **meant)
        vectors.save(output)
        console.print(f"{vectors!r} -> {output}")
    elif kind == "a vector":
        refuse_existing(output, overwrite, directory=False)
        chosen = _only(site, "--site names the module that the vector steers")
        vector = import_vector(file, chosen, key=key, **meant)
        vector.save(output)
        console.print(f"{key}, width {len(vector.vector)}, site {chosen} -> {output}")
    elif kind == "concepts":
        refuse_existing(output, overwrite, directory=True)
        concepts = import_concepts(file, site=site[0] if site else None, model=model)
        concepts.save(output)
        console.print(f"{concepts!r} -> {output}")
    else:
        features = import_features(
            file,
            output,
            sites=site or (),
            rows=rows,
            dtype=dtype,
            images=images,
            model=model,
            overwrite=overwrite,
        )
        console.print(
            f"{counted(len(features.samples), 'sample')}, {counted(features.num_rows, 'row')} of"
            f" {', '.join(features.sites)} -> {output}"
        )


def export_pth(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(help="Directory of features, concepts or fine vectors, or a vector's file."),
    ],
    output: Annotated[Path, typer.Option(help="File to write (.pth).")],
    site: Sites = None,
    overwrite: Overwrite = False,
) -> None:
    """Export features, concepts or vectors to a file that XL-VLMs and torch.load can read."""
    from ports.messages import counted
    from xlvlm_jax import Concepts, Features, SteeringVector
    from xlvlm_jax.concepts.pth import export_concepts
    from xlvlm_jax.features.pth import export_features
    from xlvlm_jax.steering.pth import export_vectors

    refuse_existing(output, overwrite, directory=False)
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    if (source / "concepts.json").exists():
        refuse_given(context, ("site",), "on concepts, which are of one site")
        concepts = Concepts.load(source)
        export_concepts(concepts, output)
        console.print(f"{concepts!r} -> {output}")
    elif files and not (source / "manifest.json").exists():
        refuse_given(context, ("site",), "on vectors, which are of one site")
        export_vectors([SteeringVector.load(file) for file in files], output)
        console.print(f"{counted(len(files), 'vector')} -> {output}")
    else:
        opened = Features.open(source)
        export_features(opened, output, sites=site or ())
        samples, rows = counted(len(opened.samples), "sample"), counted(opened.num_rows, "row")
        console.print(f"{samples}, {rows} -> {output}")


# What is in a file -> the options of `import-pth` that it takes besides --site and --model.
_TAKEN = {
    "a network": ("where", "context_site"),
    "vectors of samples": ("key", "where", "sample_ids"),
    "a vector": ("key", "where"),
    "concepts": (),
    "features": ("rows", "dtype", "images"),
}


def _kind_of(data: Any, sample_ids: Path | None) -> str:
    """Returns what a file of XL-VLMs holds, a key of _TAKEN."""
    from xlvlm_jax.steering.pth import network_in

    held = list(data) if isinstance(data, dict) else []
    if network_in(data) is not None:
        return "a network"
    if sample_ids is not None:
        return "vectors of samples"
    if any(str(name).startswith("steering_vector") for name in held):
        return "a vector"
    return "concepts" if "concepts" in held and "hidden_states" not in held else "features"


def _only(site: Any, what: str) -> str:
    if not site or len(site) != 1:
        raise ValueError(f"{what}; give it once")
    return site[0]
