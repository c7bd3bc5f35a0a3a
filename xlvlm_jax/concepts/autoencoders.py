"""Sparse autoencoders as a method of `decompose`: training, and the concepts that it gives."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from xlvlm_jax import sae
from xlvlm_jax.concepts.encoding import CODE_BYTES, encode_all
from xlvlm_jax.concepts.methods import TRAINED, Method
from xlvlm_jax.concepts.record import Concepts, components_of
from xlvlm_jax.sae.dictionary import Details
from xlvlm_jax.solvers.phases import Tell
from xlvlm_jax.solvers.sae import Trained, train
from xlvlm_jax.solvers.sae.batches import WINDOW_BYTES
from xlvlm_jax.solvers.sae.checkpoint import Checkpoints, describe_rows
from xlvlm_jax.solvers.sae.side_by_side import side_by_side
from xlvlm_jax.solvers.sae.training import DivergedError
from xlvlm_jax.solvers.validation import (
    StoredMatrix,
    as_matrix,
    check_finite,
    is_stored,
    narrow,
)

SAVE_EVERY = 500  # updates between two states of a run that can be resumed


def decompose(
    Z: Any,
    num_concepts: int,
    method: Method,
    options: Mapping[str, Any],
    *,
    key: PRNGKeyArray,
    mesh: Mesh | None = None,
    write: Callable[[int, Float[np.ndarray, "B K"]], None] | None = None,
    tell: Tell | None = None,
    every: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    target: Any = None,
    activations: bool = True,
) -> Concepts:
    """Trains a sparse autoencoder, transcoder or crosscoder on rows, and encodes them.

    Args:
        Z: real numbers[N, D], or what reads rows; those are read batch by batch.
        num_concepts: number of features.
        method: the method.
        options: its options, checked.
        key: random key.
        mesh: shards batches on "data" and features on "model".
        write: called with (first row, activations); None keeps the activations in the result, in
            the host's memory.
        tell: called after every few updates.
        every: number of updates between calls; None for the default.
        checkpoint: directory for states of the unfinished run, from which it goes on if it was
            killed; the caller removes it once the result is saved. None for no states.
        target: for transcoders and crosscoders, like Z: the rows of the other site or model.
        activations: whether the result has them, where `write` is None.

    Returns:
        The concepts; source has "explained_variance", "l0" and "dead_share" of all rows.
        Components of a transcoder are of `target`, those of a crosscoder of Z.

    Raises:
        ValueError: an option is invalid, Z is not a matrix of finite real numbers or is traced, the
            loss ceases to be finite, or the directory holds another run.
    """
    if method.training is None:
        raise ValueError(
            f"{method.name!r} cannot be trained here; expected one of "
            f"{', '.join(TRAINED)}, or read one with sae.load"
        )
    if isinstance(Z, Tracer):
        raise ValueError(
            f"{method.name} is trained in a loop of programs and cannot be traced; call it outside "
            "jit and vmap"
        )
    rows, widths = Z if is_stored(Z) else checked(Z), None
    if target is not None:
        other = target if is_stored(target) else checked(target, "target")
        rows, widths = side_by_side(rows, other)
    settings = method.training(**options)
    settings.check(num_concepts)
    told = {} if every is None else {"every": every}
    with contextlib.ExitStack() as stack:
        states = None
        if checkpoint is not None:
            run = {
                "method": method.name,
                "options": dataclasses.asdict(settings),
                "num_concepts": num_concepts,
                "key": np.asarray(jax.random.key_data(key)).tolist(),
                "rows": describe_rows(rows),
            }
            states = stack.enter_context(Checkpoints(Path(checkpoint), run, SAVE_EVERY))
        try:
            found = train(
                rows,
                key,
                settings,
                num_concepts,
                mesh=mesh,
                tell=tell,
                checkpoint=states,
                widths=widths,
                **told,
            )
        except DivergedError:
            if states is not None:  # would end the same, and stand in the way of other options
                states.forget()
            raise
    return _concepts(found, rows, method, write, widths, mesh, activations)


def memory_needed(
    shape: tuple[int, int],
    num_concepts: int,
    method: Method,
    options: Mapping[str, Any],
    on_data: int = 1,
    on_model: int = 1,
) -> int:
    """Returns about how many bytes per device training and encoding take, without Z.

    Four arrays of the size of each matrix (parameters, moments, derivative), what a batch makes of
    codes and rows, and two windows of rows that are read ahead; or afterwards the matrices on every
    device, and some rows' codes as they are and as they are selected.

    Args:
        shape: (N, D), of two sources with D of both together.
        num_concepts: K.
        method: the method.
        options: as for `decompose`.
        on_data: number of devices that the rows of a batch are spread over.
        on_model: number of devices that the features are spread over.

    Raises:
        ValueError: an option is invalid.
    """
    if method.training is None:
        return 4 * num_concepts * shape[1] * 2
    settings = method.training(**method.options(options))
    settings.check(num_concepts)
    (N, D), B = shape, min(settings.batch_size, shape[0])
    parameters = 4 * 4 * 2 * num_concepts * D // on_model
    batch = 4 * B * (5 * num_concepts // on_model + 6 * D) // on_data
    training = parameters + batch + 2 * min(WINDOW_BYTES, 4 * N * D)
    codes = min(CODE_BYTES, 4 * N * num_concepts) // on_data
    return max(training, 4 * 2 * num_concepts * D + 2 * codes)


def checked(Z: Any, name: str = "Z") -> Shaped[Array, "N D"]:
    """Returns rows as an array of at most 32 bits.

    Args:
        Z: the rows.
        name: their name in error messages.

    Raises:
        TypeError: Z is not an array of numbers.
        ValueError: Z is not a matrix of finite real numbers.
    """
    rows = narrow(as_matrix(Z, name, row="sample", share=True))
    check_finite(rows, name)
    return rows


def _concepts(
    found: Trained,
    rows: Shaped[Array | np.ndarray, "N D"] | StoredMatrix,
    method: Method,
    write: Callable[[int, np.ndarray], None] | None,
    widths: tuple[int, ...] | None,
    mesh: Mesh | None,
    activations: bool,
) -> Concepts:
    settings = found.settings
    options = dataclasses.asdict(settings)
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}
    architecture = settings.architecture
    if "W_skip" in found.params:
        architecture = architecture.replace("transcoder", "skip_transcoder")
    constants: Any = {"k": options["k"]} if architecture.startswith("topk") else {}
    scales: Any = settings.input_scale
    if architecture.endswith("crosscoder"):
        constants |= {"widths": widths, "scales": scales}
    dictionary = sae.Dictionary.of(
        found.params,
        sae.Settings(architecture, **constants),
        details=Details({"metadata": {"training": {"method": method.name, **options}}}),
    )
    K = len(dictionary.components)
    kept = np.empty((rows.shape[0], K), np.float32) if write is None and activations else None

    def keep(start: int, codes: np.ndarray) -> None:
        if write is not None:
            write(start, codes)
        if kept is not None:
            kept[start : start + len(codes)] = codes

    quality = encode_all(dictionary, rows, keep, _for_rows(mesh))
    return Concepts(
        components=components_of(dictionary),
        activations=kept,
        method=method.name,
        options=options,
        objective=quality.error,
        iterations=settings.max_iter,
        history=found.history * _per_loss(dictionary, scales),
        source=quality.as_source(),
        dictionary=dictionary,
    )


def _for_rows(mesh: Mesh | None) -> Mesh | None:
    """Returns the mesh if rows can be encoded on it: if all of it is this host's."""
    if mesh is None or "data" not in mesh.axis_names or mesh.is_multi_process:
        return None
    return mesh


def _per_loss(dictionary: sae.Dictionary, scales: Any) -> float:
    """Returns what L times makes it a sum over columns, in the units of the objective."""
    columns = dictionary.params["W_dec"].shape[1]
    if dictionary.settings.is_crosscoder:  # whose objective is in scaled units too
        return columns
    return columns / (scales[-1] if isinstance(scales, tuple) else scales or 1.0) ** 2
