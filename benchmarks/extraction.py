"""Extraction: features of the embedded model's test pictures, against PyTorch's forward hooks.

    python -m benchmarks.extraction                  # 500 pictures, captions of up to 20 tokens
    python -m benchmarks.extraction --pictures 100 --repeats 3

What every side makes: of each picture whose caption holds the word, the state at the final norm
from which the word was predicted. All read the same files with the same function and the same
processor, in float32, and store what they found. In turn, `repeats` times:

    extract     `xlvlm_jax.extract.extract` into a new directory, batches of 32
    loop        transformers' `generate`, one picture at a time; a forward hook keeps the states of
                all positions, rows are selected at the end (what the reference does)
    batched     the same in batches of 32, in inference mode; the hook keeps the last position only,
                rows are selected after each batch
    ahead       batched, with images read and preprocessed by a thread while the model computes
    peer alone  transformers' `generate` on prepared batches, without hook, images and storing
    alone       `vlm.generate` on prepared batches, the same
    images      reading and preprocessing the images, one batch after another

"ratio" is the median of a side's time a picture over that of extract, run by run. The loop may be
timed on the first pictures only. "same" says whether samples and tokens of the rows equal those of
extract; "difference" is the largest of the states over the largest state.

Memory is the largest resident size of a process of its own that reads the images and extracts,
over that of one that reads the same and generates without capturing.
"""

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import ports
from benchmarks import measure
from xlvlm_jax import embedded
from xlvlm_jax.data import coco, scenes
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.extract import Settings, extract
from xlvlm_jax.selection import Selection
from xlvlm_jax.store import Features

SITE = "language_model.model.norm"
BATCH, TOKENS = 32, 20  # a batch at which both sides are at their fastest here
AIMS = {"loop": 10.0, "batched": 3.0}
MEMORY_AIM = 1.1
TOLERANCE = 1e-4

Inputs = dict[str, np.ndarray]


class Rows(NamedTuple):
    """What a side found: R rows."""

    ids: list[str]  # of the samples
    tokens: np.ndarray  # int[R]
    states: np.ndarray  # float32[R, D]

    def first(self, ids: set[str]) -> "Rows":
        """Those of some samples only."""
        kept = [i for i, sample in enumerate(self.ids) if sample in ids]
        return Rows([self.ids[i] for i in kept], self.tokens[kept], self.states[kept])


def settings(word: str) -> Settings:
    """What is extracted."""
    selection = Selection("token-of-interest", word)
    return Settings((SITE,), selection, max_new_tokens=TOKENS, batch_size=BATCH)


def groups_of(samples: Sequence[Sample], size: int = BATCH) -> list[Sequence[Sample]]:
    """The samples in order, `size` at a time."""
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def prepare(vlm: ports.VLM, samples: Sequence[Sample]) -> Inputs:
    """A batch, with images from their files."""
    images = [read_image(sample.image) for sample in samples]
    return vlm.process([vlm.render(sample.prompt) for sample in samples], images)


def full(samples: Sequence[Sample]) -> Sequence[Sample]:
    """A batch filled up by its first sample, as `extract` does: one program for all."""
    return [*samples, *[samples[0]] * (BATCH - len(samples))]


# Our side


def run_extract(vlm: ports.VLM, samples: Sequence[Sample], word: str, output: Path) -> Rows:
    """Extracts into `output` and reads what is there."""
    extract(vlm, samples, output, settings(word))
    features = Features.open(output)
    ids = [features.samples[i]["id"] for i in features.sample_rows]
    return Rows(ids, features.tokens, features.matrix(SITE))


def run_generate(vlm: ports.VLM, batches: Iterable[Inputs]) -> list[jax.Array]:
    """Tokens of the batches, without capturing anything."""
    return [vlm.generate(batch, max_new_tokens=TOKENS).tokens for batch in batches]


# PyTorch. It is imported here alone: the processes whose memory is compared do without it.


class Peer:
    """The same model in transformers."""

    def __init__(self, vlm: ports.VLM, word: str):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        self.torch, self.vlm = torch, vlm
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            embedded.LLAVA, dtype=torch.float32
        ).eval()
        ids = settings(word).selection.spellings(vlm.tokenizer).values()
        self.token_ids = torch.tensor(list(ids))

    @contextlib.contextmanager
    def hook(self, keep: Callable[[Any], None]) -> Iterator[None]:
        """Gives the states [B, T, D] of the site to `keep`, pass by pass."""
        norm = self.model.model.language_model.norm
        handle = norm.register_forward_hook(lambda module, args, out: keep(out))
        try:
            yield
        finally:
            handle.remove()

    def generate(self, inputs: Inputs) -> Any:
        """New tokens [B, up to M], greedy."""
        tensors = {name: self.torch.from_numpy(value) for name, value in inputs.items()}
        tokens = self.model.generate(**tensors, max_new_tokens=TOKENS, do_sample=False)
        return tokens[:, inputs["input_ids"].shape[1] :]

    def texts(self, tokens: Any) -> list[str]:
        """The captions, which `extract` stores too."""
        return self.vlm.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)

    def loop(self, samples: Sequence[Sample], output: Path) -> Rows:
        """One picture at a time; every state is kept, rows are selected at the end."""
        torch, results = self.torch, []
        for sample in samples:
            states: list[Any] = []
            with torch.no_grad(), self.hook(states.append):
                tokens = self.generate(prepare(self.vlm, [sample]))
            results.append((sample.id, self.texts(tokens), tokens[0], torch.cat(states, 1)[0]))
        ids, found, rows = [], [], []
        for sample, _, tokens, states in results:
            hits = torch.isin(tokens, self.token_ids).nonzero()
            if len(hits):
                ids.append(sample)
                found.append(tokens[hits[0, 0]])
                # The state that predicted a token is the one a position before it.
                rows.append(states[len(states) - len(tokens) + hits[0, 0]])
        captions = [texts[0] for _, texts, _, _ in results]
        return self._store(output, ids, found, rows, captions)

    def batched(self, samples: Sequence[Sample], output: Path, *, read_ahead: bool = False) -> Rows:
        """In batches; of every pass the last position is kept, of every batch its rows."""
        torch, ids, found, rows, captions = self.torch, [], [], [], []
        groups = groups_of(samples)
        for group, inputs in zip(groups, self._inputs(groups, read_ahead), strict=True):
            states: list[Any] = []

            def keep(out: Any, states: list[Any] = states) -> None:
                # A copy: a view would keep the states of the whole prompt.
                states.append(out[:, -1].clone())

            with torch.inference_mode(), self.hook(keep):
                tokens = self.generate(inputs)
                hits = torch.isin(tokens, self.token_ids)
                row = hits.any(1).nonzero()[:, 0]
                where = hits.int().argmax(1)[row]
                ids += [group[i].id for i in row]
                found += tokens[row, where]
                rows += torch.stack(states, 1)[row, where]
            captions += self.texts(tokens)
        return self._store(output, ids, found, rows, captions)

    def _inputs(self, groups: Sequence[Sequence[Sample]], read_ahead: bool) -> Iterator[Inputs]:
        if not read_ahead:
            yield from (prepare(self.vlm, group) for group in groups)
            return
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(prepare, self.vlm, group) for group in groups[:2]]
            for following in [*groups[2:], None, None][: len(groups)]:
                inputs = waiting.pop(0).result()
                if following is not None:
                    waiting.append(pool.submit(prepare, self.vlm, following))
                yield inputs

    def alone(self, batches: Sequence[Inputs]) -> list[Any]:
        """Tokens of prepared batches."""
        with self.torch.inference_mode():
            return [self.generate(batch) for batch in batches]

    def _store(
        self, output: Path, ids: list[str], tokens: list, rows: list, captions: list[str]
    ) -> Rows:
        if not rows:
            raise ValueError("no caption holds the word; take more pictures, or another word")
        states, tokens = self.torch.stack(rows), self.torch.stack(tokens)
        content = {"ids": ids, "tokens": tokens, "states": states, "captions": captions}
        self.torch.save(content, output)
        return Rows(ids, tokens.numpy(), states.numpy())


# Comparing


class Side(NamedTuple):
    """One of what is run in turn."""

    pictures: int  # it works on
    run: Callable[[], Any]
    warm_up: Callable[[], Any]


def sides(
    vlm: ports.VLM, peer: Peer, samples: Sequence[Sample], looped: int, word: str, scratch: Path
) -> dict[str, Side]:
    """What is compared. Outputs lie below `scratch`, each run's in a directory of its own."""

    def new() -> Path:
        return Path(tempfile.mkdtemp(dir=scratch)) / "features"

    # Some samples that hold the word, as extraction without any row is refused; and one more than
    # a batch, so that the last batch is one that had to be filled up.
    few = sorted(samples, key=lambda sample: word not in " ".join(sample.references))[: BATCH + 1]
    prepared = [prepare(vlm, full(group)) for group in groups_of(samples)]
    every = len(samples)

    def images(samples: Sequence[Sample]) -> None:
        for group in groups_of(samples):
            prepare(vlm, group)

    return {
        "extract": Side(
            every,
            lambda: run_extract(vlm, samples, word, new()),
            lambda: run_extract(vlm, few, word, new()),
        ),
        "loop": Side(
            looped, lambda: peer.loop(samples[:looped], new()), lambda: peer.loop(few[:4], new())
        ),
        "batched": Side(
            every, lambda: peer.batched(samples, new()), lambda: peer.batched(few, new())
        ),
        "ahead": Side(
            every,
            lambda: peer.batched(samples, new(), read_ahead=True),
            lambda: peer.batched(few, new(), read_ahead=True),
        ),
        "peer alone": Side(every, lambda: peer.alone(prepared), lambda: peer.alone(prepared[:1])),
        "alone": Side(
            every, lambda: run_generate(vlm, prepared), lambda: run_generate(vlm, prepared[:1])
        ),
        "images": Side(every, lambda: images(samples), lambda: images(few)),
    }


def agreement(ours: Rows, theirs: Rows) -> dict[str, Any]:
    """Whether two sides found the same rows."""
    same = ours.ids == theirs.ids and np.array_equal(ours.tokens, theirs.tokens)
    difference = None
    if same:
        error = np.abs(ours.states - theirs.states).max()
        difference = float(error / np.abs(theirs.states).max())
    return {"rows": len(theirs.ids), "same": bool(same), "difference": difference}


def run(
    directory: Path, looped: int, word: str, repeats: int, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row of the table for each side."""
    samples = coco.load(directory, "test")
    vlm = ports.load(embedded.LLAVA)
    looped = min(looped, len(samples)) or len(samples)
    with tempfile.TemporaryDirectory() as scratch:
        compared = sides(vlm, Peer(vlm, word), samples, looped, word, Path(scratch))
        first = {name: measure.seconds(side.warm_up)[0] for name, side in compared.items()}
        times: dict[str, list[float]] = {name: [] for name in compared}
        found: dict[str, Any] = {}
        for repeat in range(repeats):
            for name, side in compared.items():
                report(f"run {repeat + 1} of {repeats}: {name} ...")
                took, found[name] = measure.seconds(side.run)
                times[name].append(took / side.pictures)
    rows = []
    for name, side in compared.items():
        row = {
            "what": name,
            "pictures": side.pictures,
            "of": len(samples),
            "milliseconds": 1e3 * statistics.median(times[name]),
            "ratio": float(np.median(np.divide(times[name], times["extract"]))),
            "aim": AIMS.get(name),
            "first": first[name],
            "runs": repeats,
            "load": os.getloadavg()[0],
        }
        if isinstance(found[name], Rows):
            ids = {sample.id for sample in samples[: side.pictures]}
            row |= agreement(found["extract"].first(ids), found[name])
        rows.append(row)
    return rows


# Memory


def peak(what: str, directory: Path, word: str) -> int:
    """Largest resident KiB of a process that does `what`."""
    command = [sys.executable, "-m", "benchmarks.extraction", "--memory-of", what]
    command += ["--scenes", str(directory), "--word", word]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def print_peak(what: str, directory: Path, word: str) -> None:
    """Does `what` in this process, and prints its largest resident KiB."""
    # As where PyTorch is not installed: transformers would import it, on both sides of the ratio.
    sys.modules["torch"] = None
    samples = coco.load(directory, "test")
    vlm = ports.load(embedded.LLAVA)
    if what == "extract":
        with tempfile.TemporaryDirectory() as scratch:
            extract(vlm, samples, Path(scratch) / "features", settings(word))
    else:
        for group in groups_of(samples):
            jax.block_until_ready(run_generate(vlm, [prepare(vlm, full(group))]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory(directory: Path, word: str, repeats: int) -> dict[str, Any]:
    """Peaks of extracting and of generating, in turn."""
    pairs = np.array(
        [[peak(what, directory, word) for what in ("extract", "generate")] for _ in range(repeats)]
    )
    extracting, generating = np.median(pairs, axis=0) / 1024
    return {
        "what": "memory",
        "extract_mib": float(extracting),
        "generate_mib": float(generating),
        "ratio": float(np.median(pairs[:, 0] / pairs[:, 1])),
        "aim": MEMORY_AIM,
        "runs": repeats,
    }


# Reporting


def table(rows: list[dict[str, Any]], word: str) -> Table:
    """The rows for a reader."""
    shown = Table(title=f"States of {word!r} in captions of {rows[0]['of']} pictures, float32")
    headings = ("what", "timed on", "a picture", "all", "ratio", "aim", "rows", "same")
    for heading in (*headings, "difference", "load"):
        shown.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        aim, difference = row["aim"], row.get("difference")
        scaled = " (scaled)" if row["pictures"] < row["of"] else ""
        shown.add_row(
            row["what"],
            f"{row['pictures']} pictures",
            f"{row['milliseconds']:.2f} ms",
            f"{row['milliseconds'] * row['of'] / 1e3:.2f} s{scaled}",
            f"{row['ratio']:.2f}",
            "" if aim is None else f"{aim:.0f}",
            str(row.get("rows", "")),
            {True: "yes", False: "no", None: ""}[row.get("same")],
            "" if difference is None else f"{difference:.0e}",
            f"{row['load']:.1f}",
        )
    return shown


def disagreeing(rows: list[dict[str, Any]]) -> list[str]:
    """The sides whose rows are not those of `extract`."""
    return [
        row["what"]
        for row in rows
        if "same" in row and not (row["same"] and row["difference"] <= TOLERANCE)
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=500, help="of the test split")
    parser.add_argument("--looped", type=int, default=60, help="pictures of the loop; 0: all")
    parser.add_argument("--word", default="dog", help="the token of interest")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/extraction.json"))
    # What a process of its own is asked for, whose memory is measured.
    parser.add_argument("--memory-of", choices=("extract", "generate"), help=argparse.SUPPRESS)
    parser.add_argument("--scenes", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Parse, measure, print, save."""
    arguments = parse()
    word, repeats = arguments.word, arguments.repeats
    if arguments.memory_of:
        print_peak(arguments.memory_of, arguments.scenes, word)
        return
    console = Console()
    console.width = max(console.width, 120)
    with tempfile.TemporaryDirectory() as directory:
        scenes.write(directory, test=arguments.pictures)
        # First, while this process is small: a new one begins with the peak of the one it is from.
        console.print("memory ...")
        used = memory(Path(directory), word, min(repeats, 3))
        rows = run(Path(directory), arguments.looped, word, repeats, console.print)
    console.print(table(rows, word))
    console.print(f"first run of extract, {BATCH + 1} pictures, compiles: {rows[0]['first']:.1f} s")
    console.print(
        f"memory: extract {used['extract_mib']:.0f} MiB, generate {used['generate_mib']:.0f} MiB, "
        f"ratio {used['ratio']:.3f}, at most {MEMORY_AIM}"
    )
    measure.save(arguments.output, [*rows, used], "torch", "transformers")
    console.print(f"saved to {arguments.output}")
    if others := disagreeing(rows):
        sys.exit(f"rows differ from those of extract: {', '.join(others)}")


if __name__ == "__main__":
    main()
