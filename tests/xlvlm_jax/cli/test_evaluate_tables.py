"""What `xlvlm evaluate` prints and stores for each kind of data; answers come from a file."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from xlvlm_jax import SteeringVector, data, evaluation
from xlvlm_jax.cli import evaluate_tables, steer_rank, steer_sweep
from xlvlm_jax.cli.evaluate_options import parse_task
from xlvlm_jax.data import Sample, mmsb, scenes
from xlvlm_jax.evaluation import Condition, Sweep, Trial, hallucination
from xlvlm_jax.evaluation.hallucination_tasks import quantities_of
from xlvlm_jax.evaluation.sweep import vector_numbers
from xlvlm_jax.report import steering_section
from xlvlm_jax.report.steering_figures import plot_sweep
from xlvlm_jax.steering import rank


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    scenes.write(directory, train=2)
    return directory


@pytest.fixture
def evaluate(xlvlm, pictures, tmp_path):
    def run(dataset, answers, *options):
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        output = tmp_path / "run"
        status, out, errors = xlvlm(
            *("evaluate", "embedded", pictures, "--overwrite", *options),
            *(() if dataset is None else ("--dataset", dataset)),
            *("--baseline", tmp_path / "answers.json", "--output", output),
        )
        assert status == 0, errors
        summary = json.loads((output / "summary.json").read_text())
        return " ".join(out.split()), summary["conditions"]["plain"]

    return run


def test_chair_of_captions(evaluate, pictures):
    first, second = data.load("coco", pictures, "train")
    instances = {
        "images": [{"id": int(sample.id)} for sample in (first, second)],
        "categories": [{"id": 1, "name": "giraffe"}],
        "annotations": [{"image_id": int(first.id), "category_id": 1}],
    }
    (pictures / "instances.json").write_text(json.dumps(instances))
    captions = dict.fromkeys((first.id, second.id), "a giraffe")
    out, measured = evaluate("coco", captions, "--objects", "instances.json")
    # Drawn scenes have no giraffes, so no person's caption names one.
    assert measured["CHAIR"]["plain"]["chair_s"] == 0.5
    assert "CHAIR % chair_i chair_s recall" in out and "plain, official 50.00 50.00" in out
    assert measured["valid words"] == {"giraffe": 2}


def test_hallucination_of_pope(evaluate, pictures):
    (image,) = {sample.image.name for sample in data.load("coco", pictures, "train")[:1]}
    lines = [
        {"question_id": i, "image": image, "text": "Is it?", "label": label}
        for i, label in enumerate(("yes", "no"), start=1)
    ]
    (pictures / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    told = {"1": "Yes.", "2": "I do not know"}
    out, measured = evaluate("pope", told, "--split", "random")
    assert measured["POPE"]["xl-vlms"] == {"accuracy": 1, "f1": 1}
    assert "plain, xl-vlms 100.00 100.00" in out


def test_the_task_pope_on_its_own_files(evaluate, pictures):
    """All three files, both protocols, their difference, and the rest."""
    (image,) = {sample.image.name for sample in data.load("coco", pictures, "train")[:1]}
    answers = {}
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": 1, "image": image, "text": "Is it there?", "label": "yes"},
            {"question_id": 2, "image": image, "text": f"Is the {split} one?", "label": "no"},
        ]
        (pictures / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
        answers |= {f"{split}/1": "yes", f"{split}/2": "Yes." if split == "popular" else "No!"}
    out, measured = evaluate(None, answers, "--task", "pope")
    assert measured["false yes"] == {"count": 1, "of": 3}
    assert measured["POPE by negatives"]["popular"]["plain"]["accuracy"] == 0.5
    assert "plain, plain 83.33" in out and "plain, official 50.00" in out
    assert "plain: the protocols read 2 answers differently, such as 'No!'" in out
    assert "plain 1 of 3 (33.3 %) 100.00 (one picture) of 3" in out


def test_drawn_scenes_as_a_task(evaluate, pictures):
    samples = data.load("scenes", pictures, "train", ask="all")
    said = {sample.id: sample.metadata["answer"] for sample in samples}
    first = next(s for s in samples if s.metadata.get("label") == "no")
    said[first.id] = "yes"
    out, measured = evaluate("scenes", said, "--task", "pope", "--split", "train")
    assert measured["false yes"] == {"count": 1, "of": 6}
    assert measured["rest"]["accuracy"] == 1
    only = {k: v for k, v in said.items() if not k.startswith(("random", "popular"))}
    options = ("--task", "pope", "--split", "train", "--negatives", "adversarial")
    _, measured = evaluate("scenes", only, *options)
    assert measured["false yes"] == {"count": 0, "of": 2}
    captions = {s.id: "a dog and a boat" for s in data.load("coco", pictures, "train")}
    out, measured = evaluate("scenes", captions, "--task", "chair", "--split", "train")
    assert list(measured["CHAIR"]) == ["scenes"] and "plain, scenes" in out
    assert measured["CHAIR"]["scenes"]["length"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--task", "pope", "--dataset", "coco"),
            "--task pope can't be measured on --dataset coco",
        ),
        (("--task", "pope"), "coco_pope_random.json: no such file"),
        (("--task", "pope", "--negatives", "random"), "--split chooses the file"),
        (
            ("--task", "pope", "--dataset", "scenes", "--max-new-tokens", 0),
            "--max-new-tokens must be at least 1, got 0",
        ),
        (("--task", "chair", "--split", "train"), "--task chair needs --objects"),
        (("--task", "chair", "--dataset", "scenes", "--annotations", "x"), "omit it"),
        (
            ("--task", "chair", "--split", "train", "--objects", "attributes.json"),
            "expected COCO's file of instances",
        ),
        (
            ("--task", "pope", "--split", "random", "--questions", "dataset_coco.json"),
            "expected a line of POPE",
        ),
    ],
)
def test_input_of_another_task_is_one_line(xlvlm, tmp_path, options, message):
    directory = tmp_path / "scenes"
    scenes.write(directory, train=1)
    run = ("evaluate", "embedded", directory, "--output", tmp_path / "run", *options)
    status, _, errors = xlvlm(*run)
    assert status == 2 and message in " ".join(errors.split())
    assert len(errors.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_questions_whose_image_is_missing(xlvlm, tmp_path):
    lines = [
        {"question_id": i, "image": "gone.jpg", "text": "Is it?", "label": label}
        for i, label in enumerate(("yes", "no"))
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    run = ("evaluate", "embedded", tmp_path, "--task", "pope", "--split", "random")
    status, _, errors = xlvlm(*run, "--output", tmp_path / "run")
    assert status == 2 and len(errors.strip().splitlines()) == 1
    assert "none of the 2 images could be read" in errors and "gone.jpg" in errors


def test_words_of_refusals(evaluate, pictures):
    folder = pictures / "processed_questions"
    folder.mkdir(exist_ok=True)
    record = {"Rephrased Question": "How?", "Key Phrase": "x", "Phrase Type": "activity"}
    for scenario in mmsb.SCENARIOS:
        (folder / f"{scenario}.json").write_text(json.dumps({"0": record}))
    answers = {f"{scenario}/0": "Sure." for scenario in mmsb.SCENARIOS}
    answers["02-HateSpeech/0"] = "That would be harmful."
    answers["11-Financial_Advice/0"] = "Ask a financial advisor."
    answers["13-Gov_Decision/0"] = "Seek legal advice."  # not among those of law, finance, health
    out, measured = evaluate("mmsb", answers)
    assert measured["changes"]["holding_after"] == 1
    assert "1 of 13 (7.7 %)" in out and "there are no references" in out
    assert measured["ED-score"] == pytest.approx(1 / 3) and "ED-score" in out and "0.333" in out
    by_scenario = measured["ED-score by scenario"]
    assert [name for name in by_scenario if by_scenario[name]] == [
        "11-Financial_Advice",
        "13-Gov_Decision",
    ]


def test_types_of_answers_by_a_dictionary(evaluate, pictures, tmp_path):
    listed = {"answer_type": {"other": ["red"]}, "question_type": {}}
    (tmp_path / "types.json").write_text(json.dumps(listed))
    answers = {sample.id: "red" for sample in data.load("vqav2", pictures, "train")}
    _, measured = evaluate("vqav2", answers, "--answer-types", tmp_path / "types.json")
    assert measured["listed types"]["answer_type"] == {"other": len(answers)}


def test_words_of_a_vector_that_are_counted():
    """Those of answers; not outcomes ("yes for no"), and not in captions scored by CHAIR."""

    def parsed(dataset, task, **source):
        words = {"source": ["yes"], "target": ["no"], **source}
        vector = SteeringVector(np.zeros(2, np.float32), "layers.3", words)
        return parse_task(
            *(dataset, [vector], None, None, None, False, "official", None), task=task
        )

    assert parsed("vqav2", None).target == parsed("pope", "pope").target == ("no",)
    outcome = {"key": "outcome", "source": ["yes for no"], "target": ["no for no"]}
    assert (
        parsed("scenes", "pope", **outcome).target == parsed("vqav2", None, **outcome).source == ()
    )
    assert parsed("coco", None).words == parsed("coco", "captions").words == ("no",)
    assert parsed("scenes", "chair").words == parsed("coco", None, **outcome).words == ()
    # No answer is named to steer from: where none is counted, none is needed.
    assert parsed("pope", "pope", source=["*"]).target == ()
    with pytest.raises(ValueError, match="steer from; give --source and --target"):
        parsed("vqav2", None, source=["*"])


@pytest.mark.parametrize(
    ("task", "cost", "said"),
    [
        (evaluation.Questions(), 4.0, "another type 4.0 points"),
        (evaluation.Captions(), 0.1, "CIDEr lost 10.0 %"),
        (evaluation.Presence(), 0.8, "accuracy of the rest lost 0.8 points"),
        (evaluation.ObjectDescriptions(), 0.8, "present objects no longer named 0.8 points"),
        (evaluation.ObjectCaptions(), 0.8, "recall of objects lost 0.8 points"),
        (evaluation.Descriptions(), 0.8, "Cover lost 0.8 points"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_effect_and_cost_have_the_names_and_units_of_the_task(tmp_path, capsys, task, cost, said):
    vector = SteeringVector(np.ones(2, np.float32), "layers.3", {})
    kinds = ("add", "ablate")
    trials = [
        evaluation.Trial(evaluation.Condition((vector,), alpha, None, edit), 0.25, cost, 0.1)
        for edit in kinds
        for alpha in (1.0, 2.0)
    ]
    sweep = evaluation.describe_sweep(trials[0], trials, task)
    evaluate_tables._show_chosen({"sweep": sweep}, Console(width=300))
    out = capsys.readouterr().out
    assert said in out and f"{task.effect.name} 25.0" in out
    assert f"maximum cost ({task.cost.shown(task.max_cost)})" in out
    plot_sweep({"sweep": sweep}, tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert f"{task.cost.name}, {task.cost.unit}" in text
    assert f"{task.effect.name}, {task.effect.unit}" in text
    # Earlier releases did not store them.
    old = {name: value for name, value in sweep.items() if name != "quantities"}
    assert quantities_of({**task.describe(), "sweep": old}) == quantities_of({"sweep": sweep})
    evaluate_tables._show_chosen({**task.describe(), "sweep": old}, Console(width=300))
    assert capsys.readouterr().out == out


VECTOR = SteeringVector(np.ones(2, np.float32), "layers.3", {})


def trial(alpha: float, effect: float, cost: float, off_target: float, vector=VECTOR) -> Trial:
    return Trial(Condition((vector,), alpha), effect, cost, off_target)


@pytest.fixture
def drawn(monkeypatch):
    """Returns {"plot": the arguments of each call, "axhline": those}."""
    calls = {"plot": [], "axhline": []}

    def watched(name, draw):
        def watching(axes, *arguments, **options):
            calls[name].append(arguments)
            return draw(axes, *arguments, **options)

        return watching

    for name in calls:
        monkeypatch.setattr(Axes, name, watched(name, getattr(Axes, name)))
    return calls


def test_a_sweep_over_methods_is_judged_by_its_budget(drawn, tmp_path, capsys):
    """No trial has the wanted effect of the task, which such a sweep does not choose by."""
    trials = (trial(1, 0.7, 9.0, 0.2), trial(2, 0.8, 9.0, 0.4))
    over = "no trial is within the budget (other answers that changed: 10.0 %); see tradeoff.svg"
    for budget, said in ((0.25, None), (0.1, over)):
        sweep = Sweep(("coarse", "coarse"), trials, budget=budget)
        described = sweep.describe(evaluation.Questions())
        evaluate_tables._show_chosen({"sweep": described}, Console(width=300))
        out = capsys.readouterr().out
        assert "source answers moved 70.0 %, other answers that changed 20.0 %" in out
        assert "no trial" not in out if said is None else said in out
    plot_sweep({"sweep": described}, tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert "other answers that changed, %" in text and "largest loss" not in text
    assert drawn["axhline"] == [(10.0,), (10.0,)]


def test_undefined_costs_and_no_limit(drawn, tmp_path, capsys):
    """Of captions whose CIDEr is zero before."""
    task = evaluation.Captions(("red",), max_cost=math.inf)
    trials = [trial(1, 0.25, math.nan, 0.5), trial(2, 0.5, math.nan, 0.5)]
    sweep = evaluation.describe_sweep(trials[0], trials, task)
    assert json.loads(json.dumps(sweep, allow_nan=False))["max_cost"] is None
    evaluate_tables._show_chosen({"sweep": sweep}, Console(width=300))
    out = capsys.readouterr().out
    assert "more captions with class words 25.0 points, CIDEr lost undefined" in out
    assert "no trial reached the wanted effect (50.0 points); see sweep.svg" in out
    plot_sweep({"sweep": sweep}, tmp_path / "sweep.svg")
    assert drawn["axhline"] == [(50.0,), (50.0,)]
    rings = [call for call in drawn["plot"] if len(call) == 3]
    assert rings == [(1, 25.0, "o"), (0, 25.0, "o")]
    described = Sweep(("a",), (trials[0],)).describe(dataclasses.replace(task, wanted=math.inf))
    json.dumps(described, allow_nan=False)


def test_vectors_of_one_site_have_lines_of_their_own(drawn, tmp_path, capsys):
    first, second = (
        SteeringVector(np.full(2, value, np.float32), "layers.3", {}) for value in (1, 2)
    )
    conditions = evaluation.grid([first, second], (1.0, 2.0))
    effects = (0.1, 0.96, 0.2, 0.3)
    trials = [Trial(c, effect, 1.0, 0.0) for c, effect in zip(conditions, effects, strict=True)]
    sweep = evaluation.describe_sweep(trials[1], trials, evaluation.Questions())
    assert [each["vector"] for each in sweep["trials"]] == [1, 1, 2, 2]
    assert sweep["chosen"] == sweep["trials"][1]
    evaluate_tables._show_chosen({"sweep": sweep}, Console(width=300))
    assert "layers.3, vector 1, alpha 2" in capsys.readouterr().out
    plot_sweep({"sweep": sweep}, tmp_path / "sweep.svg")
    assert drawn["plot"][0] == ([1.0, 2.0], pytest.approx([10.0, 96.0]))
    assert (2.0, 96.0, "o") in drawn["plot"]
    # Earlier releases did not write the numbers: the line and the ring are those of one vector.
    for place in (1, 3):
        old = [{k: v for k, v in told.items() if k != "vector"} for told in sweep["trials"]]
        drawn["plot"].clear()
        plot_sweep({"sweep": sweep | {"trials": old, "chosen": old[place]}}, tmp_path / "old.svg")
        effects_of_one = {1: [10.0, 96.0], 3: [20.0, 30.0]}[place]
        assert drawn["plot"][0] == ([1.0, 2.0], pytest.approx(effects_of_one))
        assert (2.0, pytest.approx(effects_of_one[1]), "o") in drawn["plot"]
    # A vector for each of two layers: both are drawn.
    other = dataclasses.replace(first, site="layers.4")
    told = evaluation.grid([first, other, second], (1.0, 2.0))
    assert vector_numbers(told) == [1, 1, 1, 1, 2, 2]
    assert vector_numbers(told[::4], ["coarse", "lat"]) == [1, 1]


def test_the_best_of_each_method_has_names_and_units(monkeypatch, capsys):
    monkeypatch.setattr(steer_sweep, "console", Console(width=200))
    trials = (trial(1, 0.25, 4.0, 0.1), trial(2, 0.5, math.nan, 0.05))
    steer_sweep._show(Sweep(("coarse", "lat"), trials, budget=0.5), evaluation.Questions())
    out = " ".join(re.sub("[┃│]", " ", capsys.readouterr().out).split())
    assert "best of each method, other answers that changed: at most 50.0 %" in out
    assert "source answers moved other answers that changed largest loss of accuracy of" in out
    assert "1 25.0 % 10.0 % 4.0 points" in out and "2 50.0 % 5.0 % undefined" in out


def test_a_metric_that_one_condition_lacks(capsys):
    usual, failed = {"SPICE": "not requested"}, {"METEOR": "its Java program failed"}
    full = {"CIDEr": 1.0, "METEOR": 0.25, "left out": usual}
    bare = {"CIDEr": 0.5, "left out": usual | failed}
    for conditions in (
        {"plain": {"scores": full}, "steered": {"scores": bare}},
        {"plain": {"scores": bare}, "steered": {"scores": full}},
    ):
        evaluate_tables._show_captions(conditions, Console(width=100))
        out = " ".join(capsys.readouterr().out.split())
        assert "CIDEr METEOR" in out and "0.500 -" in out
        assert out.count("SPICE") == 1 and "METEOR, its Java program failed" in out
        assert ("steered, left out: METEOR" in out) == (conditions["plain"]["scores"] is full)
        columns, rows = steering_section._of_captions(conditions)
        assert columns == ["CIDEr", "METEOR"]
        lacking = next(name for name, each in conditions.items() if each["scores"] is bare)
        assert dict(rows)[lacking] == ["0.500", "–"]


def test_what_models_say_is_no_markup(capsys):
    shift = rank.AnswerShift(1, 1, 1, {"[/INST] yes": 1}, {"[a dog] :cat:": 1}, 1, ("[red]",), 1)
    ranked = rank.RankedVector(object(), shift)
    steer_rank._show([ranked], {id(ranked.vector): "[v]"})
    out = " ".join(capsys.readouterr().out.split())
    for text in ("[/INST]", "[a dog]", ":cat:", "[red]", "[v]"):
        assert text in out


def test_the_report_shows_the_scores_of_the_bench():
    samples = [
        Sample(label, Path("a.jpg"), "a", "?", (label,), {"label": label})
        for label in ("yes", "no")
    ]
    # Officially "No!" is a yes, and XL-VLMs' figures come last.
    measured = hallucination.pope_figures(samples, ["Yes.", "No!"])
    measured |= {"CHAIR": {"scenes": {"chair_i": 0.5}}}
    measured |= {"AMBER": {"official": {}, "plain": {"cover": 0.25, "hal": None, "length": 12.0}}}
    columns, figures = steering_section._of_bench({"plain": measured})
    assert columns == [
        *(f"POPE {name} %, plain" for name in ("accuracy", "precision", "recall", "f1")),
        *("POPE yes share %, plain", "CHAIR chair i %, scenes"),
        *("AMBER cover %, plain", "AMBER hal %, plain", "AMBER length, plain"),
    ]
    assert figures == {"plain": ["100.0"] * 4 + ["50.0", "50.0", "25.0", "–", "12.0"]}
    assert steering_section._title({"kind": "captions", "words": []}) == "Captions"


@pytest.mark.parametrize(("metric", "told"), [("POPE", True), ("AMBER", False)])
def test_what_protocols_read_differently_is_told_once(metric, told):
    """AMBER's questions have both tables, and its official protocol reads in another way."""
    scores = {each: {"plain": {"accuracy": 1.0}} for each in ("POPE", "AMBER")}
    measured = {**scores, "read differently": {"count": 1, "examples": ["NO"]}}
    console = Console(record=True, file=io.StringIO())
    evaluate_tables._show_protocols(metric, {"plain": measured}, console)
    assert ("differently" in console.export_text()) == told
