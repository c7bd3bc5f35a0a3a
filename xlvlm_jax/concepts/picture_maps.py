"""Runs a model over pictures and maps concepts, words, vectors and answers on them.

T positions, D width, h x w cells of a picture.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from ports import VLM
from ports.inputs.patch_layout import PatchLayout
from xlvlm_jax.concepts import maps
from xlvlm_jax.concepts.answer_gradients import answer_gradients
from xlvlm_jax.concepts.grounding import is_before_norm, unembed_of
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.data.batches import groups_of, make_batch
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.manifest import is_hook_point, module_of
from xlvlm_jax.storage.same_model import require_model

BATCH = 8  # pictures that run together
SHOWN = 5  # concepts that are mapped if none is named


class MapRow(NamedTuple):
    """Maps of one thing over all pictures; they share a scale."""

    name: str
    unit: str  # what a value is
    maps: list[np.ndarray]  # for each picture float32[h, w]


class PictureMaps(NamedTuple):
    """Pictures, and what is mapped on them."""

    samples: list[Sample]
    boxes: list[np.ndarray]  # for each picture float[h, w, 4], as in `PatchLayout`
    rows: list[MapRow]


def map_pictures(
    vlm: VLM,
    samples: Sequence[Sample],
    *,
    site: str | None = None,
    concepts: Concepts | None = None,
    numbers: Sequence[int] = (),
    words: Sequence[str] = (),
    vectors: Mapping[str, tuple[str, np.ndarray]] | None = None,
    answers: Sequence[str] = (),
    through_norm: bool | None = None,
) -> PictureMaps:
    """Maps concepts, words, vectors and answers on pictures.

    Args:
        vlm: the model.
        samples: the pictures, each with its prompt.
        site: the site whose states are read as words and that gradients are taken at; None for that
            of the concepts, or of the only vector.
        concepts: concepts of this model; they are mapped at their own site.
        numbers: which of them; () for the five that are most active in these pictures.
        words: read by the logit lens, see `maps.word_maps`.
        vectors: name -> (site, float[D]), such as steering vectors; the cosine is mapped.
        answers: the length of the gradient of each one's log-probability is mapped.
        through_norm: whether states are read through the model's final norm; None for sites before
            it.

    Returns:
        The maps, a row for each concept, word, vector and answer in this order; one for what is
        named twice.

    Raises:
        ValueError: nothing is to be mapped or there is no picture; the site is unknown, missing or,
            for an answer, after the last layer that reads other positions; the concepts are of
            another site, width or model, a number or word is unknown, the model's image tokens have
            no place, or a prompt has no picture.
        OSError: a picture can't be read.
    """
    vectors = vectors or {}
    words, answers = list(dict.fromkeys(words)), list(dict.fromkeys(answers))
    own = _site_of(vlm, site, concepts, vectors, needed=bool(words or answers))
    if not (concepts or words or vectors or answers):
        raise ValueError("nothing to map; give concepts, a word, a vector or an answer")
    if not samples:
        raise ValueError("no samples to map on; give at least one with a picture")
    if concepts is not None:
        require_model(concepts.source, vlm, "the concepts were learnt on the states of")
        check_concepts(numbers, len(concepts.components))
    tokens = [maps.word_tokens(vlm.tokenizer, word) for word in words]
    if through_norm is None:
        through_norm = is_before_norm(vlm, own)
    at = {
        name: vlm.find_site(where, generated=True, one_state=True)
        for name, (where, _) in vectors.items()
    }
    asked = [*([own] if concepts or words else []), *at.values()]
    sites = list(dict.fromkeys(asked))
    boxes: list[np.ndarray] = []
    activations = _Activations(numbers)
    found: dict[tuple[str, str], list[np.ndarray]] = {}

    def keep(kind: str, names: Sequence[str], drawn: maps.Maps, real: int) -> None:
        for (picture,) in drawn[:real]:
            for name, one in zip(names, picture, strict=True):
                found.setdefault((kind, name), []).append(one)

    size = min(BATCH, len(samples))
    for group in groups_of(samples, size):
        batch = make_batch(vlm, group, size, strict=True)
        (inputs,), real = batch.inputs, batch.num_rows
        layouts = picture_layouts(vlm, inputs, batch.sizes)
        boxes += [layout.boxes for (layout,) in layouts[:real]]
        captured = vlm.states(inputs, sites=sites) if sites else {}
        states = {name: np.asarray(x, np.float32) for name, x in captured.items()}
        if concepts is not None:
            drawn = maps.concept_maps_by_row(states[own], concepts, layouts)
            for (picture,) in itertools.islice(drawn, real):
                activations.add(picture)
        if words:
            options = {"through_norm": through_norm}
            drawn = maps.word_maps(states[own], unembed_of(vlm, own), tokens, layouts, **options)
            keep("log-probability", words, drawn, real)
        for name, (_, vector) in vectors.items():
            drawn = maps.vector_maps(states[at[name]], np.asarray(vector)[None], layouts)
            keep("cosine", [name], drawn, real)
        for answer in answers:
            told = [answer] * len(group)
            forced = make_batch(vlm, group, size, answers=told, ended=False, strict=True)
            (inputs,) = forced.inputs
            layouts = picture_layouts(vlm, inputs, forced.sizes)
            slopes = answer_gradients(vlm, inputs, forced.answer_lengths, own).gradients
            drawn = maps.gradient_maps(np.asarray(slopes, np.float32), layouts)
            every = [one for row in drawn for one in row if one.size]
            if every and not any(np.nansum(one) for one in every):
                raise ValueError(
                    f"no later layer reads the image tokens at {own!r}, so the answer does not "
                    "depend on them there; choose an earlier layer"
                )
            keep("gradient", [answer], drawn, real)

    rows = []
    if concepts is not None:
        for k in activations.chosen(SHOWN):
            said = "" if concepts.words is None else " ".join(concepts.words[k][:5])
            name = f"concept {k}: {said}" if said else f"concept {k}"
            rows.append(MapRow(name, "activation", activations.maps_of(k)))
    rows += [MapRow(f"“{w}”", "log-probability", found["log-probability", w]) for w in words]
    rows += [MapRow(name, "cosine", found["cosine", name]) for name in vectors]
    rows += [
        MapRow(f"answer “{answer}”", "length of the gradient", found["gradient", answer])
        for answer in answers
    ]
    return PictureMaps(list(samples), boxes, rows)


def picture_layouts(
    vlm: VLM, inputs: dict[str, np.ndarray], sizes: Sequence[tuple[int, int]]
) -> list[list[PatchLayout]]:
    """Returns the layouts of a batch with one picture per row, whose image tokens have places.

    Args:
        vlm: the model.
        inputs: the processor's arrays.
        sizes: (height, width) of the picture of each row.

    Raises:
        ValueError: a prompt has no picture, or the model's image tokens have no place of their own.
    """
    layouts = vlm.patch_layout(inputs, sizes=[[size] for size in sizes])
    for row in layouts:
        if len(row) != 1:
            raise ValueError(
                f"a prompt has {len(row)} pictures; maps need one, in the place of its image token"
            )
        if row[0].latents:
            raise ValueError(
                f"the image tokens of a {vlm.config.model_type} are latents that each see the whole"
                " picture, so they can't be mapped; use a model without a resampler"
            )
    return layouts


def concept_site(vlm: VLM, site: str | None, concepts: Concepts, *, written: bool = False) -> str:
    """Returns the site of concepts.

    Args:
        vlm: the model.
        site: the name that was asked for; None for that of the concepts. It replaces the name of a
            hook point, which no module has.
        concepts: the concepts.
        written: whether the site that components are directions of is meant, which for transcoders
            is another than the one that they encode.

    Raises:
        ValueError: the concepts are of another site, neither names one, or the site is unknown or
            has no states for text tokens.
    """
    asked = None if site is None else vlm.find_site(site, generated=True, one_state=True)
    learnt = (concepts.written if written else concepts.source).get("site") or asked
    if learnt is None:
        raise ValueError("the concepts do not name their site; give it with --site")
    if asked is not None and is_hook_point(learnt):  # no module of the model
        return asked
    learnt = vlm.find_site(module_of(learnt), generated=True, one_state=True)
    if asked not in (None, learnt):
        raise ValueError(
            f"the concepts are of site {learnt!r}, not of {asked!r}; omit --site, or use concepts "
            "of that site"
        )
    return learnt


class _Activations:
    """Maps of the wanted concepts, or of all while it is not known which are the most active.

    All are kept sparse where they are: few features of an autoencoder are active in a cell.
    """

    def __init__(self, numbers: Sequence[int]):
        self._wanted = list(dict.fromkeys(numbers))
        self._pictures: list[tuple[tuple[int, ...], np.ndarray | sparse.csr_array]] = []
        self._highest = np.float32(-np.inf)  # [K] once there is a picture

    def add(self, maps: np.ndarray) -> None:
        """Adds the maps of one picture, float32[K, h, w]."""
        flat = maps.reshape(len(maps), -1)
        if self._wanted:
            kept = flat[self._wanted]
        else:
            self._highest = np.fmax(self._highest, np.nanmax(flat, axis=1, initial=-np.inf))
            # A sparse entry needs its value and its place.
            few = np.count_nonzero(flat) < flat.size / 3
            kept = sparse.csr_array(flat) if few else flat
        self._pictures.append((maps.shape[1:], kept))

    def chosen(self, most: int) -> list[int]:
        """Returns the wanted concepts, or those whose highest value in any cell is highest."""
        return self._wanted or np.argsort(-self._highest, kind="stable")[:most].tolist()

    def maps_of(self, concept: int) -> list[np.ndarray]:
        """Returns the maps of a chosen concept, float32[h, w] per picture."""
        row = self._wanted.index(concept) if self._wanted else concept
        found = []
        for shape, kept in self._pictures:
            one = kept[[row]]
            found.append((one if isinstance(one, np.ndarray) else one.toarray()).reshape(shape))
        return found


def check_concepts(numbers: Sequence[int], count: int) -> None:
    """Checks that there are concepts of these numbers.

    Raises:
        ValueError: there are not.
    """
    wrong = next((k for k in numbers if not 0 <= k < count), None)
    if wrong is not None:
        raise ValueError(f"there is no concept {wrong}; expected 0 to {count - 1}")


def _site_of(
    vlm: VLM,
    site: str | None,
    concepts: Concepts | None,
    vectors: Mapping[str, tuple[str, np.ndarray]],
    *,
    needed: bool,
) -> str:
    """Returns the site of concepts, words and answers; "" if none is needed."""
    asked = None if site is None else vlm.find_site(site, generated=True, one_state=True)
    if concepts is not None:
        return concept_site(vlm, site, concepts)
    if asked is None and needed:
        of_vectors = {where for where, _ in vectors.values()}
        if len(of_vectors) != 1:
            raise ValueError(
                "a word or an answer needs a site; name one with --site, such as layers.3"
            )
        (only,) = of_vectors
        return vlm.find_site(only, generated=True, one_state=True)
    return asked or ""
