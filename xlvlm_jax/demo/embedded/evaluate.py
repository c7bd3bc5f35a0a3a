"""Evaluates the embedded model on scenes of the test split: questions and captions."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import ports
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.scenes.scene import Split

# Minimum accuracies of the shipped model, in percent.
FLOORS = {
    "yes/no": 95,
    "number": 92,
    "other": 93,
    "caption: object": 95,
    "caption: place": 97,
}


def answer_all(
    vlm: ports.VLM,
    asked: Sequence[tuple[scenes.Scene, str]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> Iterator[list[str]]:
    """Yields the model's greedy answers to (scene, prompt) pairs, batch by batch."""
    for start in range(0, len(asked), batch_size):
        batch = list(asked[start : start + batch_size])
        full = batch + batch[:1] * (batch_size - len(batch))
        images = [Image.fromarray(scenes.training_image(scene)) for scene, _ in full]
        inputs = vlm.process([vlm.render(prompt) for _, prompt in full], images)
        tokens = vlm.generate(inputs, max_new_tokens=max_new_tokens).tokens
        yield [text.strip() for text in vlm.decode(tokens)[: len(batch)]]


def evaluate(
    directory: Path,
    num_images: int = 500,
    *,
    split: Split = "test",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluates a model on questions and captions of scenes.

    An answer is correct if it equals the truth exactly. A caption is correct for an attribute if it
    names its true value (`scenes.named`). A caption that does not name the attribute is wrong for
    object and place, and is not counted for colour, count and mood, which captions may omit.

    Args:
        directory: the directory of the model.
        num_images: the number of scenes.
        split: the split of the scenes.
        seed: the random seed of the scenes.
        progress: called with (scenes done, number of scenes).

    Returns:
        {"yes/no" | "number" | "other" | "other: colour" ... | "caption: place" ...:
        {"accuracy": percent, "count": number of answers}}.
    """
    vlm = ports.load(directory)
    pictures = [scenes.sample_scene(split, i, seed) for i in range(num_images)]
    questions = [(scene, q) for scene in pictures for q in scenes.questions(scene)]
    right: dict[str, list[bool]] = defaultdict(list)
    total = len(questions) + len(pictures)
    done = 0

    asked = [(scene, prompts.question(q.question)) for scene, q in questions]
    for answers in answer_all(vlm, asked, max_new_tokens=4):
        for answer, (_, q) in zip(answers, questions[done:], strict=False):
            kinds = [q.answer_type]
            if q.answer_type == "other":
                kinds.append(f"other: {q.attribute}")
            for kind in kinds:
                right[kind].append(answer == q.answer)
        done += len(answers)
        if progress is not None:
            progress(done, total)

    asked = [(scene, prompts.CAPTION) for scene in pictures]
    captioned = 0
    for captions in answer_all(vlm, asked, max_new_tokens=32):
        for caption, scene in zip(captions, pictures[captioned:], strict=False):
            for name, value in scenes.named(caption).items():
                truth = scenes.attributes(scene)[name]
                if value is not None or name in ("kind", "place"):
                    label = "object" if name == "kind" else name
                    right[f"caption: {label}"].append(value == truth)
        captioned += len(captions)
        if progress is not None:
            progress(done + captioned, total)
    return {
        name: {"accuracy": round(100 * float(np.mean(hits)), 2), "count": len(hits)}
        for name, hits in sorted(right.items())
    }


def show(result: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints each accuracy and its minimum."""
    table = Table("test split", "accuracy %", "count", "minimum %", box=None)
    for name, row in result.items():
        floor = FLOORS.get(name)
        table.add_row(name, f"{row['accuracy']:.1f}", str(row["count"]), str(floor or ""))
    console.print(table)
