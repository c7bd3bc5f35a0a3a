"""The same model in PyTorch, with forward hooks."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

import ports
from benchmarks.extraction.ours import TOKENS, Inputs, Rows, groups_of, prepare
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.demo import embedded
from xlvlm_jax.features.spelling import spellings


class Peer:
    """The same model in transformers."""

    def __init__(self, vlm: ports.VLM, word: str):
        torch.set_num_threads(os.cpu_count() or 1)
        self.vlm = vlm
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            embedded.LLAVA, dtype=torch.float32
        ).eval()
        ids = spellings(vlm.tokenizer, word).values()
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
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        tokens = self.model.generate(**tensors, max_new_tokens=TOKENS, do_sample=False)
        return tokens[:, inputs["input_ids"].shape[1] :]

    def texts(self, tokens: Any) -> list[str]:
        """The captions, which `extract` stores too."""
        return self.vlm.tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True)

    def loop(self, samples: Sequence[Sample], output: Path) -> Rows:
        """One picture at a time; every state is kept, rows are selected at the end."""
        results: list[Any] = []
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
        ids, found, rows, captions = [], [], [], []
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
        with torch.inference_mode():
            return [self.generate(batch) for batch in batches]

    def _store(
        self, output: Path, ids: list[str], tokens: list, rows: list, captions: list[str]
    ) -> Rows:
        if not rows:
            raise ValueError("no caption holds the word; take more pictures, or another word")
        states, tokens = torch.stack(rows), torch.stack(tokens)
        content = {"ids": ids, "tokens": tokens, "states": states, "captions": captions}
        torch.save(content, output)
        return Rows(ids, tokens.numpy(), states.numpy())
