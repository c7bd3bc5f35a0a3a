"""The whole benchmark: summaries by hand, resumed runs, the command, messages."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from xlvlm_jax.concept_benchmark import known_pictures, parse_entry, stage
from xlvlm_jax.concept_benchmark.measures import MEASURES
from xlvlm_jax.concept_benchmark.scoring import Scores
from xlvlm_jax.demo import embedded
from xlvlm_jax.storage.same_model import checkpoint_of

from .conftest import COUNTS, SITE

SETTINGS = stage.Settings(SITE, 12, k=3, encode_as="pca", counts=COUNTS, num_asked=4)


def scores(name, seed, **values):
    return Scores(name, "pca", 2, seed, values, {"naming": 0.1 * seed}, {}, [])


def test_summary_by_hand():
    scored = {
        "a": [scores("a", 0, probing_1=0.9, dead_share=0.5), scores("a", 1, probing_1=0.7)],
        "b": [scores("b", 0, probing_1=0.6, dead_share=0.1), scores("b", 1, probing_1=0.8)],
        "c": [scores("c", 0, probing_1=0.5, dead_share=0.2), scores("c", 1, probing_1=0.5)],
    }
    stable = {"a": 0.5, "b": 0.9, "c": math.nan}
    found = stage.summarise(scored, stable, 0.95, {"k": 1})
    # Means .8, .7, .5; dead has no mean for two seeds; places by it are shared, 2.
    assert [line.name for line in found.lines] == ["a", "b", "c"]
    assert [line.rank for line in found.lines] == pytest.approx([5 / 3, 5 / 3, 8 / 3])
    by_name = {line.name: line for line in found.lines}
    assert by_name["a"].values["probing_1"] == pytest.approx(0.8)
    assert by_name["a"].spread["probing_1"] == pytest.approx(0.2 / math.sqrt(2))
    assert by_name["a"].nulls == {"naming": 0.05}
    assert found.agreement["probing_1"] == pytest.approx(1 / 3)
    assert "dead_share" not in found.agreement
    head, rows = stage.as_rows(found)
    assert head == ["dictionary", "K", "probe 1", "stable", "rank"]
    assert rows[-1][:3] == ["tau over seeds", "", "0.33"]
    assert stage.as_markdown(found).splitlines()[1] == "| --- | ---: | ---: | ---: | ---: |"


def test_summary_needs_scores():
    with pytest.raises(ValueError, match=r"scores for \[0, 1\] seeds; expected the same number"):
        stage.summarise({"a": [scores("a", 0)], "b": []}, {"a": 1.0, "b": 1.0}, 0.9, {})


@pytest.fixture(scope="module")
def given(benchmarked, pictures):
    """A file of components: some rows, as another tool would write it."""
    path = benchmarked / "theirs.npy"
    np.save(path, pictures.rows[:: len(pictures.rows) // 12][:12])
    return path


@pytest.fixture(scope="module")
def result(vlm, clip, benchmarked, given, pictures):
    entries = [parse_entry(text) for text in ("random", str(given))]
    return stage.run_benchmark(benchmarked, vlm, clip, entries, SETTINGS)


def test_a_run_ranks_and_writes(result, benchmarked):
    assert {line.name for line in result.lines} == {"random", "theirs"}
    assert [line.rank for line in result.lines] == sorted(line.rank for line in result.lines)
    described = json.loads((benchmarked / stage.FILE).read_text())
    names = [measure.name for measure in MEASURES]
    for line in described["dictionaries"]:
        assert sorted(line["values"]) == sorted(names)
        assert line["values"]["stability"] is None  # of a single seed
    by_name = {line.name: line for line in result.lines}
    assert by_name["random"].values["l0"] <= 3 and by_name["theirs"].method == "pca"
    assert by_name["theirs"].values["l0"] == 3  # of twelve scores
    assert described["settings"]["seeds"] == [0]
    assert (benchmarked / stage.TABLE).read_text().startswith("| dictionary | K | explained |")


def test_a_run_goes_on(result, vlm, clip, benchmarked, given, monkeypatch):
    learnt = []
    monkeypatch.setattr(stage, "learn", lambda *_, **__: learnt.append(1))
    kept = stage.score_dictionary
    monkeypatch.setattr(
        stage,
        "score_dictionary",
        lambda c, *a, **kw: learnt.append(kw["name"]) or kept(c, *a, **kw),
    )
    (benchmarked / "seed-0" / "random" / stage.SCORES).unlink()
    entries = [parse_entry(text) for text in ("random", str(given))]
    again = stage.run_benchmark(benchmarked, vlm, clip, entries, SETTINGS)
    assert learnt == ["random"]
    for before, after in zip(result.lines, again.lines, strict=True):
        assert before.name == after.name
        np.testing.assert_allclose(
            [after.values[m.name] for m in MEASURES],
            [before.values[m.name] for m in MEASURES],
            rtol=1e-6,
        )
    # Another file under the same name is scored anew.
    assert stage._known(benchmarked / "seed-0" / "theirs" / stage.SCORES, {"of": "other"}) is None


def test_fewer_concepts_than_k(vlm, clip, pictures, tmp_path, monkeypatch):
    np.save(tmp_path / "two.npy", pictures.rows[:2])
    scored = []

    def score(concepts, ground, *, name, kept):
        scored.append((concepts, kept))
        return scores(name, 0, **dict.fromkeys((m.name for m in MEASURES), 0.5))

    monkeypatch.setattr(stage, "score_dictionary", score)
    monkeypatch.setattr(stage, "prepare_ground", lambda *_, **__: SimpleNamespace(probe_accuracy=1))
    monkeypatch.setattr(stage.known_pictures, "load_or_make", lambda *_, **__: pictures)
    entries = [parse_entry(str(tmp_path / "two.npy"))]
    settings = SETTINGS._replace(encode_as="snmf")
    stage.run_benchmark(tmp_path / "run", vlm, clip, entries, settings)
    [(concepts, kept)] = scored
    assert (len(concepts.components), kept) == (2, 3)
    assert concepts.options["alpha"] >= 0  # searched for two codes of two


def test_messages(vlm, clip, tmp_path, given):
    def refused(match, *entries, **changes):
        settings = SETTINGS._replace(**changes)
        with pytest.raises(ValueError, match=match):
            stage.run_benchmark(
                tmp_path / "run", vlm, clip, [parse_entry(x) for x in entries], settings
            )
        assert not (tmp_path / "run").exists()

    refused("got 0 dictionaries and 1 seeds; expected some")
    refused("k is 13; expected 1 to the 12 concepts", "pca", k=13)
    refused("two dictionaries are called 'pca'", "pca", "pca")
    np.save(tmp_path / "narrow.npy", np.eye(3))
    refused(r"narrow: components have shape \(3, 3\)", f"{tmp_path / 'narrow.npy'}")
    np.save(tmp_path / "nan.npy", np.full((2, 192), np.inf))
    refused("nan.npy: components .*NaN or Inf", f"{tmp_path / 'nan.npy'}")
    refused(
        "theirs has 2 paths for 1 seed; expected one path, or one per seed",
        f"theirs={given},{given}",
    )
    path = tmp_path / stage.SCORES
    path.write_text('{"scores": {"name": 1}}')
    with pytest.raises(ValueError, match=r"known-scores.json holds no scores .*; remove it"):
        stage._known(path, {})


def test_command(xlvlm, result, benchmarked, tmp_path):
    status, _, errors = xlvlm("bench-concepts", "topk", "--output", tmp_path / "run")
    assert status == 2 and "'topk' is not a method and there is no file" in errors
    status, _, errors = xlvlm("bench-concepts", "--seeds", 0, "--output", tmp_path / "run")
    assert status == 2 and "--seeds must be at least 1, got 0" in errors
    status, _, errors = xlvlm("bench-concepts", "--encode-as", "no", "--output", tmp_path / "run")
    assert status == 2 and "is 'no'; expected one of snmf, kmeans, simple, pca" in errors
    np.save(tmp_path / "narrow.npy", np.eye(3))
    arguments = ("bench-concepts", tmp_path / "narrow.npy", "--output", tmp_path / "run")
    status, _, errors = xlvlm(*arguments)
    assert status == 2 and "states at 'language_model.model.layers.5' have width 192" in errors
    assert not (tmp_path / "run").exists()


def test_what_another_model_left_is_not_used(result, vlm, clip, benchmarked, pictures, monkeypatch):
    """An adapter, a dtype and another CLIP change states, or embeddings, under one fingerprint."""

    class _MadeAnewError(Exception):
        pass

    def anew(*_, **__):
        raise _MadeAnewError

    monkeypatch.setattr(known_pictures, "make_pictures", anew)
    monkeypatch.setattr(stage, "learn", anew)
    directory = benchmarked / "seed-0"
    tuned = vlm.with_adapter(embedded.find_adapter("color"))
    rounded = copy.copy(vlm)
    rounded.module = vlm.module.clone(dtype=jnp.bfloat16)
    other = dataclasses.replace(clip, directory=embedded.LLAVA)
    # Earlier releases named no adapter, and nothing but the checkpoint.
    assert known_pictures.is_of(checkpoint_of(vlm), known_pictures.made_with(vlm, clip))
    assert not known_pictures.is_of(checkpoint_of(vlm), known_pictures.made_with(tuned, clip))
    for model, encoder in ((tuned, clip), (rounded, clip), (vlm, other)):
        with pytest.raises(_MadeAnewError):
            known_pictures.load_or_make(directory, model, encoder, SITE, counts=COUNTS)
    place = directory / "random"
    kept = stage._learnt(place, "random", pictures, vlm, SETTINGS)
    for model in (tuned, rounded):
        with pytest.raises(_MadeAnewError):
            stage._learnt(place, "random", pictures, model, SETTINGS)
    made = [
        known_pictures.made_with(m, c) for m, c in ((tuned, clip), (rounded, clip), (vlm, other))
    ]
    for each in made:
        assert stage._known(place / stage.SCORES, stage._described(kept, SETTINGS, each, 0)) is None
