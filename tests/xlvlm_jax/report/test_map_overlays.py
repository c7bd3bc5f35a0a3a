"""Maps over the pictures of cards: the activations of image tokens, and the room for them."""

import base64
import io

import numpy as np
from PIL import Image

from xlvlm_jax import Concepts, Features
from xlvlm_jax.features.image_cells import Cells
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report.cards import read_section
from xlvlm_jax.report.map_overlays import with_overlays
from xlvlm_jax.report.thumbnails import thumbnails


def decoded(uri):
    """The pixels of an image in a data URI, RGBA."""
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


def test_activations_of_image_tokens_are_the_map(pictures, tmp_path):
    image, _ = pictures[0]
    samples = [{"id": "one", "image": str(image)}]
    index = np.zeros((3, 4), np.int32)
    index[2, 1] = 1  # the shrunk picture beside its tiles is not drawn
    box = np.float32([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [0, 0, 1, 1]])
    with FeaturesWriter(tmp_path / "features", {}) as writer:
        rows = np.arange(3)
        states = {"s": np.zeros((3, 2), np.float32)}
        writer.append(samples, states, rows * 0, rows, rows, Cells(index, box))
        writer.close()
    concepts = Concepts(np.eye(2), np.float32([[0, 1], [4, 0], [9, 0]]))
    concepts.save(tmp_path / "concepts")
    features = Features.open(tmp_path / "features")
    section = read_section(tmp_path / "concepts", features, {})
    small = thumbnails([str(image)])
    (shown,) = with_overlays([section], tmp_path, features, small)
    by_number = {card.number: card for card in shown.cards}
    first = decoded(by_number[0].pictures[0].overlay)
    assert first[48, 20].tolist() == [68, 1, 84, 255]  # the lowest of viridis
    assert first[48, 70].tolist() == [253, 231, 37, 255]  # the highest
    (without,) = with_overlays([section], tmp_path, features, small, budget=0)
    assert all(p.overlay is None for card in without.cards for p in card.pictures)
