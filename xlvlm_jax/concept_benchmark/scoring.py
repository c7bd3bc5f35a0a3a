"""Scores one dictionary on pictures whose contents are known.

A picture's code is the mean over its rows: image tokens, and states that predict its caption, both
halves alike. Probes and choices are made on some pictures ("fit") and scored on others ("test"),
and the other way round; a score is the mean of both, which depends less on the pictures drawn.

N pictures, C cells of a picture, M rows, K concepts, D width, V values of attributes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from scipy import sparse

from ports import VLM
from xlvlm_jax import metrics
from xlvlm_jax.causal.changes import Questions, concept_edits, effects, prepare, spliced_losses
from xlvlm_jax.causal.scores import causal_scores, loss_recovered, signs
from xlvlm_jax.causal.words import Vocabulary, filled, own_tokens, vocabulary_of
from xlvlm_jax.concept_benchmark.dictionaries import remade
from xlvlm_jax.concept_benchmark.known_pictures import (
    KnownPictures,
    Pictures,
    caption_batch,
    cells_of,
)
from xlvlm_jax.concepts.decomposition import project
from xlvlm_jax.concepts.grounding import ground_text
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.removal import concept_directions
from xlvlm_jax.data import scenes
from xlvlm_jax.data.scenes.language import FAMILIES, caption_words
from xlvlm_jax.metrics.codes import squared_deviations
from xlvlm_jax.metrics.labels import factorise
from xlvlm_jax.metrics.localisation import rank_auc, ranks, sparse_ranks
from xlvlm_jax.metrics.probing import (
    Probe,
    balanced_accuracy,
    best_concepts,
    fit_probe,
    separation,
)

Csr = Any  # scipy.sparse.csr_array

VALUES: dict[str, tuple[Any, ...]] = {
    "kind": scenes.KINDS,
    "colour": scenes.COLOURS,
    "count": (1, 2, 3),
    "place": scenes.PLACES,
    "mood": scenes.MOODS,
}
LOCATED = ("kind", "colour", "place")  # attributes that cells of a picture show
SHOWN = 0.5  # share of a cell's pixels from which on it shows an object
TARGETED = 5  # concepts that are removed for a value
ASKED = 12  # pictures that concepts are edited on
# Rows that are encoded together on a CPU: with snmf, 256 took 1.06 times and 1,024 1.22 times as
# long for the benchmark's own states. An accelerator runs all at once.
ENCODED = 512
DENSE = 2**26  # codes that are in memory as a matrix with its zeros
ADD, ABLATE = (0.1,), (1.0,)
OWN_TOKENS = 32  # room for the tokens of a concept's words, so that dictionaries share a program


class Task(NamedTuple):
    """A value of an attribute against the other values."""

    attribute: str
    value: Any

    def __str__(self) -> str:
        return f"{self.attribute} {self.value}"


class Truth(NamedTuple):
    """Which pictures have which values."""

    positive: Bool[np.ndarray, "N V"]
    known: Bool[np.ndarray, "N V"]


class Ground(NamedTuple):
    """What all dictionaries are scored on and against.

    Attributes:
        pictures: the pictures and their states.
        tasks: values of attributes to find, V of them.
        fit: which of the pictures to fit to have which values.
        test: the same of those to test on.
        probes: V probes on the model's own states of "fit".
        test_probes: the same of "test".
        probe_accuracy: their mean balanced accuracy, from 0 to 1.
        vlm: the model.
        spliced: questions in which all image tokens and predicting positions are replaced.
        edited: questions in which predicting positions are edited.
        vocabulary: all words of the captions.
    """

    pictures: KnownPictures
    tasks: list[Task]
    fit: Truth
    test: Truth
    probes: list[Probe]
    test_probes: list[Probe]
    probe_accuracy: float
    vlm: VLM
    spliced: Questions
    edited: Questions
    vocabulary: Vocabulary

    def swapped(self) -> "Ground":
        """Returns the ground with "fit" and "test" exchanged."""
        pictures = self.pictures
        return self._replace(
            pictures=pictures._replace(fit=pictures.test, test=pictures.fit),
            fit=self.test,
            test=self.fit,
            probes=self.test_probes,
            test_probes=self.probes,
        )


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a dictionary.

    Attributes:
        name, method, num_concepts: of the dictionary.
        seed: of its pictures.
        values: by the name of a measure; NaN where it is undefined.
        nulls: of the measures whose null depends on the dictionary or the pictures.
        best_concept: for each value of an attribute the concept that tells most of it.
        best_attribute: for each concept the attribute of which it tells most; "" for none.
    """

    name: str
    method: str
    num_concepts: int
    seed: int
    values: Mapping[str, float]
    nulls: Mapping[str, float]
    best_concept: Mapping[str, int]
    best_attribute: Sequence[str]


def prepare_ground(pictures: KnownPictures, vlm: VLM, *, num_asked: int = ASKED) -> Ground:
    """Prepares what scoring needs once for all dictionaries.

    Args:
        pictures: of a site.
        vlm: the model that their states come from.
        num_asked: number of test pictures that concepts are edited on.

    Raises:
        ValueError: there are too few pictures for any value to be told.
    """
    fit, test = pictures.fit, pictures.test
    every = [
        Task(attribute, value)
        for attribute, values in VALUES.items()
        for value in (values[:1] if len(values) == 2 else values)
    ]
    truths = [truth_of(part.attributes, every) for part in (fit, test)]
    can = np.all([_can_be_told(truth) for truth in truths], axis=0)
    if not can.any():
        raise ValueError(
            f"in {len(fit.attributes)} and {len(test.attributes)} pictures no value of an "
            "attribute can be told from others; use more pictures"
        )
    tasks = [task for task, told in zip(every, can, strict=True) if told]
    fit_truth, test_truth = (truth_of(part.attributes, tasks) for part in (fit, test))
    fit_states, test_states = (pooled(part.cells, part.said, part.picture) for part in (fit, test))
    probes = _probes(fit_states, fit_truth)
    test_probes = _probes(test_states, test_truth)
    accuracies = [
        *_accuracies(probes, test_states, test_truth),
        *_accuracies(test_probes, fit_states, fit_truth),
    ]
    spliced, edited = _questions(pictures, vlm, num_asked)
    vocabulary = vocabulary_of([sorted(caption_words())], vlm.tokenizer, vlm.sizes.text.vocab_size)
    return Ground(
        pictures,
        tasks,
        fit_truth,
        test_truth,
        probes,
        test_probes,
        float(np.mean(accuracies)),
        vlm,
        spliced,
        edited,
        vocabulary,
    )


def _probes(states: Float[np.ndarray, "N D"], truth: Truth) -> list[Probe]:
    return [
        fit_probe(states[known], positive[known])
        for known, positive in zip(truth.known.T, truth.positive.T, strict=True)
    ]


def _accuracies(
    probes: Sequence[Probe], states: Float[np.ndarray, "N D"], truth: Truth
) -> list[float]:
    return [
        balanced_accuracy(positive[known], probe.says(states[known]))
        for probe, known, positive in zip(probes, truth.known.T, truth.positive.T, strict=True)
    ]


def _questions(pictures: KnownPictures, vlm: VLM, count: int) -> tuple[Questions, Questions]:
    drawn = [scenes.sample_scene("test", i, pictures.seed) for i in range(count)]
    images = [Image.fromarray(scenes.draw(scene)) for scene in drawn]
    batch = caption_batch(vlm, drawn, images)
    every = batch.predicts.copy()
    cells = cells_of(batch.layouts)
    for row, layout in zip(every, batch.layouts, strict=True):
        row[layout.positions.reshape(-1)[cells]] = True
    site, lengths = pictures.site, batch.lengths
    spliced = prepare(vlm, batch.inputs, site, answer_lengths=lengths, where=every)
    return spliced, prepare(vlm, batch.inputs, site, answer_lengths=lengths)


def truth_of(attributes: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> Truth:
    """Returns which pictures have which values, and of which the attribute is known."""
    positive = [[each[task.attribute] == task.value for task in tasks] for each in attributes]
    known = [[each[task.attribute] is not None for task in tasks] for each in attributes]
    return Truth(np.array(positive), np.array(known))


def _can_be_told(truth: Truth) -> Bool[np.ndarray, " V"]:
    others = truth.known & ~truth.positive
    return np.any(truth.positive, axis=0) & np.any(others, axis=0)


def pooled(
    cells: Float[np.ndarray, "N C K"],
    said: Float[np.ndarray, "R K"],
    picture: Int[np.ndarray, " R"],
) -> Float[np.ndarray, "N K"]:
    """Returns what stands for each picture: half the mean of its cells, half that of its words.

    Args:
        cells: float[N, C, K], of image tokens.
        said: float[R, K], of states that predict the caption.
        picture: int[R], whose caption.
    """
    N = len(cells)
    sums = np.zeros((N, said.shape[1]))
    np.add.at(sums, picture, said)
    counts = np.maximum(np.bincount(picture, minlength=N), 1)[:, None]
    return (cells.mean(axis=1, dtype=np.float64) + sums / counts) / 2


class Coded(NamedTuple):
    """The codes of pictures. Those of rows are sparse: a dictionary may have many concepts."""

    cells: Csr  # float32[N C, K]
    said: Csr  # float32[R, K]
    picture: Float[np.ndarray, "N K"]  # pooled
    coefficients: Float[np.ndarray, "N K"]  # pooled, see `coefficients_of`


def encode(
    concepts: Concepts, rows: Float[np.ndarray, "M D"], kept: int | None
) -> Float[np.ndarray, "M K"]:
    """Returns the codes of rows; those that are not sparse by themselves are cut.

    Args:
        concepts: the dictionary.
        rows: float[M, D].
        kept: of methods other than sparse autoencoders and snmf, how many codes of largest size
            each row keeps; None for all.

    Raises:
        ValueError: as for `project`.
    """
    # Codes of snmf take as many steps as the slowest row needs: of fewer rows, fewer.
    in_blocks = concepts.dictionary is None and jax.default_backend() == "cpu"
    size = ENCODED if in_blocks else max(len(rows), 1)
    parts = [project(rows[at : at + size], concepts) for at in range(0, len(rows), size)]
    codes = np.concatenate([np.asarray(part, np.float32) for part in parts])
    how = method_named(concepts.method)
    if kept is None or how.has_encoder or how.is_sparse or kept >= codes.shape[1]:
        return codes
    left = np.argpartition(-np.abs(codes), kept, axis=1)[:, kept:]
    np.put_along_axis(codes, left, 0, axis=1)
    return codes


def coefficients_of(
    concepts: Concepts, codes: Float[np.ndarray, "M K"]
) -> Float[np.ndarray, "M K"]:
    """Returns what rows are sums of `concept_directions` with, up to a constant row.

    Args:
        concepts: the dictionary.
        codes: float[M, K].

    Returns:
        float[M, K]: the codes; of centroids, which are no sum, 1 at the nearest.
    """
    if not method_named(concepts.method).is_centroids:
        return codes
    nearest = np.zeros_like(codes)
    np.put_along_axis(nearest, codes.argmax(axis=1)[:, None], 1, axis=1)
    return nearest


def _coded(concepts: Concepts, part: Pictures, kept: int | None) -> Coded:
    cells, of_cells = _sparse_codes(concepts, part.cells.reshape(-1, part.cells.shape[2]), kept)
    said, of_said = _sparse_codes(concepts, part.said, kept)

    def pooled_codes(cells: Csr, said: Csr) -> np.ndarray:
        N, C, _ = part.cells.shape
        means = _sums(cells, np.repeat(np.arange(N), C), N) / C
        counts = np.maximum(np.bincount(part.picture, minlength=N), 1)[:, None]
        return (means + _sums(said, part.picture, N) / counts) / 2

    return Coded(cells, said, pooled_codes(cells, said), pooled_codes(of_cells, of_said))


def _sparse_codes(
    concepts: Concepts, rows: Float[np.ndarray, "M D"], kept: int | None
) -> tuple[Csr, Csr]:
    """Returns the codes of rows and their coefficients, see `coefficients_of`."""
    codes: list[Csr] = []
    coefficients: list[Csr] = []
    for at in _starts(rows, concepts):
        dense = encode(concepts, rows[at], kept)
        codes.append(sparse.csr_array(dense))
        own = coefficients_of(concepts, dense)
        coefficients.append(codes[-1] if own is dense else sparse.csr_array(own))
    found = sparse.vstack(codes, "csr")
    is_same = all(one is other for one, other in zip(codes, coefficients, strict=True))
    return found, found if is_same else sparse.vstack(coefficients, "csr")


def _starts(rows: Float[np.ndarray, "M D"], concepts: Concepts) -> list[slice]:
    """Returns parts of rows whose codes fit in memory; one if there are no rows."""
    size = max(DENSE // len(concepts.components), 1)
    return [slice(at, at + size) for at in range(0, max(len(rows), 1), size)]


def _sums(rows: Csr, groups: Int[np.ndarray, " M"], count: int) -> Float[np.ndarray, "N K"]:
    """Returns the sum of the rows of each group, in float64."""
    M = rows.shape[0]
    members: Csr = sparse.csr_array((np.ones(M), (groups, np.arange(M))), shape=(count, M))
    return (members @ rows).toarray()


def score_dictionary(
    concepts: Concepts, ground: Ground, *, name: str = "", kept: int | None = None
) -> Scores:
    """Scores a dictionary by every measure that needs no other seed.

    Args:
        concepts: the dictionary; without words it is read through the head first.
        ground: from `prepare_ground`.
        name: name in the result.
        kept: as for `encode`.

    Returns:
        The scores, without "stability".

    Raises:
        ValueError: the dictionary has another width, or is not finite.
    """
    pictures, vlm = ground.pictures, ground.vlm
    if concepts.words is None:
        words = ground_text(
            np.asarray(concepts.components),
            vlm.unembed,
            vlm.tokenizer,
            through_norm=vlm.is_before_norm(pictures.site),
        )
        concepts = dataclasses.replace(concepts, words=words)
    fit, test = (_coded(concepts, part, kept) for part in (pictures.fit, pictures.test))
    values = _fidelity(concepts, ground, fit, test, kept)
    nulls: dict[str, float] = {}
    values |= _both_ways(concepts, ground, fit, test)
    alike = metrics.monosemanticity(test.picture, pictures.embeddings)
    values["monosemanticity"] = _mean(np.asarray(alike))
    nulls["monosemanticity"] = float(metrics.mean_similarity(pictures.embeddings))
    told = _information(ground, fit, test)
    values |= told.values
    nulls |= told.nulls
    nulls["naming"] = values.pop("shuffled")
    values["causal"], nulls["causal"] = _causal(concepts, ground)
    return Scores(
        name=name or concepts.method,
        method=concepts.method,
        num_concepts=len(concepts.components),
        seed=pictures.seed,
        values=values,
        nulls=nulls,
        best_concept=told.best_concept,
        best_attribute=told.best_attribute,
    )


def _both_ways(concepts: Concepts, ground: Ground, fit: Coded, test: Coded) -> dict[str, float]:
    """Returns the measures that choose concepts on some pictures and score them on others."""
    found = [
        _probing(way, chosen, tested)
        | _perturbation(concepts, way, chosen, tested)
        | _localisation(way, chosen, tested)
        | _naming(concepts, way, chosen)
        for way, chosen, tested in ((ground, fit, test), (ground.swapped(), test, fit))
    ]
    return {name: _mean(np.array([each[name] for each in found])) for name in found[0]}


def _naming(concepts: Concepts, ground: Ground, fit: Coded) -> dict[str, float]:
    best = [
        int(separation(fit.picture[known], positive[known]).argmax())
        for known, positive in zip(ground.fit.known.T, ground.fit.positive.T, strict=True)
    ]
    named = metrics.naming_accuracy(
        list(concepts.words or ()), np.array(best), [_names_of(task) for task in ground.tasks]
    )
    return {"naming": named.accuracy, "shuffled": named.shuffled}


def _mean(values: np.ndarray) -> float:
    """Returns the mean of numbers that are not NaN; NaN if there are none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _names_of(task: Task) -> set[str]:
    """Returns the words of captions that name a value."""
    return {word for word, value in FAMILIES[task.attribute].items() if value == task.value}


def _fidelity(
    concepts: Concepts, ground: Ground, fit: Coded, test: Coded, kept: int | None
) -> dict[str, float]:
    pictures, part = ground.pictures, ground.pictures.test
    count = test.cells.shape[0] + test.said.shape[0]
    indices = np.concatenate([test.cells.indices, test.said.indices])
    active = np.bincount(indices, minlength=len(concepts.components))
    alive = (active > 0) | (fit.picture != 0).any(axis=0)
    losses = spliced_losses(
        ground.spliced,
        lambda rows: remade(concepts, encode(concepts, rows, kept), rows),
        pictures.rows.mean(axis=0),
    )
    own, spliced, mean = (float(losses[name].mean()) for name in ("own", "spliced", "mean"))
    return {
        "explained_variance": _explained(
            concepts,
            [(part.cells.reshape(-1, part.cells.shape[2]), test.cells), (part.said, test.said)],
        ),
        "l0": float(active.sum() / count),
        "dead_share": float(1 - alive.mean()),
        "loss_recovered": float(loss_recovered(own, spliced, mean)) if mean != own else np.nan,
    }


def _explained(concepts: Concepts, parts: Sequence[tuple[Float[np.ndarray, "_ D"], Csr]]) -> float:
    """Returns 1 - |Z - reconstruction|^2 / |Z - mean of Z|^2 of all rows of pairs (Z, codes)."""
    error = 0.0
    for states, codes in parts:
        for at in _starts(states, concepts):
            made = remade(concepts, codes[at].toarray(), states[at])
            error += float(np.sum((states[at].astype(np.float64) - made) ** 2))
    variance = squared_deviations((0, states) for states, _ in parts if len(states))
    return 1 - error / variance if variance > 0 else float("nan")


def _probing(ground: Ground, fit: Coded, test: Coded) -> dict[str, float]:
    found: dict[int, list[float]] = {1: [], 5: []}
    for j in range(len(ground.tasks)):
        here, there = ground.fit.known[:, j], ground.test.known[:, j]
        for count, accuracies in found.items():
            accuracies.append(
                metrics.sparse_probing(
                    fit.picture[here],
                    ground.fit.positive[here, j],
                    test.picture[there],
                    ground.test.positive[there, j],
                    count,
                )
            )
    return {f"probing_{count}": float(np.mean(values)) for count, values in found.items()}


def _perturbation(concepts: Concepts, ground: Ground, fit: Coded, test: Coded) -> dict[str, float]:
    part = ground.pictures.test
    states = pooled(part.cells, part.said, part.picture)
    directions = concept_directions(concepts)
    chosen, fractions, split = [], [], []
    for j, probe in enumerate(ground.probes):
        here = ground.fit.known[:, j]
        codes, positive = fit.coefficients[here], ground.fit.positive[here, j]
        chosen.append(best_concepts(codes, positive, TARGETED))
        own = metrics.split_concepts(codes, positive)
        split.append(len(own))
        counted = ground.test.positive[:, j] & probe.says(states)
        fractions.append(
            metrics.absorption(test.coefficients, directions, probe.weights, own, counted)
        )
    losses = metrics.accuracy_losses(
        states,
        test.coefficients,
        directions,
        chosen,
        ground.probes,
        ground.test.positive,
        ground.test.known,
    )
    several = len(losses) > 1
    return {
        "perturbation": metrics.targeted_perturbation(losses) if several else np.nan,
        "absorption": _mean(np.array(fractions)),
        "splitting": float(np.mean(split)),
    }


def _localisation(ground: Ground, fit: Coded, test: Coded) -> dict[str, float]:
    """Returns how well the best concept of each value points at the cells that show it."""
    ranked = sparse_ranks(fit.cells)
    pictures, found = ground.pictures, []
    for j, (attribute, _) in enumerate(ground.tasks):
        if attribute not in LOCATED:
            continue
        shown = [_showing(part, attribute) for part in (pictures.fit, pictures.test)]
        here, there = ground.fit.positive[:, j], ground.test.positive[:, j]
        positive = (here[:, None] & shown[0].cells).reshape(-1)
        if positive.all() or not positive.any():
            continue
        best = int(rank_auc(ranked, positive).argmax())
        where = shown[1]
        values = test.cells[:, [best]].toarray().reshape(where.cells.shape)
        points = metrics.pointing(values[there], where.region[there])
        area = pictures.test.area[there] - where.pixels[there]
        auc = metrics.picture_auc(values[there], where.pixels[there], area)
        among = (ground.test.known[:, j][:, None] & where.cells).reshape(-1)
        mine = (there[:, None] & where.cells).reshape(-1)[among]
        which = np.nan
        if mine.any() and not mine.all():
            which = rank_auc(ranks(values.reshape(-1)[among][:, None]), mine)[0]
        found.append((points.mean(), _mean(auc), which))
    columns = np.array(found or [(np.nan,) * 3]).T
    names = ("pointing", "map_auc", "map_which")
    return {name: _mean(column) for name, column in zip(names, columns, strict=True)}


class _Shown(NamedTuple):
    cells: Bool[np.ndarray, "N C"]  # that show the object, or for places anything else
    pixels: Int[np.ndarray, "N C"]  # of it in each cell
    region: Bool[np.ndarray, "N C"]  # cells whose middle is in its box


def _showing(part: Pictures, attribute: str) -> _Shown:
    seen = part.area > 0
    of_object = seen & (part.pixels >= SHOWN * part.area)
    if attribute == "place":
        return _Shown(seen & ~of_object, part.area - part.pixels, ~part.in_box)
    return _Shown(of_object, part.pixels, part.in_box)


class _Told(NamedTuple):
    values: dict[str, float]
    nulls: dict[str, float]
    best_concept: dict[str, int]
    best_attribute: list[str]


def _information(ground: Ground, fit: Coded, test: Coded) -> _Told:
    pictures = ground.pictures
    attributes = [*pictures.fit.attributes, *pictures.test.attributes]
    codes = np.concatenate([fit.picture, test.picture])
    truth = Truth(*map(np.concatenate, zip(ground.fit, ground.test, strict=True)))
    names = [name for name in VALUES if any(task.attribute == name for task in ground.tasks)]
    whole = [factorise([each[name] for each in attributes]) for name in names]
    single = [
        factorise([bool(yes) if told else None for yes, told in zip(*pair, strict=True)])
        for pair in zip(truth.positive.T, truth.known.T, strict=True)
    ]

    def tables(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (
            metrics.attribute_information(codes, whole),
            metrics.attribute_information(codes, single),
        )

    shuffled = tables(codes[np.random.default_rng(pictures.seed).permutation(len(codes))])
    found = tables(codes)
    # Many concepts that tell nothing would outweigh the few that do.
    of_whole, of_single = (
        np.where(table > null.max(axis=0), table, 0)
        for table, null in zip(found, shuffled, strict=True)
    )
    values = {
        "information": float(of_single.max(axis=0).mean()),
        "disentanglement": metrics.disentanglement(of_whole) if len(names) > 1 else np.nan,
        "completeness": metrics.completeness(of_single),
    }
    nulls = {"information": float(shuffled[1].max(axis=0).mean())}
    return _Told(
        values,
        nulls,
        {str(t): int(k) for t, k in zip(ground.tasks, of_single.argmax(axis=0), strict=True)},
        [names[int(row.argmax())] if row.any() else "" for row in of_whole],
    )


def _causal(concepts: Concepts, ground: Ground) -> tuple[float, float]:
    """Returns the mean causal score of concepts with words, and that of shuffled words."""
    known = ground.vocabulary
    index = {word: i for i, word in enumerate(known.words)}
    own = [
        list(dict.fromkeys(index[word] for word in words if word in index))
        for words in concepts.words or ()
    ]
    if not any(own):
        return np.nan, np.nan
    tokens = own_tokens(known._replace(own=own))
    room = np.full((len(own), max(OWN_TOKENS, tokens.shape[1])), -1, np.int32)
    room[:, : tokens.shape[1]] = tokens
    edits = concept_edits(concept_directions(concepts), ADD, ABLATE)
    found, plain = effects(ground.edited, edits, filled(known.tokens.tolist()), room)
    S = len(ADD) + len(ABLATE)
    moved = np.asarray(found.words).reshape(len(own), S, *np.shape(plain))
    changes = np.einsum("s,ksbw->kbw", signs(ADD, ABLATE) / S, moved)
    scored = causal_scores(
        changes,
        own,
        np.asarray(plain).mean(axis=0),
        num_shuffles=10,
        num_resamples=2,
        seed=ground.pictures.seed,
    )
    return _mean(scored.score), _mean(scored.null)
