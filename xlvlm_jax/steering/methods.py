"""The steering methods: a record per method, which is all that `xlvlm steer fit` needs of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ports import VLM
from ports.intervene.edits import Edit
from ports.messages import counted, few
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.reader import Features, choose_site, choose_sites, sample_of
from xlvlm_jax.steering import lessons
from xlvlm_jax.steering.adaptive import (
    AdaptiveVector,
    VectorMemory,
    fit_adaptive,
    fit_conditional,
    fit_memory,
)
from xlvlm_jax.steering.fit import fit_coarse, fit_direction, fit_fine
from xlvlm_jax.steering.iti import fit_iti
from xlvlm_jax.steering.l2s import fit_l2s
from xlvlm_jax.steering.learned import fit_learned
from xlvlm_jax.steering.sae_features import FeatureClamp, fit_sae_clamp, fit_sae_vector
from xlvlm_jax.steering.sample_vectors import fit_p2s
from xlvlm_jax.steering.vectors import SteeringVector
from xlvlm_jax.steering.vti import fit_vti_image, fit_vti_text

# Options that choose the states which methods without a model contrast.
OF_STATES = ("target_features", "between_models", "matched")
OF_FEATURES = ("dictionary", "num_features", "feature_ids")
NUM_SAMPLES = 128  # samples to steer that are learnt from, if not said otherwise


@runtime_checkable
class Steering(Protocol):
    """What evaluation and extraction need of a vector, map or network."""

    @property
    def site(self) -> str:
        """The site whose states it shifts."""
        ...

    @property
    def source(self) -> dict[str, Any]:
        """How and on what it was fitted, as JSON values."""
        ...

    @property
    def where(self) -> Any:
        """The token positions it is meant for."""
        ...

    def edits_for(self, vlm: VLM, inputs: Any, alpha: Any, where: Any) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes for these prompts."""
        ...


@runtime_checkable
class Savable(Steering, Protocol):
    """What a method of `xlvlm steer fit` fits and `xlvlm_jax.steering.load` reads."""

    def save(self, path: str | Path) -> None:
        """Writes a file that `xlvlm_jax.steering.load` can read."""
        ...


@dataclass(frozen=True)
class Request:
    """What to fit; each method reads the attributes it needs.

    Attributes:
        features: states of the samples' answers.
        site: the site whose states to use.
        sites: all of them, for a method that fits several sites at once.
        source: the answers to steer from; None for all others.
        target: the answers to steer to.
        key, match: how answers are looked up, see `answer_states`.
        where: the token positions that the result is meant for, see `ports.add`; None for those
            that the method chooses by site (`Method.where` is None, as of vti-image).
        seed: random seed.
        num_samples: maximum number of samples to steer that are learnt from; None for all with
            forced answers or contrasts of labels, for 128 otherwise.
        keep: number of samples that must stay, per sample to steer.
        options: options of a single method, by the names of its fit function's arguments.

    Raises:
        ValueError: `num_samples` is less than 1, or `keep` less than 0.
    """

    features: Features
    site: str
    source: Sequence[str] | None = None
    target: Sequence[str] | None = None
    key: str = "prediction"
    match: str = "equals"
    where: Any = "all"
    seed: int = 0
    num_samples: int | None = None
    keep: float = 1.5
    options: Mapping[str, Any] = field(default_factory=dict)
    sites: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks the numbers of samples."""
        if not self.keep >= 0:
            raise ValueError(f"keep is {self.keep}; expected at least 0 samples per steered one")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"the number of samples must be at least 1, got {self.num_samples}")


class Examples(NamedTuple):
    """The examples that a method learns from."""

    samples: list[Sample]
    towards: list[str]  # answers, or prompts in their place
    away: list[str]  # likewise; equal to `towards` for samples that must stay
    steered: int  # number of samples to steer
    contexts: list[str] | None = None  # prompts that L2S reads; None for those of the samples


class Fitted(NamedTuple):
    """The result of a fit.

    Attributes:
        steering: file name -> what was fitted.
        figures: a short summary of the fit.
    """

    steering: Mapping[str, Savable]
    figures: str


@dataclass(frozen=True)
class Method:
    """A steering method.

    Attributes:
        name: its name on the command line.
        fit: takes a `Request` and returns a `Fitted`; a method with `examples` also takes the
            examples, the model, batch_size, strict and progress.
        options: the `Request.options` that it takes.
        needs_target: whether it requires `Request.target`.
        ignores: attributes of `Request`, and batch_size, that it does not read, unlike others of
            its kind.
        examples: chooses the examples to learn from; None for a method that reads states only and
            needs no model.
        makes_several: whether it fits several vectors, each a file in a directory.
        sites: pattern of the features' sites that it fits at once; None for a method that fits one.
        where: the token positions that its result is meant for, if not said otherwise; None for
            those that its fit function chooses by site.
        sites_of_model: whether `Request.site` is a name or pattern of the model's sites, instead of
            a site of the features.
        doing: the label of its progress bar.
    """

    name: str
    fit: Callable[..., Fitted]
    options: tuple[str, ...] = ()
    needs_target: bool = True
    ignores: tuple[str, ...] = ()
    examples: Callable[[Request], Examples] | None = None
    makes_several: bool = False
    sites: str | None = None
    where: str | None = "all"
    sites_of_model: bool = False
    doing: str = "fitting"

    def sites_in(self, features: Features, site: str | None) -> list[str]:
        """Returns the sites that the method fits.

        Args:
            features: the features.
            site: a name or a pattern; None for the method's own, or the only site of the features.

        Raises:
            ValueError: no site of the features matches, or several for a method that fits one.
        """
        if self.sites_of_model:
            return ["layers.*" if site is None else site]
        if self.examples is not None or self.makes_several:
            return [choose_site(features, self.sites if site is None else site)]
        return choose_sites(features, self.sites if site is None else site)


def _fit_coarse(asked: Request) -> Fitted:
    return _of_rows(asked, fit_coarse(*_answered(asked), **_looked_up(asked)))


def _fit_pca(asked: Request) -> Fitted:
    return _of_rows(asked, fit_direction(*_answered(asked), method="pca", **_looked_up(asked)))


def _fit_lat(asked: Request) -> Fitted:
    options = {"method": "lat", "seed": asked.seed}
    return _of_rows(asked, fit_direction(*_answered(asked), **options, **_looked_up(asked)))


def _fit_probe(asked: Request) -> Fitted:
    return _of_rows(asked, fit_direction(*_answered(asked), method="probe", **_looked_up(asked)))


def _fit_iti(asked: Request) -> Fitted:
    options = {"seed": asked.seed, **_looked_up(asked)}
    sites = asked.sites or (asked.site,)
    fitted = fit_iti(asked.features, sites, asked.source, asked.target, **options)
    heads = fitted.source["heads"]
    figures = (
        f"{counted(len(heads), 'head')} at {counted(len(fitted.vectors), 'site')}, validation "
        f"accuracy {heads[-1][-1]:.2f} to {heads[0][-1]:.2f}"
    )
    return Fitted({"iti": fitted}, figures)


def _fit_adaptive(asked: Request) -> Fitted:
    return _of_rows(asked, fit_adaptive(*_answered(asked), **_looked_up(asked)))


def _fit_conditional(asked: Request) -> Fitted:
    return _of_rows(asked, fit_conditional(*_answered(asked), **_looked_up(asked)))


def _fit_memory(asked: Request) -> Fitted:
    options = _looked_up(asked)
    if options.get("threshold") is None:
        options.pop("threshold", None)
    return _of_rows(asked, fit_memory(*_answered(asked), seed=asked.seed, **options))


def _fit_sae(asked: Request) -> Fitted:
    return _of_rows(asked, fit_sae_vector(*_answered(asked), **_with_dictionary(asked)))


def _fit_sae_clamp(asked: Request) -> Fitted:
    return _of_rows(asked, fit_sae_clamp(*_answered(asked), **_with_dictionary(asked)))


def _with_dictionary(asked: Request) -> dict[str, Any]:
    options = _looked_up(asked)
    if options.get("dictionary") is None:
        raise ValueError(
            "there is no dictionary; give a sparse autoencoder of the site with --dictionary"
        )
    return options


def _answered(asked: Request) -> tuple[Any, ...]:
    """Returns the positional arguments of the fits that contrast states of answers."""
    return asked.features, asked.site, asked.source, asked.target


def _looked_up(asked: Request) -> dict[str, Any]:
    """Returns their other arguments."""
    common = {"key": asked.key, "match": asked.match, "where": asked.where}
    return {**common, **asked.options}


def _of_rows(
    asked: Request, fitted: SteeringVector | AdaptiveVector | VectorMemory | FeatureClamp
) -> Fitted:
    """Wraps what was fitted on states as the result."""
    rows = fitted.source
    figures = f"{rows['source rows']} source and {rows['target rows']} target rows"
    if isinstance(fitted, VectorMemory):
        norms = np.linalg.norm(fitted.vectors, axis=1)
        figures += f", {counted(len(norms), 'key')}, norms {norms.min():.3g} to {norms.max():.3g}"
    elif isinstance(fitted, FeatureClamp):
        figures += f", features {few(fitted.features)}"
    else:
        figures += f", norm {np.linalg.norm(fitted.vector):.3g}"
    if "gate accuracy" in rows:
        figures += f", gate right for {100 * rows['gate accuracy']:.0f} %"
    return Fitted({asked.site: fitted}, figures)


def _fit_fine(asked: Request) -> Fitted:
    options = dict(asked.options)
    count = options.pop("num_concepts", None)
    if count is None:
        raise ValueError("method 'fine' needs the option num_concepts, the number of concepts")
    vectors, fine = fit_fine(
        asked.features,
        asked.site,
        count,
        asked.source,
        key=asked.key,
        match=asked.match,
        where=asked.where,
        seed=asked.seed,
        **options,
    )
    sizes = ", ".join(str(len(fine.samples(i))) for i in range(count))
    named = {f"{v.source['from']}-{v.source['to']}": v for v in vectors}
    return Fitted(
        named, f"{counted(len(vectors), 'vector')} between {count} concepts of {sizes} rows"
    )


def _answers(asked: Request) -> Examples:
    """Returns samples with their wanted and given answers."""
    lesson = _lesson(asked)
    return Examples(lesson.samples, lesson.wanted, lesson.given, _steered(lesson))


def _counterparts(asked: Request) -> Examples:
    """Returns `_answers`, other prompts about the same images, or forced answers, by contrast."""
    contrast = _contrast(asked)
    if contrast in ("prompt", "label") and asked.options.get("states") == "mean":
        raise ValueError("states 'mean' is over the tokens of a completion; contrast completions")
    if contrast == "forced":
        options = {"num_samples": asked.num_samples, "seed": asked.seed}
        contrasts = asked.options.get("contrasts")
        forced = lessons.forced_answers(
            asked.features,
            asked.options.get("positive"),
            asked.options.get("negative"),
            contrasts=contrasts,
            **options,
        )
        prompts = {each["id"]: each["prompt"] for each in lessons.readable(asked.features)}
        return Examples(*forced, len(forced[0]), [prompts[sample.id] for sample in forced[0]])
    for name in ("positive", "negative", "contrasts"):
        if asked.options.get(name) is not None:
            raise ValueError(f"--{name} is of forced answers; give --contrast forced too")
    if contrast == "label":
        among = [sample_of(kept) for kept in lessons.readable(asked.features)]
        chosen = lessons.readable(asked.features, asked.num_samples, asked.seed)
        samples = [sample_of(kept) for kept in chosen]
        positive, negative = lessons.contrast_labels(samples, among=among)
        apart = sum(a != b for a, b in zip(positive, negative, strict=True))
        return Examples(samples, positive, negative, apart)
    if contrast != "prompt":
        return _answers(asked)
    lesson = _lesson(asked)
    assert asked.target is not None  # or `_lesson` raises
    pairs = lessons.contrast_prompts(asked.features, lesson, asked.target, key=asked.key)
    return Examples(*pairs, _steered(lesson))


def _l2s_examples(asked: Request) -> Examples:
    """Returns `_counterparts`, with the prompts that the network reads if not those of samples."""
    found, prompt = _counterparts(asked), asked.options.get("context_prompt")
    if prompt is None:
        return found
    return found._replace(contexts=[lessons.asked_with(each, prompt) for each in found.samples])


def _contrast(asked: Request) -> str:
    """Returns how two counterparts of each prompt are contrasted; as `fit_l2s` does by default."""
    return str(asked.options.get("contrast") or "completion")


def _lesson(asked: Request) -> lessons.Lesson:
    if not asked.source or not asked.target:
        raise ValueError(
            "there are no source or no target answers to learn from; give words to steer from and "
            "the answer to steer to"
        )
    return lessons.lesson(
        asked.features,
        asked.source,
        asked.target[0],
        key=asked.key,
        match=asked.match,
        num_samples=asked.num_samples or NUM_SAMPLES,
        keep=asked.keep,
        seed=asked.seed,
    )


def _steered(lesson: lessons.Lesson) -> int:
    return sum(given != wanted for given, wanted in zip(lesson.given, lesson.wanted, strict=True))


def _fit_learned(asked: Request, examples: Examples, vlm: VLM, **learning: Any) -> Fitted:
    fitted = fit_learned(
        vlm,
        examples.samples,
        examples.towards,
        asked.site,
        where=asked.where,
        seed=asked.seed,
        **asked.options,
        **learning,
    )
    history = fitted.source["history"]
    best = min(history, key=lambda look: look["validation"])
    figures = f"{history[0]['validation']:.3g} -> {best['validation']:.3g} at step {best['step']}"
    return _of_samples(asked, fitted, f"validation loss {figures}")


def _fit_l2s(asked: Request, examples: Examples, vlm: VLM, **learning: Any) -> Fitted:
    fitted = fit_l2s(
        vlm,
        examples.samples,
        examples.towards,
        examples.away,
        asked.site,
        contexts=examples.contexts,
        where=asked.where,
        seed=asked.seed,
        context_site=asked.options.get("context_site"),
        **_contrasted(asked),
        **learning,
    )
    left, mean = (100 * fitted.source[f"unexplained{of}"] for of in ("", " by the mean"))
    figures = f"{left:.0f} % of the shifts unexplained ({mean:.0f} % by their mean)"
    return _of_samples(asked, fitted, figures)


def _fit_p2s(asked: Request, examples: Examples, vlm: VLM, **learning: Any) -> Fitted:
    fitted = fit_p2s(
        vlm,
        examples.samples,
        examples.towards,
        examples.away,
        asked.site,
        where=asked.where,
        **_contrasted(asked),
        **learning,
    )
    norms = np.linalg.norm(fitted.vectors, axis=1)
    return _of_samples(asked, fitted, f"norms {norms.min():.3g} to {norms.max():.3g}")


def _fit_vti_image(asked: Request, examples: Examples, vlm: VLM, **learning: Any) -> Fitted:
    del learning["batch_size"]  # a batch is one picture and its masked versions
    vectors = fit_vti_image(
        vlm,
        examples.samples,
        asked.site,
        where=asked.where,
        seed=asked.seed,
        **asked.options,
        **learning,
    )
    return _of_layers(asked, vectors)


def _fit_vti_text(asked: Request, examples: Examples, vlm: VLM, **learning: Any) -> Fitted:
    vectors = fit_vti_text(
        vlm,
        examples.samples,
        examples.towards,
        examples.away,
        asked.site,
        where=asked.where,
        **_contrasted(asked),
        **learning,
    )
    return _of_layers(asked, vectors)


def _of_layers(asked: Request, vectors: Mapping[str, SteeringVector]) -> Fitted:
    """Wraps a vector per site as the result."""
    for vector in vectors.values():
        vector.source["features"] = str(asked.features.path.resolve())
    norms = [np.linalg.norm(vector.vector) for vector in vectors.values()]
    samples = counted(next(iter(vectors.values())).source["samples"], "sample")
    figures = f"{counted(len(norms), 'vector')}, norms {min(norms):.3g} to {max(norms):.3g}"
    return Fitted(vectors, f"{samples}, {figures}")


def _pictures(asked: Request) -> Examples:
    """Returns readable samples, whose answers do not matter."""
    chosen = lessons.readable(asked.features, asked.num_samples or NUM_SAMPLES, asked.seed)
    samples = [sample_of(kept) for kept in chosen]
    return Examples(samples, [], [], len(samples))


def _contrasted(asked: Request) -> dict[str, str]:
    """Returns how two counterparts are contrasted: as completions or as prompts."""
    contrast = _contrast(asked)
    return {
        "contrast": {"forced": "completion", "label": "prompt"}.get(contrast, contrast),
        "states": asked.options.get("states", "last"),
    }


def _of_samples(asked: Request, fitted: Savable, figures: str) -> Fitted:
    """Adds to its source what it was fitted on, and wraps it as the result."""
    fitted.source.update(
        features=str(asked.features.path.resolve()),
        source=asked.source,
        target=asked.target,
        key=asked.key,
        match=asked.match,
    )
    return Fitted({asked.site: fitted}, f"{counted(fitted.source['samples'], 'sample')}, {figures}")


# Options of the methods that contrast two counterparts of each prompt.
OF_COUNTERPARTS = ("contrast", "states", "positive", "negative", "contrasts")
METHODS = {
    method.name: method
    for method in (
        Method("coarse", _fit_coarse, (*OF_STATES, "source_concepts")),
        Method("pca", _fit_pca, OF_STATES),
        Method("lat", _fit_lat, OF_STATES),
        Method("probe", _fit_probe, (*OF_STATES, "penalty")),
        Method(
            "iti",
            _fit_iti,
            (*OF_STATES, "num_heads", "direction"),
            sites="**.heads",
            where="predicting",
        ),
        Method("adaptive", _fit_adaptive, OF_STATES),
        Method("conditional", _fit_conditional, (*OF_STATES, "threshold")),
        Method("memory", _fit_memory, (*OF_STATES, "threshold", "num_keys")),
        Method("sae", _fit_sae, (*OF_STATES, *OF_FEATURES)),
        Method("sae-clamp", _fit_sae_clamp, (*OF_STATES, *OF_FEATURES)),
        Method(
            "fine",
            _fit_fine,
            ("num_concepts", "pairs", "decomposition"),
            needs_target=False,
            ignores=("target",),
            makes_several=True,
        ),
        Method("learned", _fit_learned, ("rank", "steps"), examples=_answers, doing="learning"),
        Method(
            "l2s",
            _fit_l2s,
            (*OF_COUNTERPARTS, "context_site", "context_prompt"),
            examples=_l2s_examples,
            doing="running counterparts",
        ),
        Method(
            "p2s",
            _fit_p2s,
            OF_COUNTERPARTS,
            examples=_counterparts,
            doing="running counterparts",
        ),
        Method(
            "vti-image",
            _fit_vti_image,
            ("share", "num_masks"),
            needs_target=False,
            ignores=("source", "target", "key", "match", "keep", "batch_size"),
            examples=_pictures,
            makes_several=True,
            where=None,
            sites_of_model=True,
            doing="masking pictures",
        ),
        Method(
            "vti-text",
            _fit_vti_text,
            OF_COUNTERPARTS,
            examples=_counterparts,
            makes_several=True,
            sites_of_model=True,
            doing="running counterparts",
        ),
    )
}


def method_named(name: str) -> Method:
    """Returns the method with this name.

    Raises:
        ValueError: there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
