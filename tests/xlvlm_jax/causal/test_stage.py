"""A dictionary's scores from its directory: the record, the file, the command, messages."""

import dataclasses
import json

import numpy as np
import pytest

from xlvlm_jax import Concepts, causal, data
from xlvlm_jax.causal import record as files
from xlvlm_jax.causal import stage
from xlvlm_jax.data import scenes
from xlvlm_jax.features.writer import FeaturesWriter

SITE = "language_model.model.layers.6"
WORDS = [["dog"], ["cat"], ["red"], []]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=5, seed=5)
    return data.load("coco", directory, "train")[:4]


@pytest.fixture(scope="module")
def concepts(vlm):
    """Returns concepts that write three words through the head, and one without words."""
    head = np.asarray(vlm.params["language_model"]["lm_head"]["kernel"]).T
    encode = vlm.tokenizer.encode
    ids = [encode(f" {word}", add_special_tokens=False)[-1] for (word,) in WORDS[:3]]
    components = np.concatenate([head[ids], np.ones((1, 192))]).astype(np.float32)
    return dataclasses.replace(
        Concepts.from_components(components, "pca"),
        words=WORDS,
        source={"site": SITE, "fingerprint": vlm.fingerprint, "model": "embedded"},
    )


@pytest.fixture(scope="module")
def record(vlm, concepts, samples):
    return causal.score_causally(
        concepts,
        vlm,
        samples,
        [sample.references[0] for sample in samples],
        mean=np.zeros(192, np.float32),
        add=[0.1],
        ablate=[1.0],
        steps=2,
        batch_size=3,  # the second batch is filled up
        num_matched=1,
    )


def test_directions_that_write_words_cause_them(record):
    scores = record.scores
    assert (scores.own[:3] > 0.01).all() and (scores.score[:3] > 0.5).all()
    assert np.isnan(scores.score[3])
    assert record.settings["samples"] == 4
    assert (record.rest > 0).all()
    assert record.first_order > 0.5 and record.integrated > record.first_order - 0.2
    # Three directions explain little: zero in place of the states does as much as their mean.
    assert set(record.losses) == {"own", "spliced", "zero", "mean"}
    assert record.losses["mean"] == pytest.approx(record.losses["zero"])
    share = causal.loss_recovered(*(record.losses[n] for n in ("own", "spliced", "zero")))
    assert record.recovered["zero"] == pytest.approx(share)


def test_batches_do_not_count(vlm, concepts, samples, record):
    one = causal.score_causally(
        concepts,
        vlm,
        samples,
        [sample.references[0] for sample in samples],
        add=[0.1],
        ablate=[1.0],
        steps=1,
        batch_size=4,
        num_matched=1,
    )
    np.testing.assert_allclose(one.scores.own, record.scores.own, atol=1e-4)
    np.testing.assert_allclose(one.answer, record.answer, atol=1e-3)
    assert one.losses == {} and one.recovered == {}


def test_the_file(record, concepts, tmp_path):
    concepts.save(tmp_path)
    path = files.save(record, tmp_path)
    described = files.read(tmp_path)
    assert described["concepts"]["score"][3] is None
    assert described["concepts"]["own"][0] == pytest.approx(record.scores.own[0], abs=1e-6)
    assert json.loads(path.read_text())["settings"]["site"] == SITE
    dataclasses.replace(concepts, words=[["pup"], [], [], []]).save(tmp_path)
    assert files.read(tmp_path) is None  # the words it was computed for have changed
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"causal.json holds no causal scores.*xlvlm causal"):
        files.read(tmp_path)
    path.unlink()
    assert files.read(tmp_path) is None


def test_concepts_that_do_not_belong_to_the_model(vlm, concepts):
    def refused(match, site=None, **changes):
        with pytest.raises(ValueError, match=match):
            stage.require_concepts_of(dataclasses.replace(concepts, **changes), vlm, site)

    refused("have no words to score; run `xlvlm ground`", words=None)
    refused("have no words to score", words=[[], [], [], []])
    refused("concepts are of site .*layers.6', not of .*layers.2'", site="layers.2")
    refused("do not name their site", source={})
    refused("another model", source=concepts.source | {"fingerprint": "other"})
    refused("are 5 wide, but the states .* have width 192", components=np.ones((4, 5), "float32"))


def test_command(xlvlm, concepts, samples, tmp_path):
    described = [sample.to_dict() | {"prediction": sample.references[0]} for sample in samples]
    with FeaturesWriter(tmp_path / "features", {"model": "embedded"}) as writer:
        index = np.arange(4)
        writer.append(described, {SITE: np.ones((4, 192), np.float32)}, index, index, index)
        writer.close()
    source = concepts.source | {"features": str(tmp_path / "features")}
    dataclasses.replace(concepts, source=source).save(tmp_path / "concepts")
    arguments = ("causal", tmp_path / "concepts", "--model", "embedded", "--batch-size", 4)
    status, out, errors = xlvlm(*arguments, "--add", 0.1, "--ablate", 1)
    assert status == 0, errors
    assert "dog" in out and "loss recovered" in out and "4 samples ->" in out
    assert files.read(tmp_path / "concepts")["settings"]["add"] == [0.1]
    status, _, errors = xlvlm(*arguments)
    assert status == 2 and "already holds causal.json; replace it with --overwrite" in errors
    status, _, errors = xlvlm(*arguments, "--overwrite", "--add", "nan")
    assert status == 2 and "finite numbers other than 0; got nan" in errors
    status, _, errors = xlvlm(*arguments, "--overwrite", "--site", "layers.1")
    assert status == 2 and "omit --site, or use concepts of that site" in errors


def test_a_score_does_not_depend_on_which_others_are_asked_for(vlm, concepts, samples):
    said = [sample.references[0] for sample in samples]
    options = {"add": [0.1], "ablate": [], "batch_size": 4, "num_matched": 1}
    one, two = (
        causal.score_causally(concepts, vlm, samples, said, numbers=numbers, **options)
        for numbers in ([0], [0, 2])
    )
    assert one.scores.score[0] == pytest.approx(two.scores.score[0], abs=1e-4)
    assert np.isfinite([one.scores.null[0], one.scores.low[0]]).all()
    assert np.isnan(one.scores.score[1:]).all()
    with pytest.raises(ValueError, match="there are 3 answers for 4 samples; expected one each"):
        causal.score_causally(concepts, vlm, samples, said[:3], **options)
    alone = dataclasses.replace(concepts, words=[["dog"], [], [], []])
    with pytest.raises(ValueError, match="no other words to compare with; ground more concepts"):
        causal.score_causally(alone, vlm, samples, said, **options)
