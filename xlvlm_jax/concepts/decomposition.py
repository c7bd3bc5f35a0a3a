"""From a matrix of states to concepts, and from new states to their activations.

Z[N, D] ~ activations[N, K] components[K, D]: a row of Z is a sample, a row of components a concept.
This file checks the input and calls the method's solver.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from types import ModuleType
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from ports.parallel.axis_types import automatic
from ports.programs import keep_programs
from xlvlm_jax.concepts import autoencoders
from xlvlm_jax.concepts.encoding import encode
from xlvlm_jax.concepts.methods import METHODS, RELATIVE, Method, ScaledRows, method_named
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.solvers import blas_threads, kmeans, phases
from xlvlm_jax.solvers.buckets import bucket_of_rows
from xlvlm_jax.solvers.collectives import keep_pace
from xlvlm_jax.solvers.linalg import real_dtype
from xlvlm_jax.solvers.loop import Result
from xlvlm_jax.solvers.phases import Standing, Tell
from xlvlm_jax.solvers.restarts import stability
from xlvlm_jax.solvers.streamed import Source
from xlvlm_jax.solvers.streamed.tiles import TILE_BYTES, Scaled, TooLargeError, scale_of
from xlvlm_jax.solvers.validation import (
    StoredMatrix,
    as_array,
    as_matrix,
    centred,
    check_finite,
    check_num_concepts,
    check_weights,
    check_whole,
    deviations,
    is_stored,
    narrow,
    on_device,
    on_host,
    padded,
    padded_concepts,
    read_block,
    read_rows,
    root_mean_square,
    shard_rows,
    short,
    unit_of,
)

FEW_CODED = 0.1  # of the rows: if fewer have a nonzero snmf code, alpha is too large for them
PROJECTED_BYTES = 2**26  # of a source's rows that are projected together
# Share of the standard deviation that rounding to float32 may move a centroid, or a row, without a
# warning.
HELD = 1e-3


@overload
def decompose(
    Z: Any, num_concepts: int, method: str = "snmf", *, key: PRNGKeyArray, **options: Any
) -> Concepts: ...
@overload
def decompose(
    Z: Any, num_concepts: Sequence[int], method: str = "snmf", *, key: PRNGKeyArray, **options: Any
) -> list[Concepts]: ...
@blas_threads.one_thread()
def decompose(
    Z: Any,
    num_concepts: int | np.integer | Sequence[int] | np.ndarray,
    method: str = "snmf",
    *,
    key: PRNGKeyArray,
    sample_weight: Shaped[Array | np.ndarray, " N"] | None = None,
    mesh: Mesh | None = None,
    progress: Tell | None = None,
    verbose: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    target: Any = None,
    activations: bool = True,
    **options: Any,
) -> Concepts | list[Concepts]:
    """Factors Z[N, D] into K = num_concepts concepts.

    Methods, and their options with defaults:
        "snmf" (or "nndl"): min 1/2 |Z - U V|_F^2 + alpha |U|_1, U >= 0, |V_k|_2 <= 1. alpha=1.0,
            relative_alpha=False (True: alpha in units of the rows' root mean square norm),
            nonnegative=True (False: codes of any sign), tol=1e-6, max_iter=1000, n_init=None starts
            (8 up to 64 concepts, 2 above), init=None (or atoms [K, D] to start from).
            Source: Ding, Li and Jordan 2010; Mairal et al. 2009; see solvers/semi_nmf.py.
        "kmeans": centroids; activations 1 / (1 + distance). tol=1e-4, max_iter=300, n_init=1
            starts, init=None for k-means++ (or centroids [K, D] to start from). Source: Lloyd
            1982; Arthur and Vassilvitskii 2007.
        "pca": orthonormal components of the centred rows; activations are scores of any sign.
            tol=1e-5, max_iter=100. Source: Golub and Underwood 1977; see solvers/pca.py.
        "simple": the K rows of largest norm; activations as for kmeans. No options.
        "topk-sae", "batchtopk-sae", "matryoshka-sae", "archetypal-sae", "jumprelu-sae" (k=32 active
            features per row) and "relu-sae" (l1=0.1): sparse autoencoders, trained with
            max_iter=4000 batches of batch_size=4096 rows. K may be thousands. All options, formulas
            and sources: solvers/sae. `Concepts.dictionary` is what encodes. Not under jit or vmap.
        "transcoder", "topk-transcoder", "batchtopk-transcoder": the same from the states of one
            site, Z, to those of another, `target`, whose directions the components are.
            skip=False: whether to add a linear map.
        "crosscoder", "topk-crosscoder", "batchtopk-crosscoder": the same of two sites, or of two
            models, at once. Components are of Z; `sae.decoders` has both, and `sae.whose` tells
            what they share. Encode rows of both side by side.

    Works under jit and vmap (Z and key as arguments), but for relative_alpha, progress and verbose.
    Everything that needs values is then skipped: rows are neither checked nor scaled, stability is
    not computed, and `history` keeps its full length. Not differentiable: `project` is.

    A zero matrix, equal rows, or fewer directions than concepts are not errors: an unneeded atom
    keeps unit norm and zero codes, surplus centroids coincide with rows.

    Args:
        Z: real numbers[N, D] from JAX, numpy, or anything numpy.asarray accepts: torch, pandas,
            xarray, dask, Zarr, TensorStore. bfloat16 and float16 are kept; everything else becomes
            float32, and all computation is in float32. For kmeans and pca the mean of float64 and
            integer rows is subtracted in float64 first. With JAX's 64-bit mode float64 stays
            float64. On a CPU, float32 that is aligned to 64 bytes, like a memory-mapped .npy file,
            is not copied, and other numpy matrices are copied once. Alternatively an object that
            reads rows, such as `Features.stored(site)`: each host then reads the rows of its own
            devices.
        num_concepts: K, from 1 to N (for pca to min(N, D)); or a sequence of them, which are solved
            side by side in one program.
        method: see above.
        key: from jax.random.key; the same key gives the same concepts on the same machine. Another
            number of cores or devices changes rounding, which can lead snmf, whose objective is not
            convex, to another optimum (of nearly the same objective).
        sample_weight: float[N], for kmeans: weight of each row in its centroid's mean and in the
            objective. An integer weight equals that many copies of the row; a row of zero weight
            only gets activations. None: equal weights.
        mesh: shards the rows of Z on its "data" axis; an iteration then communicates K D + K K + K
            numbers (kmeans 2 K D + 2 K; pca up to W D + 7 W W, W the next multiple of 32),
            whatever N is. The start of pca sends up to 1024 D for few concepts and 4 W D for many,
            or the covariance, D D; beside directions of huge variance a last look sends 3 W D. Axes
            of type `Explicit` are taken as `Auto`, and results lie on that mesh.
            If the axis does not divide N, rows that do not count pad it. With several hosts, Z is a
            global array that the axis divides.
        progress: called on every host with a `Standing` (num_concepts, iteration, max_iter,
            objective, error) after every 64 updates, or more often if Z is large. It does not
            change the updates; with several hosts, either all pass one or none does. "simple" has
            no updates.
        verbose: prints every verbose-th iteration to standard error; 0 is silent.
        checkpoint: for sparse autoencoders: a directory that keeps states of the run. If it is
            killed, the same call goes on from the last one and ends with the same bytes. Remove it
            once the result is saved.
        target: for transcoders and crosscoders, like Z: states of the other site or model for the
            same tokens, row for row.
        activations: for kmeans and sparse autoencoders, False to leave them out. With thousands of
            concepts they may take most of the time and memory; `project` computes those of some
            rows.
        **options: options of the method, see above.

    Returns:
        Concepts with float32 JAX arrays; for several K a list of them, in that order. Activations
        of sparse autoencoders stay in numpy, as they may exceed an accelerator's memory. For codes
        on fixed atoms use `project`: `init` is where the search starts, and its atoms are scaled to
        length one.

    Raises:
        ValueError: Z is not a matrix of finite real numbers (the first bad row is named), K does
            not fit, the method or an option is unknown, an option is invalid, weights are negative,
            all zero or not for kmeans, activations are left out of another method, `init` has
            another shape, `target` is missing or not for the method, `checkpoint` is given for
            another method or several K, Z is traced and the method is trained in batches, or
            relative_alpha, progress or verbose is given while Z or key is traced, the mesh
            has no "data" axis, the rows of a source do not match its shape, or the objective
            exceeds float32.
        TypeError: Z is not an array of numbers.

    Examples:
        >>> import jax, numpy as np, xlvlm_jax
        >>> Z = np.float32([[0, 1], [0, 2], [3, 0], [5, 0]])
        >>> concepts = xlvlm_jax.decompose(Z, 2, "kmeans", key=jax.random.key(0))
        >>> sorted(concepts.components.tolist())
        [[0.0, 1.5], [4.0, 0.0]]
    """
    keep_programs()
    mesh = automatic(mesh)
    how = method_named(method)
    how.check_target(target is not None)
    options = how.options(options)
    if is_stored(Z):
        given, (N, D) = Z, Z.shape
    else:
        Z = as_array(Z, "Z", row="sample")
        # Padded in the only copy, if the rows are copied.
        pad = mesh is None and not how.has_encoder
        given = as_matrix(Z, "Z", row="sample", share=True, pad=pad)
        N, D = Z.shape
    if isinstance(num_concepts, np.ndarray) and num_concepts.ndim == 0:
        num_concepts = num_concepts.item()
    several = isinstance(num_concepts, Sequence | np.ndarray)
    numbers = tuple(np.asarray(num_concepts).tolist()) if several else (num_concepts,)
    if not numbers:
        raise ValueError(
            "num_concepts is empty; expected one number of concepts or a sequence of them"
        )
    for number in numbers:
        _check_count(number, N, D, how)
    _check_key(key)
    check_whole("verbose", verbose, 0)
    _check_activations(activations, how)
    _check_values_known(Z, key, options, progress, verbose)
    _check_one_start(options)
    heaviest, weight = 1.0, float(N)
    if sample_weight is not None:
        if not how.takes_weights:
            known = " or ".join(repr(name) for name, each in METHODS.items() if each.takes_weights)
            raise ValueError(
                f"{how.name!r} does not take weights; omit sample_weight or use {known}"
            )
        sample_weight, heaviest = check_weights(sample_weight, N)
        if not isinstance(sample_weight, Tracer):
            weight = float(sample_weight.sum()) * heaviest
    if how.has_encoder:
        tell = _teller(progress, verbose, 1.0) if verbose or progress else None
        if checkpoint is not None and len(numbers) > 1:
            raise ValueError("checkpoint keeps one run; give a single num_concepts")
        found = [
            autoencoders.decompose(
                given,
                int(number),
                how,
                options,
                key=key,
                mesh=mesh,
                tell=tell,
                every=verbose or None,
                checkpoint=checkpoint,
                target=target,
                activations=activations,
            )
            for number in numbers
        ]
        return found if several else found[0]
    _check_no_checkpoint(checkpoint, how)
    wide = origin = None
    if is_stored(given):
        Z = read_rows(given, mesh)
    else:
        if isinstance(given, np.ndarray) and how.is_centred:
            # If deviations are small compared to the mean, float32 cannot distinguish the rows.
            wide, origin = given, given.mean(axis=0)
            origin = np.where(np.isfinite(origin), origin, 0)
            Z = on_device(centred(wide, origin), share=True)
        else:
            Z = narrow(given)
        if mesh is not None:
            Z = shard_rows(Z, mesh)
    if mesh is None:
        Z = padded(Z)
    unit = unit_of(Z, check_finite(Z, "Z"))
    if isinstance(given, np.ndarray) and not how.is_centred:
        _check_rounded(given, how.name)
    del given  # frees what Z is a copy of
    arguments = {name: value for name, value in options.items() if name != RELATIVE}
    if unit != 1:
        Z = Z / jnp.asarray(unit, Z.dtype)
    if options.get(RELATIVE):
        # The rows that pad a mesh are zero and do not count.
        scale = float(root_mean_square(Z)) * unit * (len(Z) / N) ** 0.5
        arguments["alpha"] = options["alpha"] = options["alpha"] * scale
        options[RELATIVE] = False  # the options record the product
    if "alpha" in arguments:
        arguments["alpha"] = arguments["alpha"] / unit
    if how.is_centroids:
        arguments["unit"] = unit
    numbers = tuple(int(number) for number in numbers)
    if (init := arguments.pop("init", None)) is not None and how.init is not None:
        arguments[how.init] = _first(init, numbers, D, origin, unit, real_dtype(Z))
        options["init"] = "given"
    arguments |= {"num_samples": N, "num_concepts": numbers}
    if sample_weight is not None:
        xp: Any = np if isinstance(sample_weight, np.ndarray) else jnp
        weights = xp.pad(xp.asarray(sample_weight, real_dtype(Z)), (0, len(Z) - N))
        arguments["sample_weight"] = weights
    if not activations:
        arguments["activations"] = False
    squared_unit = unit**2 * heaviest
    tell = _teller(progress, verbose, squared_unit) if verbose or progress else None
    assert how.solver is not None, "only sparse autoencoders have none"
    result = phases.solve(how.solver, Z, key, tell, verbose or None, mesh=mesh, **arguments)
    found, result = [], on_host(result)
    for i, number in enumerate(numbers):
        one = _without_padding(jax.tree.map(itemgetter(i), result), number, N)
        if squared_unit != 1:
            one = _in_unit(one, how, unit, squared_unit)
        if origin is not None:
            one = _around(one, how, origin)
        found.append(_concepts(one, how, dict(options), weight))
    if how.is_sparse and not isinstance(result.objective, Tracer):
        for concepts in found:
            if (share := _coded(concepts.activations)) < FEW_CODED:
                scale = float(root_mean_square(Z) * unit * (len(Z) / N) ** 0.5)
                _check_coded(share, options["alpha"], scale)
    if wide is not None and origin is not None and how.is_centroids:
        _check_held(found[0].components, wide, origin)
    return found if several else found[0]


def _teller(progress: Tell | None, verbose: int, squared_unit: float) -> Tell:
    """Returns a callback that reports to both, in the units of Z."""

    def tell(standing: Standing) -> None:
        standing = standing._replace(objective=standing.objective * squared_unit)
        if progress is not None:
            progress(standing)
        if verbose and standing.iteration % verbose == 0 and jax.process_index() == 0:
            _, iteration, _, objective, error, figures = standing
            # A run of a fixed length compares nothing to tol.
            said = {} if np.isnan(error) else {"compared to tol": error}
            told = "".join(f", {name}: {value:.2g}" for name, value in (said | {**figures}).items())
            print(f"iteration {iteration}: objective {objective:.6g}{told}", file=sys.stderr)

    return tell


def _first(
    init: Any,
    numbers: tuple[int, ...],
    D: int,
    origin: Float[np.ndarray, " D"] | None,
    unit: float,
    dtype: Any,
) -> Float[Array, "K D"]:
    """Returns the components to start from, in the solver's units."""
    init = as_matrix(init, "init", row="concept")
    K, *others = numbers
    if others or init.shape != (K, D):
        shape = "for a single K" if others else f"({K}, {D}), one row per concept"
        raise ValueError(f"init must have shape {shape}; got {init.shape}")
    if origin is not None:
        init = jax.device_put(centred(np.asarray(init, np.float64), origin))
    init = narrow(init)
    check_finite(init, "init")
    init = init if init.dtype == dtype else init.astype(dtype)
    return init if unit == 1 else init / unit


def _in_unit(result: Result, method: Method, unit: float, squared_unit: float) -> Result:
    """Converts the result for Z / unit to the result for Z; its objective is in squared units."""
    # Squares may exceed float32 even if their roots do not.
    squares: dict[str, Any] = {
        name: np.asarray(getattr(result, name), np.float64) * squared_unit
        for name in ("objective", "history")
    }
    if method.is_centroids:
        squares["components"] = result.components * unit
        squares["starts"] = None if result.starts is None else result.starts * unit
    elif result.activations is not None:
        squares["activations"] = result.activations * unit
    if result.mean is not None:
        squares["mean"] = result.mean * unit
    return result._replace(**squares)


def _around(result: Result, method: Method, origin: Float[np.ndarray, " D"]) -> Result:
    """Converts the result for Z - 1 origin to the result for Z."""
    if method.has_mean:
        return result._replace(mean=origin + np.asarray(result.mean, np.float64))
    around = origin + np.asarray(result.components, np.float64)
    return result._replace(components=jax.device_put(short(around)))


def _check_coded(share: float, alpha: float, scale: float | None = None) -> None:
    """Warns if alpha leaves most rows without a code; `scale` is their root mean square norm."""
    if share < FEW_CODED and scale != 0:
        of_rows = (
            ""
            if scale is None
            else (f", while the root mean square norm of the rows is {scale:.3g}")
        )
        warnings.warn(
            f"only {100 * share:.2g} % of the rows have a nonzero code: alpha is "
            f"{alpha:g}{of_rows}; a row no longer than alpha has only zero codes: lower alpha, or "
            "let decompose scale it by that norm with relative_alpha=True",
            stacklevel=4,
        )


def _coded(codes: Float[Array | np.ndarray, "N K"]) -> float:
    """Returns the share of rows that have a nonzero code."""
    codes = on_host(codes)
    xp = jnp if isinstance(codes, jax.Array) else np
    return float(xp.mean(xp.any(codes != 0, axis=1), dtype=np.float32))


def _check_held(
    components: Float[Array, "K D"], Z: Shaped[np.ndarray, "N D"], mean: Float[np.ndarray, " D"]
) -> None:
    """Warns if float32 is too coarse for the centroids."""
    rounding = np.spacing(np.abs(np.asarray(components, np.float32)).max(axis=0)) / 2
    deviation = deviations(Z, mean)
    lost = rounding > HELD * np.where(deviation > 0, deviation, np.inf)
    if lost.any():
        d = int(np.argmax(lost))
        warnings.warn(
            f"column {d} of Z has mean {mean[d]:.6g} and standard deviation "
            f"{deviation[d]:.3g}: clusters were found in the centred rows, but float32 rounds "
            f"centroids there by up to {rounding[d]:.2g}; subtract the column's mean first, or "
            "set JAX_ENABLE_X64=1",
            stacklevel=4,
        )


def _check_rounded(Z: Shaped[np.ndarray, "N D"], method: str) -> None:
    """Warns if float32 is too coarse for float64 rows that are not centred first."""
    largest = np.maximum(np.abs(Z.max(axis=0)), np.abs(Z.min(axis=0)))
    rounding = np.spacing(largest.astype(np.float32)) / 2
    deviation = deviations(Z, Z.mean(axis=0))  # numpy's own makes a matrix of float64
    if np.linalg.norm(rounding) > HELD * np.linalg.norm(deviation) > 0:
        d = int(np.argmax(rounding))
        warnings.warn(
            f"column {d} of Z has mean {Z[:, d].mean():.6g} and standard deviation "
            f"{deviation[d]:.3g}: {method} computes in float32, which rounds values there by up "
            f"to {rounding[d]:.2g}; subtract the columns' means first, or set JAX_ENABLE_X64=1",
            stacklevel=4,
        )


def memory_needed(
    shape: tuple[int, int],
    num_concepts: int,
    method: str = "snmf",
    *,
    dtype: Any = "float32",
    mesh: Mesh | None = None,
    activations: bool = True,
    **options: Any,
) -> int:
    """Returns how many bytes of device memory `decompose` takes, including Z.

    Compiles the program without running it; needs no Z. For sparse autoencoders it is an estimate
    for a Z in memory; if Z reads rows, see `streamed_memory_needed`. Their activations stay on the
    host.

    Args:
        shape: (N, D).
        num_concepts: K.
        method: as for `decompose`.
        dtype: of Z.
        mesh: as for `decompose`.
        activations: as for `decompose`.
        **options: as for `decompose`.

    Raises:
        ValueError: as for `decompose`.
    """
    mesh = automatic(mesh)
    how = method_named(method)
    _check_activations(activations, how)
    _check_count(num_concepts, *shape, how)
    N, D = shape
    if how.has_encoder:
        # Z is on one device, which sends the rows of a batch to the others.
        of_rows = N * D * min(jnp.dtype(dtype).itemsize, 4)
        return of_rows + _memory_of_training(shape, num_concepts, how, options, mesh)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data", None))
    rows = bucket_of_rows(N, D) if mesh is None else N + -N % mesh.shape["data"]
    Z = jax.ShapeDtypeStruct((rows, D), dtype, sharding=sharding)
    arguments = how.options(options)
    arguments.pop(RELATIVE, None)
    if arguments.pop("init", None) is not None and how.init is not None:
        # Given centroids lead to another program.
        arguments[how.init] = np.zeros((num_concepts, D), np.float32)
    if not activations:
        arguments["activations"] = False
    counts = {"num_samples": N, "num_concepts": (num_concepts,), "mesh": mesh}
    assert how.solver is not None, "only sparse autoencoders have none"
    solve = jax.jit(partial(how.solver.solve, **counts, **arguments))
    return _memory_of(solve.lower(Z, jax.random.key(0)).compile())


def _memory_of_training(
    shape: tuple[int, int],
    num_concepts: int,
    method: Method,
    options: dict[str, Any],
    mesh: Mesh | None,
) -> int:
    """Returns the bytes per device that a sparse autoencoder takes beside Z."""
    on_data = 1 if mesh is None else mesh.shape.get("data", 1)
    on_model = 1 if mesh is None else mesh.shape.get("model", 1)
    return autoencoders.memory_needed(shape, num_concepts, method, options, on_data, on_model)


def _memory_of(program: jax.stages.Compiled) -> int:
    """Returns the bytes of a program's arguments, results and what it computes with."""
    memory: Any = program.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    # A result that takes a donated argument's place takes none of its own.
    return needed + memory.output_size_in_bytes - memory.alias_size_in_bytes


def streamed_memory_needed(
    shape: tuple[int, int],
    num_concepts: int,
    method: str = "snmf",
    *,
    mesh: Mesh | None = None,
    **options: Any,
) -> int:
    """Returns how many bytes `decompose_stored` takes: tiles, and the few columns of every row.

    Args:
        shape: (N, D).
        num_concepts: K.
        method: as for `decompose_stored`.
        mesh: as for `decompose_stored`.
        **options: as for `decompose_stored`.

    Raises:
        ValueError: as for `decompose_stored`.
    """
    if method_named(method).has_encoder:
        how = method_named(method)
        _check_count(num_concepts, *shape, how)
        return _memory_of_training(shape, num_concepts, how, options, automatic(mesh))
    how, solver = _streamed(method)
    _check_one_device(mesh, how)
    _check_count(num_concepts, *shape, how)
    # One tile, the next one being read, and their products; activations being written.
    of_tiles = 4 * TILE_BYTES
    arguments = how.options(options)
    if not hasattr(solver, "in_columns"):
        return of_tiles + 4 * shape[1] * 6 * num_concepts  # the axes and their images
    for name in ("init", RELATIVE):
        arguments.pop(name, None)
    in_columns = solver.in_columns(shape, jax.random.key(0), num_concepts=num_concepts, **arguments)
    programs = phases.compiled(*in_columns)
    return of_tiles + max(_memory_of(program) for program in programs)


def _streamed(name: str) -> tuple[Method, ModuleType]:
    """Returns a method that can be streamed, and its solver for stored rows."""
    method = method_named(name)
    if method.streamed is None:
        expected = ", ".join(name for name, each in METHODS.items() if each.streamed is not None)
        raise ValueError(
            f"{method.name!r} can't be streamed; expected one of {expected}, or use decompose"
        )
    return method, method.streamed


def _check_count(num_concepts: Any, N: int, D: int, method: Method) -> None:
    """Raises ValueError unless the method can find this many concepts in Z[N, D]."""
    check_num_concepts(num_concepts, N)
    if method.max_per_width and num_concepts > D:
        raise ValueError(
            f"num_concepts={num_concepts} is larger than min(N, D) = {D}, the number of principal "
            "components of Z; use fewer, or 'snmf'"
        )


def _check_activations(wanted: bool, method: Method) -> None:
    if not wanted and not method.can_omit_activations:
        raise ValueError(
            f"{method.name!r} computes its activations with its components; omit "
            "activations=False, or use 'kmeans' or a sparse autoencoder"
        )


def _check_no_checkpoint(checkpoint: Any, method: Method) -> None:
    if checkpoint is not None:
        raise ValueError(
            f"{method.name!r} keeps no states of its run; omit checkpoint, or use an autoencoder"
        )


def _check_one_device(mesh: Mesh | None, method: Method) -> None:
    if mesh is not None:
        raise ValueError(
            f"{method.name!r} reads stored rows on one device; omit mesh, or use decompose, which "
            "spreads them"
        )


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must come from jax.random.key; got {key!r}, try jax.random.key(0)")
    if key.shape:
        raise ValueError(
            f"key must be a single one; got an array of keys of shape {key.shape}, pass one of them"
        )


def _check_values_known(
    Z: Any, key: Any, options: dict[str, Any], progress: Any, verbose: int
) -> None:
    """Raises ValueError if something is asked for that a traced call cannot know."""
    asked = {
        "relative_alpha": options.get(RELATIVE) and isinstance(Z, Tracer),
        "progress": progress is not None,
        "verbose": verbose,
    }
    if isinstance(Z, Tracer) or isinstance(key, Tracer):
        for name in (name for name, is_asked in asked.items() if is_asked):
            raise ValueError(
                f"{name} needs values that are not known under jit and vmap; omit it, or call "
                "decompose outside of them"
            )


def _check_one_start(options: dict[str, Any]) -> None:
    """Warns if several starts are asked for, but the components to start from are given."""
    if options.get("init") is not None and (options.get("n_init") or 1) > 1:
        warnings.warn(
            f"n_init={options['n_init']} has no effect with given init, which is the only start; "
            "omit n_init",
            stacklevel=4,
        )


def _without_padding(result: Result, num_concepts: int, num_samples: int) -> Result:
    """Returns one of the solver's results without the concepts and the rows that pad it."""
    activations, starts = result.activations, result.starts
    if activations is not None:
        activations = activations[:num_samples, :num_concepts]
    return result._replace(
        components=result.components[:num_concepts],
        activations=activations,
        starts=None if starts is None else starts[:, :num_concepts],
    )


def _concepts(
    result: Result, how: Method, options: dict[str, Any], weight: float = 1.0
) -> Concepts:
    """Converts one of the solver's results to concepts; `weight` is that of all rows."""
    traced = isinstance(result.objective, Tracer)

    def number(kind: type, value: Any) -> Any:
        """Converts to a Python number; a traced value stays an array."""
        return value if traced else kind(value)

    iterations = number(int, result.iterations)
    updates = options.get("max_iter", 0) if traced else iterations
    if not traced and not np.isfinite(result.objective):
        raise ValueError(
            f"the objective of {how.name} is {float(result.objective)}: squares of Z exceed "
            "float32; divide Z by its largest value, or drop columns that dwarf the others"
        )
    stable = None
    if not traced and result.starts is not None and len(result.starts) > 1:
        # Starts of centroids are offsets from the rows' mean.
        radius = (number(float, result.objective) / weight) ** 0.5 if how.is_centroids else None
        stable = stability(np.asarray(result.starts), radius)
    # The history has more room than updates.
    history = result.history[: updates + 1]
    arrays = _on_device([result.components, result.activations, history, result.mean])
    components, activations, history, mean = arrays
    return Concepts(
        components=components,
        activations=activations,
        method=how.name,
        options=options,
        objective=number(float, result.objective),
        iterations=iterations,
        converged=number(bool, result.converged),
        history=history,
        mean=mean,
        stability=stable,
    )


def _in_dtype(values: Array | np.ndarray, dtype: Any) -> Array:
    """Returns a JAX array of this dtype; values of the host are converted there."""
    if isinstance(values, np.ndarray):
        return jax.device_put(values.astype(dtype))
    return jnp.asarray(values, dtype)


def _on_device(values: list[Any]) -> list[Any]:
    """Returns arrays of the host as JAX arrays, if those have their digits; others as given."""
    found = list(values)
    held = [
        i
        for i, each in enumerate(values)
        if isinstance(each, np.ndarray) and jax.dtypes.canonicalize_dtype(each.dtype) == each.dtype
    ]
    # In one call, which takes a small problem half the time.
    for i, placed in zip(held, jax.device_put([values[i] for i in held]), strict=True):
        found[i] = placed
    return found


@blas_threads.one_thread()
def decompose_stored(
    source: Source,
    num_concepts: int,
    method: str = "snmf",
    *,
    key: PRNGKeyArray,
    write: Callable[[int, Float[np.ndarray, "B K"]], None] | None = None,
    progress: Tell | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    target: Source | None = None,
    **options: Any,
) -> Concepts:
    """Factors rows that stay on disk, such as `Features.stored(site)`.

    Runs on the host and cannot be traced. Sparse autoencoders are trained as by `decompose`, which
    reads stored rows batch by batch too; here their activations can stay on disk as well. For the
    others: the updates are those of `decompose` for a Z that is not
    small, each in one pass over the source; see `solvers.streamed`. Apart from a few tiles of 4 MB,
    memory holds some numbers of every row: for "snmf" K + 44 in compressed columns and 2 K codes,
    for "kmeans" K + 28 and about a dozen, for "pca" none. On a CPU, k-means with more than 128
    clusters takes 64 more, and with 1,024 or more another 64. Very small or large rows, whose
    squares do not fit float32, are divided by a power of two; to find it, they are read once more.

    Args:
        source: has shape (N, D), tiles(count) and take(numbers).
        num_concepts: K.
        method: as for `decompose`, except "simple".
        key: as for `decompose`.
        write: called with (first row, activations) during the last pass; None keeps the activations
            in memory and in the result.
        progress: as for `decompose`; called after every pass that is an update.
        mesh: as for `decompose`; for sparse autoencoders only.
        checkpoint: as for `decompose`.
        target: as for `decompose`.
        **options: as for `decompose`, except init and relative_alpha.

    Returns:
        Concepts; without activations if `write` is given.

    Raises:
        ValueError: as for `decompose`, or a mesh is given for another method than a sparse
            autoencoder; NaN or Inf is found, and the row named, in the first pass.

    Examples:
        >>> import jax, numpy as np, tempfile, xlvlm_jax
        >>> from xlvlm_jax.features.writer import FeaturesWriter
        >>> Z, run, index = np.eye(4, dtype="float32"), tempfile.mkdtemp(), np.arange(4)
        >>> with FeaturesWriter(run, {}) as writer:
        ...     writer.append([{"id": str(i)} for i in index], {"norm": Z}, index, index, index)
        ...     writer.close()
        >>> stored = xlvlm_jax.Features.open(run).stored("norm")
        >>> xlvlm_jax.decompose_stored(stored, 4, "kmeans", key=jax.random.key(0)).objective
        0.0
    """
    keep_programs()
    mesh = automatic(mesh)
    how = method_named(method)
    how.check_target(target is not None)
    if how.has_encoder:
        options = how.options(options)
        _check_count(num_concepts, *source.shape, how)
        _check_key(key)
        return autoencoders.decompose(
            source,
            int(num_concepts),
            how,
            options,
            key=key,
            mesh=mesh,
            write=write,
            tell=progress,
            checkpoint=checkpoint,
            target=target,
        )
    how, solver = _streamed(method)
    _check_no_checkpoint(checkpoint, how)
    _check_one_device(mesh, how)
    options = how.options(options)
    for name, unset in (("init", None), (RELATIVE, False)):
        if options.pop(name, unset) is not unset:
            raise ValueError(f"{name} is not available for stored rows; use decompose, or omit it")
    _check_count(num_concepts, *source.shape, how)
    _check_key(key)
    scale = scale_of(source)
    solve = partial(_solve_stored, source, how, solver, int(num_concepts), options)
    try:
        result, share = solve(scale.unit, key, write, progress)
    except TooLargeError:
        # A row dwarfs those that were looked at; the first pass has found it.
        scale = scale_of(source, exact=True)
        result, share = solve(scale.unit, key, write, progress)
    if how.is_sparse:
        _check_coded(share, options["alpha"], scale.norm)
    return _concepts(result, how, options, float(source.shape[0]))


def _solve_stored(
    source: Source,
    how: Method,
    solver: ModuleType,
    num_concepts: int,
    options: dict[str, Any],
    unit: float,
    key: PRNGKeyArray,
    write: Callable[[int, Float[np.ndarray, "B K"]], None] | None,
    progress: Tell | None,
) -> tuple[Result, float]:
    """Solves for stored rows in a unit, and returns which share of the rows has an activation."""
    shape = (source.shape[0], num_concepts)
    activations = np.empty(shape, np.float32) if write is None else None
    factor = 1.0 if how.is_centroids else unit
    coded = 0

    def keep(start: int, rows: np.ndarray) -> None:
        nonlocal coded
        coded += np.count_nonzero(rows.any(axis=1))
        rows = rows if factor == 1 else rows * np.float32(factor)
        if write is not None:
            write(start, rows)
        if activations is not None:
            activations[start : start + len(rows)] = rows

    arguments = dict(options)
    if "alpha" in arguments:
        arguments["alpha"] = arguments["alpha"] / unit
    if how.is_centroids:
        arguments["unit"] = unit
    tell = None if progress is None else _teller(progress, 0, unit**2)
    scaled = Scaled(source, unit)
    result = solver.solve(scaled, key, keep, tell, num_concepts=num_concepts, **arguments)
    if unit != 1:
        result = _in_unit(result, how, unit, unit**2)
    return result._replace(activations=activations), coded / source.shape[0]


def project(
    Z: Any,
    concepts: Concepts,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "N K"]:
    """Returns the activations of rows on concepts.

    snmf solves its lasso with fixed atoms, kmeans and simple return 1 / (1 + distance), pca returns
    the scores of the rows minus its mean, a sparse autoencoder its codes. For the rows that the
    concepts were learnt from, the result is `concepts.activations` again.

    Works under jit, vmap and grad, in Z and in the concepts' arrays (the derivative of snmf codes
    holds the set of nonzero codes fixed); rows are then not checked.

    Args:
        Z: real numbers[N, D], as for `decompose`; stored rows are read block by block.
        concepts: learnt or given concepts of width D.
        mesh: as for `decompose`.

    Returns:
        float[N, K].

    Raises:
        TypeError: Z is not an array of numbers.
        ValueError: Z is not a matrix of finite real numbers, its width differs from the concepts',
            or the rows of a source do not match its shape.

    Examples:
        >>> import numpy as np, xlvlm_jax
        >>> concepts = xlvlm_jax.Concepts.from_components(np.eye(2), alpha=1.0)
        >>> xlvlm_jax.project(np.float32([[3, 0], [0, 0.5]]), concepts).tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    keep_programs()
    if not is_stored(Z):
        return _project(Z, concepts, mesh, 0)
    return jnp.concatenate([part for *_, part in project_stored(Z, concepts, mesh=mesh)])


def project_stored(
    source: StoredMatrix, concepts: Concepts, *, mesh: Mesh | None = None
) -> Iterator[tuple[int, Shaped[np.ndarray, "B D"], Float[Array, "B K"]]]:
    """Yields (first row, rows, activations) of rows that stay on disk, block by block.

    Args:
        source: reads rows[N, D].
        concepts: as for `project`.
        mesh: as for `project`.

    Raises:
        ValueError: as for `project`.
    """
    N, D = source.shape
    # Of many concepts, the activations take more than the rows.
    size = max(PROJECTED_BYTES // (4 * max(D, len(concepts.components))), 1)
    for start in range(0, max(N, 1), size):
        rows = read_block(source, start, min(start + size, N))
        yield start, rows, keep_pace(_project(rows, concepts, mesh, start))


def distances(
    Z: Any, concepts: Concepts, *, mesh: Mesh | None = None
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """Returns the nearest component of each row, and its distances to all components.

    Distances distinguish rows whose activations, 1 / (1 + distance), round to one. Works
    under the same transformations as `project`.

    Args:
        Z: real numbers[N, D], as for `project`.
        concepts: of kmeans or simple.
        mesh: as for `decompose`.

    Returns:
        int32[N] and float[N, K].

    Raises:
        TypeError: as for `project`.
        ValueError: as for `project`, or the concepts are of another method.
    """
    if not method_named(concepts.method).is_centroids:
        raise ValueError(f"{concepts.method!r} has no distances; use concepts of kmeans or simple")
    if is_stored(Z):
        N, D = Z.shape
        size = max(PROJECTED_BYTES // (4 * max(D, len(concepts.components))), 1)
        starts = range(0, max(N, 1), size)
        parts = [
            keep_pace(_distances(read_block(Z, at, min(at + size, N)), concepts, mesh, at))
            for at in starts
        ]
        labels, apart = zip(*parts, strict=True)
        return jnp.concatenate(labels), jnp.concatenate(apart)
    return _distances(Z, concepts, mesh, 0)


def _distances(
    Z: Any, concepts: Concepts, mesh: Mesh | None, first_row: int
) -> tuple[Int[Array, " N"], Float[Array, "N K"]]:
    """Does `distances` for rows numbered from `first_row`."""
    rows = _rows_of(Z, concepts, automatic(mesh), first_row)
    labels, apart = on_host(kmeans.nearest_and_distances(rows.Z, rows.components, rows.unit))
    N, K = rows.num_samples, len(concepts.components)
    return jax.device_put(labels[:N]), jax.device_put(apart[:N, :K])


def _project(Z: Any, concepts: Concepts, mesh: Mesh | None, first_row: int) -> Array:
    """Does `project` for rows numbered from `first_row`."""
    mesh = automatic(mesh)
    if concepts.dictionary is not None:
        return encode(concepts.dictionary, Z, mesh, first_row)
    method = method_named(concepts.method)
    assert method.encode is not None, "only sparse autoencoders have none"
    Z = as_matrix(Z, "Z", row="sample")
    rows = _rows_of(Z, concepts, mesh, first_row)
    codes = on_host(method.encode(rows, concepts.options))
    return _on_device([codes[: len(Z), : len(concepts.components)]])[0]


def _rows_of(Z: Any, concepts: Concepts, mesh: Mesh | None, first_row: int) -> ScaledRows:
    method = method_named(concepts.method)
    Z = as_matrix(Z, "Z", row="sample")
    N, D = Z.shape
    components, mean = concepts.components, concepts.mean
    if components.shape[1] != D:
        raise ValueError(
            f"Z has {D} columns but the concepts have {components.shape[1]}; project states from "
            "the site and model that the concepts were learnt on"
        )
    wide = isinstance(Z, np.ndarray)
    # The mean has more digits than the rows' dtype holds.
    double = isinstance(mean, np.ndarray) and mean.dtype == np.float64
    longer = double and not wide and real_dtype(Z) != np.float64
    if method.has_mean and (wide or longer):
        # After subtracting in float64, the difference fits into float32.
        if isinstance(Z, Tracer):
            assert mean is not None, "only a mean can be wider than the rows"
            high = np.asarray(mean, np.float32)
            Z, mean = (Z - high) - np.asarray(mean - high, np.float32), None
        else:
            origin = np.zeros(D) if mean is None else np.asarray(mean, np.float64)
            Z, mean = on_device(centred(np.asarray(Z), origin), share=True), None
    elif wide and method.is_centroids:
        components = np.asarray(components, np.float64)
        origin = components.mean(axis=0)
        Z, components = (on_device(centred(x, origin), share=True) for x in (Z, components))
    Z = narrow(Z)
    dtype = real_dtype(Z)
    components = _in_dtype(components, dtype)
    mean = _in_dtype(np.zeros(D) if mean is None else mean, dtype)
    Z = padded(Z) if mesh is None else shard_rows(Z, mesh)
    unit = unit_of(Z, check_finite(Z, "Z", first_row))
    if unit != 1:
        Z = Z / jnp.asarray(unit, Z.dtype)
        mean = mean / unit
        components = components / unit if method.is_centroids else components
    components = padded_concepts(components, N, repeat=method.is_centroids)
    return ScaledRows(Z, components, mean, unit, N)
