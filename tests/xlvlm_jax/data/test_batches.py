"""Batches of one size: what is read, how they are padded, what is skipped."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ports
from xlvlm_jax.data.batches import (
    PICTURE_ROWS,
    groups_by_picture,
    groups_of,
    make_batch,
    read_ahead,
)
from xlvlm_jax.data.sample import Sample

from ...test_models import MODELS


def samples(folder, values):
    """Returns one sample per value: a grey picture of that value, or no picture for None."""
    found = []
    for i, value in enumerate(values):
        path = folder / f"{i}.png"
        if value is not None:
            Image.new("RGB", (64, 64), (value,) * 3).save(path)
        found.append(Sample(str(i), path, image_id=str(i), prompt="is it a dog ?"))
    return found


def test_a_batch_by_hand(vlm, tmp_path):
    made = make_batch(vlm, samples(tmp_path, [None, 10, 20]), 4)
    np.testing.assert_array_equal(made.rows, [1, 2, 1, 1])
    assert made.good.tolist() == [1, 2] and made.num_rows == 2
    assert made.errors[1:] == (None, None) and "no such image file" in made.errors[0]
    (inputs,) = made.inputs
    pixels = inputs["pixel_values"]
    assert len(pixels) == 4 and pixels[0].max() < pixels[1].max()
    np.testing.assert_array_equal(pixels[2], pixels[0])
    np.testing.assert_array_equal(pixels[3], pixels[0])


def test_without_any_picture_there_is_no_batch(vlm, tmp_path):
    made = make_batch(vlm, samples(tmp_path, [None, None]), 4)
    assert (made.inputs, len(made.rows), made.num_rows) == ((), 0, 0)
    assert list(made.refused) == ["0", "1"] and len(made.answer_lengths) == 0


def test_strict_stops_at_the_first_and_names_it(vlm, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sample 1: .*1\.png: no such image file"):
        make_batch(vlm, samples(tmp_path, [5, None, 6]), 4, strict=True)


def test_a_question_with_the_mark_of_an_image_leaves_the_batch(vlm, tmp_path):
    three = samples(tmp_path, [5, 6, 7])
    asked = [three[0], dataclasses.replace(three[1], prompt="is <image> a dog ?"), three[2]]
    made = make_batch(vlm, asked, 4)
    assert made.errors[0] is made.errors[2] is None
    assert "1.png: the processor refuses it or its prompt (" in made.errors[1]
    expected = make_batch(vlm, [three[0], three[2]], 4)
    np.testing.assert_array_equal(made.rows, [0, 2, 0, 0])
    for name, array in expected.inputs[0].items():
        np.testing.assert_array_equal(made.inputs[0][name], array)
    with pytest.raises(ValueError, match=r"sample 1: .* the processor refuses it or its prompt"):
        make_batch(vlm, asked, 4, strict=True)


def test_a_sample_is_passed_over_if_one_version_of_its_prompt_is_refused(vlm, tmp_path):
    two = samples(tmp_path, [5, 6])
    marked = {"0": "dog ?", "1": "<image> ?"}
    versions = [lambda sample: "dog ?", lambda sample: marked[sample.id]]
    made = make_batch(vlm, two, 2, prompts=versions)
    assert made.good.tolist() == [0] and len(made.inputs) == 2
    assert made.errors[1] is not None


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("qwen2_vl", (500, 2), "aspect ratio must be smaller than 200, got 250"),
        ("molmo", (12, 10), "has 12 x 10 pixels, expected at least a patch"),
    ],
)
def test_a_picture_that_the_processor_refuses(tmp_path, name, size, message):
    MODELS[name][0](tmp_path / name)
    vlm = ports.load(tmp_path / name)
    three = samples(tmp_path, [5, 6, 7])
    Image.new("RGB", size).save(three[0].image)
    made = make_batch(vlm, three, 3)
    assert message in made.errors[0] and made.errors[1:] == (None, None)
    assert made.rows.tolist() == [1, 2, 1]
    assert len(made.inputs[0]["input_ids"]) == 3
    assert np.isfinite(vlm.forward(made.inputs[0]).logits).all()


def test_errors_of_the_checkpoint_are_not_blamed_on_a_sample(vlm, tmp_path, monkeypatch):
    def lacking(texts, images):
        raise ImportError("this processor needs torchvision")

    monkeypatch.setattr(vlm, "process", lacking)
    with pytest.raises(ImportError, match="needs torchvision"):
        make_batch(vlm, samples(tmp_path, [5]), 2)


def test_answers_follow_the_prompts_and_their_lengths_the_rows(vlm, tmp_path):
    three = samples(tmp_path, [5, None, 6])
    made = make_batch(vlm, three, 4, answers=["yes", "no", "a big dog"])
    (inputs,) = made.inputs
    assert made.rows.tolist() == [0, 2, 0, 0]
    words = ["yes", "a big dog", "yes", "yes"]
    for row, length, text in zip(inputs["input_ids"], made.answer_lengths, words, strict=True):
        assert vlm.decode(row[-length:]).strip() == text
        assert row[-1] in vlm.eos_tokens
    open_ended = make_batch(vlm, three, 4, answers=["yes", "no", "a big dog"], ended=False)
    np.testing.assert_array_equal(open_ended.answer_lengths, made.answer_lengths - 1)
    assert make_batch(vlm, three, 4).answer_lengths.tolist() == [0] * 4


def test_groups_by_hand(tmp_path):
    a, b, c, d, e = samples(tmp_path, [None] * 5)
    assert groups_of([a, b, c, d, e], 2) == [(a, b), (c, d), (e,)]
    assert groups_of([], 2) == []


def asked_about(counts):
    """Samples of which so many ask about each picture."""
    return [
        Sample(f"{picture}-{number}", Path(f"{picture}.png"), image_id="", prompt="")
        for picture, count in enumerate(counts)
        for number in range(count)
    ]


def test_groups_by_picture_by_hand():
    # At most two pictures in a group: 3 * (2 * 4 + 7) is less than 2 * (4 * 4 + 7), the cost of
    # groups of four. Six, six and two questions would also be three groups, but uneven ones.
    groups = groups_by_picture(asked_about([3, 3, 3, 3, 2]), 7)
    assert [[sample.id for sample in group] for group in groups] == [
        ["0-0", "0-1", "0-2", "1-0", "1-1"],
        ["1-2", "2-0", "2-1", "2-2"],
        ["3-0", "3-1", "3-2", "4-0", "4-1"],
    ]
    assert groups_by_picture([], 7) == []


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=30), size=st.integers(1, 20))
def test_groups_by_picture_hold_every_sample_in_order(counts, size):
    samples = asked_about(counts)
    groups = groups_by_picture(samples, size)
    assert [sample for group in groups for sample in group] == samples
    assert all(0 < len(group) <= size for group in groups)
    computed = [1 << (len({s.image for s in group}) - 1).bit_length() for group in groups]
    plain = groups_of(samples, size)
    plainly = [1 << (len({s.image for s in group}) - 1).bit_length() for group in plain]
    if 2 * len(counts) > len(samples):
        assert groups == plain
    else:  # never more work than the largest number of pictures for every group
        bound = len(plain) * (PICTURE_ROWS * max(plainly) + size)
        assert len(groups) * (PICTURE_ROWS * max(computed) + size) <= bound


@pytest.mark.parametrize("workers", [1, 3, None])
def test_in_order_however_long_each_takes(workers):
    def slow(group):
        time.sleep(0.01 * (group % 3))
        return 10 * group

    assert list(read_ahead(range(3, 10), slow, workers)) == [30, 40, 50, 60, 70, 80, 90]
    assert list(read_ahead([], slow, workers)) == []


def test_the_first_is_made_alone():
    running, met = set(), []

    def make(name):
        running.add(name)
        time.sleep(0.05)
        met.append((name, len(running)))
        running.discard(name)
        return name

    assert list(read_ahead("abcdef", make, 3)) == list("abcdef")
    assert met[0] == ("a", 1)
    assert max(count for _, count in met) > 1


def test_what_the_first_raises_stops_none_of_the_threads():
    def make(number):
        if number == 0:
            raise OSError("no such picture")
        return number

    made = read_ahead(range(5), make, 2)
    with pytest.raises(OSError, match="no such picture"):
        next(made)
