"""The stages after extraction: each reads directories and writes one, so that each can run alone.

The command line and the demo call them; to work with arrays, call `decompose`, `project`,
`ground_text` and `ground_images` directly.
"""

import contextlib
import dataclasses
import math
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ports import VLM
from ports.messages import counted
from ports.parallel import hosts
from xlvlm_jax import sae
from xlvlm_jax.concepts.decomposition import decompose, decompose_stored
from xlvlm_jax.concepts.encoding import check_columns, encode_all
from xlvlm_jax.concepts.grounding import (
    ground_text,
    is_before_norm,
    strongest_samples,
    tiles_of,
    unembed_of,
)
from xlvlm_jax.concepts.methods import Method, method_named
from xlvlm_jax.concepts.reconstruction import explained_by
from xlvlm_jax.concepts.record import Concepts, StoredActivations, components_of, on_host
from xlvlm_jax.concepts.removal import concept_directions
from xlvlm_jax.data.word_rules import Rules
from xlvlm_jax.features.manifest import model_at
from xlvlm_jax.features.reader import Features, choose_site
from xlvlm_jax.features.samples import columns, name_of
from xlvlm_jax.solvers.sae.side_by_side import side_by_side
from xlvlm_jax.storage.same_model import require_model
from xlvlm_jax.storage.zarr_rows import StoredRows


def rows_mesh() -> Mesh | None:
    """Returns a mesh of all devices of all hosts with the axis "data"; None for a single device."""
    count = jax.device_count()
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,)) if count > 1 else None


def decompose_features(
    features: Features,
    output: Path,
    num_concepts: int,
    method: str = "snmf",
    *,
    site: str | None = None,
    seed: int = 0,
    stream: bool = False,
    mesh: Mesh | None = None,
    target: Features | None = None,
    target_site: str | None = None,
    **options: Any,
) -> Concepts:
    """Factors the matrix of one site into concepts and writes them to a directory.

    With several hosts (`jax.distributed`) each reads the rows of its devices and host 0 writes. The
    training of a sparse autoencoder can be killed: `<output>.training` beside the directory holds
    its last state, and the same call goes on from there.

    Args:
        features: the features to read.
        output: directory to write to.
        num_concepts: K.
        method: as for `decompose`.
        site: site whose states to use; optional if there is only one.
        seed: random seed.
        stream: for a matrix larger than memory. Its tiles are read again for every update, and the
            activations are written during the last pass; the result does not hold them.
        mesh: devices that hold rows along "data" and, for sparse autoencoders, features along
            "model"; None for all on "data".
        target: for transcoders and crosscoders, the features of the other site or model; None for
            the same features. The components of a crosscoder in `target` are written to
            `<output>-target`.
        target_site: site of `target`; None for `site` or the only one.
        **options: as for `decompose`.

    Returns:
        The concepts, of a crosscoder with the components in `features`.

    Raises:
        ValueError: as for `decompose`, the features do not have the site or hold other rows than
            `target`, or `stream` is used with several hosts, a crosscoder, or a mesh where the
            method is no sparse autoencoder.
    """
    site = choose_site(features, site)
    how = method_named(method)
    paired = paired_with(how, features, site, target, target_site)
    if stream and jax.process_count() > 1:
        raise ValueError("--stream works on a single host; omit it, or use one host")
    began, key = time.perf_counter(), jax.random.key(seed)
    stored = features.stored(site)
    source = _source(features, site) | {"seed": seed}
    if paired is not None:
        options |= {"target": paired.stored}
        source |= {("target" if paired.writes else "other"): paired.source}
        if stream and not paired.writes:
            raise ValueError("--stream writes one directory, but a crosscoder has two; omit it")
    is_autoencoder = how.has_encoder
    if stream and mesh is not None and not is_autoencoder:
        raise ValueError(f"--stream with {method!r} computes on one device; omit it, or the mesh")
    if is_autoencoder:
        options |= {"mesh": mesh or rows_mesh(), "checkpoint": training_directory(output)}
    if stream:
        with StoredActivations(output, stored.shape[0], num_concepts) as activations:
            concepts = decompose_stored(
                stored, num_concepts, method, key=key, write=activations.write, **options
            )
            source |= {"seconds": _since(began), "explained_variance": None}
            concepts = dataclasses.replace(concepts, source=source | concepts.source)
            dataclasses.replace(concepts, activations=activations.rows()).save(output)
        shutil.rmtree(training_directory(output), ignore_errors=True)
        return concepts
    if not is_autoencoder:
        options |= {"mesh": mesh or rows_mesh()}
    found = decompose(stored, num_concepts, method, key=key, **options)
    concepts = on_host(found)
    source |= {"seconds": _since(began), "explained_variance": None} | concepts.source
    if hosts.is_first() and not is_autoencoder:
        codes = concepts.activations
        explained = explained_by(concepts, stored, None if codes is None else np.asarray(codes))
        source["explained_variance"] = None if np.isnan(explained) else explained
    concepts = dataclasses.replace(concepts, source=source)
    if hosts.is_first():
        concepts.save(output)
        if paired is not None and not paired.writes:
            of_target = _of_target(concepts)
            of_target.save(target_directory(output))
        shutil.rmtree(training_directory(output), ignore_errors=True)
    return concepts


class Paired(NamedTuple):
    """The other states that a transcoder or crosscoder learns from."""

    stored: StoredRows
    source: dict[str, Any]
    writes: bool  # whether components are directions of these states, as those of a transcoder


def paired_with(
    method: Method,
    features: Features,
    site: str,
    target: Features | None,
    target_site: str | None,
) -> Paired | None:
    """Returns the other states that a method learns from; None for methods of one matrix.

    Args:
        method: the method.
        features: the features of the first states.
        site: their site.
        target, target_site: as for `decompose_features`.

    Raises:
        ValueError: they are missing, the same or of other tokens, or the method takes none.
    """
    if not method.takes_target:
        method.check_target(target is not None or target_site is not None)
        return None
    other = target or features
    other_site = choose_site(other, target_site or site, "--target-site")
    if other is features and other_site == site:
        raise ValueError(
            f"{method.name!r} learns from two sites or models, but both are {site!r} of "
            f"{features.path}; name the other with --target-site or --target"
        )
    _check_same_rows(features, other)
    writes = not method.name.endswith("crosscoder")
    return Paired(other.stored(other_site), _source(other, other_site), writes)


def _check_same_rows(features: Features, other: Features) -> None:
    """Raises ValueError unless both hold states of the same tokens of the same samples."""
    if other is features:
        return
    counts = features.num_rows, other.num_rows
    named = []
    for each in (features, other):
        (ids,) = columns(each.samples, "id")
        names = np.array([name_of(number, given) for number, given in enumerate(ids)])
        named.append((names[each.sample_rows], each.positions))
    least = min(counts)
    (names, places), (their_names, their_places) = named
    differ = (names[:least] != their_names[:least]) | (places[:least] != their_places[:least])
    if differ.any() or counts[0] != counts[1]:
        row = int(differ.argmax()) if differ.any() else least
        raise ValueError(
            f"{features.path} ({counted(counts[0], 'row')}) and {other.path} "
            f"({counted(counts[1], 'row')}) differ in row {row}; extract both from the same data "
            "with the same selection of tokens"
        )


def _of_target(concepts: Concepts) -> Concepts:
    """Returns the concepts of a crosscoder with the components of its second source."""
    assert concepts.dictionary is not None, "a crosscoder has one"
    facts = {name: value for name, value in concepts.source.items() if name != "other"}
    other = concepts.source["other"]
    return dataclasses.replace(
        concepts,
        components=np.asarray(components_of(concepts.dictionary, 1)),
        source=facts | other | {"other": {name: facts.get(name) for name in other}},
    )


def target_directory(output: Path) -> Path:
    """Returns where the components of a crosscoder's second source are written."""
    return output.with_name(f"{output.name}-target")


def training_directory(output: Path) -> Path:
    """Returns where the states of an unfinished training run are kept, beside its output."""
    return output.with_name(f"{output.name}.training")


def encode_features(
    features: Features,
    output: Path,
    dictionary: sae.Dictionary,
    *,
    site: str | None = None,
    stream: bool = False,
    target: Features | None = None,
    target_site: str | None = None,
) -> Concepts:
    """Encodes the rows of one site with a sparse autoencoder and writes its features as concepts.

    Args:
        features: the features to read.
        output: directory to write to.
        dictionary: such as `sae.load` reads.
        site: site whose states to use; optional if there is only one.
        stream: for activations larger than memory.
        target: for crosscoders, and for transcoders whose output is to be compared: features of the
            other site or model; None for the same features.
        target_site: site of `target`; None for `site` or the only one.

    Raises:
        ValueError: the features do not have the site, or states of another width, or the dictionary
            has no concepts of rows.
    """
    began = time.perf_counter()
    rows, source = rows_to_encode(features, dictionary, site, target, target_site)
    concepts = Concepts.from_dictionary(dictionary, source=source)
    shape = rows.shape[0], len(concepts.components)
    with contextlib.ExitStack() as stack:
        if stream:
            kept = stack.enter_context(StoredActivations(output, *shape))
            quality = encode_all(dictionary, rows, kept.write)
            activations: Any = kept.rows()
        else:
            activations = np.empty(shape, np.float32)

            def write(start: int, codes: np.ndarray) -> None:
                activations[start : start + len(codes)] = codes

            quality = encode_all(dictionary, rows, write)
        concepts = dataclasses.replace(
            concepts,
            activations=activations,
            objective=None if math.isnan(quality.error) else quality.error,
            source=concepts.source | {"seconds": _since(began)} | quality.as_source(),
        )
        concepts.save(output)
    return concepts


def rows_to_encode(
    features: Features,
    dictionary: sae.Dictionary,
    site: str | None = None,
    target: Features | None = None,
    target_site: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Returns the rows that `encode_features` encodes, not read yet, and where they come from.

    Args:
        features, dictionary, site, target, target_site: as for `encode_features`.

    Raises:
        ValueError: as `encode_features`.
    """
    site = choose_site(features, site)
    layers = layer_of(dictionary.site or ""), layer_of(site)
    if None not in layers and layers[0] != layers[1]:
        warnings.warn(
            f"the dictionary was learnt at {dictionary.site}, but the states are of {site}; choose "
            "the site of the same layer",
            stacklevel=3,
        )
    rows: Any = features.stored(site)
    source = _source(features, site)
    if target is not None or target_site is not None or dictionary.settings.is_crosscoder:
        how = method_named(dictionary.method)
        if (paired := paired_with(how, features, site, target, target_site)) is not None:
            rows, _ = side_by_side(rows, paired.stored)
            source |= {("target" if paired.writes else "other"): paired.source}
    check_columns(dictionary, rows.shape[1])
    return rows, source


def layer_of(site: str) -> int | None:
    """Returns the number of the layer whose output a site's name tells, by any library's names."""
    found = re.search(r"(?:layers?|blocks|h)[._](\d+)", site)
    # What enters a layer is what the one before it puts out.
    return None if found is None else int(found[1]) - ("resid_pre" in site)


def _source(features: Features, site: str) -> dict[str, Any]:
    """Returns where the rows of a site come from."""
    return {
        "features": str(features.path.resolve()),
        "site": site,
        "rows": features.num_rows,
        **model_at(features.manifest, site),
    }


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)


def ground_concepts(
    directory: Path,
    vlm: VLM,
    features: Features,
    *,
    num_words: int = 10,
    num_candidates: int = 50,
    num_images: int = 5,
    through_norm: bool | None = None,
    rules: Rules = "default",
    centred: bool = False,
) -> Concepts:
    """Finds the words and the images of the concepts in a directory and adds them to it.

    Args:
        directory: directory with concepts.
        vlm: the model whose states the concepts were learnt on.
        features: the features that the concepts were learnt on.
        num_words: maximum number of words per concept.
        num_candidates: as for `ground_text`.
        num_images: number of images per concept.
        through_norm: whether words are read through the model's final norm (see `ground_text`); by
            default they are for sites before it. Recorded in concepts.json.
        rules: which tokens count as words, see `ground_text`. Recorded in concepts.json.
        centred: read the words of centroids from their difference from the mean of all centroids,
            which is the direction that edits take (see `concept_directions`), instead of from the
            centroids themselves. Recorded in concepts.json.

    Raises:
        ValueError: the concepts were learnt on other features, the features come from another
            model (whose head would read other words), or a single centroid is to be `centred`.
    """
    concepts = Concepts.load(directory)
    if concepts.activations is None or len(concepts.activations) != features.num_rows:
        count = "no" if concepts.activations is None else len(concepts.activations)
        raise ValueError(
            f"{directory} has activations of {count} rows but {features.path} has "
            f"{features.num_rows}; ground concepts with the features they were learnt on"
        )
    where = concepts.written
    require_model(where, vlm, f"{directory} was learnt on the states of")
    if through_norm is None:
        through_norm = is_before_norm(vlm, where.get("site"))
    words = ground_text(
        concept_directions(concepts) if centred else np.asarray(concepts.components),
        unembed_of(vlm, where.get("site")),
        vlm.tokenizer,
        num_words,
        num_candidates,
        through_norm=through_norm,
        rules=rules,
    )
    images = [
        [image for sample in samples if (image := features.samples[sample].get("image"))]
        for samples in top_samples(features, concepts.activations, num_images)
    ]
    concepts = dataclasses.replace(
        concepts,
        words=words,
        images=images,
        through_norm=through_norm,
        source=concepts.source | {"word rules": rules, "centred words": centred},
    )
    concepts.save(directory)
    return concepts


def most_active(concepts: Concepts, count: int) -> list[int]:
    """Returns the concepts with words that are active in most rows, by number.

    Of methods whose activations are hardly ever zero (all but snmf and sparse autoencoders), a row
    counts for the concept of its strongest activation, of either sign.

    Args:
        concepts: concepts, grounded; the first ones of them if activations are unknown.
        count: maximum number of concepts.
    """
    K, how = len(concepts.components), method_named(concepts.method)
    active = np.zeros(K, np.int64)
    if concepts.activations is not None:
        for _, tile in tiles_of(concepts.activations):
            if how.is_sparse or how.has_encoder:
                active += np.count_nonzero(tile, axis=0)
            else:
                active += np.bincount(np.abs(tile).argmax(axis=1), minlength=K)
    worded = [k for k in range(K) if concepts.words is None or concepts.words[k]]
    return sorted(sorted(worded, key=lambda k: -active[k])[:count])


def top_samples(features: Features, activations: Any, count: int) -> list[list[int]]:
    """Returns the samples whose rows activate each concept most, each once, the strongest first.

    Samples that do not activate it at all are left out: many features are active in few.

    Args:
        features: the features.
        activations: float[N, K] of their rows; of `StoredRows`, one tile is in memory at a time.
        count: maximum number of samples per concept.

    Returns:
        For each concept the numbers of samples.
    """
    rows = strongest_samples(
        tiles_of(activations), activations.shape[1], features.sample_rows, count
    )
    return [features.sample_rows[each].tolist() for each in rows]
