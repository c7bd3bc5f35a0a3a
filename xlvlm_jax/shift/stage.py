"""The stage of `xlvlm shift`: analyses features of two models and concepts of one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ports import VLM
from ports.messages import few
from xlvlm_jax.concepts.decomposition import decompose, decompose_stored
from xlvlm_jax.concepts.grounding import is_before_norm, unembed_of
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.record import Concepts, StoredActivations
from xlvlm_jax.data.word_rules import Rules
from xlvlm_jax.features.manifest import finetuned_site, model_at
from xlvlm_jax.features.reader import Features, matching_sites, require_states
from xlvlm_jax.features.samples import columns, name_of
from xlvlm_jax.shift.analyse import analyse
from xlvlm_jax.shift.blocks import assigned, blocks_of_pairs
from xlvlm_jax.shift.grounding import ground_samples, ground_words
from xlvlm_jax.shift.pairs import Pairs, RowIds, common_site, match_samples
from xlvlm_jax.shift.record import DESCRIPTION, KINDS, ShiftAnalysis
from xlvlm_jax.shift.vectors import AssignBy, Reduce
from xlvlm_jax.storage.same_model import require_model
from xlvlm_jax.storage.tensors import write_with_rows
from xlvlm_jax.storage.zarr_rows import StoredRows

HELD_BYTES = 2**28  # maximum size of states to decompose in memory; larger ones are streamed
SAMPLE_SHIFTS = "sample-shifts.safetensors"
NUM_PICTURES = 5  # images per concept whose paths are stored for the panels


def shift_features(
    original: Features,
    finetuned: Features | None,
    concepts: Concepts,
    vlm: VLM,
    output: Path,
    *,
    finetuned_vlm: VLM | None = None,
    finetuned_concepts: Concepts | None = None,
    pairs: Pairs | None = None,
    site: str | None = None,
    alpha: float = 1.0,
    reduce: Reduce = "mean",
    assign_by: AssignBy = "activation",
    normalise_shifts: bool = False,
    normalise_shifted: bool = False,
    num_words: int = 15,
    num_candidates: int = 200,
    num_images: int = 50,
    through_norm: bool | None = None,
    rules: Rules = "default",
    store_samples: bool = False,
    seed: int = 0,
) -> ShiftAnalysis:
    """Analyses how concepts move from one directory of features to another, and saves the result.

    Runs on the host and cannot be traced.

    Args:
        original, finetuned: features of the same data under both models; with None for the second,
            both are read from the first, as `extract(..., finetuned=)` writes them.
        concepts: concepts learnt on the original features.
        vlm: the original model, whose head decodes the original concepts.
        output: the directory to write: shift.safetensors, shift.json, and finetuned-concepts/ if
            the fine-tuned model's concepts are learnt here.
        finetuned_vlm: the fine-tuned model, whose head decodes shifted and fine-tuned concepts;
            None if its head does not differ.
        finetuned_concepts: the fine-tuned model's concepts; None to learn them here, with the
            method and options of `concepts`.
        pairs: what `match_samples` returns, if already known; of one directory with both models,
            rows are paired as they are.
        site: the site whose states to use; None for the concepts' site.
        alpha, reduce, assign_by, normalise_shifts, normalise_shifted: see `analyse`.
        num_words, num_candidates: see `ground_text`.
        num_images: samples per concept.
        through_norm: whether to decode words through the final norm; None for the choice made for
            `concepts`, or, if they have no words, for sites before the norm.
        rules: which tokens count as words, see `ground_text`.
        store_samples: also write the shift of each pair of rows, to sample-shifts.safetensors.
        seed: random seed of the decomposition.

    Returns:
        The grounded analysis.

    Raises:
        ValueError: the features, concepts or models do not belong together.
    """
    named, site = site is not None, site or concepts.source.get("site")
    if finetuned is None:
        if pairs is not None:
            raise ValueError(
                "pairs are of two directories, but both models' states are read from one, whose "
                "rows are paired already; omit pairs"
            )
        site, Z_b, pairs = _paired_rows(original, site)
        finetuned, tuned_site = original, finetuned_site(site)
        both = [RowIds(original)] * 2
    else:
        site = tuned_site = common_site(original, finetuned, site)
        pairs, Z_b = pairs or match_samples(original, finetuned), finetuned.stored(site)
        both = [RowIds(original), RowIds(finetuned)]
    require_states(concepts.source, original, site, "moved", named=named)
    if finetuned_concepts is not None:
        states = finetuned_concepts.source, finetuned, tuned_site
        require_states(*states, "compared", named=named)
    Z_a = original.stored(site)
    _check_width(vlm, finetuned_vlm)
    # Only its head is read, and the command line has no option for an adapter of the original.
    learnt = "the concepts were learnt on the states of"
    require_model(concepts.source, vlm, learnt, other_adapter="warn")
    if finetuned_vlm is not None:
        theirs = "the fine-tuned model's states are those of"
        require_model(model_at(finetuned.manifest, tuned_site), finetuned_vlm, theirs)
    if finetuned_concepts is None:
        if Z_a.shape[1] != Z_b.shape[1]:  # `analyse` raises, before a decomposition is wasted
            analyse(Z_a, Z_b, pairs, concepts, concepts)
        source = {
            "features": str(finetuned.path.resolve()),
            "site": tuned_site,
            "seed": seed,
            "rows": len(Z_b),
            **model_at(finetuned.manifest, tuned_site),
        }
        directory = output / "finetuned-concepts"
        finetuned_concepts = _decompose_alike(Z_b, concepts, seed, source, directory)

    how: dict[str, Any] = {
        "assign_by": assign_by,
        "normalise_shifts": normalise_shifts,
        "normalise_shifted": normalise_shifted,
    }
    analysis = analyse(
        Z_a, Z_b, pairs, concepts, finetuned_concepts, alpha=alpha, reduce=reduce, **how
    )
    if through_norm is None:
        through_norm = concepts.through_norm
    if through_norm is None:
        through_norm = is_before_norm(vlm, site)
    analysis = ground_words(
        analysis,
        unembed_of(vlm, site),
        vlm.tokenizer,
        finetuned_unembed=None if finetuned_vlm is None else unembed_of(finetuned_vlm, site),
        num_words=num_words,
        num_candidates=num_candidates,
        through_norm=through_norm,
        rules=rules,
    )
    analysis = ground_samples(
        analysis, concepts, finetuned_concepts, Z_a, Z_b, *both, num_images=num_images
    )
    analysis = dataclasses.replace(
        analysis,
        pictures=_pictures(analysis.images or {}, *both),
        source={
            "original features": str(original.path.resolve()),
            "fine-tuned features": str(finetuned.path.resolve()),
            "site": site,
            "method": concepts.method,
            **model_at(original.manifest, site),
            "fine-tuned model": _finetuned_name(finetuned.manifest),
            "words through the final norm": through_norm,
            "word rules": rules,
            **how,
            "seed": seed,
        },
    )
    # The description says that all is there: it is written last, and that of an analysis that is
    # replaced goes first.
    for name in (DESCRIPTION, SAMPLE_SHIFTS):
        (output / name).unlink(missing_ok=True)
    if store_samples:
        output.mkdir(parents=True, exist_ok=True)
        _store_samples(output, Z_a, Z_b, pairs, assigned(concepts, Z_a, assign_by))
    analysis.save(output)
    return analysis


def _store_samples(
    output: Path,
    original: StoredRows,
    finetuned: StoredRows,
    pairs: Pairs,
    assignment: Int[np.ndarray, " N"],
) -> None:
    """Writes the shift of each pair of rows, the rows, and its concept, -1 for none."""
    tensors = {
        "original_rows": np.asarray(pairs.original, np.int64),
        "finetuned_rows": np.asarray(pairs.finetuned, np.int64),
        "concepts": assignment[pairs.original].astype(np.int32),
    }
    shape = len(pairs.original), original.shape[1]
    blocks = ((b - a).astype(np.float32) for _, a, b in blocks_of_pairs(original, finetuned, pairs))
    write_with_rows(output / SAMPLE_SHIFTS, tensors, "shifts", shape, blocks)


def _paired_rows(features: Features, site: str | None) -> tuple[str, StoredRows, Pairs]:
    """Returns site, fine-tuned states and pairs of a directory with the states of both models."""
    both = [name for name in features.sites if finetuned_site(name) in features.sites]
    found = both if site is None else matching_sites(site, both)
    if len(found) != 1:
        raise ValueError(
            f"{features.path} holds the sites {few(features.sites)}; expected states of both"
            f" models at {site or 'one site'}, or give the fine-tuned model's features too"
        )
    site, rows = found[0], np.arange(features.num_rows)
    return site, features.stored(finetuned_site(site)), Pairs(rows, rows, len(features.samples))


def _finetuned_name(manifest: dict[str, Any]) -> str | None:
    described = manifest.get("finetuned") or manifest
    return described.get("adapter") or described.get("model")


def _check_width(vlm: VLM, finetuned_vlm: VLM | None) -> None:
    if finetuned_vlm is None:
        return
    widths = [each.config.get_text_config().hidden_size for each in (vlm, finetuned_vlm)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the fine-tuned model is {widths[1]} wide, the original {widths[0]}; a shift needs a"
            " fine-tuned version of the same model"
        )


def _decompose_alike(
    Z: StoredRows, concepts: Concepts, seed: int, source: dict[str, Any], directory: Path
) -> Concepts:
    """Learns equally many concepts of Z in the same way (streamed or not) and writes them."""
    options = {name: value for name, value in concepts.options.items() if name != "init"}
    K, key = len(concepts.components), jax.random.key(seed)
    if not isinstance(concepts.activations, StoredRows):
        streamed = method_named(concepts.method).streamed is not None
        many = 4 * Z.shape[0] * Z.shape[1] > HELD_BYTES
        learn = decompose_stored if many and streamed else decompose
        found = dataclasses.replace(learn(Z, K, concepts.method, key=key, **options), source=source)
        found.save(directory)
        return found
    with StoredActivations(directory, len(Z), K) as activations:
        found = decompose_stored(Z, K, concepts.method, key=key, write=activations.write, **options)
        dataclasses.replace(found, source=source, activations=activations.rows()).save(directory)
    return Concepts.load(directory)


def _pictures(images: dict[str, list[list[str]]], *asked: RowIds) -> dict[str, str]:
    """Returns {sample ID: image file} of each concept's first samples."""
    shown = {name for kind in KINDS for names in images[kind] for name in names[:NUM_PICTURES]}
    found = {}
    for each in asked:
        for name in shown & each.samples.keys():
            if image := each.features.samples[each.samples[name]].get("image"):
                found[name] = str(image)
    if shown <= found.keys():
        return found
    # Only one of the two features may know the image of a sample.
    for each in asked:
        for number, (name, image) in enumerate(
            zip(*columns(each.features.samples, "id", "image"), strict=True)
        ):
            if image and (name := name_of(number, name)) in shown:
                found.setdefault(name, str(image))
    return found
