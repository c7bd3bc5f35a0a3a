"""The demo on one twentieth of its pictures."""

import io
import json
from functools import partial

import pytest
from rich.console import Console

from xlvlm_jax import Concepts, Features
from xlvlm_jax.demo import pipeline, summary
from xlvlm_jax.demo import pipeline as pipeline_module
from xlvlm_jax.demo.steering_part import SITES, run_steering


@pytest.mark.slow
def test_the_demo_writes_a_page_and_summarises_the_concepts(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "NUM_TRAIN", 120)
    monkeypatch.setattr(pipeline, "NUM_TEST", 40)
    few = partial(run_steering, sites=SITES[-1:], alphas=(0.7,), num_samples=(100, 24, 20))
    monkeypatch.setattr(pipeline, "run_steering", few)
    stages: list[str] = []

    def stage(name):
        stages.append(name)
        return lambda done, total, rows=None: None

    result = pipeline_module.run(tmp_path / "run", num_concepts=4, stage=stage)
    assert stages[0] == "drawing scenes"
    assert result.report.exists()
    features = Features.open(tmp_path / "run" / "features")
    assert {s["attributes"]["kind"] for s in features.samples} == {"dog"}
    assert {s["attributes"]["count"] for s in features.samples} == {1, 2, 3}
    for directory in ("concepts", f"concepts-{pipeline_module.MIDDLE}"):
        assert len(Concepts.load(tmp_path / "run" / directory).words) == 4
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["attributes"]
    assert set(scores) == {pipeline_module.FINAL, pipeline_module.MIDDLE}
    assert set(scores[pipeline_module.FINAL]["test"]) == {"colour", "count", "place", "mood"}

    assert {row.method for row in result.dictionaries} == {
        *("snmf", "kmeans", "pca", "simple", "random"),
    }
    assert result.shift.shifted.shape == (4, 192)
    assert result.steering["conditions"]["steered"]["changes"]["moved_share"] > 0
    page = result.report.read_text()
    assert 'id="shift' in page
    assert "Steering: Answers from" in page

    console = Console(file=io.StringIO(), width=120)
    summary.show(result, console)
    assert "report.html" in console.file.getvalue().replace("\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--word", "zebra"),
            r"no caption of the drawn scenes contains 'zebra'; expected dog, cat, ",
        ),
        (("--num-concepts", 0), "number of concepts must be at least 1, got 0"),
    ],
)
def test_impossible_requests_are_refused_before_scenes_are_drawn(xlvlm, tmp_path, options, message):
    status, out, errors = xlvlm("demo", "--output", tmp_path / "demo", *options)
    assert status == 2 and message in errors
    assert "drawing" not in out
    assert len(errors.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
