"""`xlvlm decompose`: features -> concepts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xlvlm_jax.cli.console import (
    Overwrite,
    Seed,
    console,
    parse_mesh,
    refuse_existing,
    refuse_given,
    solver_bar,
)
from xlvlm_jax.cli.runtime import DryRun, Hosts, Profile, join_hosts, peak_memory, profiled

if TYPE_CHECKING:
    from xlvlm_jax import Concepts, Features


# Options of methods; what is not given has the method's own default.
OPTIONS = (
    *("alpha", "k", "l1", "batch_size", "learning_rate", "products"),
    *("tol", "max_iter", "n_init", "skip"),
)


def decompose(
    context: typer.Context,
    features: Annotated[Path, typer.Argument(help="Directory of features.")],
    output: Annotated[Path, typer.Option(help="Directory of concepts to write.")],
    num_concepts: Annotated[int, typer.Option(help="Number of concepts, K.")] = 20,
    method: Annotated[
        str,
        typer.Option(
            help="snmf (semi-NMF, also called nndl), kmeans, pca or simple; or a sparse "
            "autoencoder: topk-sae, batchtopk-sae, matryoshka-sae, archetypal-sae, jumprelu-sae or "
            "relu-sae; or of two sites or models: transcoder, crosscoder, or either with topk- or "
            "batchtopk- before it."
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
            help="Encode the states with this sparse autoencoder (a directory of SAELens, Gemma "
            "Scope or dictionary_learning, or a file of Qwen-Scope or overcomplete) instead of "
            "learning concepts."
        ),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            help="Transcoders and crosscoders: features of the other model. Default: the same "
            "features."
        ),
    ] = None,
    target_site: Annotated[
        str | None,
        typer.Option(
            help="Transcoders: site to predict; crosscoders: the second site. Default: --site."
        ),
    ] = None,
    skip: Annotated[
        bool, typer.Option("--skip", help="Transcoders: add a linear map of the states.")
    ] = False,
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
    from xlvlm_jax import Features
    from xlvlm_jax.concepts.methods import method_named
    from xlvlm_jax.concepts.stage import decompose_features, paired_with, target_directory
    from xlvlm_jax.features.reader import choose_sites

    options = {name: context.params[name] for name in OPTIONS}
    # A zero is given, too.
    given = {name: v for name, v in options.items() if v is not None and v is not False}
    opened = Features.open(features)
    other: dict[str, Any] = {
        "target": None if target is None else Features.open(target),
        "target_site": target_site,
    }
    sites = choose_sites(opened, site)
    places = {name: output.with_name(f"{output.name}-{name}") for name in sites}
    if len(sites) == 1:
        places = {sites[0]: output}
    if not dry_run:
        for directory in places.values():
            refuse_existing(directory, overwrite, directory=True)
            if method.endswith("crosscoder") and dictionary is None:
                refuse_existing(target_directory(directory), overwrite, directory=True)
    if dictionary is not None:
        learning = ("method", "num_concepts", "seed", "mesh", "profile")
        refuse_given(context, learning, "with --dictionary, which is not learnt")
        _encode(opened, places, dictionary, stream, given, other, dry_run)
        return
    if (counts := parse_mesh(mesh)) is not None:
        given["mesh"] = ports.make_mesh(*counts)
    for name, directory in places.items():
        if dry_run:
            paired = paired_with(method_named(method), opened, name, *other.values())
            _show_needs(
                opened.stored(name),
                0 if paired is None else paired.stored.shape[1],
                num_concepts,
                method,
                directory,
                stream,
                given,
            )
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
                **other,
                **given,
            )
        _show(concepts, directory)


def _show(concepts: "Concepts", directory: Path) -> None:
    """Prints how a decomposition ended, and where it is."""
    from ports.messages import counted

    if concepts.dictionary is not None:
        _show_autoencoder(concepts, directory)
        return
    ended = "converged" if concepts.converged else "not converged: raise --max-iter"
    console.print(
        f"{concepts.method}: {counted(len(concepts.components), 'concept')} from "
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
    other: dict[str, Any],
    dry_run: bool,
) -> None:
    """Writes the features of a sparse autoencoder from files as concepts of each site."""
    from xlvlm_jax import sae
    from xlvlm_jax.concepts.stage import encode_features, rows_to_encode

    if options:
        raise ValueError(
            f"--dictionary is not learnt, so it has no option {', '.join(options)}; omit them"
        )
    loaded = sae.load(dictionary)
    for name, directory in places.items():
        if dry_run:
            rows, _ = rows_to_encode(features, loaded, name, **other)
            _show_encoding(rows.shape, features.stored(name).dtype, loaded, directory, stream)
            continue
        concepts = encode_features(features, directory, loaded, site=name, stream=stream, **other)
        _show_autoencoder(concepts, directory)


def _show_encoding(
    shape: tuple[int, int], dtype: Any, dictionary: Any, output: Path, stream: bool
) -> None:
    """Prints what --dry-run says about encoding rows [N, D]."""
    from xlvlm_jax import Concepts

    N, D = shape
    components = Concepts.from_dictionary(dictionary).components
    K = len(components)
    matrix, activations = N * D * dtype.itemsize, 4 * N * K
    process = peak_memory() + (0 if stream else matrix + activations)
    console.print(
        f"[{N}, {D}] of {dtype}: {matrix / 1e9:,.3f} GB; {K} features; process memory at "
        f"least {process / 1e9:,.1f} GB; writes {activations / 1e6:,.1f} MB of activations and "
        f"{4 * components.size / 1e6:,.1f} MB of components to {output}"
    )


def _show_autoencoder(concepts: "Concepts", directory: Path) -> None:
    """Prints how well a sparse autoencoder describes the rows, and where it is."""
    from ports.messages import counted

    source, K = concepts.source, len(concepts.components)
    explained = source["explained_variance"]
    shown = "unknown" if explained is None else f"{explained:.4f}"
    error = "" if concepts.objective is None else f"mean squared error {concepts.objective:.6g}"
    trained = f" after {counted(int(concepts.iterations), 'update')}" * bool(concepts.iterations)
    console.print(
        f"{concepts.method}: {counted(K, 'feature')} from {counted(source['rows'], 'row')}, "
        f"{error}{trained}, explained variance {shown}, L0 {source['l0']:.4g}, dead "
        f"{source['dead_share']:.1%}, {source['seconds']:.1f} s -> {directory}"
    )
    if concepts.dictionary is not None and concepts.dictionary.settings.is_crosscoder:
        from xlvlm_jax import sae

        dead, names = concepts.dead, sae.whose(concepts.dictionary)
        counts = {name: (names[~dead] == name).sum() for name in ("first", "second", "shared")}
        console.print(", ".join(f"{count} {name}" for name, count in counts.items()))


def _show_needs(
    stored: Any,
    others: int,
    num_concepts: int,
    method: str,
    output: Path,
    stream: bool,
    options: dict[str, Any],
) -> None:
    """Prints what --dry-run says about one site's matrix, and the columns of another beside it."""
    import jax

    from xlvlm_jax.concepts.decomposition import memory_needed, streamed_memory_needed
    from xlvlm_jax.concepts.methods import method_named
    from xlvlm_jax.concepts.stage import rows_mesh

    N, D = stored.shape[0], stored.shape[1] + others
    matrix, activations = N * D * stored.dtype.itemsize, 4 * N * num_concepts
    if stream:
        options = {name: value for name, value in options.items() if name != "mesh"}
        needed = streamed_memory_needed((N, D), num_concepts, method, **options)
        # What the solver needs includes the columns of rows that are kept on the host.
        on_host, how = needed, "streamed: a few tiles and some columns of every row"
    else:
        mesh = options.pop("mesh", None) or rows_mesh()
        if method_named(method).has_encoder:  # reads rows batch by batch
            needed = streamed_memory_needed((N, D), num_concepts, method, mesh=mesh, **options)
        else:
            needed = memory_needed(
                (N, D), num_concepts, method, dtype=stored.dtype, mesh=mesh, **options
            )
        # On CPU, device memory is process memory, and rows stay where they were read.
        on_cpu = jax.default_backend() == "cpu"
        of_rows = needed * jax.local_device_count() if on_cpu else matrix
        on_host = of_rows + 3 * activations  # copies made while saving
        how = "as compiled"
    process = peak_memory() + on_host
    console.print(
        f"[{N}, {D}] of {stored.dtype}: {matrix / 1e9:,.3f} GB; "
        f"memory per device {needed / 1e9:,.3f} GB ({how}); process memory about "
        f"{process / 1e9:,.1f} GB; writes {activations / 1e6:,.1f} MB of activations and "
        f"{4 * D * num_concepts / 1e6:,.1f} MB of components to {output}"
    )
