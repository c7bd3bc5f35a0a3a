"""Answers under several conditions equal those of separate runs."""

import copy
import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from ports import ablate, add, checkpoint
from xlvlm_jax import SteeringVector, evaluation
from xlvlm_jax.data import sweeps
from xlvlm_jax.data.images import read_image
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import PLAIN, Condition
from xlvlm_jax.evaluation.predict import Predictions
from xlvlm_jax.storage.same_model import model_of

OPTIONS = {"max_new_tokens": 3, "batch_size": 16}
OTHER = "language_model.model.layers.3"


@pytest.fixture(scope="module")
def asked(questions):
    return questions[:20]


@pytest.fixture(scope="module")
def conditions(vector):
    elsewhere = dataclasses.replace(vector, site=OTHER, where="last_prompt")
    return [
        PLAIN,
        Condition((vector,), 1.5),
        Condition((vector, elsewhere), 0.7),
        Condition((vector,), 1.8, edit="ablate"),
        Condition(instruction="no"),
    ]


@pytest.fixture(scope="module")
def predictions(vlm, asked, conditions):
    # Three steered conditions in runs of two: the last run is filled up.
    return evaluation.predict(vlm, asked, conditions, max_rows=32, **OPTIONS)


def alone(vlm, samples, edits=None, words=""):
    texts = []
    for start in range(0, len(samples), 16):
        rows = samples[start : start + 16]
        full = [*rows, *rows[:1] * (16 - len(rows))]
        inputs = vlm.process(
            [vlm.render(s.prompt + words) for s in full], [read_image(s.image) for s in full]
        )
        tokens = vlm.generate(inputs, max_new_tokens=3, edits=edits).tokens
        decoded = vlm.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        texts += [text.strip() for text in decoded[: len(rows)]]
    return texts


def test_equal_questions_are_answered_once(vlm, asked, tmp_path, encoded):
    """As those that POPE's files share; the answers are those of each, and so are the errors."""
    gone = dataclasses.replace(asked[1], id="gone", image=tmp_path / "gone.jpg")
    own = [*asked[:12], gone]
    again = [dataclasses.replace(sample, id=f"{sample.id} again") for sample in own]
    found = evaluation.predict(vlm, [*own, *again], **OPTIONS)
    assert len(encoded) == 1  # 26 questions in one batch of 16
    (answers,) = found.answers
    assert answers[:12] == alone(vlm, asked[:12]) and answers[:13] == answers[13:]
    assert list(found.errors) == ["gone", "gone again"] and answers[12] is None


def test_each_condition_answers_as_it_does_alone(vlm, asked, vector, predictions):
    v = vector.vector
    site, answers = vector.site, predictions.answers
    assert answers[0] == alone(vlm, asked)
    assert answers[1] == alone(vlm, asked, {site: add(v, 1.5)})
    assert answers[2] == alone(vlm, asked, {site: add(v, 0.7), OTHER: add(v, 0.7, "last_prompt")})
    assert answers[3] == alone(vlm, asked, {site: ablate(v, 1.8)})
    assert answers[4] == alone(vlm, asked, words=" no")
    assert predictions.errors == {}


def test_questions_about_one_picture_share_its_encoding(vlm, asked, predictions, encoded):
    mixed = np.random.default_rng(0).permutation(len(asked))
    found = evaluation.predict(vlm, [asked[i] for i in mixed], **OPTIONS)
    assert found.answers[0] == [predictions.answers[0][i] for i in mixed]
    assert len(encoded) == 2
    assert encoded[0] <= 8  # pictures, for 16 questions


def test_no_more_rows_at_once_than_fit_into_the_cache(
    vlm, asked, conditions, predictions, monkeypatch
):
    inputs = vlm.process([vlm.render("how many?")] * 2, [read_image(asked[0].image)] * 2)
    config, slots = vlm.sizes.text, inputs["input_ids"].shape[1] + 3
    row = 4 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots
    for room, rows in ((9 * row, 9), (row // 2, 2), (10**12, sweeps.MOST_ROWS)):
        monkeypatch.setattr(sweeps, "CACHE_BYTES", room)
        assert sweeps.rows_at_once(vlm, inputs, 3) == rows
    monkeypatch.setattr(sweeps, "CACHE_BYTES", 1)
    assert evaluation.predict(vlm, asked, conditions, **OPTIONS).answers == predictions.answers


def test_the_vector_steers(asked, predictions):
    plain, steered = predictions.answers[:2]
    said_yes = [i for i, answer in enumerate(plain) if answer == "yes"]
    assert said_yes
    assert sum(steered[i] == "no" for i in said_yes) > len(said_yes) / 2


def test_an_unreadable_image_is_recorded_and_skipped(vlm, asked, predictions, tmp_path):
    (tmp_path / "torn.jpg").write_bytes(asked[3].image.read_bytes()[:200])
    broken = list(asked)
    broken[3] = dataclasses.replace(asked[3], image=tmp_path / "torn.jpg")
    broken[0] = dataclasses.replace(asked[0], image=tmp_path / "none.jpg")
    found = evaluation.predict(vlm, broken, **OPTIONS)
    assert list(found.errors) == [asked[0].id, asked[3].id]
    assert "torn.jpg: cannot be decoded" in found.errors[asked[3].id]
    expected = list(predictions.answers[0])
    expected[0] = expected[3] = None
    assert found.answers == [expected]
    samples, (answers,) = found.readable(broken)
    assert len(samples) == len(answers) == 18
    none = evaluation.predict(vlm, [broken[0]], **OPTIONS)
    with pytest.raises(ValueError, match=r"none of the 1 images .*none\.jpg: no such image"):
        none.readable([broken[0]])


def test_progress_counts_samples(vlm, asked):
    seen = []
    evaluation.predict(vlm, asked, progress=lambda *counts: seen.append(counts), **OPTIONS)
    (first, _), last = seen  # two batches of at most 16, nearly equal
    assert 4 <= first <= 16 and last == (20, 20)


def test_aligned_edits_have_one_structure_and_order():
    first, second = add(np.ones(4), 2.0), ablate(np.ones(4))
    variants = [{"a": [first, second, first]}, {"b": second}, {"a": second}, {}]
    found = evaluation.aligned(variants)
    assert len({jax.tree.structure(edits) for edits in found}) == 1
    assert [float(edit.alpha) for edit in found[0]["a"]] == [2, 1, 2]
    assert [float(edit.alpha) for edit in found[2]["a"]] == [0, 1, 0]
    assert [float(edit.alpha) for edits in found[3].values() for edit in edits] == [0, 0, 0, 0]


def test_messages(vlm, asked, vector):
    with pytest.raises(ValueError, match="0 conditions and batches of 16"):
        evaluation.predict(vlm, asked, [], **OPTIONS)
    with pytest.raises(ValueError, match="unknown edit 'push'; expected one of add, add_relative"):
        Condition((vector,), edit="push")
    other = SteeringVector(vector.vector, vector.site, {"model": "other", "fingerprint": "abc"})
    with pytest.raises(ValueError, match="fitted on 'other'"):
        evaluation.predict(vlm, asked[:1], [Condition((other,))], **OPTIONS)
    with pytest.raises(ValueError, match=r"no site matches 'layers\.99'"):
        wrong = dataclasses.replace(vector, site="layers.99")
        evaluation.predict(vlm, asked[:1], [Condition((wrong,))], **OPTIONS)


def test_the_checkpoint_is_read_once_for_all_conditions_and_batches(
    vlm, asked, vector, monkeypatch
):
    """Runs 14 strengths and the plain answers, in four batches."""
    read, fingerprint = [], checkpoint.fingerprint
    monkeypatch.setattr(checkpoint, "fingerprint", lambda p: read.append(p) or fingerprint(p))
    loaded = copy.copy(vlm)
    loaded.__dict__.pop("fingerprint", None)  # as of a model that was just loaded
    own = dataclasses.replace(vector, source=vector.source | model_of(vlm))
    conditions = [PLAIN, *(Condition((own,), alpha / 10) for alpha in range(14))]
    found = evaluation.predict(loaded, asked[:4], conditions, max_new_tokens=1, batch_size=1)
    assert found.answers[0] == found.answers[1]  # a strength of zero does nothing
    assert read == [loaded.directory]


def test_a_refused_sample_is_skipped(vlm, asked, predictions):
    odd = [asked[0], dataclasses.replace(asked[1], prompt="is <image> a dog ?"), *asked[2:16]]
    found = evaluation.predict(vlm, odd, [PLAIN, Condition(instruction="no")], **OPTIONS)
    assert list(found.errors) == [asked[1].id]
    assert "the processor refuses it or its prompt" in found.errors[asked[1].id]
    assert [each[1] for each in found.answers] == [None, None]
    assert found.answers[0][2:] == predictions.answers[0][2:16]
    with pytest.raises(ValueError, match=f"sample {asked[1].id}: .* refuses it"):
        evaluation.predict(vlm, odd, strict=True, **OPTIONS)


def test_predictions_as_a_table():
    pytest.importorskip("pandas")
    samples = [Sample(name, Path(f"{name}.jpg"), name, "Is it?") for name in ("a", "b")]
    made = Predictions([["yes", None], ["no", None]], {"b": "b.jpg: no such image file"})
    table = made.to_pandas(samples, ["plain", "steered"])
    assert table["id"].tolist() == ["a", "b"]
    columns = table[["prediction.plain", "prediction.steered", "error"]].fillna("none")
    assert columns.values.tolist() == [
        ["yes", "no", "none"],
        ["none", "none", "b.jpg: no such image file"],
    ]
    with pytest.raises(ValueError, match="2 samples and 1 names; expected 2 and 2, those of the"):
        made.to_pandas(samples, ["plain"])
