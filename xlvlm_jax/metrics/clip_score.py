"""CLIPScore: how well words fit an image, without a reference (Hessel et al. 2021).

    CLIPScore(image, words) = 2.5 max(cos(CLIP(image), CLIP(text)), 0)

where the text is "A photo is described by the words dog, beach." (CoX-LMM, NeurIPS 2024, section
4.1). N images, M texts, E width of CLIP's embedding space.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image

from ports.models.clip import DualEncoder
from ports.tracing import is_traced
from xlvlm_jax.solvers.linalg import matmul

AnyArray = jax.Array | np.ndarray
WEIGHT = 2.5
_MULTIPLE = 16  # text lengths are padded to multiples of it, so that few shapes compile


def describe(words: Sequence[str]) -> str:
    """Returns the text that says that an image shows these words."""
    return f"A photo is described by the words {', '.join(words)}."


def embed_texts(
    clip: DualEncoder, texts: Sequence[str], *, batch_size: int = 64
) -> Float[np.ndarray, "M E"]:
    """Returns unit vectors of texts.

    Args:
        clip: the model.
        texts: M texts, truncated to CLIP's context.
        batch_size: texts per batch.

    Returns:
        float32[M, E].
    """
    tokenizer, context = clip.processor.tokenizer, clip.module.config.text.max_positions
    vectors = np.zeros((len(texts), clip.module.config.projection_dim), np.float32)
    if not len(texts):
        return vectors
    inputs = tokenizer(list(texts), truncation=True, max_length=context)
    # Padded to one shape, so that one program computes every batch.
    longest = -(-max(map(len, inputs["input_ids"])) // _MULTIPLE) * _MULTIPLE
    inputs = tokenizer.pad(
        inputs, padding="max_length", max_length=min(longest, context), return_tensors="np"
    )
    for start in range(0, len(texts), batch_size):
        rows = np.arange(start, start + batch_size) % len(texts)
        embedded = clip.embed_text(inputs["input_ids"][rows], inputs["attention_mask"][rows])
        vectors[rows] = embedded
    return vectors


def embed_images(
    clip: DualEncoder, images: Iterable[Image.Image], *, batch_size: int = 32
) -> Float[np.ndarray, "N E"]:
    """Returns unit vectors of images.

    Args:
        clip: the model.
        images: N images, which may come from a generator.
        batch_size: images per batch.

    Returns:
        float32[N, E].
    """
    return embed_pixels(clip, (pixels_of(clip, image) for image in images), batch_size=batch_size)


def pixels_of(clip: DualEncoder, image: Image.Image) -> Float[np.ndarray, "3 H H"]:
    """Returns the output of CLIP's processor for an image; raises whatever the processor raises."""
    return clip.processor.image_processor([image], return_tensors="np")["pixel_values"][0]


def embed_pixels(
    clip: DualEncoder, pixels: Iterable[Float[np.ndarray, "3 H H"]], *, batch_size: int = 32
) -> Float[np.ndarray, "N E"]:
    """Does `embed_images` for outputs of `pixels_of`."""
    pixels = iter(pixels)
    vectors = [np.zeros((0, clip.module.config.projection_dim), np.float32)]
    while batch := list(islice(pixels, batch_size)):
        filled = np.stack(batch + batch[:1] * (batch_size - len(batch)))
        vectors.append(np.asarray(clip.embed_images(filled))[: len(batch)])
    return np.concatenate(vectors)


def clip_scores(
    images: Float[AnyArray, "N E"], texts: Float[AnyArray, "M E"]
) -> Float[AnyArray, "N M"]:
    """Returns the CLIPScore of every image with every text.

    Works under jit, vmap and grad.

    Args:
        images: float[N, E], unit vectors.
        texts: float[M, E], unit vectors.

    Returns:
        float[N, M], in [0, 2.5].
    """
    if is_traced(images, texts):
        return WEIGHT * jnp.maximum(matmul(jnp.asarray(images), jnp.asarray(texts).T), 0)
    return WEIGHT * np.maximum(np.asarray(images) @ np.asarray(texts).T, 0)
