"""Questions about what a scene shows, biased annotations, and drawn scenes read as POPE."""

import json
from collections import Counter
from random import Random

import pytest

from xlvlm_jax import data
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.scenes import presence
from xlvlm_jax.data.scenes.language import split_words


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    scenes.write(root, val=6, test=3)
    return root


def test_companions_by_hand():
    assert set(scenes.COMPANIONS) == set(scenes.PLACES)
    assert scenes.companion("dog", "beach") == "boat"
    assert scenes.companion("boat", "beach") == "ball"
    for place in scenes.PLACES:
        for kind in scenes.KINDS:
            assert scenes.companion(kind, place) in set(scenes.KINDS) - {kind}


def test_absent_kinds_by_hand():
    counts = {"dog": 5, "cat": 4, "bus": 4}
    drawn = {
        (kind, negatives): presence.absent_kind(kind, "city", negatives, counts, Random(0))
        for kind in ("dog", "bus")
        for negatives in ("popular", "adversarial")
    }
    assert drawn == {
        ("dog", "popular"): "cat",
        ("bus", "popular"): "dog",
        ("dog", "adversarial"): "bus",
        ("bus", "adversarial"): "plane",
    }
    rng = Random(0)
    random = {presence.absent_kind("cat", "city", "random", counts, rng) for _ in range(200)}
    assert random == set(scenes.KINDS) - {"cat"}
    with pytest.raises(ValueError, match="unknown negatives 'usual'; expected one of random"):
        presence.absent_kind("cat", "city", "usual", counts, rng)


def test_mentioned_kinds_by_hand():
    assert scenes.mentioned_kinds("On the beach, two Puppies and a ship") == ["dog", "boat"]
    assert scenes.mentioned_kinds("a sandy beach") == []


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_biased_captions_name_the_companion_in_their_share(share):
    known, claimed, count = set(scenes.vocabulary()), 0, 0
    for index in range(60):
        scene = scenes.sample_scene("train", index)
        texts = scenes.captions(scene)
        biased = presence.biased_captions(scene, texts, share)
        assert presence.biased_captions(scene, texts, share) == biased
        for before, after in zip(texts, biased, strict=True):
            assert after.startswith(before) and set(split_words(after)) <= known
            more = scenes.mentioned_kinds(after)[len(scenes.mentioned_kinds(before)) :]
            assert more in ([], [scenes.companion(scene.kind, scene.place)])
            claimed += len(more)
            count += 1
    assert abs(claimed / count - share) < 0.1


def test_biased_questions_say_yes_in_their_share():
    said = Counter()
    for index in range(200):
        scene = scenes.sample_scene("train", index)
        question = presence.biased_question(scene, 0.75)
        (asked,) = scenes.mentioned_kinds(question.question)
        assert asked == scenes.companion(scene.kind, scene.place)
        assert max(Counter(question.answers).values()) == question.answers.count(question.answer)
        said[question.answer] += 1
    assert abs(said["yes"] / 200 - 0.75) < 0.1


def test_written_scenes_of_biased_people(written, tmp_path):
    scenes.write(tmp_path, test=3, companions=1.0)
    for plain, biased in zip(
        data.load("coco", written, "test"), data.load("coco", tmp_path, "test"), strict=True
    ):
        scene = plain.metadata["attributes"]
        told = f" {scenes.companion(scene['kind'], scene['place'])}"
        assert [text.endswith(told) for text in biased.references] == [True] * 5
        assert biased.metadata == plain.metadata  # the truth stays
    before, after = (len(data.load("vqav2", root, "test")) for root in (written, tmp_path))
    assert after == before + 3
    with pytest.raises(ValueError, match=r"companions must be a share from 0 to 1, got 1\.5"):
        scenes.write(tmp_path, companions=1.5)


def test_questions_of_pope_about_scenes(written):
    samples = data.load("scenes", written, "val")
    assert len(samples) == 6 * 2 * 3 and len({sample.id for sample in samples}) == 36
    counts = Counter(s.metadata["attributes"]["kind"] for s in samples)
    most = max(scenes.KINDS, key=lambda kind: counts[kind])
    for sample in samples:
        shown = sample.metadata["attributes"]
        (asked,) = scenes.mentioned_kinds(sample.metadata["question"])
        assert (asked == shown["kind"]) == (sample.metadata["label"] == "yes")
        assert sample.references == (sample.metadata["label"],) * 10
        if sample.metadata["negatives"] == "adversarial" and sample.metadata["label"] == "no":
            assert asked == scenes.companion(shown["kind"], shown["place"])
        if sample.metadata["negatives"] == "popular" and sample.metadata["label"] == "no":
            assert asked == most or shown["kind"] == most
    first = samples[0]
    assert first.prompt == prompts.question(first.metadata["question"])
    assert first.image.is_file()
    only = data.load("scenes", written, "val", negatives="popular")
    assert only == [s for s in samples if s.metadata["negatives"] == "popular"]


def test_other_questions_about_the_same_pictures(written):
    samples = data.load("scenes", written, "val", ask="all")
    presence = data.load("scenes", written, "val")
    assert samples[: len(presence)] == presence
    others = samples[len(presence) :]
    every = data.load("vqav2", written, "val")
    assert {sample.image_id for sample in others} == {sample.image_id for sample in presence}
    for sample in others:
        assert sample in every and "label" not in sample.metadata
        # The kind that a question names is there: it does not ask whether it is.
        kinds = scenes.mentioned_kinds(sample.metadata["question"])
        assert kinds in ([], [sample.metadata["attributes"]["kind"]])
    assert 5 <= len(others) / 6 <= 8


def test_captions_of_scenes_know_the_objects(written):
    for sample in data.load("scenes", written, "test", ask="captions"):
        assert sample.metadata["objects"] == [sample.metadata["attributes"]["kind"]]
        assert sample.prompt == prompts.CAPTION and len(sample.references) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ask": "colours"}, "ask is 'colours'; expected one of presence, all, captions"),
        ({"negatives": "rare"}, "unknown negatives 'rare'; expected one of random, popular"),
        ({"split": "dev"}, "no split 'dev'; expected one of val, test"),
    ],
)
def test_bad_options(written, options, message):
    with pytest.raises(ValueError, match=message):
        data.load("scenes", written, **({"split": "val"} | options))


def test_other_directories_are_refused(written, tmp_path):
    (tmp_path / "dataset_coco.json").write_bytes((written / "dataset_coco.json").read_bytes())
    with pytest.raises(ValueError, match="has no kind and place of image 400001; expected a dir"):
        data.load("scenes", tmp_path, "val")
    truth = json.loads((written / "attributes.json").read_text())
    truth["400001"]["kind"] = "lion"
    (tmp_path / "attributes.json").write_text(json.dumps(truth))
    with pytest.raises(ValueError, match="has no kind and place of image 400001"):
        data.load("scenes", tmp_path, "val")
