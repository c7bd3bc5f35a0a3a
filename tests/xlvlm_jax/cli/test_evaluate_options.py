"""Options of `xlvlm evaluate` and `xlvlm steer apply` that need no model."""

import json

import pytest

from xlvlm_jax.cli.evaluate_options import parse_task, reading_of, samples_to_choose_on
from xlvlm_jax.data import pope, select


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Returns POPE's splits of two pictures: their questions with label yes are the same."""
    directory = tmp_path_factory.mktemp("pope")
    for split, absent in (("random", "cat"), ("popular", "car"), ("adversarial", "cup")):
        lines = [
            {
                "question_id": 2 * i + j,
                "image": f"{i}.jpg",
                "text": f"Is there a {name} in the image?",
            }
            | {"label": ("yes", "no")[j]}
            for i in range(2)
            for j, name in enumerate(("dog", absent))
        ]
        (directory / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    return {split: pope.load(directory, split) for split in (*pope.SPLITS, "all")}


def test_samples_to_choose_on_are_other_questions(splits):
    with pytest.raises(ValueError, match="--choose-on random: every sample in it is also evalua"):
        samples_to_choose_on(splits["all"], splits["random"], "random", None)
    first = splits["adversarial"][:2]  # of the first picture
    others = samples_to_choose_on(first, splits["random"], "random", None)
    # The question about the dog in the first picture is evaluated; that about the cat is not.
    assert [sample.id for sample in others] == ["1", "2", "3"]
    drawn = [samples_to_choose_on(first, splits["random"], "random", 2, seed) for seed in (0, 1)]
    assert drawn == [select.subsample(others, 2, seed) for seed in (0, 1)]
    for number in (3, 9):  # all of them in order, as earlier sweeps had them
        assert samples_to_choose_on(first, splits["random"], "random", number, 1) == others
    with pytest.raises(ValueError, match="every question of it with the label yes is also evalua"):
        samples_to_choose_on(splits["adversarial"], splits["random"], "random", None)


def test_words_are_read_as_answers_are():
    task = parse_task("vqav2", [], "Yes, no way", " White,black ", None, False, "official", None)
    assert (task.source, task.target) == (("yes", "no way"), ("white", "black"))


def test_the_split_is_named():
    """Without --split the summary did not say which was read, and --dataset pope read another."""
    assert reading_of("pope", "pope", None, "all") == reading_of(None, "pope", None, "all")
    assert reading_of(None, "pope", None, "all") == {"split": "all"}
    defaults = {"vqav2": "train", "coco": "train", "scenes": "train", "mmsb": "all", "amber": "all"}
    assert {name: reading_of(None, name, None, "all")["split"] for name in defaults} == defaults
    assert reading_of(None, "vqav2", "val", "all") == {"split": "val"}
    with pytest.raises(ValueError, match="--negatives has no effect on captions; omit it"):
        reading_of("chair", "scenes", None, "random")
