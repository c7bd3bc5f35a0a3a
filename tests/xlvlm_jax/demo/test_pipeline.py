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

    there = {path.name for path in (tmp_path / "run").iterdir()}
    removed = {name.partition("/")[0] for name in pipeline.WRITTEN}
    assert there == removed | {pipeline.STARTED}

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


def test_a_demo_of_other_arguments_is_resumed_by_none_and_replaced(xlvlm, tmp_path, monkeypatch):
    class _DrawnError(ValueError):
        pass

    def draw(directory, *, seed, **_):
        raise _DrawnError(f"drawn with seed {seed}")

    monkeypatch.setattr(pipeline.scenes, "write", draw)
    output = tmp_path / "demo"
    demo = ("demo", "--output", output)
    assert "drawn with seed 0" in xlvlm(*demo)[2]
    (output / "scenes").mkdir()
    (output / "scenes" / "dataset_coco.json").touch()
    (output / "features").mkdir()
    # Interrupted after the scenes: they are those of seed 0.
    status, _, errors = xlvlm(*demo, "--seed", 1)
    assert status == 2 and "holds an interrupted demo with seed 0, now it is 1; give" in errors
    status, _, errors = xlvlm(*demo, "--word", "cat")
    assert status == 2 and "with word 'dog', now it is 'cat'" in errors
    (output / "own.txt").touch()
    assert "drawn with seed 1" in xlvlm(*demo, "--seed", 1, "--overwrite")[2]
    assert sorted(path.name for path in output.iterdir()) == ["demo.json", "own.txt"]


def test_what_is_not_a_demo_is_not_removed(tmp_path):
    (tmp_path / "features").mkdir()
    assert pipeline._begin(tmp_path, {"version": 1, "seed": 0}, True) is False
    assert (tmp_path / "features").is_dir()
    assert pipeline._begin(tmp_path, {"version": 1, "seed": 0}, False) is True
