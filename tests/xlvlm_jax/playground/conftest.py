"""The embedded model with two concepts and a vector from yes to no, made of its own head."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from xlvlm_jax import steering
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.playground import server
from xlvlm_jax.playground.answers import Answers
from xlvlm_jax.playground.items import find_items
from xlvlm_jax.playground.pictures import Pictures
from xlvlm_jax.storage.same_model import model_of

NORM = "language_model.model.norm"
TOKEN = "a-token"


class Made(NamedTuple):
    """What the tests steer by, and ask about."""

    run: Path  # concepts/ ("yes" and "no") and steering/yes-no.safetensors
    picture: Path
    question: str  # the answer is yes


@pytest.fixture(scope="session")
def made(vlm, tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("play")
    scenes.write(root / "scenes", train=2)
    picture = sorted((root / "scenes" / "train2014").glob("*.jpg"))[0]
    truth = json.loads((root / "scenes" / "attributes.json").read_text())
    kind = truth[str(int(picture.stem[-12:]))]["kind"]
    width = vlm.config.get_text_config().hidden_size
    head = np.asarray(vlm.unembed(np.eye(width, dtype=np.float32)))
    yes, no = (
        head[:, vlm.tokenizer.encode(word, add_special_tokens=False)[0]] for word in ("yes", "no")
    )
    source = {**model_of(vlm), "site": NORM}
    Concepts(
        np.stack([yes, no, yes + no]),
        np.float32([[2, 0, 0], [4, 1, 0]]),
        options={},
        words=[["yes", "right"], ["no"], ["never"]],
        images=[[str(picture)], [str(picture)], []],
        source=source,
    ).save(root / "run" / "concepts")
    # Adds 30 to the difference of their logits.
    away = 30 * (no - yes) / np.sum((no - yes) ** 2)
    vector = steering.SteeringVector(away, NORM, model_of(vlm))
    vector.save(root / "run" / "steering" / "yes-no.safetensors")
    question = prompts.question(f"Is there a {kind} in the picture?")
    return Made(root / "run", picture, question)


@pytest.fixture(scope="session")
def answers(vlm, made):
    return Answers(vlm, find_items(vlm, made.run), max_new_tokens=8)


@pytest.fixture(scope="session")
def pictures():
    with Pictures() as kept:
        yield kept


@pytest.fixture(scope="session")
def picture(pictures, made):
    return pictures.add(made.picture.read_bytes(), made.picture.name)


@pytest.fixture(scope="session")
def app(answers, pictures):
    return server.create_app(answers, server.Model("embedded", None), pictures, TOKEN)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory) -> bytes:
    """A vector file of another model."""
    path = tmp_path_factory.mktemp("foreign") / "other.safetensors"
    source = {"model": "another", "fingerprint": "0" * 16}
    steering.SteeringVector(np.ones(192, np.float32), NORM, source).save(path)
    return path.read_bytes()
