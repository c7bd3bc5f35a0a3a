"""`xlvlm demo`: the full pipeline on the embedded model, from drawn pictures to one page."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ports
from ports.models import clip
from xlvlm_jax import data
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.scores.attributes import as_json, score_attributes
from xlvlm_jax.concepts.scores.comparison import score_run
from xlvlm_jax.concepts.scores.scorer import DictionaryScores
from xlvlm_jax.concepts.stage import decompose_features, ground_concepts
from xlvlm_jax.data import scenes, select
from xlvlm_jax.data.scenes.language import caption_words
from xlvlm_jax.demo import embedded
from xlvlm_jax.demo.shift_part import run_shift
from xlvlm_jax.demo.steering_part import run_steering
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.metrics import AttributeScore
from xlvlm_jax.report import score_figures, write_report
from xlvlm_jax.shift import ShiftAnalysis
from xlvlm_jax.storage import atomic, versions

FINAL = "language_model.model.norm"
MIDDLE = "language_model.model.layers.2"  # the layer, of 8, that separates count and colour best
NUM_TRAIN, NUM_TEST = 2400, 800  # pictures; about one in four shows a dog

Scores = dict[str, dict[str, dict[str, AttributeScore]]]  # site -> split -> attribute


class Result(NamedTuple):
    """The results of the demo."""

    concepts: dict[str, Concepts]  # site -> concepts
    scores: Scores
    dictionaries: list[DictionaryScores]  # methods and numbers of concepts, at the final norm
    shift: ShiftAnalysis  # to the model fine-tuned to name colours
    steering: dict[str, Any]  # summary of the evaluation of steering answers from yes to no
    seconds: dict[str, float]  # stage -> duration
    rows: dict[str, int]  # split -> number of rows
    report: Path


def run(
    output: Path,
    *,
    word: str = "dog",
    num_concepts: int = 20,
    seed: int = 0,
    stage: Callable[[str], Callable[..., None]],
) -> Result:
    """Runs all stages into a run directory.

    Args:
        output: the run directory; an interrupted run in it is resumed.
        word: the token of interest; only pictures whose captions contain it are used.
        num_concepts: number of concepts, K.
        seed: random seed of the pictures and the solver.
        stage: stage(name) starts a progress bar and returns advance(done, total, rows=None).

    Returns:
        The results.

    Raises:
        ValueError: no caption contains the word, or num_concepts is below 1; nothing is drawn.
    """
    if word not in caption_words():
        raise ValueError(
            f"no caption of the drawn scenes contains {word!r}; expected "
            f"{', '.join(scenes.KINDS)}, or another word of the captions, such as red or happy"
        )
    if num_concepts < 1:
        raise ValueError(f"the number of concepts must be at least 1, got {num_concepts}")
    output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name], began = round(now - began, 2), now

    pictures = output / "scenes"
    if not (pictures / "dataset_coco.json").exists():  # written last
        scenes.write(
            pictures, train=NUM_TRAIN, test=NUM_TEST, seed=seed, progress=stage("drawing scenes")
        )
    lap("draw")

    vlm = ports.load(embedded.LLAVA)
    forms = (word, f"{word}s", f"{word}es")  # the plural counts too
    settings = ExtractionSettings(
        sites=(FINAL, MIDDLE),
        selection=Selection("class", ",".join(forms)),
        batch_size=64,
    )
    features, samples = {}, {}
    for split, name in (("train", "features"), ("test", "test-features")):
        samples[split] = select.containing(data.load("coco", pictures, split), forms)
        source = {"dataset": "scenes", "split": split, "containing": word, "seed": seed}
        advance = stage(f"extracting {split}")
        extract(vlm, samples[split], output / name, settings, source=source, progress=advance)
        features[split] = Features.open(output / name)
    lap("extract")

    concepts: dict[str, Concepts] = {}
    scores: Scores = {}
    advance = stage("learning, grounding concepts")
    for number, site in enumerate(settings.sites, start=1):
        directory = output / ("concepts" if site == FINAL else f"concepts-{site}")
        decompose_features(features["train"], directory, num_concepts, site=site, seed=seed)
        concepts[site] = ground_concepts(directory, vlm, features["train"])
        scores[site] = {
            split: score_attributes(concepts[site], features[split]) for split in features
        }
        advance(number, len(settings.sites))
    lap("concepts")

    rows = {split: len(f.tokens) for split, f in features.items()}
    shift = run_shift(
        vlm,
        output,
        samples["train"],
        settings,
        site=FINAL,
        num_concepts=num_concepts,
        seed=seed,
        stage=stage,
    )
    lap("shift")

    attributes = {
        site: {split: as_json(score) for split, score in splits.items()}
        for site, splits in scores.items()
    }
    known = {"version": versions.VERSION, "attributes": attributes}
    atomic.write(output / "scores.json", json.dumps(known, indent=2) + "\n")
    dictionaries = score_run(
        output,
        vlm,
        clip.load_dual_encoder(embedded.CLIP),
        site=FINAL,
        num_concepts=sorted({max(num_concepts // 4, 1), num_concepts}),
        seed=seed,
        progress=stage("comparing methods"),
    ).scores
    score_figures.draw_all(dictionaries, output)
    lap("scores")
    steering = run_steering(vlm, output, pictures, stage=stage)
    lap("steering")
    description = _description(word, num_concepts, seed, rows, seconds)
    atomic.write(output / "run.json", json.dumps(description, indent=2) + "\n")
    report = write_report(output)
    lap("report")
    return Result(concepts, scores, dictionaries, shift, steering, seconds, rows, report)


def _description(
    word: str, num_concepts: int, seed: int, rows: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    packages = ("xlvlm-jax", "jax", "flax", "transformers", "numpy")
    return {
        "model": "the embedded LLaVA",
        "data": f"{NUM_TRAIN} drawn scenes to learn from, {NUM_TEST} to test on",
        "token of interest": word,
        "sites": [FINAL, MIDDLE],
        "method": "snmf",
        "concepts": num_concepts,
        "rows": rows,
        "seed": seed,
        "seconds": dict(seconds),
        "versions": {name: _version(name) for name in packages}
        | {"python": platform.python_version()},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # a source tree that runs in place
