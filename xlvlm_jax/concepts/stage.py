"""The stages after extraction: each reads directories and writes one, so that each can run alone.

The command line and the demo call them; to work with arrays, call `decompose`, `project`,
`ground_text` and `ground_images` directly.
"""

import contextlib
import dataclasses
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ports import VLM
from ports.parallel import hosts
from xlvlm_jax import sae
from xlvlm_jax.concepts.decomposition import decompose, decompose_stored
from xlvlm_jax.concepts.encoding import encode_all
from xlvlm_jax.concepts.grounding import ground_images, ground_text, is_before_norm, unembed_of
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.reconstruction import explained_by
from xlvlm_jax.concepts.record import Concepts, StoredActivations, on_host
from xlvlm_jax.data.word_rules import Rules
from xlvlm_jax.features.reader import Features, choose_site
from xlvlm_jax.storage.same_model import require_model


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
        **options: as for `decompose`.

    Raises:
        ValueError: as for `decompose`, the features do not have the site, or `stream` is used with
            several hosts.
    """
    site = choose_site(features, site)
    if stream and jax.process_count() > 1:
        raise ValueError("--stream works on a single host; omit it, or use one host")
    began, key = time.perf_counter(), jax.random.key(seed)
    stored = features.stored(site)
    source = _source(features, site) | {"seed": seed}
    is_autoencoder = method_named(method).has_encoder
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
        explained = explained_by(concepts, stored, np.asarray(concepts.activations))
        source["explained_variance"] = None if np.isnan(explained) else explained
    concepts = dataclasses.replace(concepts, source=source)
    if hosts.is_first():
        concepts.save(output)
        shutil.rmtree(training_directory(output), ignore_errors=True)
    return concepts


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
) -> Concepts:
    """Encodes the rows of one site with a sparse autoencoder and writes its features as concepts.

    Args:
        features: the features to read.
        output: directory to write to.
        dictionary: such as `sae.load` reads.
        site: site whose states to use; optional if there is only one.
        stream: for activations larger than memory.

    Raises:
        ValueError: the features do not have the site, or states of another width, or the dictionary
            has no concepts of rows.
    """
    site = choose_site(features, site)
    layers = layer_of(dictionary.site or ""), layer_of(site)
    if None not in layers and layers[0] != layers[1]:
        warnings.warn(
            f"the dictionary was learnt at {dictionary.site}, but the states are of {site}; choose "
            "the site of the same layer",
            stacklevel=2,
        )
    began, stored = time.perf_counter(), features.stored(site)
    concepts = Concepts.from_dictionary(dictionary, source=_source(features, site))
    shape = stored.shape[0], len(concepts.components)
    with contextlib.ExitStack() as stack:
        if stream:
            kept = stack.enter_context(StoredActivations(output, *shape))
            quality = encode_all(dictionary, stored, kept.write)
            activations: Any = kept.rows()
        else:
            activations = np.empty(shape, np.float32)

            def write(start: int, codes: np.ndarray) -> None:
                activations[start : start + len(codes)] = codes

            quality = encode_all(dictionary, stored, write)
        concepts = dataclasses.replace(
            concepts,
            activations=activations,
            objective=quality.error,
            source=concepts.source | {"seconds": _since(began)} | quality.as_source(),
        )
        concepts.save(output)
    return concepts


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
        "rows": len(features.tokens),
        "model": features.manifest.get("model"),
        "fingerprint": features.manifest.get("fingerprint"),
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

    Raises:
        ValueError: the concepts were learnt on other features, or the features come from another
            model (whose head would read other words).
    """
    concepts = Concepts.load(directory)
    if concepts.activations is None or len(concepts.activations) != len(features.tokens):
        count = "no" if concepts.activations is None else len(concepts.activations)
        raise ValueError(
            f"{directory} has activations of {count} rows but {features.path} has "
            f"{len(features.tokens)}; ground concepts with the features they were learnt on"
        )
    require_model(concepts.source, vlm, f"{directory} was learnt on the states of")
    if through_norm is None:
        through_norm = is_before_norm(vlm, concepts.source.get("site"))
    words = ground_text(
        np.asarray(concepts.components),
        unembed_of(vlm, concepts.source.get("site")),
        vlm.tokenizer,
        num_words,
        num_candidates,
        through_norm=through_norm,
        rules=rules,
    )
    images = [
        [features.samples[sample]["image"] for sample in samples]
        for samples in top_samples(features, concepts.activations, num_images)
    ]
    concepts = dataclasses.replace(
        concepts,
        words=words,
        images=images,
        through_norm=through_norm,
        source=concepts.source | {"word rules": rules},
    )
    concepts.save(directory)
    return concepts


def top_samples(features: Features, activations: Any, count: int) -> list[list[int]]:
    """Returns the samples whose rows activate each concept most, each once, the strongest first.

    Args:
        features: the features.
        activations: float[N, K] of their rows; of `StoredRows`, one tile is in memory at a time.
        count: maximum number of samples per concept.

    Returns:
        For each concept the numbers of samples.
    """
    # A sample may have many rows, such as its image tokens.
    most = int(np.bincount(features.sample_rows).max())
    top = np.asarray(ground_images(activations, min(count * most, len(features.tokens))))
    found = (dict.fromkeys(features.sample_rows[rows].tolist()) for rows in top)
    return [list(samples)[:count] for samples in found]
