"""An evaluation from the model to its files, its figures and its section of the report."""

import dataclasses
import json

import pytest
from matplotlib.axes import Axes

from xlvlm_jax import data, evaluation
from xlvlm_jax.demo import embedded
from xlvlm_jax.evaluation import Captions, Condition, Questions
from xlvlm_jax.report import write_report
from xlvlm_jax.report.steering_figures import draw_all, plot_sweep, short_names
from xlvlm_jax.report.steering_section import read_steering

OPTIONS = {"max_new_tokens": 3, "batch_size": 16}
TASK = Questions(("yes",), ("no",))


@pytest.fixture(scope="module")
def asked(pictures, tmp_path_factory):
    """Returns questions on three pictures, and one whose picture is missing."""
    samples = data.load("vqav2", pictures, "test")
    missing = tmp_path_factory.mktemp("nothing") / "gone.jpg"
    return [*samples, dataclasses.replace(samples[0], id="gone", image=missing)]


@pytest.fixture(scope="module")
def run(vlm, asked, vector, questions, tmp_path_factory):
    """Returns (run directory, summary); site and strength are chosen among four."""
    run = tmp_path_factory.mktemp("run")
    tried = evaluation.grid([vector], (0.5, 1.0)) + evaluation.grid([vector], (1.5,), edit="ablate")
    best, trials = evaluation.select(vlm, questions[:24], TASK, tried, **OPTIONS)
    conditions = {"steered": best.condition, "told": Condition(instruction="Answer no.")}
    sweep = evaluation.describe_sweep(best, trials, TASK, split="train", samples=24)
    directory = run / "steering" / "yes-no"
    summary = evaluation.evaluate(vlm, asked, TASK, directory, conditions, sweep=sweep, **OPTIONS)
    draw_all(summary, directory)
    return run, summary


def test_the_files_hold_what_was_answered_and_measured(run, asked):
    directory, summary = run[0] / "steering" / "yes-no", run[1]
    assert "generation_config" not in summary
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert list(summary["unreadable"]) == ["gone"]
    lines = [json.loads(x) for x in (directory / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [sample.id for sample in asked[:-1]]
    assert set(lines[0]["predictions"]) == {"plain", "steered", "told"}
    for name, measured in summary["conditions"].items():
        given = [line["predictions"][name] for line in lines]
        assert measured["scores"]["all"]["official"] == pytest.approx(
            evaluation.vqa_scores(asked[:-1], given)["all"].official
        )
        assert sum(measured["answer types"].values()) == len(given) == summary["samples"]
    assert summary["conditions"]["plain"]["scores"]["all"]["official"] > 0.8
    changes = summary["conditions"]["steered"]["changes"]
    assert changes["moved"] > 0
    assert summary["conditions"]["plain"]["changes"]["changed"] == 0


def test_values_of_generation_config_and_the_adapter_are_kept(vlm, asked, tmp_path):
    changed = vlm.with_generation_config({"suppress_tokens": [7], "top_k": 3})
    options = {"max_new_tokens": 1, "batch_size": 4}
    summary = evaluation.evaluate(changed, asked[:4], TASK, tmp_path / "a", **options)
    assert summary["generation_config"] == {"suppress_tokens": [7]}
    assert summary["about"]["adapter"] is None and summary["about"]["dtype"] == "float32"
    adapted = vlm.with_adapter(embedded.find_adapter("color"))
    assert adapted.fingerprint == summary["fingerprint"] == vlm.fingerprint
    with pytest.warns(UserWarning, match=r"generation config .* of \{\}; adapter None instead of"):
        told = evaluation.evaluate(
            adapted, asked[:4], TASK, tmp_path / "b", baseline=tmp_path / "a", **options
        )
    assert told["about"]["adapter"] is not None


def test_the_trials_are_kept_with_the_chosen_one(run):
    sweep = run[1]["sweep"]
    assert len(sweep["trials"]) == 3
    assert sweep["chosen"] in sweep["trials"]
    assert {trial["edit"] for trial in sweep["trials"]} == {"add", "ablate"}


def test_one_kind_of_edit_is_drawn(run, monkeypatch, tmp_path):
    trials = run[1]["sweep"]["trials"]
    chosen = trials[0]  # add, at 0.5; the other trial of it is at 1, and ablate is at 1.5
    alphas, plot = [], Axes.plot

    def watched(axes, x, *arguments, **options):
        alphas.append(x)
        return plot(axes, x, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    plot_sweep({"sweep": {**run[1]["sweep"], "chosen": chosen}}, tmp_path / "sweep.svg")
    assert alphas[0] == [0.5, 1.0]


def test_figures_are_drawn_and_old_ones_removed(run, tmp_path):
    directory, summary = run[0] / "steering" / "yes-no", run[1]
    assert "source answers moved" in (directory / "sweep.svg").read_text()
    assert "Answer types" in (directory / "answers.svg").read_text()
    draw_all(summary, tmp_path)
    plain = {**summary, "conditions": {"plain": summary["conditions"]["plain"]}}
    del plain["sweep"]
    assert draw_all(plain, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_sites_are_called_by_what_tells_them_apart():
    assert short_names(["m.layers.3", "m.layers.5"]) == ["3", "5"]
    assert short_names(["m.layers.3", "m.norm"]) == ["layers.3", "norm"]
    assert short_names(["m.layers.3"]) == ["3"]


def test_the_report_needs_steering_alone(run, asked):
    (section,) = read_steering(run[0])
    assert section.title == "Answers from “yes” to “no”"
    assert [name for name, _ in section.rows] == ["plain", "steered", "told"]
    assert len(section.rows[0][1]) == len(section.columns)
    assert len(section.plots) == 2
    assert all((e.before, e.after) == ("yes", "no") for e in section.moved)
    assert 0 < len(section.moved) <= 6
    page = write_report(run[0]).read_text("utf-8")
    assert "Answers from “yes” to “no”" in page
    assert section.moved[0].question in page
    assert "data:image/jpeg" in page
    assert "A concept is a direction" not in page
    with pytest.raises(ValueError, match="no features and concepts to show another run's beside"):
        write_report(run[0], beside=run[0])


def test_a_damaged_evaluation_is_named(run, tmp_path):
    broken = tmp_path / "steering" / "bad"
    broken.mkdir(parents=True)
    (broken / "summary.json").write_text('{"kind": "vqa"}')
    with pytest.raises(ValueError, match="bad: cannot read the evaluation"):
        write_report(tmp_path)


def test_an_output_that_cannot_be_written_is_found_before_answers(vlm, asked, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FileExistsError, match="file is a file; expected a directory"):
            evaluation.evaluate(vlm, asked, TASK, output, batch_size=0)
    with pytest.raises(ValueError, match="a condition is called 'plain', as the unsteered model"):
        evaluation.evaluate(vlm, asked, TASK, tmp_path, {"plain": Condition()}, batch_size=0)


def test_captions_are_scored_and_compared(vlm, pictures, vector, tmp_path):
    pytest.importorskip("pycocoevalcap")
    samples = data.load("coco", pictures, "train")
    task = Captions(("red", "yellow", "blue", "green", "orange", "purple", "black", "white"))
    conditions = {"steered": Condition((vector,), 3.0)}
    options = {"max_new_tokens": 16, "batch_size": 8}
    summary = evaluation.evaluate(
        vlm, samples, task, tmp_path / "steering" / "c", conditions, **options
    )
    plain, steered = (summary["conditions"][name] for name in ("plain", "steered"))
    assert plain["scores"]["CIDEr"] > 0.3
    assert plain["scores"]["left out"]["METEOR"] == "not requested"
    assert steered["changes"]["samples"] == 6
    said = plain["changes"]["words_before"]
    assert sum(plain["class words"].values()) == said
    (section,) = (draw_all(summary, tmp_path / "steering" / "c"), read_steering(tmp_path))[1]
    assert section.title.startswith("Captions towards red, yellow")
    assert "with class words" in section.columns


def test_nothing_is_written_for_words_of_another_data_set(vlm, asked, tmp_path):
    with pytest.raises(ValueError, match="target words sphinx as its answer"):
        evaluation.evaluate(vlm, asked, Questions(("yes",), ("sphinx",)), tmp_path / "out")
    with pytest.raises(ValueError, match="have no answers; evaluate questions"):
        Questions().require([dataclasses.replace(asked[0], metadata={})])
    with pytest.raises(ValueError, match="have no captions"):
        Captions().require([dataclasses.replace(asked[0], references=())])
    with pytest.raises(ValueError, match="captions contains one of the words sphinx; give --words"):
        Captions(("sphinx",)).require(asked)
    assert list(tmp_path.iterdir()) == []
