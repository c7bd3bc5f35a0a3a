"""The shift part of the demo: compares a fine-tuned embedded model with the original."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ports import VLM
from xlvlm_jax.concepts.stage import decompose_features
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.demo import embedded
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.reader import Features
from xlvlm_jax.report.shift_figures import draw_all
from xlvlm_jax.shift import ShiftAnalysis, shift_features


def run_shift(
    vlm: VLM,
    run: Path,
    samples: Sequence[Sample],
    settings: ExtractionSettings,
    *,
    site: str,
    adapter: str | Path = "color",
    num_concepts: int = 20,
    method: str = "kmeans",
    seed: int = 0,
    name: str = "shift",
    stage: Callable[[str], Callable[..., None]] | None = None,
) -> ShiftAnalysis:
    """Extracts the fine-tuned model's states and writes the analysis of the shift.

    Args:
        vlm: the original model.
        run: the run directory; its `features` hold the original states of `samples`.
        samples, settings: what `features` were extracted from, and how.
        site: the site whose states to use; one of the features' sites.
        adapter: one of the embedded model's adapters ("color", "place", "mood"), or a directory.
        num_concepts, method, seed: as for `decompose_features`, for both dictionaries; the paper
            learns 20 concepts with k-means.
        name: the directory of the shift within `run`; `<name>-features` holds the fine-tuned
            states.
        stage: stage(name) starts a progress bar and returns advance(done, total, rows=None).

    Returns:
        The analysis.
    """
    original = Features.open(run / "features")
    tuned = vlm.with_adapter(embedded.find_adapter(adapter))
    advance = None if stage is None else stage("extracting fine-tuned")
    # At all sites of the original features: the program for them is compiled already.
    extract(tuned, samples, run / f"{name}-features", settings, progress=advance)
    finetuned = Features.open(run / f"{name}-features")
    directory = run / name
    concepts = decompose_features(
        original, directory / "original-concepts", num_concepts, method, site=site, seed=seed
    )
    analysis = shift_features(
        original, finetuned, concepts, vlm, directory, finetuned_vlm=tuned, seed=seed
    )
    draw_all(analysis, directory, Path(adapter).name)
    return analysis


def describe(analysis: ShiftAnalysis) -> dict[str, Any]:
    """Returns the figures that a summary shows: mean overlaps, chance and correlations."""
    summary = analysis.summary()
    return {name: summary[name] for name in ("words overlap", "images overlap", "correlations")}
