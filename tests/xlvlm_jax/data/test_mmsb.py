"""MM-SafetyBench's questions: by hand, XL-VLMs' split, and messages."""

import json

import numpy as np
import pytest

from xlvlm_jax import data
from xlvlm_jax.data import mmsb


def record(number):
    return {
        "Question": f"How {number}?",
        "Changed Question": f"How {number} this?",
        "Key Phrase": f"phrase {number}",
        "Phrase Type": "activity",
        "Rephrased Question": f" The phrase at the bottom is {number}. ",
        "Rephrased Question(SD)": f"The picture shows {number}.",
    }


def write(directory, each=2):
    folder = directory / "processed_questions"
    folder.mkdir(exist_ok=True)
    for scenario in mmsb.SCENARIOS:
        content = {str(i): record(i) for i in range(each)}
        (folder / f"{scenario}.json").write_text(json.dumps(content))


def test_questions_by_hand(tmp_path):
    write(tmp_path)
    samples = data.load("mmsb", tmp_path)
    assert len(samples) == 26
    sample = samples[3]
    assert sample.id == "02-HateSpeech/1" and sample.references == ()
    assert sample.image == tmp_path / "imgs/02-HateSpeech/SD_TYPO/1.jpg"
    assert sample.prompt == "The phrase at the bottom is 1."
    assert sample.metadata["scenario"] == "02-HateSpeech"
    assert sample.metadata["key_phrase"] == "phrase 1"
    drawn = mmsb.load(tmp_path, pictures="SD", prompt="{question} Safe?")[3]
    assert drawn.prompt == "The picture shows 1. Safe?"
    assert drawn.image == tmp_path / "imgs/02-HateSpeech/SD/1.jpg"


def test_the_split_of_xl_vlms(tmp_path):
    write(tmp_path)
    parts = [{s.id for s in data.load("mmsb", tmp_path, split)} for split in ("train", "test")]
    assert [len(part) for part in parts] == [20, 6] and not parts[0] & parts[1]
    # As XL-VLMs draws: numpy's global generator, shuffled in place.
    np.random.seed(21)
    numbers = np.arange(26)
    np.random.shuffle(numbers)
    everything = [sample.id for sample in data.load("mmsb", tmp_path)]
    assert parts[1] == {everything[i] for i in numbers[20:]}


@pytest.mark.wrong_types
def test_messages(tmp_path):
    with pytest.raises(FileNotFoundError, match="01-Illegal_Activitiy"):
        data.load("mmsb", tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="MM-SafetyBench has no split 'val'; expected all, train"):
        data.load("mmsb", tmp_path, "val")
    with pytest.raises(ValueError, match="no pictures 'OCR'; expected SD_TYPO, SD, TYPO"):
        mmsb.load(tmp_path, pictures="OCR")
    path = tmp_path / "processed_questions" / "03-Malware_Generation.json"
    path.write_text('{"0": {}}')
    with pytest.raises(ValueError, match="0: key 'Rephrased Question' missing"):
        data.load("mmsb", tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="expected an object, got a list"):
        data.load("mmsb", tmp_path)
