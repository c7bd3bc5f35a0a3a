"""Reads a run directory, renders it as a page and writes the page."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ports.tables import flat
from xlvlm_jax.concepts.scores.attributes import known_attributes
from xlvlm_jax.features.reader import Features
from xlvlm_jax.report.beside_section import beside as side_by_side
from xlvlm_jax.report.beside_section import pair_sections, read_other
from xlvlm_jax.report.cards import NUM_CONCEPTS, Section, read_section
from xlvlm_jax.report.environment import BLANK, environment, part, store
from xlvlm_jax.report.heat_maps import gradient_css
from xlvlm_jax.report.map_overlays import with_overlays
from xlvlm_jax.report.numbers import number
from xlvlm_jax.report.pictures import choose_pictures
from xlvlm_jax.report.scores_section import KEYS as SCORES
from xlvlm_jax.report.scores_section import read_scores
from xlvlm_jax.report.shift_section import read_shifts, shown_images
from xlvlm_jax.report.steering_section import read_steering
from xlvlm_jax.report.steering_section import shown_images as shown_steering
from xlvlm_jax.report.thumbnails import BUDGET, not_shown
from xlvlm_jax.storage import damaged, versions
from xlvlm_jax.storage.names import distinct_ends
from xlvlm_jax.storage.pictures import store_features

Facts = list[tuple[str, str]]


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    images: str | os.PathLike[str] | None = None,
    beside: str | os.PathLike[str] | None = None,
    picture_bytes: int = BUDGET,
    num_concepts: int = NUM_CONCEPTS,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Writes a run directory as a self-contained HTML page.

    Reads `features/`, every `concepts*/` and, if present, `scores.json`, `run.json`, `shift*/` and
    `steering/*/`; with an evaluation in `steering/*/`, features and concepts may be missing. The
    page embeds its pictures as thumbnails and needs no other file and no network.

    Args:
        run: the run directory.
        output: the file to write; by default report.html in the run directory.
        images: directory that holds the pictures now, if they were moved without the run.
        beside: another run directory, whose concepts the page shows next to their match in this
            run.
        picture_bytes: maximum size of all thumbnails together. What the most activating pictures of
            the concepts leave goes to further pictures, which the page shows on a click.
        num_concepts: maximum number of concepts per directory to show in full, those with the
            largest shares; the others are rows of a table, with their words and numbers.
        tell: called with a message if pictures can't be shown; the page shows the message too.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the directory does not exist, or holds no features or no concepts.
        ValueError: a file is damaged, concepts were not learnt on these features, or `num_concepts`
            is less than 1.
        OSError: the page can't be written.
    """
    if num_concepts < 1:
        raise ValueError(f"num_concepts must be at least 1, got {num_concepts}")
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(
            f"{run}: no such run directory; give one such as `xlvlm demo` writes"
        )
    with damaged.reported(run, "run", "recreate its features and concepts"):
        other = None if beside is None else Path(beside)
        text = _render(run, images, other, picture_bytes, num_concepts, tell)
    return store(run / "report.html" if output is None else Path(output), text)


def _render(
    run: Path,
    images: str | os.PathLike[str] | None,
    beside: Path | None,
    picture_bytes: int,
    num_concepts: int,
    tell: Callable[[str], None] | None,
) -> str:
    steering = read_steering(run, images)
    has_features = (run / "features").is_dir()
    if not has_features and not steering:
        raise FileNotFoundError(f"{run}: has no features/; run `xlvlm extract` first")
    directories = sorted(path for path in run.glob("concepts*") if path.is_dir())
    if not directories and not steering:
        raise FileNotFoundError(f"{run}: has no concepts*/; run `xlvlm decompose` first")

    features = (
        Features.open(run / "features", images=images) if has_features and directories else None
    )
    attributes, sections = {}, []
    if features is not None:
        attributes = known_attributes(features)
        sections = [
            read_section(directory, features, attributes, num_concepts) for directory in directories
        ]
    other, pairs = None, []
    if beside is not None:
        if not sections:
            raise ValueError(
                f"{run} has no features and concepts to show another run's beside; omit --beside"
            )
        other = read_other(beside, images, num_concepts)
        pairs = pair_sections(sections, other.sections)
    settings, scores = _read_json(run / "run.json"), _read_json(run / "scores.json")
    versions.require(run / "scores.json", scores, "score again")
    shifts = read_shifts(run, images, num_concepts)
    owned = [(section, features) for section in sections if features is not None]
    if other is not None:
        owned += [(section, other.features) for section in other.sections]
    roots = [root for each in (run, beside) if each is not None for root in (each, each.parent)]
    shown = choose_pictures(
        owned, [*shown_images(shifts), *shown_steering(steering)], roots, picture_bytes
    )
    sections, others = shown.sections[: len(sections)], shown.sections[len(sections) :]
    if features is not None:
        sections = with_overlays(sections, run, features, shown.thumbnails)
    besides = []
    if features is not None and other is not None:
        first, second = distinct_ends([run, beside or run])
        names, manifests = (first, second), (features.manifest, other.features.manifest)
        besides = [
            side_by_side(sections[i], others[j], names, manifests, f"s{i + 1}") for i, j in pairs
        ]
    left_out = None
    if shown.left_out:
        left_out = (
            f"{number(shown.left_out)} of {number(shown.asked_for)}, those that activate each"
            " concept less, are left out to keep the page small (--picture-mb)"
        )
    unseen = not_shown(shown.thumbnails)
    if unseen and tell is not None:
        tell(f"{unseen}; give the directory that holds them (--images)")
    page = environment().get_template("page.html.jinja")
    return page.render(
        about=_about(settings, features, sections),
        sections=sections,
        besides=besides,
        scores=_attribute_scores(scores),
        dictionaries=read_scores(run, scores),
        shifts=shifts,
        steering=steering,
        groups=list(_settings(run, settings, scores, features, sections)),
        attributes_known=bool(attributes),
        has_maps=any(
            picture.overlay
            for section in sections
            for card in section.cards
            for picture in card.pictures
        ),
        stops=gradient_css(),
        thumbnails=shown.thumbnails,
        unseen="; ".join(filter(None, (unseen, left_out))),
        unit="samples"
        if features is None or len(np.unique(features.sample_rows)) == features.num_rows
        else "rows",
        css=part("page.css"),
        script=part("page.js"),
        blank=BLANK,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} if the file does not exist."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); write it again or remove it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


# What the run explains.


class About(NamedTuple):
    """The head of the page."""

    token: str | None  # token of interest: the word whose states were taken
    model: str | None
    facts: Facts


def _about(
    settings: Mapping[str, Any], features: Features | None, sections: Iterable[Section]
) -> About:
    if features is None:
        names = {"Model": settings.get("model"), "Data": settings.get("data")}
        return About(None, settings.get("model"), list(_rows(names)))
    manifest = features.manifest
    selection = manifest.get("selection")
    selection = selection if isinstance(selection, dict) else {}
    token = settings.get("token of interest")
    if token is None and selection.get("mode") == "token-of-interest":
        token = selection.get("argument")
    model = settings.get("model") or manifest.get("model")

    rows, samples = features.num_rows, len(features.samples)
    prompts = {sample.get("prompt") for sample in features.samples}
    methods = dict.fromkeys(f"{s.concepts.method}, {s.num_concepts} concepts" for s in sections)
    facts = {
        "Model": model,
        "Token of interest": token,
        "Prompt": prompts.pop() if len(prompts) == 1 else None,
        "Data": settings.get("data") or manifest.get("source"),
        "States": f"{number(rows)} from {number(samples)} samples",
        "Method": "; ".join(methods),
    }
    return About(token and str(token), model and str(model), list(_rows(facts)))


# Scores: {"attributes": {site: {split: {attribute: {"concepts": nmi, "random": nmi}}}}}.


class Score(NamedTuple):
    """How well the concepts, and a random assignment, predict one attribute."""

    concepts: float
    random: float | None


class AttributeTable(NamedTuple):
    """The scores of one site."""

    splits: list[str]
    rows: list[tuple[str, list[Score | None]]]  # attribute, its score on each split

    @property
    def best(self) -> list[tuple[str, Score]]:
        """The three best predicted attributes on the last split (test, if there is one)."""
        last = [(name, scores[-1]) for name, scores in self.rows if scores[-1]]
        return sorted(last, key=lambda row: -row[1].concepts)[:3]


def _attribute_scores(scores: Mapping[str, Any]) -> dict[str, AttributeTable]:
    tables = {}
    for site, by_split in _mapping(scores.get("attributes")).items():
        by_split = _mapping(by_split)
        splits = sorted(by_split, key=lambda split: (split != "train", split))
        names = dict.fromkeys(name for split in splits for name in _mapping(by_split[split]))
        rows = [(name, [_score(_mapping(by_split[s]).get(name)) for s in splits]) for name in names]
        if rows:
            tables[site] = AttributeTable(splits, rows)
    return tables


def _score(value: Any) -> Score | None:
    value = _mapping(value)
    if not isinstance(value.get("concepts"), int | float):
        return None
    return Score(value["concepts"], value.get("random"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


# Settings.


class Group(NamedTuple):
    """A table of settings."""

    title: str
    rows: Facts


def _settings(
    run: Path,
    settings: Mapping[str, Any],
    scores: Mapping[str, Any],
    features: Features | None,
    sections: Iterable[Section],
) -> Iterator[Group]:
    yield from _groups("Run", settings)
    if features is not None:
        yield Group("Extraction", list(_rows(_without_folders(features.manifest))))
    for section in sections:
        concepts = section.concepts
        solver = {
            "site": section.site,
            "method": concepts.method,
            **concepts.options,
            "objective": concepts.objective,
            "iterations": concepts.iterations,
            "converged": concepts.converged,
            "words through the final norm": concepts.through_norm,
            **{k: v for k, v in store_features(concepts.source, run).items() if k != "site"},
        }
        yield Group(section.name, list(_rows(solver)))
    yield from _groups(
        "Scores", {k: v for k, v in scores.items() if k not in ("version", "attributes", *SCORES)}
    )


def _without_folders(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest with the names of steering vectors instead of paths on this machine."""
    steering = manifest.get("steering")
    if not isinstance(steering, Mapping) or "vectors" not in steering:
        return dict(manifest)
    names = [Path(path).name for path in steering["vectors"]]
    return {**manifest, "steering": {**steering, "vectors": names}}


def _groups(title: str, values: Mapping[str, Any]) -> Iterator[Group]:
    """Yields the plain values as one table, then each mapping as a table of its own."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    if rows := list(_rows(plain)):
        yield Group(title, rows)
    for key, value in values.items():
        if key not in plain and (rows := list(_rows(value))):
            yield Group(key.capitalize(), rows)


def _rows(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, value as text) of values that are set, those of nested mappings too."""
    return ((name, _plain(value)) for name, value in flat(values))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
