"""`xlvlm decompose`: features -> concepts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from xlvlm_jax.cli.console import Overwrite, Seed, console, refuse_existing, solver_bar
from xlvlm_jax.cli.runtime import DryRun, Hosts, Profile, join_hosts, peak_memory, profiled


def decompose(
    features: Annotated[Path, typer.Argument(help="A directory of features.")],
    output: Annotated[Path, typer.Option(help="The directory of concepts to write.")],
    num_concepts: Annotated[int, typer.Option(help="K.")] = 20,
    method: Annotated[str, typer.Option(help="snmf (nndl), kmeans, pca or simple.")] = "snmf",
    site: Annotated[
        str | None,
        typer.Option(
            help="Whose states; may be left out if there is one site. A pattern ('layers.*') that "
            "fits several gives each of them a directory OUTPUT-SITE."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="snmf: weight of the codes' sum.")] = None,
    tol: Annotated[float | None, typer.Option(help="When to stop; see the method.")] = None,
    max_iter: Annotated[int | None, typer.Option(help="At most so many iterations.")] = None,
    n_init: Annotated[int | None, typer.Option(help="Starts, of which the best is kept.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the matrix tile by tile: it may exceed memory.")
    ] = False,
    overwrite: Overwrite = False,
    hosts: Hosts = None,
    dry_run: DryRun = False,
    profile: Profile = None,
    seed: Seed = 0,
) -> None:
    """features/ -> concepts/. Rows are spread over all devices, of all hosts."""
    join_hosts(hosts)
    from xlvlm_jax import Features
    from xlvlm_jax.concepts.stage import decompose_features
    from xlvlm_jax.features.reader import choose_sites

    given = {"alpha": alpha, "tol": tol, "max_iter": max_iter, "n_init": n_init}
    given = {name: value for name, value in given.items() if value is not None}
    opened = Features.open(features)
    sites = choose_sites(opened, site)
    places = {name: output.with_name(f"{output.name}-{name}") for name in sites}
    if len(sites) == 1:
        places = {sites[0]: output}
    if not dry_run:
        for directory in places.values():
            refuse_existing(directory, overwrite)
    for name, directory in places.items():
        if dry_run:
            _show_needs(opened.stored(name), num_concepts, method, directory, stream, given)
            continue
        with profiled(profile), solver_bar(method) as told:
            concepts = decompose_features(
                opened,
                directory,
                num_concepts,
                method,
                site=name,
                seed=seed,
                stream=stream,
                progress=told,
                **given,
            )
        ended = "converged" if concepts.converged else "not converged: raise --max-iter"
        console.print(
            f"{concepts.method}: {num_concepts} concepts of {concepts.source['rows']} rows, "
            f"objective {concepts.objective:.6g} after {concepts.iterations} iterations ({ended}), "
            f"{concepts.source['seconds']:.1f} s -> {directory}"
        )


def _show_needs(
    stored: Any,
    num_concepts: int,
    method: str,
    output: Path,
    stream: bool,
    options: dict[str, Any],
) -> None:
    """What --dry-run says of one site's matrix."""
    import jax

    from xlvlm_jax.concepts.decomposition import memory_needed, streamed_memory_needed
    from xlvlm_jax.concepts.stage import rows_mesh

    N, D = stored.shape
    matrix, activations = N * D * stored.dtype.itemsize, 4 * N * num_concepts
    if stream:
        needed = streamed_memory_needed(stored.shape, num_concepts, method, **options)
        # The columns of rows on the host are in what the solver needs; the rest is the device's.
        on_host, how = needed, "streamed, a few tiles and columns of every row"
    else:
        mesh = rows_mesh()
        needed = memory_needed(
            stored.shape, num_concepts, method, dtype=stored.dtype, mesh=mesh, **options
        )
        # A CPU's memory is the process's, and takes rows where they were read.
        on_cpu = jax.default_backend() == "cpu"
        of_rows = needed * jax.local_device_count() if on_cpu else matrix
        on_host = of_rows + 3 * activations  # as they are saved
        how = "as compiled"
    process = peak_memory() + on_host
    console.print(
        f"\\[{N}, {D}] of {stored.dtype}: {matrix / 1e9:,.3f} GB; "
        f"memory of a device {needed / 1e9:,.3f} GB, {how}; of the process about "
        f"{process / 1e9:,.1f} GB; activations of {activations / 1e6:,.1f} MB and components of "
        f"{4 * D * num_concepts / 1e6:,.1f} MB in {output}"
    )
