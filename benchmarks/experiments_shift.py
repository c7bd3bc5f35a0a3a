"""The shift experiment of the paper on the embedded model and its three adapters.

    python -m benchmarks.experiments_shift

As in "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (ICCV 2025): states
of the token "dog" at the final norm under the original and each fine-tuned model, 20 concepts of
each by k-means, shift vectors, and how many words shifted concepts share with the fine-tuned ones.
The embedded model has a vocabulary of 518 tokens, so words overlap by chance as well: the last
column is what original concepts share with fine-tuned ones that are not their match.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import ports
from xlvlm_jax import data
from xlvlm_jax.data import scenes, select
from xlvlm_jax.demo import embedded, pipeline
from xlvlm_jax.demo.shift_part import describe, run_shift
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.report.shift_figures import plot_overlap, plot_recovery, pooled_correlation
from xlvlm_jax.shift import ShiftAnalysis
from xlvlm_jax.storage import atomic

# Mean T-Overlap of original and shifted concepts, LLaVA-1.5, read off the paper's plot.
PAPER = {"color": (0.46, 0.73), "place": (0.56, 0.78), "mood": (0.42, 0.79)}
PAPER_CORRELATION = (0.40, 0.0016)  # consistency with recovery over the three, and its p-value


def run(
    output: Path,
    adapters: dict[str, Path],
    *,
    word: str = "dog",
    pictures: int = pipeline.NUM_TRAIN,
    num_concepts: int = 20,
    method: str = "kmeans",
    site: str = pipeline.FINAL,
    seeds: int = 1,
    console: Console,
) -> dict[int, dict[str, ShiftAnalysis]]:
    """The analyses, by seed of the decompositions and by adapter; figures of the first seed."""
    directory = output / "scenes"
    if not (directory / "dataset_coco.json").exists():
        scenes.write(directory, train=pictures, seed=0)
    vlm = ports.load(embedded.LLAVA)
    settings = ExtractionSettings(
        sites=(site,), selection=Selection("class", f"{word},{word}s"), batch_size=64
    )
    samples = select.containing(data.load("coco", directory, "train"), (word, f"{word}s"))
    extract(vlm, samples, output / "features", settings)
    analyses: dict[int, dict[str, ShiftAnalysis]] = {}
    for seed in range(seeds):
        for name, adapter in adapters.items():
            console.print(f"{name}, seed {seed} ...", style="dim")
            analyses.setdefault(seed, {})[name] = run_shift(
                vlm,
                output,
                samples,
                settings,
                site=site,
                adapter=adapter,
                num_concepts=num_concepts,
                method=method,
                seed=seed,
                name=f"shift-{name}",
            )
    plot_overlap(analyses[0], output / "overlap.svg")
    plot_recovery(analyses[0], output / "recovery.svg")
    return analyses


def table(analyses: dict[int, dict[str, ShiftAnalysis]]) -> Table:
    """T-Overlap beside the paper's; means over seeds, with the lowest gain of a seed."""
    shown = Table(title="Mean T-Overlap with the fine-tuned concepts, %", box=None)
    for heading in (
        "",
        "original",
        "shifted",
        "gain",
        "lowest",
        "not matched",
        "images",
        "shifted",
    ):
        shown.add_column(heading, justify="right")
    for heading in ("paper: original", "shifted", "gain"):
        shown.add_column(heading, justify="right")
    for name in analyses[0]:
        runs = [by_name[name] for by_name in analyses.values()]
        words = np.array([[each.mean_overlap(k) for k in ("original", "shifted")] for each in runs])
        images = np.mean(
            [[each.mean_overlap(k, "images") for k in ("original", "shifted")] for each in runs], 0
        )
        chance = np.mean([each.chance()["mismatched"] for each in runs])
        gains = words[:, 1] - words[:, 0]
        figures = [*words.mean(0), gains.mean(), gains.min(), chance, *images]
        if paper := PAPER.get(name):
            figures += [*paper, paper[1] - paper[0]]
        shown.add_row(name, *(f"{100 * figure:.0f}" for figure in figures))
    return shown


def main() -> None:
    """Parse, run, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--adapters", nargs="+", default=["color", "place", "mood"])
    parser.add_argument("--word", default="dog", help="token of interest")
    parser.add_argument("--pictures", type=int, default=pipeline.NUM_TRAIN)
    parser.add_argument("--num-concepts", type=int, default=20)
    parser.add_argument("--method", default="kmeans")
    parser.add_argument("--seeds", type=int, default=3, help="decompositions of each")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/shift"))
    arguments = parser.parse_args()
    adapters = {
        Path(adapter).name: embedded.ADAPTERS.get(adapter, Path(adapter))
        for adapter in arguments.adapters
    }
    console = Console(markup=False)
    console.width = max(console.width, 120)
    analyses = run(
        arguments.output,
        adapters,
        word=arguments.word,
        pictures=arguments.pictures,
        num_concepts=arguments.num_concepts,
        method=arguments.method,
        seeds=arguments.seeds,
        console=console,
    )
    console.print(table(analyses))
    first = next(iter(next(iter(analyses.values())).values()))
    console.print(
        f"random words share {100 * first.chance()['random']:.1f} % (of {first.vocabulary})"
    )
    result: dict[str, Any] = {"paper": {"overlap": PAPER, "correlation": PAPER_CORRELATION}}
    for seed, by_name in analyses.items():
        pooled = {
            f"{a}-{b}": pooled_correlation(by_name, a, b)._asdict()
            for a, b in (("consistency", "recovery"), ("magnitude", "recovery"))
        }
        result[f"seed {seed}"] = {"pooled": pooled} | {
            name: describe(analysis) for name, analysis in by_name.items()
        }
        for pair, found in pooled.items():
            said = f"seed {seed}: {pair.replace('-', ' and ')}, all together: "
            said += f"r = {found['r']:.2f}, p = {found['p_value']:.2g}"
            console.print(f"{said} ({found['count']} concepts)")
    console.print(f"paper: consistency and recovery r = {PAPER_CORRELATION[0]:.2f}, p = .0016")
    atomic.write(arguments.output / "shift.json", json.dumps(result, indent=1) + "\n")
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
