"""CLIPScore and its baselines, with the bundled CLIP pair."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from xlvlm_jax import metrics
from xlvlm_jax.data import scenes
from xlvlm_jax.demo import embedded


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Returns (images, the kind of object in each)."""
    root = tmp_path_factory.mktemp("scenes")
    scenes.write(root, train=24)
    attributes = json.loads((root / "attributes.json").read_text())
    files = sorted((root / "train2014").glob("*.jpg"))
    kinds = [attributes[str(int(file.stem[-12:]))]["kind"] for file in files]
    return [Image.open(file).convert("RGB") for file in files], kinds


def test_scores_by_hand():
    images, texts = np.float32([[1, 0], [0.6, 0.8]]), np.float32([[1, 0], [0, 1], [-1, 0]])
    expected = [[2.5, 0, 0], [1.5, 2, 0]]  # cosines below zero count as zero
    np.testing.assert_allclose(metrics.clip_scores(images, texts), expected, atol=1e-6)


def test_the_text_is_the_papers():
    assert metrics.describe(["dog", "beach"]) == ("A photo is described by the words dog, beach.")


def test_embeddings_equal_transformers(clip, pictures):
    model = transformers.CLIPModel.from_pretrained(embedded.CLIP, dtype=torch.float32).eval()
    texts = [metrics.describe(words) for words in (["dog", "red"], ["two", "cats", "beach"] * 3)]
    inputs = clip.processor(text=texts, images=pictures[0][:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**inputs)
    ours = metrics.embed_images(clip, pictures[0][:3], batch_size=32)
    np.testing.assert_allclose(ours, theirs.image_embeds, rtol=0, atol=1e-5)
    ours = metrics.embed_texts(clip, texts)
    np.testing.assert_allclose(ours, theirs.text_embeds, rtol=0, atol=1e-5)


def test_batches_change_no_vector(clip, pictures):
    whole = metrics.embed_images(clip, iter(pictures[0]), batch_size=32)
    np.testing.assert_allclose(
        metrics.embed_images(clip, pictures[0][20:], batch_size=32), whole[20:], atol=1e-5
    )
    texts = [metrics.describe([kind]) for kind in pictures[1]]
    many = metrics.embed_texts(clip, texts * 3)  # the second batch is filled up by the first
    np.testing.assert_allclose(many[48:], metrics.embed_texts(clip, texts), atol=1e-5)
    assert metrics.embed_texts(clip, []).shape == (0, 128)
    assert metrics.embed_images(clip, []).shape == (0, 128)


def test_a_long_text_is_cut_off(clip):
    long = metrics.embed_texts(clip, [metrics.describe(["dog"] * 200)])
    np.testing.assert_allclose(np.linalg.norm(long), 1, rtol=1e-5)


def test_words_match_their_own_pictures_better_than_others_and_noise(clip, pictures):
    images, kinds = pictures
    names = sorted(set(kinds))
    texts = metrics.embed_texts(clip, [metrics.describe([name]) for name in names])
    scores = metrics.clip_scores(metrics.embed_images(clip, images), texts)
    own = np.array([[kind == name for name in names] for kind in kinds])
    assert scores[own].mean() > scores[~own].mean() + 0.25
    noise = metrics.clip_scores(metrics.embed_images(clip, metrics.noise_images(4, 112)), texts)
    assert scores[own].mean() > noise.mean() + 0.2


def test_random_words_match_in_number_and_are_seeded(clip):
    vocabulary = metrics.vocabulary_words(clip.processor.tokenizer)
    assert {"dog", "beach", "red"} <= set(vocabulary)
    assert not {"the", "<s>", ","} & set(vocabulary)
    words = [["dog", "cat"], [], ["bus"] * 5]
    drawn = metrics.random_words(words, vocabulary, seed=1)
    assert [len(concept) for concept in drawn] == [2, 0, 5]
    assert len(set(drawn[2])) == 5 and set(drawn[2]) <= set(vocabulary)
    assert drawn == metrics.random_words(words, vocabulary, seed=1)
    assert drawn != metrics.random_words(words, vocabulary, seed=2)
    # How many words a concept has changes no other word.
    longer = metrics.random_words([["dog"] * 4, ["cat"], ["bus"]], vocabulary, seed=1)
    assert longer[0][:2] == drawn[0] and longer[2] == drawn[2][:1]
    with pytest.raises(
        ValueError, match="a concept has 5 words but the vocabulary has 3 to draw from"
    ):
        metrics.random_words(words, vocabulary[:3])


def test_noise_is_seeded():
    one, again, other = (metrics.noise_images(1, 8, seed=seed)[0] for seed in (0, 0, 1))
    assert one.size == (8, 8) and one.tobytes() == again.tobytes() != other.tobytes()
