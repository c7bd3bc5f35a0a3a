"""BERTScore: how well words match a reference in meaning (Zhang et al. 2020, section 3).

Each token x of a text has a contextual state, normalised to a unit vector, and a weight w(x): 1, or
its inverse document frequency; 0 for the special tokens at the ends. Tokens are matched greedily:

    precision = sum over tokens c of the candidate of w(c) max_r cos(c, r) / sum of w(c)
    recall    = sum over tokens r of the reference of w(r) max_c cos(c, r) / sum of w(r)
    F1        = their harmonic mean

The maximum includes the special tokens, as in the authors' package, whose values this reproduces. S
sentences, T tokens, D width, P pairs of sentences.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ports.models.bert import TextEncoder

# The layers that agree best with human judgement (Zhang et al. 2020, appendix B and the package's
# table), by model_type and depth. For other models the last layer is used.
BEST_LAYERS = {("bert", 12): 9, ("bert", 24): 18, ("roberta", 12): 10, ("roberta", 24): 17}
_MULTIPLE = 16  # lengths are padded to multiples of it, so that few shapes compile


class BertScore(NamedTuple):
    """Scores of each candidate, in [-1, 1] before rescaling; 1 for a copy of the reference.

    Attributes:
        precision: float[S], mean over the candidate's tokens of the highest cosine with one of the
            reference.
        recall: float[S], the same over the reference's tokens.
        f1: float[S], their harmonic mean.
    """

    precision: Float[np.ndarray, " S"]
    recall: Float[np.ndarray, " S"]
    f1: Float[np.ndarray, " S"]


class BertScorer:
    """Scores many candidates against the same references: each text is encoded once and kept.

    Args:
        encoder: from `ports.models.bert.load_text_encoder`; its tokenizer splits the texts.
        layer: layer whose states to use, from 0 to the encoder's depth; default:
            `default_layer(encoder)`.
        idf: the texts that document frequencies are counted in (usually all references): a token in
            n of N texts has weight log((N + 1) / (n + 1)). Default: equal weights of 1.
        baseline: precision, recall and F1 b of unrelated sentences, from `read_baseline`: scores
            become (score - b) / (1 - b) (section 5 of the paper), those of empty texts too.
        batch_size: number of pairs, and of sentences, per batch.

    Raises:
        ValueError: the layer does not exist, `idf` is empty, or its texts all have the same tokens.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        *,
        layer: int | None = None,
        idf: Sequence[str] | None = None,
        baseline: tuple[float, float, float] | None = None,
        batch_size: int = 64,
    ):
        self.encoder, self.baseline, self.batch_size = encoder, baseline, batch_size
        self.layer = default_layer(encoder) if layer is None else layer
        if not 0 <= self.layer <= encoder.config.num_layers:
            raise ValueError(
                f"layer is {layer}; {encoder.directory} has layers 0 (the embeddings) to "
                f"{encoder.config.num_layers}"
            )
        self._idf = None if idf is None else self._document_frequencies(idf)
        self._sentences: dict[str, _Sentence] = {}

    def __call__(
        self, candidates: Sequence[str], references: Sequence[str | Sequence[str]]
    ) -> BertScore:
        """Returns the BERTScore of each candidate with its reference, or the best of several.

        Args:
            candidates: S texts. An empty one scores 0, and so does one with an empty reference;
                with a baseline b, (0 - b) / (1 - b).
            references: one or more texts per candidate. The best one counts, separately for
                precision, recall and F1.

        Raises:
            ValueError: the numbers of texts differ, or a candidate has no references.
        """
        if len(candidates) != len(references):
            raise ValueError(
                f"{len(candidates)} candidates and {len(references)} references; expected one or "
                "more texts per candidate"
            )
        groups = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        for number, group in enumerate(groups):
            if not group:
                raise ValueError(f"candidate {number} has no reference; omit it")
        owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        each = [(candidates[i], text) for i, group in enumerate(groups) for text in group]
        # A pair that many samples share, a concept's words and a caption, is matched once.
        place = {pair: number for number, pair in enumerate(dict.fromkeys(each))}
        pairs = list(place)
        self._encode({text for pair in pairs for text in pair})

        matched = np.zeros((len(pairs), 3))
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            filled = batch + batch[:1] * (self.batch_size - len(batch))
            sides = (_padded([self._sentences[pair[i]] for pair in filled]) for i in (0, 1))
            matched[start : start + len(batch)] = _match(*sides)[: len(batch)]
        best = np.full((len(candidates), 3), -np.inf)
        np.maximum.at(best, owners, matched[[place[pair] for pair in each]])
        if self.baseline is not None:
            best = (best - np.asarray(self.baseline)) / (1 - np.asarray(self.baseline))
        return BertScore(*best.T)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.encoder.tokenizer
        longest = min(tokenizer.model_max_length, self.encoder.config.max_length)
        stripped = [text.strip() for text in texts]
        # The package encodes with add_prefix_space: RoBERTa's first word is as within a text.
        # transformers 5 ignores the option of the call, so the space is written.
        if self.encoder.config.model_type == "roberta":
            stripped = [text and f" {text}" for text in stripped]
        return tokenizer(stripped, truncation=True, max_length=longest)["input_ids"]

    def _document_frequencies(self, texts: Sequence[str]) -> Callable[[int], float]:
        """Returns a function from a token to its weight, the inverse document frequency."""
        if not len(texts):
            raise ValueError("no texts to count document frequencies in; pass some, or omit idf")
        counts = Counter(token for ids in self._ids(texts) for token in set(ids))
        if min(counts.values()) == len(texts):  # the package then scores a copy 0
            raise ValueError(
                f"every token is in all texts ({len(texts)}), so that none has a weight; pass "
                "texts that differ, or omit idf"
            )
        return lambda token: math.log((len(texts) + 1) / (counts[token] + 1))

    def _encode(self, texts: set[str]) -> None:
        """Encodes new texts, grouped by length to reduce padding."""
        new = sorted(texts - self._sentences.keys())
        if not new:
            return
        ids = dict(zip(new, self._ids(new), strict=True))
        tokenizer, size = self.encoder.tokenizer, self.batch_size
        ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        weight = self._idf or (lambda token: float(token not in ends))
        new.sort(key=lambda text: len(ids[text]))
        for start in range(0, len(new), size):
            batch = new[start : start + size]
            longest = min(_round_up(len(ids[batch[-1]])), self.encoder.config.max_length)
            tokens = np.full((size, longest), tokenizer.pad_token_id, np.int32)
            mask = np.zeros((size, longest), np.int32)
            mask[:, 0] = 1  # padding rows must attend to something too
            for row, text in enumerate(batch):
                tokens[row, : len(ids[text])] = ids[text]
                mask[row, : len(ids[text])] = 1
            states = np.asarray(self.encoder.states(tokens, mask, self.layer), np.float32)
            for row, text in enumerate(batch):
                own = states[row, : len(ids[text])]
                weights = np.array([weight(token) for token in ids[text]], np.float32)
                # An empty text has only the special tokens.
                total = weights.sum() if len(ids[text]) > 2 else 0
                self._sentences[text] = _Sentence(
                    own / np.linalg.norm(own, axis=1, keepdims=True),
                    weights / total if total else np.zeros_like(weights),
                )


def bert_score(
    encoder: TextEncoder,
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    **options: Any,
) -> BertScore:
    """Returns the BERTScore of each candidate with its references.

    Args:
        encoder: as for `BertScorer`.
        candidates: S texts.
        references: one or more texts per candidate.
        **options: as for `BertScorer`.

    Raises:
        ValueError: as for `BertScorer` and calling it.
    """
    return BertScorer(encoder, **options)(candidates, references)


def default_layer(encoder: TextEncoder) -> int:
    """Returns the layer that agrees best with human judgement if known, else the last."""
    depth = encoder.config.num_layers
    return BEST_LAYERS.get((encoder.config.model_type, depth), depth)


def read_baseline(path: str | Path, layer: int) -> tuple[float, float, float]:
    """Reads precision, recall and F1 of unrelated sentences at a layer, from the package's files.

    Args:
        path: a file with lines `LAYER,P,R,F` and this header.
        layer: the layer.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has another format, or does not have the layer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such baseline; expected a file with LAYER,P,R,F lines")
    rows: dict[int, tuple[float, float, float]] = {}
    try:
        names, *lines = path.read_text("utf-8-sig").split() or [""]
        if names != "LAYER,P,R,F":
            raise ValueError(f"it starts with {names!r}")
        for line in lines:
            number, *figures = line.split(",")
            if len(figures) != 3:
                raise ValueError(f"got {line!r}")
            precision, recall, f1 = map(float, figures)
            rows[int(number)] = precision, recall, f1
    except ValueError as error:
        raise ValueError(f"{path}: expected lines LAYER,P,R,F; {error}") from None
    if layer not in rows:
        raise ValueError(f"{path}: no layer {layer}; it has {', '.join(map(str, rows))}")
    return rows[layer]


class _Sentence(NamedTuple):
    states: Float[np.ndarray, "T D"]  # unit vectors, including special tokens
    weights: Float[np.ndarray, " T"]  # sum to 1, or zeros for an empty sentence


def _round_up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def _padded(sentences: Sequence[_Sentence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns states [P, T, D], weights [P, T], and bool[P, T], which tokens are real."""
    longest = _round_up(max(len(sentence.weights) for sentence in sentences))
    states = np.zeros((len(sentences), longest, sentences[0].states.shape[1]), np.float32)
    weights = np.zeros((len(sentences), longest), np.float32)
    there = np.zeros((len(sentences), longest), bool)
    for row, sentence in enumerate(sentences):
        length = len(sentence.weights)
        states[row, :length], weights[row, :length] = sentence
        there[row, :length] = True
    return states, weights, there


Side = tuple[jax.Array, jax.Array, jax.Array]


@jax.jit
def _match(candidate: Side, reference: Side) -> jax.Array:
    """Returns precision, recall and F1 [P, 3] of P pairs; 0 if a side is empty."""
    (c, c_weights, c_there), (r, r_weights, r_there) = candidate, reference
    cosine = jnp.einsum("ptd,psd->pts", c, r, precision="highest")
    cosine = jnp.where(c_there[:, :, None] & r_there[:, None, :], cosine, -jnp.inf)

    def weighted(best: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights > 0, best, 0) * weights, axis=1)

    full = (c_weights.sum(1) > 0) & (r_weights.sum(1) > 0)
    precision = jnp.where(full, weighted(cosine.max(2), c_weights), 0)
    recall = jnp.where(full, weighted(cosine.max(1), r_weights), 0)
    total = precision + recall
    f1 = jnp.where(total != 0, 2 * precision * recall / jnp.where(total != 0, total, 1), 0)
    return jnp.stack([precision, recall, f1], axis=1)
