"""Greedy generation with real weights against transformers with sdpa, on the same checkpoint.

    python -m benchmarks.generation                       # the embedded model: batch 1, 8, 32
    python -m benchmarks.generation --model DIR --batches 1 8 16     # any LLaVA checkpoint
    python -m benchmarks.generation --cpu                 # where something else is running

    answers     captions of test pictures, or without an image processor continuations of text
    questions   four questions about each of eight pictures: one batch, as `predict` makes it
    apart       the same batch, without sharing pictures and the beginnings of prompts

No row ends early: the end-of-sequence token is taken from both sides. Both sides run in turn in
float32 with all cores; "ratio" is the median of transformers' seconds over ours, pair by pair.
"step" is the time of one further token, "same" the number of rows with identical tokens.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

import ports
from benchmarks import measure
from ports.inputs import common_prefix
from xlvlm_jax.data import scenes
from xlvlm_jax.demo import embedded

PICTURES, TOKENS, TEXT = 8, 20, 30
QUESTIONS = (
    "What is in the picture?",
    "What colour is it?",
    "Where is the dog?",
    "How many are there in the picture?",
)
Inputs = dict[str, np.ndarray]


class Setting:
    """A checkpoint on both sides."""

    def __init__(self, directory: Path):
        self.vlm = ports.load(directory)
        self.vlm.eos_tokens = ()
        self.peer = transformers.LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.peer.generation_config.eos_token_id = None
        self.sees = (directory / "processor_config.json").exists()

    def captions(self, count: int) -> Inputs:
        """Returns rows with a picture and one question each, or with text alone."""
        if not self.sees:
            vocabulary = self.vlm.module.num_embeddings - 1
            ids = np.random.default_rng(0).integers(3, vocabulary, (count, TEXT))
            return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        return self.ask([(i, QUESTIONS[0]) for i in range(count)])

    def ask(self, asked: list[tuple[int, str]]) -> Inputs:
        """Returns a row for each number of a picture and question."""
        pictures = {
            i: Image.fromarray(scenes.training_image(scenes.sample_scene("test", i)))
            for i, _ in asked
        }
        texts = [self.vlm.render(question) for _, question in asked]
        return self.vlm.process(texts, [pictures[i] for i, _ in asked])

    def sides(self, inputs: Inputs, tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Returns our generation and the peer's."""
        tensors = {name: torch.from_numpy(np.asarray(x)) for name, x in inputs.items()}

        def ours() -> Any:
            return self.vlm.generate(inputs, max_new_tokens=tokens).tokens

        @torch.no_grad()
        def theirs() -> Any:
            out = self.peer.generate(**tensors, max_new_tokens=tokens, do_sample=False)
            return out[:, inputs["input_ids"].shape[1] :].numpy()

        return ours, theirs


def measured(
    what: str,
    setting: Setting,
    inputs: Inputs,
    tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Returns one row of the results."""
    ours, theirs = setting.sides(inputs, tokens)
    same = int((np.asarray(ours()) == theirs()).all(1).sum())
    first, _ = setting.sides(inputs, 1)
    first()
    times = measure.paired(ours, theirs, repeats, clock)
    alone = float(np.median([measure.seconds(first, clock)[0] for _ in range(repeats)]))
    return {
        "what": what,
        "rows": len(inputs["input_ids"]),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "tokens": tokens,
        **times._asdict(),
        "step": (times.ours - alone) / (tokens - 1),
        "same_rows": same,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rows as a printable table."""
    shown = Table("what", "rows", "prompt", "ours", "step", "transformers", "ratio", "same")
    for row in rows:
        shown.add_row(
            row["what"],
            str(row["rows"]),
            str(row["prompt_tokens"]),
            f"{1e3 * row['ours']:.1f} ms",
            f"{1e3 * row['step']:.2f} ms",
            f"{1e3 * row['theirs']:.1f} ms",
            f"{row['ratio']:.2f}",
            str(row["same_rows"]),
        )
    return shown


def main() -> None:
    """Measures, prints and saves."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=embedded.LLAVA, help="a LLaVA checkpoint")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to generate")
    parser.add_argument("--repeats", type=int, default=5, help="paired runs of each case")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of all threads, not wall")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generation.json"))
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    setting, rows, console = Setting(arguments.model), [], Console(markup=False)
    console.width = max(console.width, 120)
    apart = mock.patch.object(common_prefix, "share", lambda *_: None)
    cases = [("answers", batch, contextlib.nullcontext()) for batch in arguments.batches]
    if setting.sees:
        cases += [("questions", 0, contextlib.nullcontext()), ("apart", 0, apart)]
    for what, batch, context in cases:
        asked = [(i, question) for i in range(PICTURES) for question in QUESTIONS]
        inputs = setting.captions(batch) if batch else setting.ask(asked)
        with context:
            rows.append(measured(what, setting, inputs, arguments.tokens, arguments.repeats, clock))
        console.print(table(rows[-1:]))
        measure.save(arguments.output, rows, "torch", "transformers")
    console.print(table(rows))
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
