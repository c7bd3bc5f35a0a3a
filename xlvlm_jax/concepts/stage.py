"""The stages behind extraction: each reads directories and writes one, so that each runs alone.

The command line and the demo call them; who works with arrays calls `decompose`, `project`,
`ground_text` and `ground_images` directly.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ports import VLM, hub_names
from ports.messages import few
from ports.sites import match_sites
from xlvlm_jax import hosts
from xlvlm_jax.concepts import (
    Concepts,
    StoredActivations,
    decompose,
    decompose_stored,
    on_host,
    project,
)
from xlvlm_jax.grounding import ground_images, ground_text, is_before_norm
from xlvlm_jax.labels import Labels, factorise_each
from xlvlm_jax.metrics import (
    AttributeScore,
    attribute_scores,
    explained_by,
)
from xlvlm_jax.same_model import require_model
from xlvlm_jax.samples import unplaced
from xlvlm_jax.store import Features


def choose_sites(features: Features, site: str | None) -> list[str]:
    """The sites that a name or a pattern means; without one, the only one there is.

    Raises ValueError if that is none (see `ports.sites.match_sites`).
    """
    if site is None and len(features.sites) == 1:
        return list(features.sites)
    found = [] if site is None else match_sites(site, features.sites, hub_names)
    if not found:
        raise ValueError(
            f"{features.path} holds the sites {few(features.sites)}; choose one of them, "
            f"got {site!r}; name it by --site"
        )
    return found


def choose_site(features: Features, site: str | None) -> str:
    """As `choose_sites`, and ValueError if there are several."""
    found = choose_sites(features, site)
    if len(found) > 1:
        raise ValueError(f"{site!r} means {len(found)} sites, {few(found)}; choose one of them")
    return found[0]


def rows_mesh() -> Mesh | None:
    """All devices on the axis "data", those of other hosts too; None where there is one."""
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
    **options: Any,
) -> Concepts:
    """Factors the matrix of one site into concepts and writes them to a directory.

    stream: for a matrix larger than memory. Its tiles are read again for every update, and the
    activations are written as the last pass makes them; the result does not hold them.
    Over several hosts (`jax.distributed`) each reads the rows of its devices and host 0 writes.

    Raises ValueError as `decompose` does, for a site that the features do not hold, and to stream
    over several hosts.
    """
    site = choose_site(features, site)
    if stream and jax.process_count() > 1:
        raise ValueError("--stream reads on one host; leave it out, or the other hosts")
    began, key = time.perf_counter(), jax.random.key(seed)
    stored = features.stored(site)
    source = {
        "features": str(features.path.resolve()),
        "site": site,
        "seed": seed,
        "rows": len(features.tokens),
        "model": features.manifest.get("model"),
        "fingerprint": features.manifest.get("fingerprint"),
    }
    if stream:
        with StoredActivations(output, stored.shape[0], num_concepts) as activations:
            concepts = decompose_stored(
                stored, num_concepts, method, key=key, write=activations.write, **options
            )
            source |= {"seconds": _since(began), "explained_variance": None}
            concepts = dataclasses.replace(concepts, source=source)
            dataclasses.replace(concepts, activations=activations.rows()).save(output)
        return concepts
    found = decompose(stored, num_concepts, method, key=key, mesh=rows_mesh(), **options)
    concepts = on_host(found)
    source |= {"seconds": _since(began), "explained_variance": None}
    if hosts.is_first():
        explained = explained_by(concepts, stored, concepts.activations)
        source["explained_variance"] = None if np.isnan(explained) else explained
    concepts = dataclasses.replace(concepts, source=source)
    if hosts.is_first():
        concepts.save(output)
    return concepts


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
) -> Concepts:
    """Finds the words and the images of the concepts in a directory and writes them into it.

    through_norm: whether words are read through the model's final norm (see `ground_text`); by
    default those of sites before it are. Recorded in concepts.json.

    Raises ValueError if the features are not those that the concepts were learnt on, or the model
    is another one than the features' (its head would read other words).
    """
    concepts = Concepts.load(directory)
    if concepts.activations is None or len(concepts.activations) != len(features.tokens):
        count = "no" if concepts.activations is None else len(concepts.activations)
        raise ValueError(
            f"{directory} has activations of {count} rows, {features.path} has "
            f"{len(features.tokens)}; ground concepts with the features they were learnt on"
        )
    require_model(concepts.source, vlm, f"{directory} was learnt on the states of")
    if through_norm is None:
        through_norm = is_before_norm(vlm, concepts.source.get("site"))
    words = ground_text(
        np.asarray(concepts.components),
        vlm.unembed,
        vlm.tokenizer,
        num_words,
        num_candidates,
        through_norm=through_norm,
    )
    count = min(num_images, len(features.tokens))
    top = ground_images(concepts.activations, count)
    images = [
        [features.samples[features.sample_rows[row]]["image"] for row in rows] for rows in top
    ]
    concepts = dataclasses.replace(concepts, words=words, images=images, through_norm=through_norm)
    concepts.save(directory)
    return concepts


def known_attributes(features: Features) -> dict[str, Labels]:
    """{attribute: its value at each row}, of the attributes that the data set keeps of samples."""
    described = (sample.get("attributes") or {} for sample in unplaced(features.samples))
    of_samples = factorise_each(described, len(features.samples))
    rows = {name: labels.take(features.sample_rows) for name, labels in of_samples.items()}
    # What all rows share (the kind, when the token of interest names it) tells nothing.
    return {name: labels for name, labels in rows.items() if np.count_nonzero(labels.counts()) > 1}


def score_attributes(concepts: Concepts, features: Features) -> dict[str, AttributeScore]:
    """How well the most activated concept tells the attributes, on learnt or on other features."""
    site = concepts.source.get("site")
    if concepts.source.get("features") == str(features.path.resolve()):
        activations = concepts.activations
    else:
        activations = project(features.matrix(choose_site(features, site)), concepts)
    return attribute_scores(np.asarray(activations), known_attributes(features))


def as_json(scores: Mapping[str, AttributeScore]) -> dict[str, dict[str, float]]:
    """Scores as the report reads them."""
    return {
        name: {"concepts": round(score.nmi, 4), "random": round(score.random_mean, 4)}
        for name, score in scores.items()
    }
