"""Scores of dictionaries whose correct words are known."""

import dataclasses

import numpy as np
import pytest

from ports.models import bert
from xlvlm_jax import Concepts, Features, metrics
from xlvlm_jax.concepts.scores.records import DictionaryScores
from xlvlm_jax.concepts.scores.scorer import Scorer, captions
from xlvlm_jax.storage.zarr_rows import StoredRows, create_array

from ....ports import bert_helpers
from .conftest import SITE, WIDTH


@pytest.fixture(scope="module")
def scorer(features, clip):
    return Scorer(features, clip=clip, num_random=3)


@pytest.fixture
def right(kinds):
    """Returns one concept per kind, with its name and its plural as words."""
    return Concepts.from_components(np.eye(WIDTH)[: len(kinds)], alpha=0.1)


@pytest.fixture
def named(right, kinds):
    return dataclasses.replace(right, words=[[kind, f"{kind}s"] for kind in kinds])


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bert")
    bert_helpers.make_bert(directory, "bert")
    return metrics.BertScorer(bert.load_text_encoder(directory), batch_size=8)


def test_the_right_words_fit_better_than_wrong_random_and_noise(scorer, named):
    scores = scorer.score(named)
    wrong = dataclasses.replace(named, words=named.words[1:] + named.words[:1])
    top = scores.clip[1]
    assert top.num_samples == 40
    assert top.mean > scorer.score(wrong).clip[1].mean + 0.2
    assert top.mean > top.random + 0.2 and top.mean > top.noise + 0.2
    assert 0 < top.std < 1


def test_clip_scores_by_hand(scorer, named, kinds, pictures):
    # Each sample activates its kind alone, so that both numbers of concepts give the same.
    texts = metrics.embed_texts(scorer.clip, [metrics.describe(w) for w in named.words])
    own = [kinds.index(truth["kind"]) for _, truth in pictures]
    cosines = np.sum(scorer.images * texts[own], axis=1)
    scores = scorer.score(named)
    expected = 2.5 * np.maximum(cosines, 0)
    for r in (1, 3):
        assert scores.clip[r].mean == pytest.approx(expected.mean(), abs=1e-5)
        assert scores.clip[r].std == pytest.approx(expected.std(), abs=1e-5)


def test_what_the_codes_are_like(scorer, named, kinds):
    scores = scorer.score(named, name="mine", others=[named, named])
    assert (scores.name, scores.method, scores.num_concepts) == ("mine", "snmf", len(kinds))
    assert scores.hoyer == pytest.approx(1, abs=1e-3)
    assert scores.active == pytest.approx(1 / len(kinds), abs=0.01)
    assert scores.explained_variance > 0.95
    assert scores.dead == 0 and scores.overlap == 0
    assert scores.stability == pytest.approx(1)
    assert scores.attributes["kind"]["concepts"] == pytest.approx(1, abs=1e-3)
    # Images of one kind are more alike than images are.
    everything = metrics.mean_similarity(scorer.images)
    assert scores.monosemanticity > everything + 0.05


def test_permuting_concepts_permutes_no_score(scorer, named):
    order = np.random.default_rng(0).permutation(len(named.words))
    shuffled = dataclasses.replace(
        named,
        components=np.asarray(named.components)[order],
        words=[named.words[k] for k in order],
    )
    first, again = scorer.score(named), scorer.score(shuffled)
    assert again.clip[1].mean == pytest.approx(first.clip[1].mean, abs=1e-5)
    assert again.overlap == first.overlap
    assert again.monosemanticity == pytest.approx(first.monosemanticity, abs=1e-5)


def test_concepts_without_words(scorer, right, named, kinds):
    bare = scorer.score(right)
    assert bare.clip == {} and bare.overlap is None and bare.hoyer is not None
    none = dataclasses.replace(right, words=[[] for _ in kinds])
    scores = scorer.score(none)
    assert scores.clip[1].mean == scores.clip[1].random == scores.clip[1].noise == 0


def test_random_words_as_a_row(scorer, named):
    scores = scorer.score(named)
    row = scorer.random_words(scores)
    assert row.method == "random" and row.num_concepts == scores.num_concepts
    assert row.clip[1].mean == scores.clip[1].random
    assert row.overlap < 0.1 and row.hoyer is None
    with pytest.raises(ValueError, match="random words are drawn from CLIP's or BERT's vocabul"):
        Scorer(scorer.features).random_words(scores)
    with pytest.raises(ValueError, match="has no words to replace by random ones; ground it first"):
        scorer.random_words(dataclasses.replace(scores, words=None))


def test_bert_scores_are_those_of_the_captions(features, named, judge, kinds, pictures):
    scorer = Scorer(features, bert=judge, num_random=2, tops=(1,))
    fit = scorer.score(named).bert[1]
    own = [named.words[kinds.index(truth["kind"])] for _, truth in pictures]
    expected = judge([", ".join(words) for words in own], captions(features))
    assert fit.mean == pytest.approx(expected.f1.mean(), abs=1e-5)
    assert fit.precision == pytest.approx(expected.precision.mean(), abs=1e-5)
    assert fit.recall == pytest.approx(expected.recall.mean(), abs=1e-5)


def test_records_survive_json(scorer, named):
    scores = scorer.score(named, name="mine")
    again = DictionaryScores.from_dict(scores.to_dict())
    assert again.clip[1].mean == pytest.approx(scores.clip[1].mean, abs=1e-6)
    assert again.to_dict() == scores.to_dict()
    assert DictionaryScores("x", "pca", 1, hoyer=float("nan")).to_dict()["hoyer"] is None


def test_what_it_was_scored_on(scorer):
    described = scorer.describe()
    assert (described["rows"], described["clip"], described["site"]) == (40, "clip", SITE)
    assert 0 < described["mean similarity of two images"] < 1


def test_an_image_of_several_rows_counts_once(scorer, write_features, clip, named, tmp_path):
    features = write_features()
    rows = np.repeat(np.arange(40), 2)
    create_array(tmp_path / "twice", "float32", (80, WIDTH)).write(
        np.asarray(scorer.stored)[rows]
    ).result()

    class Doubled:
        __class__ = Features  # as far as isinstance sees
        sample_rows, num_rows = rows, 80
        tokens = positions = np.int32(rows)

        def __getattr__(self, name):
            return getattr(features, name)

        def stored(self, site):
            return StoredRows(tmp_path / "twice", 80)

    both = Scorer(Doubled(), clip=clip, num_random=1)
    assert both.images.shape == (80, 128)
    assert both.score(named).monosemanticity == pytest.approx(
        scorer.score(named).monosemanticity, abs=1e-5
    )


@pytest.mark.wrong_types
def test_concepts_and_samples_that_do_not_fit(scorer, named, write_features, judge, clip):
    elsewhere = dataclasses.replace(named, source={"site": "layers.2"})
    with pytest.raises(ValueError, match=r"concepts of site 'layers.2' cannot be scored on states"):
        scorer.score(elsewhere)
    foreign = write_features(fingerprint="abc")
    other = dataclasses.replace(named, source={"fingerprint": "def", "model": "n"})
    with pytest.raises(ValueError, match=r"model 'n' \(def\), but .* states of 'm' \(abc\); ext"):
        Scorer(foreign).score(other)
    narrow = dataclasses.replace(named, components=np.eye(20)[: len(named.words)])
    with pytest.raises(ValueError, match="Z has 192 columns but the concepts have 20"):
        scorer.score(narrow)
    fewer = dataclasses.replace(named, components=np.asarray(named.components)[1:])
    with pytest.raises(ValueError, match=r"concepts have shapes .*; expected the same \[K, D\]"):
        scorer.score(named, others=[fewer])
    with pytest.raises(ValueError, match="40 samples have no captions, the first '0'; BERTScore"):
        Scorer(write_features(captions=False), bert=judge)
    blind = dataclasses.replace(foreign, samples=[{"id": "7"}] * 40)
    with pytest.raises(ValueError, match="sample '7' has no image for CLIP to score"):
        Scorer(blind, clip=clip)
    with pytest.raises(ValueError, match=r"tops must be at least 1, got \(0,\)"):
        Scorer(foreign, tops=(0,))


def test_unreadable_images_are_left_out_of_clip_scores(
    write_features, clip, named, scorer, tmp_path
):
    gone = write_features()
    gone = dataclasses.replace(gone, samples=list(gone.samples))
    for number, file in ((0, tmp_path / "gone.jpg"), (7, tmp_path / "text.jpg")):
        gone.samples[number]["image"] = str(file)
    (tmp_path / "text.jpg").write_text("no picture")
    found = Scorer(gone, clip=clip, num_random=3)
    assert sorted(found.skipped) == sorted([str(tmp_path / "gone.jpg"), str(tmp_path / "text.jpg")])
    assert "no such image file" in found.skipped[str(tmp_path / "gone.jpg")]
    scores, whole = found.score(named), scorer.score(named)
    assert scores.clip[1].num_samples == 38
    assert np.isfinite([scores.clip[1].mean, scores.clip[1].random, scores.clip[1].noise]).all()
    assert scores.hoyer == whole.hoyer  # the codes are of all rows
    few = np.delete(np.arange(40), [0, 7])
    np.testing.assert_allclose(found.images[few], scorer.images[few], atol=1e-5)
    assert found.describe()["images that CLIP does not see"] == 2
    assert scores.monosemanticity == pytest.approx(whole.monosemanticity, abs=0.05)
    with pytest.raises(ValueError, match=r"gone\.jpg: no such image file"):
        Scorer(gone, clip=clip, strict=True)
    for sample in gone.samples:
        sample["image"] = str(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match=r"CLIP can read none of 1 images; the first: .*go"):
        Scorer(gone, clip=clip)
