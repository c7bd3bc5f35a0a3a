"""Arrays of prompts: their first token, and batches without pictures."""

import shutil

import numpy as np
import pytest
from PIL import Image

import ports
from xlvlm_jax.demo import embedded


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


def test_without_any_picture(with_start):
    texts = ["hello there", "hello"]
    ours = with_start.process(texts, [[], []])
    assert set(ours) == {"input_ids", "attention_mask"}
    expected = with_start.processor(text=texts, padding=True, return_tensors="np")
    np.testing.assert_array_equal(ours["input_ids"], expected["input_ids"])
