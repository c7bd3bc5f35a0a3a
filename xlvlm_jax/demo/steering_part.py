"""The steering part of the demo: fits a coarse vector, chooses its strength and applies it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ports import VLM
from xlvlm_jax import data, evaluation
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.report.steering_figures import draw_all
from xlvlm_jax.steering import fit_coarse

SITES = (
    "language_model.model.layers.6",
    "language_model.model.layers.7",
    "language_model.model.norm",
)
ALPHAS = (0.5, 0.6, 0.7, 0.8, 1.0)
NUM_FIT, NUM_TRY, NUM_TEST = 320, 96, 320  # questions


def run_steering(
    vlm: VLM,
    run: Path,
    pictures: Path,
    *,
    source: str = "yes",
    target: str = "no",
    sites: Sequence[str] = SITES,
    alphas: Sequence[float] = ALPHAS,
    num_samples: tuple[int, int, int] = (NUM_FIT, NUM_TRY, NUM_TEST),
    stage: Callable[[str], Callable[..., None]] | None = None,
) -> dict[str, Any]:
    """Fits, chooses and evaluates a vector that steers answers from source to target.

    Writes into `run`: `steering-features` (the states that the vectors are fitted on), the chosen
    vector as `steering/<source>-<target>.safetensors`, and its evaluation with figures, which the
    report shows, as the directory `steering/<source>-<target>`.

    Args:
        vlm: the embedded model.
        run: the run directory.
        pictures: drawn scenes in the layout of VQAv2. Vectors are fitted on questions of the
            training split, site and strength are chosen on other questions of it, and the choice
            is tested on the test split.
        source, target: the answers to steer from and to.
        sites, alphas: the sites and strengths to try.
        num_samples: numbers of questions to fit on, to choose on and to test on.
        stage: stage(name) starts a progress bar and returns advance(done, total, rows=None).

    Returns:
        The summary that `evaluate` writes.
    """
    fitted, tried, tested = num_samples
    asked = data.load("vqav2", pictures, "train")
    settings = ExtractionSettings(
        tuple(sites), Selection("before-special-tokens"), max_new_tokens=3, batch_size=64
    )
    directory = run / "steering-features"
    advance = None if stage is None else stage("extracting answers")
    extract(vlm, asked[:fitted], directory, settings, progress=advance)
    features = Features.open(directory)
    vectors = [fit_coarse(features, site, [source], [target]) for site in sites]

    task = evaluation.Questions((source,), (target,))
    options: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 32, "stage": stage}
    others: list[Sample] = asked[fitted : fitted + tried]
    name = f"{source}-{target}"
    summary = evaluation.evaluate_steering(
        vlm,
        data.load("vqav2", pictures, "test")[:tested],
        task,
        run / "steering" / name,
        evaluation.grid(vectors, alphas),
        others=others,
        split="train",
        instruction=f"Answer {target}.",
        **options,
    )
    (site,) = summary["sweep"]["chosen"]["sites"]
    chosen = next(vector for vector in vectors if vector.site == site)
    chosen.save(run / "steering" / f"{name}.safetensors")
    draw_all(summary, run / "steering" / name)
    return summary


def describe(summary: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures that the demo's summary shows."""
    steered = summary["conditions"]["steered"]
    changes, scores = steered["changes"], steered["scores"]
    plain = summary["conditions"]["plain"]["scores"]
    return {
        "site": steered["sites"][0],
        "alpha": steered["alpha"],
        "moved": changes["moved_share"],
        "others changed": changes["others_changed_share"],
        "accuracy": {kind: (plain[kind]["official"], scores[kind]["official"]) for kind in plain},
    }
