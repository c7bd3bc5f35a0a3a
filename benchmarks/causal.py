"""Causal scores on the embedded model: against PyTorch's hooks in a loop, and shuffled words.

    python -m benchmarks.causal                 # 1,000 edits; then 20 concepts at three sites
    python -m benchmarks.causal --edits 100 --samples 16
    python -m benchmarks.causal --edits 0 --seed 1 2 3     # scenes that no choice was made on

Two parts:

    speed    edits of one layer, each of another direction or strength, and their effects on the
             answer and on 40 words: our compiled program, and transformers' forward pass with a
             hook per edit, run in turn; CPU seconds. "worst" is the largest difference of an
             effect, in nats.
    words    concepts of states that predict the words of captions of 160 drawn scenes, edited while
             the model answers about others; "auc" is how often the score of a concept's own words
             exceeds one of another concept's words. The words of centroids are read from the
             component, the centroid itself, and from the direction that is edited. Beside it, how
             gradients rank the effects, and the loss that the dictionary recovers.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

import ports
import xlvlm_jax
from benchmarks import measure
from xlvlm_jax import causal, data
from xlvlm_jax.concepts.grounding import ground_text
from xlvlm_jax.concepts.removal import concept_directions
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.answers import answered
from xlvlm_jax.data.images import read_image
from xlvlm_jax.demo import embedded

SITES = ("layers.3", "layers.5", "layers.7")
LEARNT = 160  # pictures
NUM_WORDS = 40


class Setting:
    """A picture with its answer on both sides, and edits of one layer."""

    def __init__(self, vlm: ports.VLM, site: str, count: int):
        self.vlm, self.site = vlm, site
        self.peer = transformers.LlavaForConditionalGeneration.from_pretrained(
            embedded.LLAVA, dtype=torch.float32
        ).eval()
        image = Image.fromarray(scenes.training_image(scenes.sample_scene("test", 0)))
        prompt = vlm.render(prompts.CAPTION)
        inputs = vlm.process([prompt], [image])
        said = vlm.decode(vlm.generate(inputs, max_new_tokens=20).tokens[0])
        texts, *_, self.lengths = answered(vlm, [prompt], [str(said).strip()], ended=False)
        self.inputs = vlm.process(texts, [image])
        self.tensors = {name: torch.tensor(value) for name, value in self.inputs.items()}
        random = np.random.default_rng(0)
        vectors = random.standard_normal((-(-count // 5), vlm.sizes.text.hidden_size))
        edits = causal.concept_edits(vectors, add=[0.05, 0.1, 0.2], ablate=[0.5, 1.0])
        self.edits = causal.ConceptEdits(*(np.asarray(field)[:count] for field in edits))
        V = vlm.sizes.text.vocab_size
        self.words = random.choice(np.arange(10, V), NUM_WORDS, replace=False)[:, None]
        self.words = self.words.astype(np.int32)

    def ours(self) -> tuple[np.ndarray, np.ndarray]:
        """Changes of the words and of the answer, from the picture on."""
        asked = causal.prepare(self.vlm, self.inputs, self.site, answer_lengths=self.lengths)
        own = np.zeros((len(self.edits.vectors), 1), np.int32)
        found, _ = causal.effects(asked, self.edits, self.words, own)
        return np.asarray(found.words)[:, 0], np.asarray(found.answer)[:, 0]

    @torch.no_grad()
    def theirs(self) -> tuple[np.ndarray, np.ndarray]:
        """The same with one forward pass per edit."""
        n = int(self.lengths[0])
        layer = self.peer.model.language_model.layers[int(self.site.rsplit(".", 1)[1])]
        words = torch.from_numpy(self.words[:, 0].astype(np.int64))
        targets = self.tensors["input_ids"][0, -n:]

        def measured() -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.peer(**self.tensors, logits_to_keep=n + 1).logits[0, :-1]
            logp = torch.log_softmax(logits, -1)
            return logp[:, words].mean(0), logp[torch.arange(n), targets].sum()

        before = measured()
        changes = []
        for vector, add, remove in zip(*self.edits[:3], strict=True):
            unit = torch.from_numpy(vector / np.linalg.norm(vector))

            def hook(
                module: Any,
                args: Any,
                out: Any,
                unit: torch.Tensor = unit,
                add: float = float(add),
                remove: float = float(remove),
            ) -> Any:
                states = out[0] if isinstance(out, tuple) else out
                part = states[:, -n - 1 : -1]
                norm, along = part.norm(dim=-1, keepdim=True), (part @ unit)[..., None]
                states = states.clone()
                states[:, -n - 1 : -1] = part + (add * norm - remove * along) * unit
                return (states, *out[1:]) if isinstance(out, tuple) else states

            handle = layer.register_forward_hook(hook)
            after = measured()
            handle.remove()
            changes.append([new - old for new, old in zip(after, before, strict=True)])
        words_moved, said = zip(*changes, strict=True)
        return torch.stack(words_moved).numpy(), torch.stack(said).numpy()


def speed(vlm: ports.VLM, sites: Sequence[str], count: int, repeats: int) -> list[dict[str, Any]]:
    """Both sides at each site."""
    rows = []
    for site in sites:
        setting = Setting(vlm, site, count)
        worst = max(
            float(np.abs(ours - theirs).max())
            for ours, theirs in zip(setting.ours(), setting.theirs(), strict=True)
        )
        # Both are warm. CPU time, as the machine may be busy with other things.
        pairs = [(cpu(setting.ours), cpu(setting.theirs)) for _ in range(repeats)]
        ours, theirs = np.median(pairs, axis=0)
        rows.append({"part": "speed", "site": site, "edits": count, "worst": worst})
        rows[-1] |= {"ours": ours, "theirs": theirs, "runs": repeats}
        rows[-1]["ratio"] = float(np.median([slow / fast for fast, slow in pairs]))
    return rows


def cpu(call: Callable[[], Any]) -> float:
    """Returns the CPU seconds of a call, in all threads."""
    began = time.process_time()
    call()
    return time.process_time() - began


def dictionaries(
    vlm: ports.VLM, sites: Sequence[str], count: int, seed: int
) -> list[dict[str, Any]]:
    """Scores of true and shuffled words, per site and method, in `count` pictures."""
    with tempfile.TemporaryDirectory() as directory:
        scenes.write(Path(directory), train=LEARNT + count, val=0, test=0, seed=seed)
        samples = data.load("coco", directory, "train")
        said, Z = [], {site: [] for site in sites}
        for first in range(0, len(samples), 32):
            group = samples[first : first + 32]
            inputs = vlm.process(
                [vlm.render(s.prompt) for s in group], [read_image(s.image) for s in group]
            )
            answer = vlm.generate(inputs, max_new_tokens=20, sites=sites)
            ended = np.isin(answer.tokens, vlm.eos_tokens).cumsum(1) > 0
            said += [text.strip() for text in vlm.decode(answer.tokens)]
            learnt = ~ended & (np.arange(first, first + len(group)) < LEARNT)[:, None]
            for site in sites:
                Z[site].append(np.asarray(answer.states[site])[learnt])
        rows = []
        for site in sites:
            states = np.concatenate(Z[site])
            for method in ("snmf", "kmeans"):
                found = xlvlm_jax.decompose(states, 20, method, key=jax.random.key(seed))
                read_from = {"component": np.asarray(found.components)}
                if method == "kmeans":
                    read_from["direction"] = concept_directions(found)
                lists = {
                    name: ground_text(vectors, vlm.unembed, vlm.tokenizer, 5, through_norm=True)
                    for name, vectors in read_from.items()
                }
                source = {"site": site, "fingerprint": vlm.fingerprint}
                found = dataclasses.replace(found, source=source)
                asked, answers = samples[LEARNT:], said[LEARNT:]
                rows.append(
                    {"part": "words", "seed": seed, "site": site, "method": method}
                    | one(found, lists, vlm, asked, answers, states.mean(0))
                )
    return rows


def one(
    concepts: Any,
    lists: dict[str, list[list[str]]],
    vlm: ports.VLM,
    samples: Any,
    answers: list[str],
    mean: np.ndarray,
) -> dict[str, Any]:
    """The scores of a dictionary with each of its lists of words, and with shuffled ones."""
    every = [
        [word for words in each for word in words] for each in zip(*lists.values(), strict=True)
    ]
    found = causal.measure_concepts(
        dataclasses.replace(concepts, words=every), vlm, samples, answers, mean=mean
    )
    index = {word: i for i, word in enumerate(found.vocabulary.words)}
    scores: dict[str, Any] = {}
    for name, words in lists.items():
        own = [[index[word] for word in mine if word in index] for mine in words]
        scores |= {f"{key}, {name}": value for key, value in separation(found, own).items()}
    losses = {name: float(values.mean()) for name, values in found.losses.items()}
    return scores | {
        "first order": causal.rank_correlation(found.first_order, found.own),
        "integrated": causal.rank_correlation(found.integrated, found.own),
        "recovered": float(causal.loss_recovered(losses["own"], losses["spliced"], losses["zero"])),
        "recovered of the mean": float(
            causal.loss_recovered(losses["own"], losses["spliced"], losses["mean"])
        ),
    }


def separation(found: Any, own: list[list[int]]) -> dict[str, float]:
    """How well the scores of concepts' own words are told from those of other concepts' words."""
    true = causal.causal_scores(found.changes, own, found.likelihood, num_shuffles=100)
    shuffled = []
    for shift in range(1, len(own)):
        # Another concept's words, without those that this one has too.
        lists = [
            [word for word in own[(k + shift) % len(own)] if word not in mine]
            for k, mine in enumerate(own)
        ]
        moved = causal.causal_scores(
            found.changes, lists, found.likelihood, num_shuffles=0, num_resamples=2
        )
        shuffled.append(moved.score)
    wrong = np.concatenate(shuffled)
    return {
        "auc": causal.auc(true.score[np.isfinite(true.score)], wrong[np.isfinite(wrong)]),
        "median": float(np.nanmedian(true.score)),
        "shuffled": float(np.nanmedian(wrong)),
        "marked": int(true.includes_null.sum()),
    }


def table(rows: list[dict[str, Any]], part: str, columns: dict[str, str]) -> Table:
    """The rows of one part for a reader."""
    shown = Table(title=part)
    for name in columns:
        shown.add_column(name, justify="right")
    for row in rows:
        if row["part"] == part:
            told = [(row.get(name), form) for name, form in columns.items()]
            shown.add_row(*("" if value is None else format(value, form) for value, form in told))
    return shown


def main() -> None:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--site", nargs="+", default=SITES, help="sites to edit")
    parser.add_argument("--edits", type=int, default=1000, help="edits of the speed part")
    parser.add_argument("--repeats", type=int, default=3, help="paired runs")
    parser.add_argument("--samples", type=int, default=48, help="pictures of the words part")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="seeds of the scenes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/causal.json"))
    arguments = parser.parse_args()
    vlm = ports.load("embedded")
    sites, rows = vlm.check_sites(arguments.site), []
    if arguments.edits:
        rows += speed(vlm, sites, arguments.edits, arguments.repeats)
    for seed in arguments.seed if arguments.samples else ():
        rows += dictionaries(vlm, sites, arguments.samples, seed)
    console = Console(width=130, markup=False)
    figures = {"ours": ".2f", "theirs": ".2f", "ratio": ".1f", "worst": ".1e"}
    console.print(table(rows, "speed", {"site": "", "edits": "", **figures}))
    kinds = [f"{key}, component" for key in ("auc", "median", "shuffled", "marked")]
    names = (*kinds, "auc, direction", "first order", "integrated", "recovered")
    scores = dict.fromkeys((*names, "recovered of the mean"), ".3g")
    console.print(table(rows, "words", {"seed": "", "site": "", "method": "", **scores}))
    measure.save(arguments.output, rows, "torch", "transformers")
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
