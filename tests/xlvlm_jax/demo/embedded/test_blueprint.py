"""The embedded model's tokenizer and processor."""

import json
import subprocess
import sys

import numpy as np
import pytest

from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.demo import embedded
from xlvlm_jax.demo.embedded import blueprint


@pytest.fixture(scope="module")
def tokenizer():
    return blueprint.make_tokenizer()


def test_whole_words_and_suffixes(tokenizer):
    pieces = tokenizer.tokenize("three red dogs and buses, on the grass")
    assert pieces == "▁three ▁red ▁dog s ▁and ▁bus es , ▁on ▁the ▁grass".split()  # noqa: SIM905


def test_any_text_comes_back(tokenizer):
    for text in ("a zebra with wheels", "What's 3.5 % of it?", "Grüße aus Köln", "line\nbreak"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_no_word_of_the_scenes_is_spelt_out(tokenizer):
    for index in range(200):
        scene = scenes.sample_scene("train", index)
        texts = [*scenes.captions(scene), *(q.answer for q in scenes.questions(scene))]
        for piece in tokenizer.tokenize(" ".join(texts)):
            assert len(piece) > 1 or piece in ("s", ",", "▁"), piece


def test_the_vocabulary_does_not_depend_on_the_hash_seed(tokenizer):
    code = (
        "from xlvlm_jax.demo.embedded import blueprint;"
        "print(blueprint.make_tokenizer().backend_tokenizer.to_str())"
    )
    # This process has a seed of its own.
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "1", "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == tokenizer.backend_tokenizer.to_str()


def test_the_shipped_tokenizer_is_this_one(tokenizer):
    import ports

    shipped = ports.load(embedded.LLAVA).tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
    text = f"USER: <image>\n{prompts.CAPTION} ASSISTANT: two dogs"
    assert shipped(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_processor_gives_one_token_per_patch():
    from PIL import Image

    processor = blueprint.make_processor()
    picture = Image.fromarray(np.zeros((112, 112, 3), np.uint8))
    batch = processor(images=[picture], text=["USER: <image>\nHi ASSISTANT:"], return_tensors="np")
    assert (batch["input_ids"] == blueprint.IMAGE).sum() == blueprint.TOKENS_PER_IMAGE == 64


def test_the_directory_is_one_that_transformers_4_reads_too(tmp_path):
    # 4.47.1 loads these files and gives the same tokens and logits.
    blueprint.save_llava(tmp_path, blueprint.llava_config(len(blueprint.make_tokenizer())))
    for name in (
        *("preprocessor_config.json", "processor_config.json"),
        *("tokenizer_config.json", "chat_template.json"),
    ):
        written, shipped = (
            json.loads((place / name).read_text()) for place in (tmp_path, embedded.LLAVA)
        )
        assert written == shipped, name
    assert "image_processor" not in json.loads((tmp_path / "processor_config.json").read_text())
    assert written["chat_template"] == blueprint.CHAT_TEMPLATE
    blueprint.place_for_transformers_4(tmp_path)  # once more changes nothing
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["crop_size"]


def test_the_processor_of_another_checkpoint(tmp_path):
    import ports

    for file in embedded.LLAVA.glob("*.json*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {**json.loads((tmp_path / "tokenizer_config.json").read_text()), "eos_token": "."}
        )
    )
    own = ports.load(embedded.LLAVA)
    other = ports.load(embedded.LLAVA, processor=tmp_path)
    assert (own.tokenizer.eos_token, other.tokenizer.eos_token) == ("</s>", ".")
    assert other.processor.tokenizer.eos_token == "."
    assert (
        own.with_processor(tmp_path).tokenizer.eos_token == "." and other.directory == own.directory
    )
