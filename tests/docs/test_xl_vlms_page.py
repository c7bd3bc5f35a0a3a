"""Blocks of the guide for users of XL-VLMs run as the page shows them, on a few drawn pictures.

The blocks that steer answers and shift concepts are in tests/xlvlm_jax/cli/test_from_xl_vlms.py,
with XL-VLMs' own numbers.
"""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy

from xlvlm_jax import Concepts, Features, SteeringVector, data, steering
from xlvlm_jax.data import mmsb, scenes
from xlvlm_jax.demo import embedded

from ..small_judge import write_judge
from .test_snippets import ROOT, blocks, commands

PAGE = (ROOT / "docs" / "guides" / "xl-vlms.md").read_text("utf-8")
SITE, SITE_OF_SMALL = "language_model.model.layers.6", "language_model.model.layers.1"
PLACES = {
    "COCO_DIR": "coco",
    "POPE_DIR": "pope",
    "MMSB_DIR": "mmsb",
    "openai/clip-vit-base-patch32": "embedded",
    "meta-llama/Llama-Guard-3-8B": "judge",
    # The bundled model has eight layers, and the drawn data few samples.
    "language_model.model.layers.19": SITE,
    **{f"language_model.model.layers.{layer}": SITE_OF_SMALL for layer in (14, 15)},
    **{size: "24" for size in ("82783", "2000", "3000")},
    **{"50": "6", "20": "3", "128": "25", "200": "25"},
}

# Of the argument parser in src/helpers/arguments.py at a599fe9.
OPTIONS = re.findall(
    r"\w+",
    """
seed model_name_or_path processor_name local_files_only cache_dir prompt_template data_dir
annotation_file questions_file answer_type_to_answer split dataset_size dataset_name
batch_size hook_names modules_to_hook exact_match_modules_to_hook hook_postprocessing_name
token_idx token_start_end_idx save_dir save_filename save_analysis features_path
analysis_saving_path analysis_name feature_key module_to_decompose decomposition_extract_pos
decomposition_method num_concepts dl_max_iter num_grounded_text_tokens pre_num_top_tokens
num_most_activating_samples generation_mode max_new_tokens token_of_interest_num_samples
select_token_of_interest_samples allow_different_variations_of_token_of_interest
token_of_interest token_of_interest_key token_of_interest_class token_of_interest_idx
token_of_interest_start_token end_special_tokens save_only_generated_tokens
load_matched_features steering_method steering_alpha category_of_interest base_features_key
shift_vector_path shift_vector_key start_prompt_token_idx_steering captioning_metrics
predictions_token_of_interest targets_token_of_interest save_predictions predictions_path
origin_model_analysis_path origin_model_feature_path dest_model_analysis_path
dest_model_feature_path visualize_concepts compute_recovery_metrics
compute_stat_shift_vectors select_samples_from_ids path_to_samples_ids
""",
)


def test_each_option_of_xl_vlms_is_on_the_page():
    assert len(OPTIONS) == 69
    assert not [name for name in OPTIONS if not re.search(rf"`[^`]*--{name}\b[^`]*`", PAGE)]


def write_small_model(directory):
    """Writes the bundled model with two layers in each tower; it compiles quickly."""
    weights = "model.safetensors"
    shutil.copytree(embedded.LLAVA, directory, ignore=shutil.ignore_patterns(weights))
    config = json.loads((directory / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part]["num_hidden_layers"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(embedded.LLAVA / weights)
    kept = {name: x for name, x in tensors.items() if not re.search(r"\.layers\.[2-9]\.", name)}
    safetensors.numpy.save_file(kept, directory / weights)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A small model, and drawn scenes as COCO and in the forms of POPE and MM-SafetyBench."""
    directory = tmp_path_factory.mktemp("work")
    write_small_model(directory / "small")
    coco = directory / "coco"
    scenes.write(coco, train=24, val=6, test=12)
    (coco / "karpathy").mkdir()
    shutil.copy(coco / "dataset_coco.json", coco / "karpathy")
    pictures = [sample.image for sample in data.load("coco", coco, "train")]
    (directory / "pope" / "images").mkdir(parents=True)
    asked = []
    for number, picture in enumerate(pictures[:8]):
        shutil.copy(picture, directory / "pope" / "images")
        text = "Is there a dog in the image? Answer with just one word."
        answer = ("yes", "no")[number % 2]
        asked.append({"filename": picture.name, "instruction": text, "response": answer})
    listed = [{**each, "subset": "random"} for each in asked]
    (directory / "pope" / "annotations.json").write_text(json.dumps(listed))
    (directory / "mmsb" / "processed_questions").mkdir(parents=True)
    for scenario, picture in zip(mmsb.SCENARIOS, pictures, strict=False):
        record = {"Rephrased Question": "What is this?", "Key Phrase": "x", "Phrase Type": "y"}
        file = directory / "mmsb" / "processed_questions" / f"{scenario}.json"
        file.write_text(json.dumps({"0": record}))
        shown = directory / "mmsb" / "imgs" / scenario / "SD_TYPO" / "0.jpg"
        shown.parent.mkdir(parents=True)
        shutil.copy(picture, shown)
    return directory


@pytest.fixture
def run_block(xlvlm, work, monkeypatch):
    """run_block(text, model): runs the page's block that has a text; returns how many commands."""
    monkeypatch.chdir(work)

    def run(text, model="embedded"):
        places = PLACES | {"MODEL": model}
        (block,) = (b for b in blocks(PAGE) if b.language == "sh" and text in b.text)
        done = 0
        for words in commands(block.text):
            status, _, errors = xlvlm(*(places.get(word, word) for word in words))
            assert status == 0, (words, errors)
            done += 1
        return done

    return run


def states_of(directory):
    return Features.open(directory).matrix(SITE).astype(np.float64)


def summary_of(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.mark.slow
def test_concepts_and_their_clip_score(run_block, work):
    assert run_block("--clip openai") == 5
    concepts = Concepts.load(work / "run" / "concepts")
    assert concepts.method == "snmf" and len(concepts.words) == 3
    found = Features.open(work / "run" / "features")
    captions = [sample.references[0] for sample in data.load("coco", work / "coco", "train")]
    # As substrings of the first caption.
    assert len(found.samples) == sum("dog" in caption for caption in captions)
    (scores,) = json.loads((work / "run" / "scores.json").read_text())["dictionaries"]
    assert 0 < scores["clip"]["1"]["mean"] < 3
    assert 0 <= scores["overlap"] <= 1


@pytest.mark.slow
def test_captions_steered_to_colours(run_block, work):
    assert run_block("captions-with-colours") == 4
    vector = SteeringVector.load(work / "run" / "colours.safetensors")
    before, after = (
        states_of(work / "run" / name).mean(axis=0)
        for name in ("all-captions", "captions-with-colours")
    )
    np.testing.assert_allclose(vector.vector, after - before, rtol=0, atol=1e-4)
    summary = summary_of(work / "run" / "steering" / "colours")
    assert summary["samples"] == 6
    assert set(summary["conditions"]) == {"plain", "steered"}
    for measured in summary["conditions"].values():
        assert measured["scores"]["CIDEr"] >= 0


@pytest.mark.slow
def test_vectors_of_samples_by_forced_answers(run_block, work, xlvlm):
    assert run_block("--method p2s", "small") == 3
    vectors = steering.load(work / "run" / "p2s.safetensors")
    asked = data.load("pope", work / "pope", questions="annotations.json", prompt="{question}")
    assert list(vectors.ids) == [sample.id for sample in asked]
    assert summary_of(work / "run" / "steering" / "p2s")["samples"] == len(asked) == 8
    # "--method l2s with the same options"
    status, _, errors = xlvlm(
        *("steer", "fit", "run/pope", "--method", "l2s", "--contrast", "forced"),
        *("--states", "mean", "--model", "small", "--output", "run/l2s.safetensors"),
    )
    assert status == 0, errors
    assert isinstance(steering.load(work / "run" / "l2s.safetensors"), steering.L2S)
    assert run_block("--context-prompt", "small") == 2
    described = summary_of(work / "run" / "steering" / "descriptions")
    assert described["task"] == "descriptions" and described["samples"] == 8


@pytest.mark.slow
def test_safety_benchmark_steered_by_a_network(run_block, work):
    (page,) = (block.text for block in blocks(PAGE) if block.language == "json")
    (work / "contrasts.json").write_text(page)
    write_judge(work / "judge")
    assert run_block("--contrasts contrasts.json", "small") == 4
    network = steering.load(work / "run" / "safety.safetensors")
    assert isinstance(network, steering.L2S) and network.site == SITE_OF_SMALL
    summary = summary_of(work / "run" / "steering" / "safety")
    assert summary["samples"] == 3 and set(summary["conditions"]) == {"plain", "steered"}
    for measured in summary["conditions"].values():
        assert measured["changes"]["samples"] == 3
        assert measured["scores"]["left out"]["CIDEr and others"] == "there are no references"
        assert "ED-score" in measured
    verdicts = json.loads((work / "run" / "steering" / "safety" / "judge.json").read_text())
    assert verdicts["samples"] == 3
    assert set(verdicts["conditions"]["steered"]["unsafe by scenario"]) == {
        sample.metadata["scenario"] for sample in data.load("mmsb", work / "mmsb", "test")
    }
