"""The ways to fit steering: one record for each, which is all that the command knows of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ports import VLM
from ports.intervene.edits import Edit
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.features.reader import Features
from xlvlm_jax.steering import lessons
from xlvlm_jax.steering.fit import fit_coarse, fit_fine
from xlvlm_jax.steering.l2s import fit_l2s
from xlvlm_jax.steering.learned import fit_learned


@runtime_checkable
class Steering(Protocol):
    """What a method fits, and `xlvlm_jax.steering.load` reads: evaluation asks for nothing else."""

    @property
    def site(self) -> str:
        """Whose states it is for."""
        ...

    @property
    def source(self) -> dict[str, Any]:
        """How it was fitted and on what, JSON values."""
        ...

    @property
    def where(self) -> Any:
        """The positions it is meant for."""
        ...

    def edits_for(self, vlm: VLM, inputs: Any, alpha: Any, where: Any) -> dict[str, Edit]:
        """The edits that `VLM.generate` takes for these prompts."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes it where `xlvlm_jax.steering.load` reads it."""
        ...


@dataclass(frozen=True)
class Request:
    """What is to be fitted; a method reads of it what it needs.

    Attributes:
        features: states of the samples' answers.
        site: whose states.
        source: the answers to steer from; None: all others.
        target: the answers to steer to.
        key, match: how answers are looked up, see `fit_coarse`.
        where: the positions that the result is meant for, see `ports.add`.
        seed: of every random choice.
        num_samples: of those to be steered that are learnt from, at most.
        keep: for each of these, so many others that stay.
        options: what is one method's alone, by the names of its fit function's arguments.
    """

    features: Features
    site: str
    source: Sequence[str] | None = None
    target: Sequence[str] | None = None
    key: str = "prediction"
    match: str = "equals"
    where: Any = "all"
    seed: int = 0
    num_samples: int = 128
    keep: float = 1.5
    options: Mapping[str, Any] = field(default_factory=dict)


class Examples(NamedTuple):
    """What a method that learns is given."""

    samples: list[Sample]
    towards: list[str]  # answers, or prompts in their place
    away: list[str]  # likewise; equal to `towards` where a sample is to stay
    steered: int  # of the samples


class Fitted(NamedTuple):
    """What a fit makes."""

    steering: Mapping[str, Steering]  # by the name of its file
    figures: str  # how it went, in a few words


@dataclass(frozen=True)
class Method:
    """One way to fit steering.

    Attributes:
        name: what a user calls it.
        fit: makes it: of a `Request`, and for what learns also of the examples, the model, and
            batch_size, strict and progress.
        options: those of `Request.options` that it takes.
        needs_target: whether it can't do without `Request.target`.
        examples: what is learnt from; None for a method that takes states alone, and no model.
        makes_several: whether it makes several, each a file in a directory.
        doing: what its progress bar says.
    """

    name: str
    fit: Callable[..., Fitted]
    options: tuple[str, ...] = ()
    needs_target: bool = True
    examples: Callable[[Request], Examples] | None = None
    makes_several: bool = False
    doing: str = "fitting"


def _fit_coarse(asked: Request) -> Fitted:
    assert asked.target is not None
    vector = fit_coarse(
        asked.features,
        asked.site,
        asked.source,
        asked.target,
        key=asked.key,
        match=asked.match,
        where=asked.where,
        **asked.options,
    )
    rows, norm = vector.source, float(np.linalg.norm(vector.vector))
    figures = f"{rows['source rows']} source and {rows['target rows']} target rows"
    return Fitted({asked.site: vector}, f"{figures}, norm {norm:.3g}")


def _fit_fine(asked: Request) -> Fitted:
    options = dict(asked.options)
    count = options.pop("num_concepts")
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
    return Fitted(named, f"{len(vectors)} vectors between {count} concepts of {sizes} rows")


def _answers(asked: Request) -> Examples:
    """Samples with the answers wanted of them, and those that they got."""
    lesson = _lesson(asked)
    return Examples(lesson.samples, lesson.wanted, lesson.given, _steered(lesson))


def _counterparts(asked: Request) -> Examples:
    """As `_answers`; with prompts as contrast, other prompts about the same images."""
    if asked.options["contrast"] != "prompt":
        return _answers(asked)
    lesson = _lesson(asked)
    assert asked.target is not None
    pairs = lessons.contrast_prompts(asked.features, lesson, asked.target, key=asked.key)
    return Examples(*pairs, _steered(lesson))


def _lesson(asked: Request) -> lessons.Lesson:
    assert asked.source is not None and asked.target is not None
    return lessons.lesson(
        asked.features,
        asked.source,
        asked.target[0],
        key=asked.key,
        match=asked.match,
        num_samples=asked.num_samples,
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
        where=asked.where,
        seed=asked.seed,
        **asked.options,
        **learning,
    )
    left, mean = (100 * fitted.source[f"unexplained{of}"] for of in ("", " by the mean"))
    figures = f"{left:.0f} % of the shifts unexplained ({mean:.0f} % by their mean)"
    return _of_samples(asked, fitted, figures)


def _of_samples(asked: Request, fitted: Steering, figures: str) -> Fitted:
    """With what it was fitted on in its source."""
    fitted.source.update(
        features=str(asked.features.path.resolve()),
        source=asked.source,
        target=asked.target,
        key=asked.key,
        match=asked.match,
    )
    return Fitted({asked.site: fitted}, f"{fitted.source['samples']} samples, {figures}")


METHODS = {
    method.name: method
    for method in (
        Method("coarse", _fit_coarse, ("target_features",)),
        Method(
            "fine",
            _fit_fine,
            ("num_concepts", "pairs"),
            needs_target=False,
            makes_several=True,
        ),
        Method("learned", _fit_learned, ("rank", "steps"), examples=_answers, doing="learning"),
        Method(
            "l2s",
            _fit_l2s,
            ("contrast", "context_site"),
            examples=_counterparts,
            doing="running counterparts",
        ),
    )
}


def method_named(name: str) -> Method:
    """The method of that name. ValueError for another."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]
