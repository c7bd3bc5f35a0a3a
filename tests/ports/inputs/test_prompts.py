"""Arrays of prompts: their first token, and batches without pictures."""

import shutil

import numpy as np
import pytest
import tokenizers
from PIL import Image

import ports
from ports.inputs import prompts
from xlvlm_jax.demo import embedded

from ..models import test_processors


@pytest.fixture(scope="module")
def with_start(tmp_path_factory):
    """Returns the embedded model with a template that writes the beginning-of-sequence token."""
    directory = tmp_path_factory.mktemp("start") / "checkpoint"
    shutil.copytree(embedded.LLAVA, directory)
    file = directory / "chat_template.jinja"
    file.write_text("{{ bos_token }}" + file.read_text())
    (directory / "chat_template.json").unlink()
    return ports.load_abstract(directory)


def test_the_first_token_stands_once_as_in_transformers(with_start):
    image, question = Image.new("RGB", (64, 64)), "What is in the picture?"
    prompt = with_start.render(question)
    start = with_start.tokenizer.bos_token
    assert prompt.startswith(start)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    theirs = with_start.processor.apply_chat_template(
        [{"role": "user", "content": content}], **options, return_tensors="np"
    )
    theirs = theirs["input_ids"][0]
    (ours,) = with_start.process([prompt], [image])["input_ids"]
    np.testing.assert_array_equal(ours, theirs)
    # A shorter row, and one that does not say it, for which the tokenizer writes it.
    rows = with_start.process([prompt, start + "hello", "hello"], [image, [], []])
    assert set(map(len, rows["input_ids"])) == {len(theirs)}
    for row, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        assert (row[mask == 1] == with_start.tokenizer.bos_token_id).sum() == 1
        assert not row[mask == 0].any() and mask[-1]
    np.testing.assert_array_equal(rows["input_ids"][0], theirs)
    alone = with_start.tokenizer("hello")["input_ids"]
    assert rows["input_ids"][2, -len(alone) :].tolist() == alone


def test_padding_stays_on(with_start):
    """Other threads share the tokenizer: without padding, its rows would differ in length."""
    with_start.process([with_start.render("what"), "hello"], [Image.new("RGB", (64, 64)), []])
    padding = with_start.processor.tokenizer._tokenizer.padding
    assert padding is not None and padding["direction"] == "left"


def test_what_the_caller_asks_for(with_start):
    start = with_start.tokenizer.bos_token
    texts, number = [start + "hello there", "hello"], with_start.tokenizer.bos_token_id
    # The text says it twice, and the tokenizer does not.
    for options in ({"add_special_tokens": False}, {"text_kwargs": {"add_special_tokens": False}}):
        own = with_start.process([start + start + "hello"], [[]], **options)["input_ids"]
        assert (own == number).sum() == 2
    plain = with_start.process(texts, [[], []])
    length = plain["input_ids"].shape[1]
    for multiple in (length, length + 1, 16):
        for options in (
            {"pad_to_multiple_of": multiple},
            {"text_kwargs": {"pad_to_multiple_of": multiple}},
        ):
            padded = with_start.process(texts, [[], []], **options)
            wide = -(-length // multiple) * multiple
            for name, value in plain.items():
                expected = np.pad(value, ((0, 0), (wide - length, 0)))
                np.testing.assert_array_equal(padded[name], expected)


def test_every_array_of_tokens_loses_the_token(with_start):
    start = with_start.tokenizer.bos_token
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    texts, tokenizer = [start + "hello there", "hello"], with_start.tokenizer
    rows = [
        tokenizer(texts[0], add_special_tokens=False, **options),
        tokenizer(texts[1], **options),
    ]
    # Twice: with padding before the dropped token, and without.
    for longer in ([], ["hello there, what is in the picture"]):
        found = with_start.process(texts + longer, [[]] * len(texts + longer), **options)
        real = found["attention_mask"] == 1
        for row, expected in enumerate(rows):
            assert real[row].sum() == len(expected["input_ids"])
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name][row][real[row]], value)
        assert not found["offset_mapping"][~real].any()
        assert found["special_tokens_mask"][~real].all()
        assert real[:, 0].any()


@pytest.mark.parametrize("name", ["gemma3", "pixtral", "internvl"])
def test_families_whose_template_and_tokenizer_write_it(name, tmp_path):
    """All arrays are those of a tokenizer that does not write it."""
    _, processor = test_processors.MAKERS[name]()
    processor.chat_template = "{{ bos_token }} " + processor.chat_template
    image = Image.new("RGB", (90, 70), "red")
    texts = [prompts.render(processor, each, image_text="{}", where="x") for each in ("what", "is")]
    texts = [texts[0], texts[1] + " picture picture"]
    expected = prompts.run_processor(processor, texts, [image, image], {})
    processor.tokenizer._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert processor.tokenizer("what")["input_ids"][0] == 1
    found = prompts.run_processor(processor, texts, [image, image], {})
    assert found.keys() == expected.keys() and len(found) > 2
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
    if name == "gemma3":  # a processor of transformers
        content = [{"type": "image", "image": image}, {"type": "text", "text": "what"}]
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        )
        ours = prompts.run_processor(processor, texts[:1], [image], {})
        for key, value in theirs.items():
            np.testing.assert_array_equal(ours[key], value)


def test_without_any_picture(with_start):
    texts = ["hello there", "hello"]
    ours = with_start.process(texts, [[], []])
    assert set(ours) == {"input_ids", "attention_mask"}
    expected = with_start.processor(text=texts, padding=True, return_tensors="np")
    np.testing.assert_array_equal(ours["input_ids"], expected["input_ids"])
