"""The steering part of the demo on a few pictures."""

import pytest

import ports
from xlvlm_jax import SteeringVector
from xlvlm_jax.data import scenes
from xlvlm_jax.demo import embedded, steering_part
from xlvlm_jax.report import write_report


@pytest.mark.slow
def test_it_writes_a_vector_an_evaluation_and_a_page(tmp_path):
    scenes.write(tmp_path / "scenes", train=16, test=3, seed=4)
    stages = []

    def stage(name):
        stages.append(name)
        return lambda done, total, rows=None: None

    summary = steering_part.run_steering(
        ports.load(embedded.LLAVA),
        tmp_path,
        tmp_path / "scenes",
        sites=steering_part.SITES[-1:],
        alphas=(0.7, 0.9),
        num_samples=(100, 24, 20),
        stage=stage,
    )
    assert stages == ["extracting answers", "trying", "answering"]
    described = steering_part.describe(summary)
    assert described["site"] == steering_part.SITES[-1]
    assert described["moved"] > 0.5
    directory = tmp_path / "steering"
    vector = SteeringVector.load(directory / "yes-no.safetensors")
    assert vector.source["target"] == ["no"]
    assert {path.name for path in (directory / "yes-no").iterdir()} == {
        "summary.json",
        "predictions.jsonl",
        "answers.svg",
        "sweep.svg",
    }
    assert "Steering: Answers from" in write_report(tmp_path).read_text("utf-8")
