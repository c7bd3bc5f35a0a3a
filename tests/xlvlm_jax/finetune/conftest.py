"""A small LLaVA with its processor, and pictures captioned with words in its vocabulary."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ports
from xlvlm_jax.data import Sample
from xlvlm_jax.finetune import FinetuneSettings

from ...ports import helpers
from ...ports.test_vlm import make_processor

# One program for most tests.
SETTINGS = FinetuneSettings(
    rank=3,
    alpha=6,
    steps=5,
    batch_size=4,
    rate=0.01,
    schedule="constant",
    warmup=0.0,
    weight_decay=0.1,
    clip=0.5,
)
CAPTIONS = ("w1 w2 w3", "w4 w5 w6 w7", "w8 w9", "w2 w4 w6 w8 w10")


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> helpers.Pair:
    directory = tmp_path_factory.mktemp("base") / "small"
    config = helpers.llava_config({"eos_token_id": helpers.EOS}, vision={"image_size": 28})
    pair = helpers.make_llava(directory, config)
    make_processor().save_pretrained(directory)
    return pair


@pytest.fixture(scope="session")
def vlm(pair) -> ports.VLM:
    return pair.vlm


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> list[Sample]:
    directory = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    return [make_sample(directory, i, random) for i in range(8)]


def make_sample(directory: Path, number: int, random: np.random.Generator) -> Sample:
    file = directory / f"{number}.png"
    Image.fromarray(random.integers(0, 256, (28, 28, 3), np.uint8)).save(file)
    captions = tuple(str(c) for c in random.permutation(CAPTIONS)[:2])
    return Sample(str(number), file, str(number), "what is in the picture", captions)
