"""Options of `xlvlm evaluate` and `xlvlm steer apply` that need no model."""

import json

import pytest

from xlvlm_jax.cli.evaluate_options import samples_to_choose_on
from xlvlm_jax.data import pope


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
    assert len(samples_to_choose_on(first, splits["random"], "random", 2)) == 2
    with pytest.raises(ValueError, match="every question of it with the label yes is also evalua"):
        samples_to_choose_on(splits["adversarial"], splits["random"], "random", None)
