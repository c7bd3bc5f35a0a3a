"""`xlvlm demo`: the full pipeline on the embedded model, from drawn pictures to one page."""

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ports
from ports.models import clip
from xlvlm_jax import data
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.scores import comparison
from xlvlm_jax.concepts.scores.attributes import as_json, score_attributes
from xlvlm_jax.concepts.scores.comparison import score_run
from xlvlm_jax.concepts.scores.scorer import DictionaryScores
from xlvlm_jax.concepts.stage import decompose_features, ground_concepts
from xlvlm_jax.data import files, scenes, select
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

MODEL = "the embedded LLaVA"
STARTED = "demo.json"  # the arguments, written first
# What a run writes besides it, run.json first: without it, a run is not finished.
WRITTEN = (
    "run.json",
    "report.html",
    "features",
    "test-features",
    "concepts",
    f"concepts-{MIDDLE}",
    "shift",
    "shift-features",
    "scores.json",
    comparison.ARRAYS,
    "scores.svg",
    "steering-features",
    "steering/yes-no",
    "steering/yes-no.safetensors",
    "scenes",
)

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
    overwrite: bool = False,
    stage: Callable[[str], Callable[..., None]],
) -> Result:
    """Runs all stages into a run directory.

    Args:
        output: the run directory; an interrupted run in it is resumed.
        word: the token of interest; only pictures whose captions contain it are used.
        num_concepts: number of concepts, K.
        seed: random seed of the pictures and the solver.
        overwrite: replace what a demo left in the run directory.
        stage: stage(name) starts a progress bar and returns advance(done, total, rows=None).

    Returns:
        The results.

    Raises:
        ValueError: no caption contains the word, num_concepts is below 1, or an interrupted run had
            other arguments; nothing is drawn.
    """
    if word not in caption_words():
        raise ValueError(
            f"no caption of the drawn scenes contains {word!r}; expected "
            f"{', '.join(scenes.KINDS)}, or another word of the captions, such as red or happy"
        )
    if num_concepts < 1:
        raise ValueError(f"the number of concepts must be at least 1, got {num_concepts}")
    asked = {"version": versions.VERSION, "word": word, "num_concepts": num_concepts, "seed": seed}
    resumed = _begin(output, asked, overwrite)
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name], began = round(now - began, 2), now

    pictures = output / "scenes"
    if not resumed or not (pictures / "dataset_coco.json").exists():  # written last
        scenes.write(
            pictures,
            train=NUM_TRAIN,
            test=NUM_TEST,
            seed=seed,
            overwrite=True,
            progress=stage("drawing scenes"),
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

    rows = {split: f.num_rows for split, f in features.items()}
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


def _begin(output: Path, asked: dict[str, Any], overwrite: bool) -> bool:
    """Prepares a run directory; returns whether it holds an interrupted run of these arguments."""
    started = output / STARTED
    if overwrite and _is_demo(output):
        # The record comes last: an interruption here leaves none of another run unnamed.
        for name in (*WRITTEN, STARTED):
            path = output / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    if not started.is_file():
        output.mkdir(parents=True, exist_ok=True)
        atomic.write(started, json.dumps(asked, indent=2) + "\n")
        return False
    before = files.read_json(started)
    if not isinstance(before, dict):
        raise ValueError(f"{started}: expected a JSON object; replace the demo with --overwrite")
    versions.require(started, before, "replace the demo with --overwrite")
    for name, value in asked.items():
        if before.get(name) != value:
            raise ValueError(
                f"{output} holds an interrupted demo with {name} {before.get(name)!r}, now it is "
                f"{value!r}; give the same arguments, another --output, or --overwrite"
            )
    return True


def _is_demo(output: Path) -> bool:
    """Returns whether a directory holds a demo, of this release or an earlier one."""
    if (output / STARTED).is_file():
        return True
    try:
        described = files.read_json(output / "run.json")
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(described, dict) and described.get("model") == MODEL


def _description(
    word: str, num_concepts: int, seed: int, rows: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    packages = ("xlvlm-jax", "jax", "flax", "transformers", "numpy")
    return {
        "model": MODEL,
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
