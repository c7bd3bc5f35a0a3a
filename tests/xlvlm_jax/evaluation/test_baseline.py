"""Answers of an earlier run, ours or XL-VLMs', and messages."""

import json
from pathlib import Path

import pytest

from xlvlm_jax.data.sample import Sample
from xlvlm_jax.evaluation import read_baseline

SAMPLES = [Sample(str(i), Path(f"COCO_val2014_{i:012d}.jpg"), str(i), "?", ("a",)) for i in (7, 8)]


def test_answers_of_both_kinds_of_runs(tmp_path):
    lines = [{"id": str(i), "predictions": {"plain": f" a{i}", "steered": "no"}} for i in (8, 7, 9)]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_baseline(tmp_path, SAMPLES) == ["a7", "a8"]
    questions, captions = tmp_path / "q.json", tmp_path / "c.json"
    questions.write_text(json.dumps({"8": "yes", "7": "no"}))
    assert read_baseline(questions, SAMPLES) == ["no", "yes"]
    captions.write_text(json.dumps({sample.image.stem: sample.id for sample in SAMPLES}))
    assert read_baseline(captions, SAMPLES) == ["7", "8"]


def test_messages(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; expected a directory of `xlvlm ev"):
        read_baseline(tmp_path, SAMPLES)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a.json: not answers of an earlier run .a list"):
        read_baseline(tmp_path / "a.json", SAMPLES)
    (tmp_path / "a.json").write_text(json.dumps({"7": "no"}))
    with pytest.raises(ValueError, match="has no answer to sample '8'"):
        read_baseline(tmp_path / "a.json", SAMPLES)
