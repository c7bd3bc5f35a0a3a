"""Answers of an earlier run, ours or XL-VLMs', and messages."""

import dataclasses
import json
from pathlib import Path

import pytest

from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import read_baseline
from xlvlm_jax.evaluation.baseline import warn_of_others
from xlvlm_jax.storage import versions

SAMPLES = [Sample(str(i), Path(f"COCO_val2014_{i:012d}.jpg"), str(i), "?", ("a",)) for i in (7, 8)]


def test_answers_of_both_kinds_of_runs(tmp_path):
    lines = [{"id": str(i), "predictions": {"plain": f" a{i}", "steered": "no"}} for i in (8, 7, 9)]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8-sig")
    assert read_baseline(tmp_path, SAMPLES) == ["a7", "a8"]
    questions, captions = tmp_path / "q.json", tmp_path / "c.json"
    questions.write_text(json.dumps({"8": "yes", "7": "no"}), "utf-8-sig")  # a mark
    assert read_baseline(questions, SAMPLES) == ["no", "yes"]
    captions.write_text(json.dumps({sample.image.stem: sample.id for sample in SAMPLES}))
    assert read_baseline(captions, SAMPLES) == ["7", "8"]


def test_pictures_that_the_earlier_run_could_not_read(tmp_path):
    (tmp_path / "predictions.jsonl").write_text('{"id": "7", "predictions": {"plain": "a"}}')
    summary = {"version": versions.VERSION, "unreadable": {"8": "gone"}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for named in (tmp_path, tmp_path / "predictions.jsonl"):
        assert read_baseline(named, SAMPLES) == ["a", None]
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "unreadable": {}}))
    with pytest.raises(ValueError, match="has no answer to sample '8'"):
        read_baseline(tmp_path, SAMPLES)


def test_other_settings_are_told(tmp_path, recwarn):
    line = {"id": "7", "prompt": "Why?", "predictions": {"plain": "a"}}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line))
    (tmp_path / "summary.json").write_text('{"model": "m", "max_new_tokens": 10}')
    with pytest.warns(UserWarning, match=r"model 'm' instead of 'n'; prompt 'Why\?' instead of"):
        warn_of_others(tmp_path, SAMPLES, model="n", max_new_tokens=10)
    (tmp_path / "predictions.jsonl").write_text(json.dumps({**line, "prompt": "?"}))
    warn_of_others(tmp_path, SAMPLES, model=None, max_new_tokens=10)
    warn_of_others(tmp_path / "other.json", SAMPLES, model="n")
    assert not recwarn.list
    # The file of a run is the run.
    with pytest.warns(UserWarning, match="model 'm' instead of 'n'"):
        warn_of_others(tmp_path / "predictions.jsonl", SAMPLES, model="n")


def test_questions_that_share_an_id_are_not_mixed_up(tmp_path):
    """POPE's files number their questions alike: splits differ in what is absent."""
    asked = ["Is there a dog in the image?", "Is there a cat in the image?"]
    samples = [
        dataclasses.replace(sample, metadata={"question": text})
        for sample, text in zip(SAMPLES, asked, strict=True)
    ]

    def write(questions):
        lines = [
            {"id": sample.id, "predictions": {"plain": "no"}} | told
            for sample, told in zip(samples, questions, strict=True)
        ]
        (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))

    for same in ([{"question": text} for text in asked], [{}, {}]):
        write(same)
        assert read_baseline(tmp_path, samples) == ["no", "no"]
    write([{"question": asked[0]}, {"question": "Is there a car in the image?"}])
    with pytest.raises(ValueError, match="sample '8' is another question, 'Is there a car in the"):
        read_baseline(tmp_path, samples)
    assert read_baseline(tmp_path, SAMPLES) == ["no", "no"]  # nothing is known to differ


def test_another_adapter_or_checkpoint_is_told(tmp_path, recwarn):
    """An adapter does not change the checkpoint's fingerprint."""
    line = {"id": "7", "predictions": {"plain": "a"}}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line))
    (tmp_path / "summary.json").write_text("{}")  # of an earlier release
    made_with = {"adapter": None, "dtype": "float32"}
    warn_of_others(tmp_path, SAMPLES, about=made_with, fingerprint="b", generation_config={})
    assert not recwarn.list
    told = {"about": made_with | {"adapter": "color"}, "fingerprint": "a"}
    (tmp_path / "summary.json").write_text(json.dumps(told))
    with pytest.warns(UserWarning, match="fingerprint 'a' instead of 'b'; adapter 'color' instead"):
        warn_of_others(tmp_path, SAMPLES, about=made_with, fingerprint="b")
    with pytest.warns(UserWarning, match=r"with generation config \{\} instead of \{'top_k': 3\}:"):
        warn_of_others(tmp_path, SAMPLES, generation_config={"top_k": 3})


def test_messages(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; expected a directory of `xlvlm ev"):
        read_baseline(tmp_path, SAMPLES)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a.json: not answers of an earlier run .a list"):
        read_baseline(tmp_path / "a.json", SAMPLES)
    (tmp_path / "a.json").write_text(json.dumps({"7": "no"}))
    with pytest.raises(ValueError, match="has no answer to sample '8'"):
        read_baseline(tmp_path / "a.json", SAMPLES)
