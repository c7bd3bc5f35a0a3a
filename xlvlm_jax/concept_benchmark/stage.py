"""The whole benchmark: learns or reads dictionaries, scores them for several seeds, ranks them.

A run directory holds, for each seed, the pictures and a directory per dictionary, with its concepts
if it was learnt here, and its scores. What is there already is not computed again.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ports import VLM
from ports.messages import counted
from ports.models.clip import DualEncoder
from xlvlm_jax import metrics
from xlvlm_jax.concept_benchmark import known_pictures
from xlvlm_jax.concept_benchmark.dictionaries import (
    Entry,
    check,
    check_names,
    digest_of,
    learn,
    read,
)
from xlvlm_jax.concept_benchmark.measures import MEASURES, RANKED
from xlvlm_jax.concept_benchmark.ranking import agreement, rank
from xlvlm_jax.concept_benchmark.scoring import ASKED, Scores, prepare_ground, score_dictionary
from xlvlm_jax.concept_benchmark.sparsity import with_mean_l0
from xlvlm_jax.concepts.record import TENSORS, Concepts
from xlvlm_jax.concepts.removal import concept_directions
from xlvlm_jax.data import files
from xlvlm_jax.storage import atomic, versions

FILE, TABLE = "benchmark.json", "leaderboard.md"
SCORES = "known-scores.json"
METHODS = ("snmf", "kmeans", "pca", "topk-sae", "random")
PROTOCOL = 2  # raised where the same settings mean other dictionaries or measures


class Settings(NamedTuple):
    """What a run of the benchmark is made of.

    Attributes:
        site: the site whose states are decomposed.
        num_concepts: K of the dictionaries that are learnt here.
        k: active concepts per state, L0.
        encode_as: the method that encodes states on bare components: "snmf", "kmeans", "simple" or
            "pca".
        counts: numbers of pictures to learn from, to fit probes to and to test on.
        num_asked: test pictures whose predictions are measured under edits.
    """

    site: str
    num_concepts: int = 128
    k: int = 8
    encode_as: str = "snmf"
    counts: tuple[int, int, int] = known_pictures.COUNTS
    num_asked: int = ASKED


class Line(NamedTuple):
    """A dictionary in the leaderboard: means over the seeds.

    Attributes:
        name: as in `Entry.name`.
        method: how it was learnt, or how its file encodes states.
        num_concepts: K.
        values: measure -> mean over the seeds, see `MEASURES`.
        spread: measure -> sample standard deviation over the seeds; empty for one seed.
        nulls: measure -> the same of a random or shuffled dictionary.
        rank: mean place over the measures that are ranked; 1 is best.
    """

    name: str
    method: str
    num_concepts: int
    values: dict[str, float]
    spread: dict[str, float]
    nulls: dict[str, float]
    rank: float


class Benchmark(NamedTuple):
    """The result, best dictionary first.

    Attributes:
        lines: a line per dictionary, best first.
        agreement: measure, or "rank" -> Kendall's tau between the rankings of the seeds.
        probe_accuracy: mean balanced accuracy of probes on the model's own states, from 0 to 1.
        settings: what the run was made with, JSON values.
    """

    lines: list[Line]
    agreement: dict[str, float]
    probe_accuracy: float
    settings: dict[str, Any]


def run_benchmark(
    output: Path,
    vlm: VLM,
    clip: DualEncoder,
    entries: Sequence[Entry],
    settings: Settings,
    *,
    seeds: Sequence[int] = (0,),
    progress: Callable[[str], Callable[..., None]] | None = None,
) -> Benchmark:
    """Scores dictionaries on drawn pictures, anew for each seed, and ranks them.

    Args:
        output: the run directory; what it holds is used.
        vlm: the model whose states the dictionaries are of.
        clip: embeds pictures, for the monosemanticity.
        entries: the dictionaries.
        settings: site, sizes, and so on.
        seeds: of pictures, and of the dictionaries that are learnt.
        progress: progress(name) starts a bar and returns advance(done, total).

    Returns:
        The leaderboard, which is also written as benchmark.json and leaderboard.md.

    Raises:
        FileNotFoundError: a path holds no dictionary.
        ValueError: an entry is unknown, given twice, or does not fit the site; or settings do not
            fit.
    """
    if not entries or not seeds:
        raise ValueError(f"got {len(entries)} dictionaries and {len(seeds)} seeds; expected some")
    check_names(entries)
    if not 1 <= settings.k <= settings.num_concepts:
        raise ValueError(
            f"k is {settings.k}; expected 1 to the {settings.num_concepts} concepts (--k, "
            "--num-concepts)"
        )
    settings = settings._replace(site=vlm.find_site(settings.site, one_state=True))
    # Before any work: what is given must fit.
    for entry in entries:
        if len(entry.paths) > len(seeds):
            raise ValueError(
                f"{entry.name} has {len(entry.paths)} paths for {counted(len(seeds), 'seed')}; "
                "expected one path, or one per seed (--seeds)"
            )
    given = {
        entry.name: [_read(path, entry, vlm, settings) for path in entry.paths]
        for entry in entries
        if entry.method is None
    }
    made = known_pictures.made_with(vlm, clip)
    start = progress or (lambda name: lambda done, total: None)
    scored: dict[str, list[Scores]] = {entry.name: [] for entry in entries}
    found: dict[str, list[Concepts]] = {entry.name: [] for entry in entries}
    accuracies: list[float] = []
    for number, seed in enumerate(seeds):
        directory = output / f"seed-{seed}"
        pictures = known_pictures.load_or_make(
            directory,
            vlm,
            clip,
            settings.site,
            seed=seed,
            counts=settings.counts,
            progress=start(f"seed {seed}: drawing, running the model"),
        )
        ground = prepare_ground(pictures, vlm, num_asked=settings.num_asked)
        accuracies.append(ground.probe_accuracy)
        advance = start(f"seed {seed}: learning, scoring")
        for done, entry in enumerate(entries, start=1):
            place = directory / entry.name
            if entry.method is None:
                dictionaries = given[entry.name]
                concepts = dictionaries[min(number, len(dictionaries) - 1)]
                if concepts.dictionary is None:  # those with an encoder come as they are
                    k = min(settings.k, len(concepts.components))  # theirs may be few
                    concepts = with_mean_l0(concepts, pictures.fit.states, k)
            else:
                concepts = _learnt(place, entry.method, pictures, vlm, settings)
            described = _described(concepts, settings, made, seed)
            scores = _known(place / SCORES, described)
            if scores is None:
                kept = settings.k
                scores = score_dictionary(concepts, ground, name=entry.name, kept=kept)
                place.mkdir(parents=True, exist_ok=True)
                text = described | {"scores": plain(dataclasses.asdict(scores))}
                atomic.write(place / SCORES, json.dumps(text, indent=1) + "\n")
            scored[entry.name].append(scores)
            found[entry.name].append(concepts)
            advance(done, len(entries))
    stable = {entry.name: _stability(found[entry.name], entry) for entry in entries}
    result = summarise(scored, stable, float(np.mean(accuracies)), _settings(settings, seeds, made))
    described = {"version": versions.VERSION, **plain(as_json(result))}
    atomic.write(output / FILE, json.dumps(described, indent=1) + "\n")
    atomic.write(output / TABLE, as_markdown(result))
    return result


def _read(path: Path, entry: Entry, vlm: VLM, settings: Settings) -> Concepts:
    concepts = read(path, settings.encode_as)
    check(concepts, vlm, settings.site, entry.name)
    return concepts


def _learnt(
    place: Path,
    method: str,
    pictures: known_pictures.KnownPictures,
    vlm: VLM,
    settings: Settings,
) -> Concepts:
    """Returns the dictionary that a directory holds; learns it if there is none or another."""
    asked = {
        "entry": method,
        "protocol": PROTOCOL,
        "site": pictures.site,
        "seed": pictures.seed,
        "pictures": list(settings.counts),
        "num_concepts": settings.num_concepts,
        "k": settings.k,
        **known_pictures.made_with(vlm),
    }
    if (place / TENSORS).is_file():
        known = Concepts.load(place)
        # Also a dtype, which is named where it is not float32.
        if all(known.source.get(name) == asked.get(name) for name in {*asked, "dtype"}):
            return known
    made = learn(method, pictures.rows, settings.num_concepts, settings.k, seed=pictures.seed)
    made = with_mean_l0(made, pictures.fit.states, settings.k)
    concepts = dataclasses.replace(made, activations=None, source=made.source | asked)
    concepts.save(place)
    return Concepts.load(place)


def _settings(settings: Settings, seeds: Sequence[int], made: Mapping[str, Any]) -> dict[str, Any]:
    return settings._asdict() | {"seeds": list(seeds), **made}


def _described(
    concepts: Concepts, settings: Settings, made: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Returns what scores depend on, as JSON values."""
    described = _settings(settings, [seed], made) | {"words": concepts.words}
    described |= {"version": versions.VERSION, "protocol": PROTOCOL, "of": digest_of(concepts)}
    return json.loads(json.dumps(described))


def _known(path: Path, described: Mapping[str, Any]) -> Scores | None:
    """Returns the scores in a file, if they are of the same dictionary and settings."""
    if not path.is_file():
        return None
    known = files.read_json(path)
    if not isinstance(known, dict):
        raise ValueError(f"{path}: expected a JSON object; remove it")
    about = {name: value for name, value in known.items() if name != "scores"}
    if not known_pictures.is_of(about, described):
        return None
    try:
        scores = Scores(**known["scores"])
        numbers = {
            field: {
                name: math.nan if value is None else float(value)
                for name, value in getattr(scores, field).items()
            }
            for field in ("values", "nulls")
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no scores ({error}); remove it") from None
    return dataclasses.replace(scores, **numbers)


def _stability(found: Sequence[Concepts], entry: Entry) -> float:
    distinct = found if entry.method is not None else found[: len(entry.paths)]
    directions = [concept_directions(concepts) for concepts in distinct]
    if len(directions) < 2 or len({each.shape for each in directions}) > 1:
        return math.nan
    return metrics.stability(directions)


def summarise(
    scored: Mapping[str, Sequence[Scores]],
    stable: Mapping[str, float],
    probe_accuracy: float,
    settings: Mapping[str, Any],
) -> Benchmark:
    """Returns the leaderboard of scores.

    A dictionary's rank is its mean place over all ranked measures that some dictionary has.

    Args:
        scored: {name: its scores, one per seed}.
        stable: {name: its stability}.
        probe_accuracy: of probes on the model's own states.
        settings: JSON values.

    Raises:
        ValueError: there are no dictionaries, or they have scores for different numbers of seeds.
    """
    counts = {len(scores) for scores in scored.values()}
    if len(counts) != 1 or not min(counts):
        raise ValueError(
            f"dictionaries have scores for {sorted(counts)} seeds; expected the same number for "
            "all, one or more"
        )
    names = list(scored)
    columns = [measure.name for measure in MEASURES if measure.name != "stability"]
    cube = np.array(
        [[[each.values.get(c, math.nan) for c in columns] for each in scored[n]] for n in names]
    )  # [dictionaries, seeds, measures]
    ranked = {m.name: bool(m.higher) for m in RANKED if m.name in columns}
    used = [
        j
        for j, column in enumerate(columns)
        if column in ranked and np.isfinite(cube[:, :, j]).any()
    ]
    higher = [ranked[columns[j]] for j in used]
    agreed = {
        columns[j]: agreement(cube[:, :, j].T) for j in used if np.isfinite(cube[:, :, j]).all()
    }
    places = [rank(cube[:, s][:, used], higher).mean(axis=1) for s in range(cube.shape[1])]
    agreed["rank"] = agreement(np.array(places))
    mean = cube.mean(axis=1)
    overall = np.column_stack([mean[:, used], [stable[name] for name in names]])
    if np.isfinite(overall[:, -1]).any():
        higher = [*higher, True]
    else:
        overall = overall[:, :-1]
    final = rank(overall, higher).mean(axis=1)
    lines = []
    for e, name in enumerate(names):
        first = scored[name][0]
        values = dict(zip(columns, mean[e].tolist(), strict=True)) | {"stability": stable[name]}
        spread = {}
        if cube.shape[1] > 1:
            spread = dict(zip(columns, cube[e].std(axis=0, ddof=1).tolist(), strict=True))
        nulls = {
            key: float(np.mean([each.nulls[key] for each in scored[name]])) for key in first.nulls
        }
        lines.append(
            Line(name, first.method, first.num_concepts, values, spread, nulls, float(final[e]))
        )
    lines.sort(key=lambda line: line.rank)
    return Benchmark(lines, agreed, probe_accuracy, dict(settings))


def as_json(result: Benchmark) -> dict[str, Any]:
    """Returns a result as JSON values, except that NaN stays."""
    return {
        "settings": result.settings,
        "probes on states": result.probe_accuracy,
        "dictionaries": [line._asdict() for line in result.lines],
        "agreement of seeds": result.agreement,
        "measures": {each.name: each._asdict() for each in MEASURES},
    }


def plain(value: Any) -> Any:
    """Returns JSON values: NaN as None, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def as_rows(result: Benchmark) -> tuple[list[str], list[list[str]]]:
    """Returns the headings and the lines of the table, its last line Kendall's tau over seeds."""
    shown = [m for m in MEASURES if any(np.isfinite(x.values[m.name]) for x in result.lines)]

    def text(value: float | None) -> str:
        return "" if value is None or not math.isfinite(value) else f"{value:.2f}"

    head = ["dictionary", "K", *(measure.title for measure in shown), "rank"]
    rows = [
        [
            line.name,
            str(line.num_concepts),
            *(text(line.values[measure.name]) for measure in shown),
            f"{line.rank:.1f}",
        ]
        for line in result.lines
    ]
    if any(np.isfinite(value) for value in result.agreement.values()):
        taus = (text(result.agreement.get(measure.name)) for measure in shown)
        rows.append(["tau over seeds", "", *taus, text(result.agreement["rank"])])
    return head, rows


def as_markdown(result: Benchmark) -> str:
    """Returns the table in Markdown."""
    head, rows = as_rows(result)
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))
