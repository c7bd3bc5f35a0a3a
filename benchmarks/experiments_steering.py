"""The steering experiments of the paper on the embedded model; site and strength chosen on val.

    python -m benchmarks.experiments_steering

As in "Analyzing Fine-tuning Representation Shift for Multimodal LLMs Steering" (ICCV 2025, section
5): answers from yes to no, one to three, white to black, and captions towards words of a class, by
coarse vectors. Beside the paper's questions: what a vector does without its part along the other
pairs' ("freed"); what mirroring the states does, instead of adding to them; what an instruction in
the prompt does; what a learnt vector does at the same off-target change; and whether captions can
be steered away from a class. A summary, every trial and the figures of each experiment go into its
directory.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import ports
from benchmarks import measure
from xlvlm_jax import Features, SteeringVector, data, evaluation, steering
from xlvlm_jax.data import Sample, scenes
from xlvlm_jax.data.words import class_words
from xlvlm_jax.demo import embedded
from xlvlm_jax.evaluation import Captions, Condition, Questions, Trial
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.metrics.captions import holding
from xlvlm_jax.report.steering_figures import draw_all

LAYERS = tuple(f"language_model.model.layers.{i}" for i in (2, 4, 5, 6, 7))
SITES = (*LAYERS, "language_model.model.norm")
LATE = SITES[-3:]
PAIRS = (("yes", "no"), ("one", "three"), ("white", "black"))
# Strengths: of adding the vector, and what is left of it; and of ablation (2 mirrors the states).
ADDED, MIRRORED = (0.5, 0.6, 0.7, 0.85, 1.0), (1.5, 2.0)
FREED = (0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
OFF_TARGET = (0.01, 0.03, 0.1)  # shares of the other answers that change
PARTS = ("questions", "learned", "captions")
CLASSES = ("colour", "mood", "place")
# LLaVA-1.5 on 5,000 questions of VQAv2: accuracy of yes/no, number and other; answers that are a
# source word, and a target word, less those before.
PAPER = {
    "none": (90.82, 58.47, 71.10, 0, 0),
    "yes -> no": (69.03, 56.82, 68.99, -828, 828),
    "one -> three": (90.71, 54.52, 71.12, -215, 144),
    "white -> black": (90.40, 58.42, 58.36, -98, 441),
}
OPTIONS = {"max_new_tokens": 3, "batch_size": 32}


def of_each_type(samples: Sequence[Sample], source: str, count: int) -> list[Sample]:
    """So many questions whose answer is the source, and so many others of each answer type."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        is_source = sample.metadata["answer"] == source
        groups.setdefault("source" if is_source else sample.metadata["answer_type"], []).append(
            sample
        )
    return [sample for group in groups.values() for sample in group[:count]]


def questions(
    vlm: ports.VLM, features: Features, val: list[Sample], test: list[Sample], output: Path
) -> dict[str, dict[str, Any]]:
    """{pair: summary}: each coarse vector added, mirrored, and the target asked for in words."""
    coarse = {
        pair: [steering.fit_coarse(features, site, [pair[0]], [pair[1]]) for site in SITES]
        for pair in PAIRS
    }
    summaries = {}
    for (source, target), vectors in coarse.items():
        task = Questions((source,), (target,))
        others = [coarse[pair] for pair in PAIRS if pair != (source, target)]
        late = [i for i, site in enumerate(SITES) if site in LATE]
        freed = [without(vectors[i], [other[i] for other in others]) for i in late]
        tried = {
            "added": evaluation.grid(vectors, ADDED),
            "freed": evaluation.grid(freed, FREED),
            "mirrored": evaluation.grid([vectors[i] for i in late], MIRRORED, edit="ablate"),
        }
        some = of_each_type(val, source, 60)
        kinds = [name for name, conditions in tried.items() for _ in conditions]
        every = [condition for conditions in tried.values() for condition in conditions]
        _, trials = evaluation.select(vlm, some, task, every, **OPTIONS)
        of = {
            name: [t for kind, t in zip(kinds, trials, strict=True) if kind == name]
            for name in tried
        }
        chosen = {
            name: evaluation.choose(own, task.wanted, task.max_cost) for name, own in of.items()
        }
        conditions = {name: trial.condition for name, trial in chosen.items()}
        conditions["instruction"] = Condition(instruction=f"Answer {target}.")
        # The curve is that of what the paper does: adding.
        sweep = evaluation.describe_sweep(
            chosen["added"], of["added"], task, split="val", samples=len(some)
        )
        directory = output / f"{source}-{target}"
        summary = evaluation.evaluate(
            vlm, test, task, directory, conditions, sweep=sweep, **OPTIONS
        )
        draw_all(summary, directory)
        summary["trials"] = {name: [t.describe() for t in own] for name, own in of.items()}
        summaries[f"{source} -> {target}"] = summary
    return summaries


def without(vector: SteeringVector, others: Sequence[SteeringVector]) -> SteeringVector:
    """The vector without its part in the span of others of the same site."""
    basis = np.stack([other.vector for other in others], axis=1)
    part = basis @ np.linalg.lstsq(basis, vector.vector)[0]
    return dataclasses.replace(vector, vector=vector.vector - part)


def learned(
    vlm: ports.VLM, features: Features, train: list[Sample], test: list[Sample]
) -> list[dict[str, Any]]:
    """The share of source answers moved by coarse and learnt vectors, at equal off-target change.

    Both are added at the same site, with strengths in small steps; the strongest counts that
    changes at most such a share of the other answers, or costs the other answer types at most five
    points of accuracy.
    """
    site, rows = SITES[3], []
    for source, target in PAIRS:
        taught = steering.lesson(features, [source], target, num_samples=96, keep=2)
        vectors = {
            "coarse": steering.fit_coarse(features, site, [source], [target]),
            "learned": steering.fit_learned(vlm, taught.samples, taught.wanted, site),
        }
        if (source, target) == PAIRS[0]:
            vectors["L2S"] = fit_shift(vlm, train, site)
        alphas = np.linspace(0.5, 1.6, 12).tolist()
        conditions = evaluation.grid(list(vectors.values()), alphas)
        some = of_each_type(test, source, 60)
        task = Questions((source,), (target,))
        _, trials = evaluation.select(vlm, some, task, conditions, **OPTIONS)
        for number, name in enumerate(vectors):
            own = trials[number * len(alphas) : (number + 1) * len(alphas)]
            row = {"pair": f"{source} -> {target}", "vector": name, "samples": len(some)}
            row |= {
                f"{limit:.0%}": _strongest(t for t in own if t.off_target <= limit)
                for limit in OFF_TARGET
            }
            row["5 points"] = _strongest(t for t in own if t.cost <= task.max_cost)
            rows.append(row | {"trials": [trial.describe() for trial in own]})
    return rows


def fit_shift(vlm: ports.VLM, train: list[Sample], site: str, count: int = 400) -> steering.L2S:
    """L2S from yes to no: towards the state of a question about the same picture answered by no.

    Questions with other answers stay as they are, which teaches it when to leave one alone.
    """
    pictures: dict[Path, list[Sample]] = {}
    for sample in train:
        pictures.setdefault(Path(sample.image), []).append(sample)
    pairs = []
    for asked in pictures.values():
        yes, no = (
            [sample for sample in asked if sample.metadata["answer"] == answer]
            for answer in ("yes", "no")
        )
        pairs += [(sample, other.prompt) for sample, other in zip(yes, no, strict=False)]
        rest = [sample for sample in asked if sample.metadata["answer"] != "yes"]
        pairs += [(sample, sample.prompt) for sample in rest[:1]]
    order = np.random.default_rng(0).permutation(len(pairs))[:count]
    samples = [pairs[i][0] for i in order]
    return steering.fit_l2s(
        vlm,
        samples,
        positive=[pairs[i][1] for i in order],
        negative=[sample.prompt for sample in samples],
        site=site,
        contrast="prompt",
        where="last_prompt",
        batch_size=32,
    )


def _strongest(trials: Iterable[Trial]) -> float:
    return max((trial.effect for trial in trials), default=0.0)


def captions(
    vlm: ports.VLM, train: list[Sample], val: list[Sample], test: list[Sample], output: Path
) -> dict[str, dict[str, Any]]:
    """{class: summary}: captions towards, and away from, words of a class, by coarse vectors.

    Of two kinds: both go from the mean state of captions without words of the class, to that of
    captions with such words, or to that of the positions that predict such a word. Animals alone
    have a mood: the vector of mood is fitted on them, and chosen for them.
    """
    summaries = {}
    for name in CLASSES:
        words = class_words(f"scenes:{name}")
        concerned = [each for each in (train, val) if each]
        if name == "mood":
            concerned = [
                [s for s in each if s.metadata["attributes"]["mood"]] for each in concerned
            ]
        learnt_on, chosen_on = concerned[0], concerned[1][:32]
        vectors = caption_vectors(vlm, learnt_on, name, output / "features" / name)
        task = Captions(words)
        conditions = [
            *evaluation.grid(vectors["captions"], (-4.0, -2.0, -1.0, 1.0, 2.0)),
            *evaluation.grid(vectors["positions"], (-1.0, -0.5, 0.25, 0.5, 1.0)),
        ]
        best, trials = evaluation.select(vlm, chosen_on, task, conditions, batch_size=16)
        turned = [trial._replace(effect=-trial.effect) for trial in trials]
        away = evaluation.choose(turned, task.wanted, task.max_cost)
        sweep = evaluation.describe_sweep(best, trials, task, split="val", samples=len(chosen_on))
        directory = output / f"captions-{name}"
        chosen = {"towards": best.condition, "away": away.condition}
        summary = evaluation.evaluate(vlm, test, task, directory, chosen, sweep=sweep)
        draw_all(summary, directory)
        summaries[name] = summary
    return summaries


def caption_vectors(
    vlm: ports.VLM, samples: list[Sample], name: str, directory: Path
) -> dict[str, list[SteeringVector]]:
    """Coarse vectors from people's captions, forced: to captions, or positions, of the class."""
    forced = [
        dataclasses.replace(
            sample,
            id=f"{sample.id}-{number}",
            references=(caption,),
            metadata={**sample.metadata, "caption": caption},
        )
        for sample in samples
        for number, caption in enumerate(sample.references[:3])
    ]
    stored = {}
    for what, tokens in (
        ("captions", "before-special-tokens"),
        ("positions", f"class:scenes:{name}"),
    ):
        settings = ExtractionSettings(
            LAYERS[1:], Selection.parse(tokens), "teacher-forcing", batch_size=64
        )
        extract(vlm, forced, directory / what, settings)
        stored[what] = Features.open(directory / what)
    words, whole = class_words(f"scenes:{name}"), stored["captions"]
    with_words = holding([sample["caption"] for sample in whole.samples], words)
    source = ~with_words[whole.sample_rows]
    vectors: dict[str, list[SteeringVector]] = {}
    for site in LAYERS[1:]:
        states = whole.matrix(site)
        targets = {"captions": states[~source], "positions": stored["positions"].matrix(site)}
        for what, target in targets.items():
            vector = np.asarray(steering.steering_vector(states[source], target))
            described = {"method": "coarse", "target": what}
            vectors.setdefault(what, []).append(SteeringVector(vector, site, described))
    return vectors


def show(results: dict[str, Any], console: Console) -> None:
    """Prints the tables, that of the answers beside the paper's."""
    table = Table(
        *("answers", "by", "site, strength", "yes/no", "number", "other"),
        *("source", "target", "moved %", "others changed %", "paper: accuracies", "source, target"),
        title="Official accuracy in %, test split",
        box=None,
    )
    for pair, summary in results.get("questions", {}).items():
        for name, measured in summary["conditions"].items():
            if name == "plain" and pair != "yes -> no":
                continue
            paper = PAPER["none" if name == "plain" else pair] if name in ("plain", "added") else ()
            scores, c = measured["scores"], measured["changes"]
            place = ""
            if "sites" in measured:
                place = f"{measured['sites'][0].split('.')[-1]}, {measured['alpha']:g}"
            table.add_row(
                "none" if name == "plain" else pair,
                name,
                place,
                *(
                    f"{100 * scores[kind]['official']:.1f}"
                    for kind in ("yes/no", "number", "other")
                ),
                "" if name == "plain" else f"{c['source_after'] - c['source_before']:+d}",
                "" if name == "plain" else f"{c['target_after'] - c['target_before']:+d}",
                "" if name == "plain" else f"{100 * c['moved_share']:.1f} of {c['source_before']}",
                "" if name == "plain" else f"{100 * c['others_changed_share']:.1f}",
                " / ".join(f"{value:.2f}" for value in paper[:3]),
                ", ".join(f"{value:+d}" for value in paper[3:]),
            )
    console.print(table)
    table = Table(
        *("vector", "answers", *(f"{limit:.0%}" for limit in OFF_TARGET), "5 points"),
        title="Moved %, where so many others change, or other types lose five points",
        box=None,
    )
    for row in results.get("learned", ()):
        figures = [row[f"{limit:.0%}"] for limit in OFF_TARGET] + [row["5 points"]]
        table.add_row(row["vector"], row["pair"], *(f"{100 * x:.1f}" for x in figures))
    console.print(table)
    table = Table(
        *("captions", "site, strength", "with words, %", "gained, % of those without", "CIDEr"),
        box=None,
    )
    for name, summary in results.get("captions", {}).items():
        plain = summary["conditions"]["plain"]["scores"]["CIDEr"]
        for way in ("towards", "away"):
            measured = summary["conditions"][way]
            c = measured["changes"]
            without_words = c["samples"] - c["holding_before"]
            table.add_row(
                f"{way} {name}" if way == "towards" else f"away from {name}",
                f"{measured['sites'][0].split('.')[-1]}, {measured['alpha']:g}",
                " -> ".join(f"{100 * c[k] / c['samples']:.1f}" for k in HELD),
                f"{100 * c['gained'] / without_words:.1f}" if without_words else "",
                f"{plain:.3f} -> {measured['scores']['CIDEr']:.3f}",
            )
    console.print(table)


HELD = ("holding_before", "holding_after")


def main() -> None:
    """Runs all experiments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/steering"))
    parser.add_argument("--pictures", type=int, nargs=3, default=(300, 200, 150))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    output, (train, val, test) = arguments.output, arguments.pictures
    console = Console(width=150, markup=False)
    if not (output / "scenes" / "dataset_coco.json").exists():
        scenes.write(output / "scenes", train=train, val=val, test=test, seed=11)
    vlm = ports.load(embedded.LLAVA)
    asked = {s: data.load("vqav2", output / "scenes", s) for s in ("train", "val", "test")}
    # VQAv2's val holds the test pictures too.
    tested = {sample.id for sample in asked["test"]}
    asked["val"] = [sample for sample in asked["val"] if sample.id not in tested]
    settings = ExtractionSettings(
        SITES, Selection.parse("before-special-tokens"), max_new_tokens=3, batch_size=64
    )
    extract(vlm, asked["train"], output / "features" / "answers", settings)
    features = Features.open(output / "features" / "answers")
    shown = {s: data.load("coco", output / "scenes", s) for s in ("train", "val", "test")}
    parts = {
        "questions": lambda: questions(vlm, features, asked["val"], asked["test"], output),
        "learned": lambda: learned(vlm, features, asked["train"], asked["test"]),
        "captions": lambda: captions(vlm, *shown.values(), output),
    }
    results = {"machine": measure.machine("jax")}
    results |= {name: run() for name, run in parts.items() if name in arguments.parts}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results, console)


if __name__ == "__main__":
    main()
