"""Questions whether objects are there: false yes against accuracy on everything else."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.hallucination import common
from benchmarks.hallucination.common import HEADS, INSTRUCTION, Entry, Found, Setting, kept, layer
from xlvlm_jax import Features, data, sae, steering
from xlvlm_jax.concepts.stage import decompose_features
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import Presence
from xlvlm_jax.evaluation.hallucination import distinct_questions
from xlvlm_jax.features import ExtractionSettings
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.metrics.uncertainty import bootstrap
from xlvlm_jax.steering.sample_vectors import SampleVectors
from xlvlm_jax.steering.site_vectors import SiteVectors

NEW_TOKENS = 3
STORED = (4, 5, 6)  # layers whose states are kept
LAYERS = (5, 6)  # those that are steered
FALSE, RIGHT = ["yes for no"], ["no for no"]  # a false yes, and a right no
OUTCOME: dict[str, Any] = {"key": "outcome", "where": "predicting"}
OPPOSITE = {"yes": "no", "no": "yes"}
CONTRASTS = ("completion", "prompt")
WEAK = (0.25, 0.5, 1.0)
STRONG = (0.5, 1.0, 2.0)
NUM_L2S = 500  # questions
INSTRUCTIONS = (
    "Is it in the picture?",
    "Can you see it?",
    "Answer no.",
    "Answer yes or no.",
    "Answer no if it is not in the picture.",
    "Only say yes if you can see it.",
    "What is in the picture?",
    "no",
)


class Fits:
    """The entries of every method; each fit is kept on disk."""

    def __init__(self, setting: Setting):
        self.setting, self.vlm = setting, setting.vlm
        self.directory = setting.output / "questions" / "fits"
        self.train = _once(data.load("scenes", setting.pictures, "train", ask="all"))
        self.asked = [sample for sample in self.train if "label" in sample.metadata]

    def families(self) -> list[Callable[[], list[Entry]]]:
        """What is tried on the validation split; the entries of a family share one program."""
        return [
            # At one layer: the layers before it run once for all trials.
            lambda: [
                *(*self.vectors(), *self.adaptive(), *self.clamps()),
                *(*self.learned(), *self.l2s(), *self.p2s("val")),
            ],
            lambda: [*self.heads(), *self.vti_text()],
            lambda: [Entry(INSTRUCTION, text, text) for text in INSTRUCTIONS],
        ]

    def samples(self, split: str) -> list[Sample]:
        """The questions about the pictures of a split."""
        return self.setting.few(data.load("scenes", self.setting.pictures, split, ask="all"), split)

    @functools.cached_property
    def features(self) -> Features:
        """The states that predict the answers."""
        sites = (*map(layer, STORED), HEADS)
        settings = ExtractionSettings(
            sites, Selection("before-special-tokens"), max_new_tokens=NEW_TOKENS, batch_size=64
        )
        return common.features_of(self.setting, self.asked, "questions", settings)

    def vectors(self) -> list[Entry]:
        """What is one vector at one layer."""
        features = self.features
        fits: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "coarse": (steering.fit_coarse, {}),
            **{name: (steering.fit_direction, {"method": name}) for name in ("pca", "lat")},
            "probe": (steering.fit_direction, {"method": "probe"}),
        }
        entries = []
        for name, (fit, options) in fits.items():
            for number in LAYERS:
                key = f"{name}-{number}"
                given = (features, layer(number), FALSE, RIGHT)
                made = kept(self.directory, key, fit, *given, **options, **OUTCOME)
                entries.append(Entry(name, key, made, WEAK))
        number = LAYERS[-1]
        for pair in ((0, 1), (1, 0)):
            key = f"fine-{number}-{pair[0]}"
            made = kept(self.directory, key, self._fine, layer(number), pair)
            entries.append(Entry("fine", key, made, WEAK))
        for count in (4, 16):
            key = f"sae-{number}-{count}"
            made = kept(self.directory, key, self._sae, steering.fit_sae_vector, number, count)
            entries.append(Entry("sae", key, made, STRONG))
        return entries

    def _fine(self, site: str, pair: tuple[int, int]) -> Any:
        """From one of two clusters of the states that answer questions about what is absent."""
        said = [*FALSE, *RIGHT]
        return steering.fit_fine(self.features, site, 2, said, pairs=[pair], **OUTCOME)[0][0]

    def _sae(self, fit: Callable[..., Any], number: int, count: int) -> Any:
        """Features of a sparse autoencoder that is trained on the same states."""
        directory = self.setting.output / "questions" / f"sae-{number}"
        if not directory.is_dir():
            options: dict[str, Any] = {"k": 16, "max_iter": 1000, "batch_size": 512}
            options["site"] = layer(number)
            count_all = min(384, len(self.features.tokens) // 2)
            decompose_features(self.features, directory, count_all, "topk-sae", **options)
        options = {"dictionary": sae.load(directory), "num_features": count, **OUTCOME}
        return fit(self.features, layer(number), FALSE, RIGHT, **options)

    def learned(self) -> list[Entry]:
        """A vector, and a map of low rank, that turn false yes to no and keep other answers."""
        given = common.plain_answers(self.setting, self.train, "questions", NEW_TOKENS)
        false = np.nan_to_num(Presence().false_yes(self.train, given)).astype(bool)
        others = np.random.default_rng(0).permutation(np.flatnonzero(~false))[: 3 * false.sum()]
        rows = np.concatenate([np.flatnonzero(false), others])
        samples = [self.train[row] for row in rows]
        wanted = ["no" if false[row] else given[row] for row in rows]
        options: dict[str, Any] = {"where": "predicting", "steps": 60, "batch_size": 32}
        site = layer(LAYERS[-1])
        entries = []
        for name, rank in (("learned", None), ("learned, rank 4", 4)):
            fit, given_to = steering.fit_learned, (self.vlm, samples, wanted, site)
            made = kept(
                self.directory, f"learned-{rank or 0}", fit, *given_to, rank=rank, **options
            )
            entries.append(Entry(name, f"{name} at {LAYERS[-1]}", made, WEAK))
        return entries

    def adaptive(self) -> list[Entry]:
        """Vectors whose strength, or direction, depends on the state."""
        fits = {
            "adaptive": steering.fit_adaptive,
            "conditional": steering.fit_conditional,
            "memory": steering.fit_memory,
        }
        entries = []
        for name, fit in fits.items():
            for number in LAYERS:
                key = f"{name}-{number}"
                given = (self.features, layer(number), FALSE, RIGHT)
                made = kept(self.directory, key, fit, *given, **OUTCOME)
                entries.append(Entry(name, key, made, WEAK))
        return entries

    def heads(self) -> list[Entry]:
        """ITI: numbers of heads, and both directions."""
        features, entries = self.features, []
        sites = [site for site in features.sites if site.endswith("heads")]
        for count in (8, 24):
            for direction in ("mean", "probe"):
                key = f"iti-{count}-{direction}"
                options = {"num_heads": count, "direction": direction, **OUTCOME}
                given = (features, sites, FALSE, RIGHT)
                made = kept(self.directory, key, steering.fit_iti, *given, **options)
                entries.append(Entry("iti", key, made, (0.25, 0.5, 0.75, 1.0)))
        return entries

    def clamps(self) -> list[Entry]:
        """Codes of features, set to what they are in states of right answers."""
        entries, number = [], LAYERS[-1]
        for count in (4, 16):
            key = f"sae-clamp-{number}-{count}"
            made = kept(self.directory, key, self._sae, steering.fit_sae_clamp, number, count)
            entries.append(Entry("sae-clamp", key, made, WEAK))
        return entries

    def l2s(self) -> list[Entry]:
        """Networks that predict the contrast of two answers, or of two questions."""
        entries, number = [], LAYERS[-1]
        pictures = {sample.image_id for sample in self.asked[:NUM_L2S]}
        samples = [sample for sample in self.train if sample.image_id in pictures]
        for contrast in CONTRASTS:
            key = f"l2s-{number}-{contrast}"
            made = self._contrasted(key, steering.fit_l2s, samples, contrast, layer(number))
            entries.append(Entry("l2s", key, made, STRONG))
        return entries

    def p2s(self, split: str) -> list[Entry]:
        """A vector for each question of the split, made with its label, which no user knows."""
        samples = self.samples(split)
        entries, number = [], LAYERS[-1]
        for contrast in CONTRASTS:
            key = f"p2s-{number}-{contrast}"
            made = self._contrasted(
                f"{key}-{split}-{len(samples)}", _of_samples, samples, contrast, layer(number)
            )
            entries.append(Entry("p2s", key, made, STRONG))
        return entries

    def vti_text(self) -> list[Entry]:
        """What right answers share, at every layer of the decoder."""
        absent = [sample for sample in self.asked if sample.metadata["label"] == "no"][:NUM_L2S]
        entries = []
        for contrast in CONTRASTS:
            key = f"vti-text-{contrast}"
            sites = "language_model.model.layers.*"
            text = self._contrasted(key, _vti_text, absent, contrast, sites)
            entries.append(Entry("vti-text", key, text, (0.1, *WEAK)))
        return entries

    def _contrasted(
        self, key: str, fit: Callable[..., Any], samples: list[Sample], contrast: str, site: str
    ) -> Any:
        pairs = counterparts(samples, contrast, among=[*self.asked, *samples])
        options: dict[str, Any] = {"contrast": contrast, "where": "predicting", "batch_size": 64}
        return kept(self.directory, key, fit, self.vlm, samples, *pairs, site, **options)


def counterparts(
    samples: Sequence[Sample], contrast: str, among: Sequence[Sample]
) -> tuple[list[str], list[str]]:
    """What to steer each question towards and away from; the same for the rest, which must stay.

    Args:
        samples: the questions.
        contrast: "completion" for the right and the wrong answer, "prompt" for two questions about
            the same picture, one with the same label and one with the other.
        among: the questions to choose these two from.
    """
    if contrast == "prompt":
        return steering.contrast_labels(samples, among=among)
    towards = [sample.metadata.get("label") or sample.references[0] for sample in samples]
    labels = [sample.metadata.get("label") for sample in samples]
    away = [OPPOSITE.get(label, stays) for label, stays in zip(labels, towards, strict=True)]
    return towards, away


def _once(samples: Sequence[Sample]) -> list[Sample]:
    """The questions without those that are asked again, as POPE does."""
    return list({(sample.image, sample.prompt): sample for sample in reversed(samples)}.values())


def _of_samples(
    vlm: Any, samples: list[Sample], towards: list[str], away: list[str], site: str, **options: Any
) -> SampleVectors:
    """Vectors of samples; what stays, and what is asked again, is not computed."""
    names = [(str(s.image), s.prompt) for s in samples]
    rows = {name: i for i, name in enumerate(names) if towards[i] != away[i]}
    some = list(rows.values())
    right, wrong = ([column[i] for i in some] for column in (towards, away))
    made = steering.fit_p2s(vlm, [samples[i] for i in some], right, wrong, site, **options)
    place = {name: number for number, name in enumerate(rows)}
    vectors = np.zeros((len(samples), made.vectors.shape[1]), np.float32)
    for i, name in enumerate(names):
        if name in place:
            vectors[i] = made.vectors[place[name]]
    ids = tuple(sample.id for sample in samples)
    return dataclasses.replace(made, vectors=vectors, ids=ids)


def _vti_text(*args: Any, **options: Any) -> SiteVectors:
    return _together(steering.fit_vti_text(*args, **options))


def _together(vectors: Mapping[str, Any]) -> SiteVectors:
    first = next(iter(vectors.values()))
    return SiteVectors({site: v.vector for site, v in vectors.items()}, first.source, first.where)


def run(setting: Setting, tested: Sequence[str] | None) -> Found:
    """Chooses on the validation pictures, and tests what was chosen.

    Args:
        setting: the setting.
        tested: the methods to test; None for all.
    """
    fits, task, directory = Fits(setting), Presence(), setting.output / "questions"
    val, test = fits.samples("val"), fits.samples("test")
    trials = common.try_all(setting, val, task, directory / "val", fits.families(), NEW_TOKENS)
    names = [
        name for name in dict.fromkeys(trials.sweep.methods) if tested is None or name in tested
    ]
    of_test = {entry.key: entry.applied for entry in fits.p2s("test")} if "p2s" in names else {}
    answers = common.test(
        setting, test, task, directory / "test", trials, names, NEW_TOKENS, of_test
    )
    return Found(_rows(task, test, answers, trials), trials.sweep)


def _rows(
    task: Presence, samples: list[Sample], answers: dict[str, list[str]], trials: common.Trials
) -> list[dict[str, Any]]:
    """What was chosen of each method, and what it does on the test split if it was tested."""
    false = {name: task.false_yes(samples, given) for name, given in answers.items()}
    rest = {name: task.rest(samples, given) for name, given in answers.items()}
    absent, others = ~np.isnan(false["plain"]), ~np.isnan(rest["plain"])
    asked = [sample for sample, is_absent in zip(samples, absent, strict=True) if is_absent]
    groups = [s.image_id for s, is_other in zip(samples, others, strict=True) if is_other]
    once = distinct_questions(asked)  # which the p values count
    yes = {name: values[absent].astype(bool) for name, values in false.items()}
    rows = []
    for name in dict.fromkeys(("plain", *trials.sweep.methods, *answers)):
        row = {"method": name} if name == "plain" else common.chosen_row(trials, name)
        if name in answers:
            share, interval = common.share_gone(yes["plain"], yes[name], asked)
            counts = np.stack([rest["plain"], rest[name], np.ones(len(samples))], axis=1)[others]
            lost = bootstrap(
                counts, groups, lambda x: {"lost": 100 * (x[:, 0] - x[:, 1]) / x[:, 2]}
            )
            row |= {
                "false yes": int(yes[name].sum()),
                "of": len(asked),
                "gone": share,
                "gone interval": interval,
                "rest": float(rest[name][others].mean()),
                "lost": 100 * float(counts[:, 0].mean() - counts[:, 1].mean()),
                "lost interval": list(lost["lost"]),
                "p against plain": common.p_value(yes["plain"][once], yes[name][once]),
                "p against instruction": common.p_value(yes[INSTRUCTION][once], yes[name][once]),
            }
        rows.append(row)
    return rows
