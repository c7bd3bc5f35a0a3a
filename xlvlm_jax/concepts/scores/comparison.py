"""A table over methods and numbers of concepts: decompose, ground, score, each on the same rows.

"random" is not a decomposition: it is the first other method's dictionary with random words, as
many per concept, and only gets scores that depend on words.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ports import VLM
from ports.models.clip import DualEncoder
from xlvlm_jax import metrics
from xlvlm_jax.concepts.decomposition import decompose
from xlvlm_jax.concepts.grounding import ground_text, is_before_norm, unembed_of
from xlvlm_jax.concepts.methods import ALIASES, METHODS, TRAINED
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.scores.records import DictionaryScores, mean_over_seeds
from xlvlm_jax.concepts.scores.scorer import Scorer
from xlvlm_jax.data import files
from xlvlm_jax.data.word_rules import Rules
from xlvlm_jax.features.manifest import model_at
from xlvlm_jax.features.reader import Features, choose_site
from xlvlm_jax.storage import atomic, outputs, pictures, versions
from xlvlm_jax.storage.names import distinct_ends
from xlvlm_jax.storage.same_model import require_model
from xlvlm_jax.storage.tensors import as_bytes

FILE, ARRAYS = "scores.json", "scores.safetensors"
RANDOM = "random"
ALL_METHODS = (*METHODS, RANDOM)


def require_methods(
    methods: Sequence[str], num_concepts: Sequence[int], num_seeds: int
) -> list[str]:
    """Checks what `compare` is asked for, which needs no model.

    Args:
        methods, num_concepts, num_seeds: as for `compare`.

    Returns:
        The methods to learn, without "random".

    Raises:
        ValueError: a method is unknown, "random" is the only one, or a number is less than 1.
    """
    learnt = [method for method in dict.fromkeys(methods) if method != RANDOM]
    if not learnt:
        raise ValueError(
            "'random' replaces the words of another method's concepts; add one of "
            f"{', '.join(METHODS)}"
        )
    if unknown := [name for name in learnt if name not in (*METHODS, *ALIASES, *TRAINED)]:
        raise ValueError(
            f"unknown method {unknown[0]!r}; expected some of {', '.join(ALL_METHODS)}"
        )
    if num_seeds < 1:
        raise ValueError(f"the number of seeds must be at least 1, got {num_seeds}")
    if not num_concepts or min(num_concepts) < 1:
        given = ", ".join(map(str, num_concepts)) or "none"
        raise ValueError(f"the numbers of concepts must be at least 1, got {given}")
    return learnt


def compare(
    train: Features,
    vlm: VLM,
    scorer: Scorer,
    *,
    methods: Sequence[str] = ALL_METHODS,
    num_concepts: Sequence[int] = (5, 10, 20, 50),
    num_seeds: int = 2,
    average: bool = False,
    num_words: int = 10,
    num_candidates: int = 50,
    through_norm: bool | None = None,
    rules: Rules = "default",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[DictionaryScores]:
    """Scores every method with every number of concepts.

    Args:
        train: the rows to decompose, from the scorer's site.
        vlm: the model whose head reads the words.
        scorer: holds the rows to score on, preferably not the training rows.
        methods: methods of `decompose`, and "random"; sparse autoencoders only if they are named.
        num_concepts: each K.
        num_seeds: number of decompositions per K, for the stability; the first is scored.
        average: score each of them; scores are means over the seeds, with their spread.
        num_words: as for `ground_text`.
        num_candidates: as for `ground_text`.
        through_norm: whether words are read through the final norm; by default they are for sites
            before it.
        rules: which tokens count as words, see `ground_text`.
        seed: random seed of the first decomposition.
        progress: called after each dictionary with (done, total).

    Returns:
        one record per dictionary, ordered by number of concepts and then by method.

    Raises:
        ValueError: as for `decompose`, the rows come from another model or have another width, or
            "random" is the only method.
    """
    learnt = require_methods(methods, num_concepts, num_seeds)
    if RANDOM in methods and scorer.clip is None and scorer.bert is None:
        raise ValueError("random words are scored by CLIP or BERT; provide one, or omit 'random'")
    Z = train.matrix(choose_site(train, scorer.site))
    source = {"site": scorer.site, **model_at(train.manifest, scorer.site)}
    scorer.check_source(source)
    if through_norm is None:
        through_norm = is_before_norm(vlm, scorer.site)
    require_model(source, vlm, f"{train.path} holds states of")
    counts = list(dict.fromkeys(num_concepts))
    found: dict[tuple[str, int], DictionaryScores] = {}

    def keep(method: str, K: int, scores: DictionaryScores) -> None:
        found[method, K] = scores
        if progress is not None:
            progress(len(found), len(set(methods)) * len(counts))

    for method in learnt:
        # All numbers of concepts side by side: one program per method.
        runs = [
            decompose(Z, counts, method, key=jax.random.key(seed + i)) for i in range(num_seeds)
        ]
        for K, found_here in zip(counts, zip(*runs, strict=True), strict=True):
            scored = []
            for each in found_here if average else found_here[:1]:
                words = ground_text(
                    np.asarray(each.components),
                    unembed_of(vlm, scorer.site),
                    vlm.tokenizer,
                    num_words,
                    num_candidates,
                    through_norm=through_norm,
                    rules=rules,
                )
                concepts = dataclasses.replace(
                    each, words=words, through_norm=through_norm, source=source
                )
                others = [other for other in found_here if other is not each]
                scored.append(scorer.score(concepts, name=f"{method}-{K}", others=others))
            keep(method, K, mean_over_seeds(scored))
    if RANDOM in methods:
        for K in counts:
            row = scorer.random_words(found[learnt[0], K], name=f"{RANDOM}-{K}")
            keep(RANDOM, K, row)
    return [found[method, K] for K in counts for method in dict.fromkeys(methods)]


def load_dictionaries(directories: Sequence[Path], *, with_words: bool) -> list[Concepts]:
    """Loads the concepts to score.

    Args:
        directories: directories of concepts.
        with_words: whether words are scored, so that each concept needs them.

    Raises:
        ValueError: concepts that need words have none, or as `Concepts.load`.
    """
    loaded = [Concepts.load(directory) for directory in directories]
    for directory, each in zip(directories, loaded, strict=True):
        if with_words and each.words is None:
            raise ValueError(f"{directory} has no words to score; run `xlvlm ground` first")
    return loaded


def names_of(directories: Sequence[Path]) -> list[str]:
    """Returns a name for each directory: the shortest end of its path that no other has.

    Args:
        directories: directories of concepts.

    Raises:
        ValueError: a directory is given twice.
    """
    names = distinct_ends(directories)
    for name, count in collections.Counter(names).items():
        if count > 1:
            path = os.path.abspath(directories[names.index(name)])
            raise ValueError(f"{path} is given twice; give each directory of concepts once")
    return names


class Run(NamedTuple):
    """Result of `score_run`."""

    scores: list[DictionaryScores]
    path: Path


def score_run(
    run: Path,
    vlm: VLM,
    clip: DualEncoder,
    *,
    bert: metrics.BertScorer | None = None,
    site: str | None = None,
    methods: Sequence[str] = ALL_METHODS,
    num_concepts: Sequence[int] = (5, 10, 20),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Compares methods on a run directory: learnt on features/, scored on test-features/.

    The scores are added to scores.json, which the report shows.

    Args:
        run: the run directory.
        vlm: the model whose head reads the words.
        clip: scores words and images.
        bert: scores words and captions; None for no BERTScore.
        site: site whose states to use; optional if there is only one.
        methods: as for `compare`.
        num_concepts: as for `compare`.
        seed: random seed.
        progress: as for `compare`.

    Raises:
        ValueError: as for `compare` and `Scorer`.
    """
    train = Features.open(run / "features")
    scorer = Scorer(Features.open(run / "test-features"), site, clip=clip, bert=bert, seed=seed)
    options = {"methods": methods, "num_concepts": num_concepts, "seed": seed}
    rows = compare(train, vlm, scorer, progress=progress, **options)
    return Run(rows, write_scores(run, scorer.describe(), rows))


def require_no_scores(directory: Path, overwrite: bool) -> None:
    """Checks, before any work, that no scores would be overwritten, and that they can be written.

    Raises:
        FileExistsError: scores.json already has scores of dictionaries, or the directory is a file.
        ValueError: scores.json is not a JSON object.
        OSError: the directory can't be written.
    """
    outputs.require_writable(directory)
    if "dictionaries" in _known(directory) and not overwrite:
        raise FileExistsError(
            f"{directory / FILE} already has scores of dictionaries; choose another output, or "
            "replace them with --overwrite"
        )


def _known(directory: Path) -> dict[str, Any]:
    """Returns the contents of scores.json; {} if it does not exist."""
    path = directory / FILE
    known = files.read_json(path) if path.exists() else {}
    if not isinstance(known, dict):
        raise ValueError(f"{path}: expected a JSON object; remove it or choose another output")
    versions.require(path, known, "choose another output")
    return known


def write_scores(
    directory: Path, description: Mapping[str, Any], rows: Sequence[DictionaryScores]
) -> Path:
    """Writes the scores as "dictionaries" in scores.json, keeping its other entries.

    Each sample's scores and the overlap of each two concepts go to scores.safetensors, as arrays
    "NAME/clip top-1", "NAME/overlap" and so on.

    Raises:
        ValueError: scores.json is not a JSON object, or two dictionaries have one name.
    """
    named = collections.Counter(row.name for row in rows)
    if twice := [name for name, count in named.items() if count > 1]:
        raise ValueError(f"several dictionaries are named {twice[0]!r}; give each another name")
    path, known = directory / FILE, _known(directory)
    directory.mkdir(parents=True, exist_ok=True)
    known["version"] = versions.VERSION
    known["scored on"] = pictures.store_features(description, directory)
    known["dictionaries"] = [row.to_dict() for row in rows]
    arrays = {
        f"{row.name}/{key}": np.asarray(values, np.float32)
        for row in rows
        for key, values in row.arrays.items()
    }
    atomic.write(directory / ARRAYS, as_bytes(arrays))
    atomic.write(path, json.dumps(known, indent=2) + "\n")
    return path
