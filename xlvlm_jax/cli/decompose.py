"""`xlvlm decompose`: features -> concepts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xlvlm_jax.cli.console import Overwrite, Seed, console, parse_mesh, refuse_existing, solver_bar
from xlvlm_jax.cli.runtime import DryRun, Hosts, Profile, join_hosts, peak_memory, profiled

if TYPE_CHECKING:
    from xlvlm_jax import Concepts, Features


def decompose(
    features: Annotated[Path, typer.Argument(help="Directory of features.")],
    output: Annotated[Path, typer.Option(help="Directory of concepts to write.")],
    num_concepts: Annotated[int, typer.Option(help="Number of concepts, K.")] = 20,
    method: Annotated[
        str,
        typer.Option(
            help="snmf (semi-NMF, also called nndl), kmeans, pca or simple; or a sparse "
            "autoencoder: topk-sae, batchtopk-sae, matryoshka-sae, archetypal-sae, jumprelu-sae or "
            "relu-sae."
        ),
    ] = "snmf",
    site: Annotated[
        str | None,
        typer.Option(
            help="Site whose states to decompose; optional if there is only one. A pattern "
            "('layers.*') that matches several writes one directory OUTPUT-SITE per site."
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="snmf: weight of the L1 penalty on the codes.")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", help="Sparse autoencoders: active features per state."),
    ] = None,
    l1: Annotated[
        float | None, typer.Option("--l1", help="relu-sae: weight of the L1 penalty on the codes.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sparse autoencoders: states per update.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Sparse autoencoders: highest learning rate.")
    ] = None,
    products: Annotated[
        str | None,
        typer.Option(
            help="Sparse autoencoders: float32, or bfloat16 products with float32 sums, which are "
            "fast on accelerators."
        ),
    ] = None,
    dictionary: Annotated[
        Path | None,
        typer.Option(
            help="Encode the states with this sparse autoencoder (a directory of SAELens or Gemma "
            "Scope, or a file of Qwen-Scope) instead of learning concepts."
        ),
    ] = None,
    tol: Annotated[float | None, typer.Option(help="Tolerance of the stopping criterion.")] = None,
    max_iter: Annotated[int | None, typer.Option(help="Maximum number of iterations.")] = None,
    n_init: Annotated[
        int | None, typer.Option(help="Number of random starts; the best result is kept.")
    ] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Read the matrix in tiles, for a matrix larger than memory."),
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="DATAxMODEL",
            help="Numbers of devices to spread rows over and, for sparse autoencoders, features "
            "over. Default: rows over all devices.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    hosts: Hosts = None,
    dry_run: DryRun = False,
    profile: Profile = None,
    seed: Seed = 0,
) -> None:
    """Learn concepts from features; rows are spread over all devices of all hosts."""
    join_hosts(hosts)
    import ports
    from ports.messages import counted
    from xlvlm_jax import Features
    from xlvlm_jax.concepts.stage import decompose_features
    from xlvlm_jax.features.reader import choose_sites

    options = {
        "alpha": alpha,
        "k": k,
        "l1": l1,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "products": products,
        "tol": tol,
        "max_iter": max_iter,
        "n_init": n_init,
    }
    given: dict[str, Any] = {name: v for name, v in options.items() if v is not None}
    opened = Features.open(features)
    sites = choose_sites(opened, site)
    places = {name: output.with_name(f"{output.name}-{name}") for name in sites}
    if len(sites) == 1:
        places = {sites[0]: output}
    if not dry_run:
        for directory in places.values():
            refuse_existing(directory, overwrite)
    if dictionary is not None:
        _encode(opened, places, dictionary, stream, given)
        return
    if (counts := parse_mesh(mesh)) is not None:
        given["mesh"] = ports.make_mesh(*counts)
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
        if concepts.dictionary is not None:
            _show_autoencoder(concepts, directory)
            continue
        ended = "converged" if concepts.converged else "not converged: raise --max-iter"
        console.print(
            f"{concepts.method}: {counted(num_concepts, 'concept')} from "
            f"{counted(concepts.source['rows'], 'row')}, objective {concepts.objective:.6g} after "
            f"{counted(int(concepts.iterations), 'iteration')} ({ended}), "
            f"{concepts.source['seconds']:.1f} s -> {directory}"
        )


def _encode(
    features: "Features",
    places: dict[str, Path],
    dictionary: Path,
    stream: bool,
    options: dict[str, Any],
) -> None:
    """Writes the features of a sparse autoencoder from files as concepts of each site."""
    from xlvlm_jax import sae
    from xlvlm_jax.concepts.stage import encode_features

    if options:
        raise ValueError(
            f"--dictionary is not learnt, so it has no option {', '.join(options)}; omit them"
        )
    loaded = sae.load(dictionary)
    for name, directory in places.items():
        concepts = encode_features(features, directory, loaded, site=name, stream=stream)
        _show_autoencoder(concepts, directory)


def _show_autoencoder(concepts: "Concepts", directory: Path) -> None:
    """Prints how well a sparse autoencoder describes the rows, and where it is."""
    from ports.messages import counted

    source, K = concepts.source, len(concepts.components)
    explained = source["explained_variance"]
    shown = "unknown" if explained is None else f"{explained:.4f}"
    trained = f" after {counted(int(concepts.iterations), 'update')}" * bool(concepts.iterations)
    console.print(
        f"{concepts.method}: {counted(K, 'feature')} from {counted(source['rows'], 'row')}, mean "
        f"squared error {concepts.objective:.6g}{trained}, explained variance {shown}, L0 "
        f"{source['l0']:.4g}, dead {source['dead_share']:.1%}, {source['seconds']:.1f} s -> "
        f"{directory}"
    )


def _show_needs(
    stored: Any,
    num_concepts: int,
    method: str,
    output: Path,
    stream: bool,
    options: dict[str, Any],
) -> None:
    """Prints what --dry-run says about one site's matrix."""
    import jax

    from xlvlm_jax.concepts.decomposition import memory_needed, streamed_memory_needed
    from xlvlm_jax.concepts.stage import rows_mesh

    N, D = stored.shape
    matrix, activations = N * D * stored.dtype.itemsize, 4 * N * num_concepts
    if stream:
        options = {name: value for name, value in options.items() if name != "mesh"}
        needed = streamed_memory_needed(stored.shape, num_concepts, method, **options)
        # What the solver needs includes the columns of rows that are kept on the host.
        on_host, how = needed, "streamed: a few tiles and some columns of every row"
    else:
        mesh = options.pop("mesh", None) or rows_mesh()
        needed = memory_needed(
            stored.shape, num_concepts, method, dtype=stored.dtype, mesh=mesh, **options
        )
        # On CPU, device memory is process memory, and rows stay where they were read.
        on_cpu = jax.default_backend() == "cpu"
        of_rows = needed * jax.local_device_count() if on_cpu else matrix
        on_host = of_rows + 3 * activations  # copies made while saving
        how = "as compiled"
    process = peak_memory() + on_host
    console.print(
        f"\\[{N}, {D}] of {stored.dtype}: {matrix / 1e9:,.3f} GB; "
        f"memory per device {needed / 1e9:,.3f} GB ({how}); process memory about "
        f"{process / 1e9:,.1f} GB; writes {activations / 1e6:,.1f} MB of activations and "
        f"{4 * D * num_concepts / 1e6:,.1f} MB of components to {output}"
    )
