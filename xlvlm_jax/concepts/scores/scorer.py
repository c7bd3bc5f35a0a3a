"""Scores dictionaries: how well their words fit samples, and properties of their codes.

A `Scorer` holds the samples, which are rows of one site of a directory of features, with the
embeddings of their images and their captions; it scores one dictionary after another on them. N
rows, K concepts, D width, E width of CLIP's embedding space.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from ports.checkpoint import hub
from ports.models.clip import DualEncoder
from xlvlm_jax import metrics
from xlvlm_jax.concepts.decomposition import project_stored
from xlvlm_jax.concepts.reconstruction import squared_residual
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.concepts.scores.attributes import as_json, known_attributes
from xlvlm_jax.concepts.scores.records import DictionaryScores, Fit, plain
from xlvlm_jax.data.images import read_image
from xlvlm_jax.features.reader import Features, choose_site, require_states
from xlvlm_jax.features.samples import columns
from xlvlm_jax.metrics.codes import TILE_ROWS, squared_deviations
from xlvlm_jax.metrics.labels import UNKNOWN, factorise

TOPS = (1, 3)
NUM_RANDOM = 10
NUM_NOISE = 32


class Scorer:
    """Scores dictionaries on the rows of one site.

    Each image is read and encoded once, however many rows and dictionaries are scored.

    Args:
        features: the samples to score on.
        site: site whose states to use; optional if there is only one.
        clip: from `ports.models.clip.load_dual_encoder`; without it, no CLIPScore and no
            monosemanticity.
        bert: a `metrics.BertScorer`; without it, no BERTScore.
        tops: the numbers r of most active concepts.
        num_random: number of draws of random words; their scores are means over the draws.
        seed: random seed of the random words and of the noise.
        strict: stop at an image that can't be read or that CLIP's processor refuses. Otherwise its
            rows are left out of CLIP's scores, and `skipped` says why.

    Raises:
        ValueError: the site is unknown, a number is below one, `bert` is given and samples have no
            captions, or `clip` is given and samples have no images or none that can be read; if
            strict, also for the first image that CLIP's processor refuses.
        OSError: if strict, for the first image that can't be read.
    """

    def __init__(
        self,
        features: Features,
        site: str | None = None,
        *,
        clip: DualEncoder | None = None,
        bert: metrics.BertScorer | None = None,
        tops: Sequence[int] = TOPS,
        num_random: int = NUM_RANDOM,
        seed: int = 0,
        strict: bool = False,
    ):
        for name, values in (("tops", tops), ("num_random", [num_random])):
            if not values or min(values) < 1:
                raise ValueError(f"{name} must be at least 1, got {values}")
        self.features, self.site = features, choose_site(features, site)
        self._named = site is not None
        self.clip, self.bert = clip, bert
        self.tops, self.num_random, self.seed = tuple(tops), num_random, seed
        self.stored = features.stored(self.site)
        self.attributes = known_attributes(features)
        if bert is not None:
            self._captions = captions(features)
            self._bert_vocabulary = metrics.vocabulary_words(bert.encoder.tokenizer)
        self.images: Float[np.ndarray, "N E"] | None = None  # NaN if there is none
        self.skipped: dict[str, str] = {}  # image -> why CLIP does not see it
        if clip is not None:
            self._see(clip, strict)
            side = clip.module.config.vision.image_size
            self._noise = metrics.embed_images(
                clip, metrics.noise_images(NUM_NOISE, side, seed=seed)
            )
            self._clip_vocabulary = metrics.vocabulary_words(clip.processor.tokenizer)

    def _see(self, clip: DualEncoder, strict: bool) -> None:
        """Encodes the images of the rows, each once."""
        features = self.features
        (files,) = columns(features.samples, "image")
        shown = factorise(files)
        without = np.flatnonzero(shown.codes[features.sample_rows] == UNKNOWN)
        if len(without):
            name = features.samples[int(features.sample_rows[without[0]])].get("id")
            raise ValueError(f"{features.path}: sample {name!r} has no image for CLIP to score")
        # [N], which of the images each row shows
        used, self._image_rows = np.unique(shown.codes[features.sample_rows], return_inverse=True)
        names = [shown.values[image] for image in used]
        embedded = metrics.embed_pixels(clip, self._pixels(clip, names, strict))
        vectors = np.full((len(names), embedded.shape[1]), np.nan, np.float32)
        vectors[[name not in self.skipped for name in names]] = embedded
        if len(self.skipped) == len(names):
            raise ValueError(
                f"{features.path}: CLIP can read none of {len(names)} images; the first: "
                f"{next(iter(self.skipped.values()))}"
            )
        self.images = vectors[self._image_rows]

    def _pixels(
        self, clip: DualEncoder, names: Sequence[str], strict: bool
    ) -> Iterator[Float[np.ndarray, "3 H H"]]:
        """Yields the images that CLIP's processor accepts; `skipped` gets the others."""
        for name in names:
            try:
                pixels = metrics.pixels_of(clip, read_image(name))
            except (ImportError, MemoryError):
                raise
            except Exception as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                if name not in reason:
                    reason = f"{name}: CLIP's processor refuses it ({reason})"
                if strict:
                    raise ValueError(reason) from error
                self.skipped[name] = reason
            else:
                yield pixels

    def _distinct(self) -> np.ndarray:
        """Returns the first row of each image, except images that CLIP does not see."""
        _, rows = np.unique(self._image_rows, return_index=True)
        return rows[np.isfinite(self._seen()[rows]).all(axis=1)]

    def _seen(self) -> Float[np.ndarray, "N E"]:
        assert self.images is not None, "only called if there is a `clip`"
        return self.images

    def score(
        self, concepts: Concepts, *, name: str = "", others: Sequence[Concepts] = ()
    ) -> DictionaryScores:
        """Scores a dictionary.

        Args:
            concepts: without words, CLIPScore, BERTScore and overlap are left out.
            name: name of the dictionary in the result.
            others: concepts found with other seeds, for the stability.

        Raises:
            ValueError: the concepts are of another site, model or width, or others have another
                shape.
        """
        concepts.require_one_site("scoring")
        self.check_source(concepts.source)
        K = len(concepts.components)
        activations, explained = self._encode(concepts)
        stability = None
        if others:
            stability = metrics.stability([x.components for x in (concepts, *others)])
        alike = None
        if self.images is not None:
            rows = self._distinct()
            scores = metrics.monosemanticity(activations[rows], self.images[rows])
            alike = float(np.nanmean(scores)) if np.isfinite(scores).any() else None
        agreement = metrics.attribute_scores(activations, self.attributes)
        return DictionaryScores(
            name=name or concepts.method,
            method=concepts.method,
            num_concepts=K,
            explained_variance=explained,
            hoyer=float(metrics.hoyer_sparsity(activations)),
            active=float(metrics.active_share(activations)),
            dead=int(metrics.dead_concepts(activations).sum()),
            stability=stability,
            monosemanticity=alike,
            attributes=as_json(agreement),
            **self._of_words(concepts.words, activations),
            through_norm=concepts.through_norm,
        )

    @functools.cached_property
    def _variance(self) -> float:
        return squared_deviations(self.stored.tiles(TILE_ROWS))

    def _encode(self, concepts: Concepts) -> tuple[Float[np.ndarray, "N K"], float]:
        """Returns the activations of all rows and the explained variance, in one disk pass."""
        activations = np.empty((len(self.stored), len(concepts.components)), np.float32)
        left = 0.0
        for start, rows, codes in project_stored(self.stored, concepts):
            codes = activations[start : start + len(rows)] = np.asarray(codes)
            for first in range(0, len(rows), TILE_ROWS):
                part = slice(first, first + TILE_ROWS)
                left += squared_residual(concepts, rows[part], codes[part])
        return activations, 1 - left / self._variance if self._variance > 0 else math.nan

    def check_source(self, source: Mapping[str, Any]) -> None:
        """Checks that concepts of this source belong to the site and model of the rows.

        Raises:
            ValueError: they do not.
        """
        require_states(source, self.features, self.site, "scored", named=self._named)

    def random_words(self, scores: DictionaryScores, *, name: str = "random") -> DictionaryScores:
        """Scores a dictionary with random words instead of its own.

        Scores are means over the draws.

        Args:
            scores: scores of the dictionary.
            name: name in the result.

        Raises:
            ValueError: there is neither `clip` nor `bert`, whose vocabularies the words are drawn
                from, or the dictionary has no words.
        """
        if self.clip is None and self.bert is None:
            raise ValueError(
                "random words are drawn from CLIP's or BERT's vocabulary; provide one of them"
            )
        if scores.words is None:
            raise ValueError(
                f"{scores.name} has no words to replace by random ones; ground it first"
            )
        vocabulary = self._clip_vocabulary if self.clip else self._bert_vocabulary
        draws = self._draws(scores.words, vocabulary)

        def drawn(fits: Mapping[int, Fit]) -> dict[int, Fit]:
            return {
                r: Fit(fit.random, fit.random_std, fit.random, fit.random_std, fit.num_samples)
                for r, fit in fits.items()
            }

        return DictionaryScores(
            name=name,
            method="random",
            num_concepts=scores.num_concepts,
            clip=drawn(scores.clip),
            bert=drawn(scores.bert),
            overlap=float(np.mean([metrics.word_overlap(words) for words in draws]))
            if scores.num_concepts > 1
            else None,
        )

    def _of_words(
        self, words: Sequence[Sequence[str]] | None, activations: Float[np.ndarray, "N K"]
    ) -> dict[str, Any]:
        """Returns the scores that depend on words, by field name."""
        if words is None:
            return {}
        judged = self.clip is not None or self.bert is not None
        chosen = {r: np.asarray(metrics.top_concepts(activations, r)) for r in self.tops if judged}
        fits = {
            "clip": self._clip_fits(self.clip, words, chosen) if self.clip else {},
            "bert": self._bert_fits(self.bert, words, chosen) if self.bert else {},
        }
        scores = {f"{of} top-{r}": found[1] for of in fits for r, found in fits[of].items()}
        return {
            "words": words,
            "overlap": metrics.word_overlap(words) if len(words) > 1 else None,
            **{of: {r: found[0] for r, found in each.items()} for of, each in fits.items()},
            "arrays": {**scores, "overlap": metrics.overlap_matrix(words)},
        }

    def _clip_fits(
        self,
        clip: DualEncoder,
        words: Sequence[Sequence[str]],
        chosen: Mapping[int, Bool[np.ndarray, "N K"]],
    ) -> dict[int, tuple[Fit, np.ndarray]]:
        images = self._seen()
        draws = self._draws(words, self._clip_vocabulary)
        texts = [metrics.describe(concept) for version in (words, *draws) for concept in version]
        embedded = metrics.embed_texts(clip, texts)
        worded = np.array([bool(concept) for concept in words])
        K = len(words)
        own = np.asarray(metrics.clip_scores(images, embedded[:K])) * worded
        # One draw in memory at a time.
        drawn = np.zeros_like(own)
        for start in range(K, len(texts), K):
            drawn += np.asarray(metrics.clip_scores(images, embedded[start : start + K]))
        drawn /= len(draws)
        # Sample n gets noise image n mod NUM_NOISE.
        noise = metrics.clip_scores(self._noise, embedded[:K]) * worded
        noise = noise[np.arange(len(own)) % NUM_NOISE]
        seen = np.all(np.isfinite(images), axis=1, keepdims=True)
        return {
            r: _fit(own, drawn * worded, mask, noise=_mean(metrics.mean_of_top(noise, mask)))
            for r, mask in ((r, mask & seen) for r, mask in chosen.items())
        }

    def _bert_fits(
        self,
        bert: metrics.BertScorer,
        words: Sequence[Sequence[str]],
        chosen: Mapping[int, Bool[np.ndarray, "N K"]],
    ) -> dict[int, tuple[Fit, np.ndarray]]:
        widest = chosen[max(chosen)]
        rows, columns = np.nonzero(widest)

        def matched(version: Sequence[Sequence[str]]) -> np.ndarray:
            """Returns precision, recall and F1 [3, N, K] where `widest`, else 0."""
            texts = [", ".join(version[int(k)]) for k in columns]
            values = np.zeros((3, *widest.shape))
            if len(rows):
                values[:, rows, columns] = bert(texts, [self._captions[n] for n in rows])
            return values

        precision, recall, own = matched(words)
        draws = self._draws(words, self._bert_vocabulary)
        drawn = np.zeros(widest.shape)
        for version in draws:  # one in memory at a time
            drawn += matched(version)[2]
        drawn /= len(draws)
        return {
            r: _fit(
                own,
                drawn,
                mask,
                precision=_mean(metrics.mean_of_top(precision, mask)),
                recall=_mean(metrics.mean_of_top(recall, mask)),
            )
            for r, mask in chosen.items()
        }

    def _draws(
        self, words: Sequence[Sequence[str]], vocabulary: Sequence[str]
    ) -> list[list[list[str]]]:
        return [
            metrics.random_words(words, vocabulary, seed=self.seed + draw)
            for draw in range(self.num_random)
        ]

    def describe(self) -> dict[str, Any]:
        """Returns what the scores were computed with and on, as JSON values."""
        similarity = None
        if self.images is not None and len(self._distinct()) > 1:
            similarity = metrics.mean_similarity(self.images[self._distinct()])
        described = {
            "features": str(self.features.path),
            "site": self.site,
            "rows": len(self.stored),
            "images that CLIP does not see": len(self.skipped) or None,
            "clip": self.clip and hub.name_of(self.clip.directory),
            "bert": self.bert and hub.name_of(self.bert.encoder.directory),
            "bert layer": self.bert and self.bert.layer,
            "mean similarity of two images": similarity,
            "draws of random words": self.num_random,
            "seed": self.seed,
        }
        return plain({key: value for key, value in described.items() if value is not None})


def captions(features: Features) -> list[list[str]]:
    """Returns the captions of the sample of each row.

    Raises:
        ValueError: a sample has none.
    """
    (said,) = columns(features.samples, "references")
    said = [[text for text in texts or () if text.strip()] for texts in said]
    found = [said[i] for i in features.sample_rows]
    missing = [i for i, texts in zip(features.sample_rows, found, strict=True) if not texts]
    if missing:
        name = features.samples[missing[0]].get("id", missing[0])
        raise ValueError(
            f"{features.path}: {len(set(missing))} samples have no captions, the first {name!r}; "
            "BERTScore needs them: extract from data with captions, or omit BERTScore"
        )
    return found


def _fit(
    own: Float[np.ndarray, "N K"],
    drawn: Float[np.ndarray, "N K"],
    chosen: Bool[np.ndarray, "N K"],
    **rest: float,
) -> tuple[Fit, Float[np.ndarray, " N"]]:
    """Returns the means and deviations, and each sample's score."""
    scores, random = (metrics.mean_of_top(values, chosen) for values in (own, drawn))
    fit = Fit(
        mean=_mean(scores),
        std=float(np.nanstd(scores)) if np.isfinite(scores).any() else math.nan,
        random=_mean(random),
        random_std=float(np.nanstd(random)) if np.isfinite(random).any() else math.nan,
        num_samples=int(np.isfinite(scores).sum()),
        **rest,
    )
    return fit, np.asarray(scores)


def _mean(scores: Float[jax.Array | np.ndarray, " N"]) -> float:
    """Returns the mean over the samples that have a score; NaN if there are none."""
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan
