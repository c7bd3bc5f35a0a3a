"""What a model answers, and how likely its answer stays, when concepts are removed one by one.

K concepts, B batch, T positions, D width, A tokens of the answer.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ports import VLM
from ports.intervene.edits import ablate
from xlvlm_jax.concepts.methods import method_named
from xlvlm_jax.concepts.record import Concepts
from xlvlm_jax.data.batches import make_batch
from xlvlm_jax.data.sample import Sample

BATCH = 8  # concepts that are removed side by side


def concept_directions(concepts: Concepts) -> Float[np.ndarray, "K D"]:
    """Returns the direction along which each concept is added to states or removed from them.

    Args:
        concepts: the concepts.

    Returns:
        float32[K, D]: the components; for centroids, which share what all states have in common,
        their difference from the mean of the centroids.

    Raises:
        ValueError: there is a single centroid, which differs from nothing.
    """
    require_directions(concepts)
    components = np.asarray(concepts.components, np.float32)
    if method_named(concepts.method).is_centroids:
        components = components - components.mean(axis=0)
    return components


def require_directions(concepts: Concepts) -> None:
    """Checks, before a model is loaded, that `concept_directions` has what it needs.

    Args:
        concepts: the concepts.

    Raises:
        ValueError: there is a single centroid, which differs from nothing.
    """
    if method_named(concepts.method).is_centroids and len(concepts.components) == 1:
        raise ValueError(
            f"a single centroid of {concepts.method!r} has no direction, which is its "
            "difference from the mean of all; use two concepts or more"
        )


def removal_effects(
    vlm: VLM,
    sample: Sample,
    answer: str,
    site: str,
    directions: Float[np.ndarray, "K D"],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, Float[np.ndarray, " K"]]:
    """Returns how much each direction contributes to the log-probability of an answer.

    Args:
        vlm: the model.
        sample: picture and prompt.
        answer: the text whose tokens are scored, without an end token.
        site: the site that directions are removed at, at every position.
        directions: float[K, D].
        progress: called after each batch with (directions done, K).

    Returns:
        The log-probability of the answer, natural logarithm, and float32[K], its change when a
        direction is removed: negative where the answer depends on it.

    Raises:
        ValueError: the answer is empty, the site is unknown, or the widths differ.
        OSError: the picture can't be read.
    """
    if not answer.strip():
        raise ValueError(f"the answer for sample {sample.id} is empty; expected text to score")
    batch = make_batch(
        vlm, [sample] * BATCH, BATCH, answers=[answer] * BATCH, ended=False, strict=True
    )
    (inputs,), length = batch.inputs, int(batch.answer_lengths[0])
    tokens = jnp.asarray(inputs["input_ids"][:, -length:])
    norm = f"{vlm.decoder}.{vlm.module.norm_name}"

    def log_probabilities(vectors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        edits = {site: ablate(vectors, alpha)}
        states = vlm.states(inputs, sites=[norm], edits=edits)[norm][:, -length - 1 : -1]
        every = jax.nn.log_softmax(vlm.unembed(states))
        own = jnp.take_along_axis(every, tokens[..., None], axis=-1)
        return np.asarray(own.sum(axis=(1, 2)))

    # The first row is left as it is.
    K, D = directions.shape
    rows = -(-(K + 1) // BATCH) * BATCH
    vectors, alpha = np.ones((rows, D), np.float32), np.zeros(rows, np.float32)
    vectors[1 : K + 1], alpha[1 : K + 1] = directions, 1
    parts = []
    for start in range(0, rows, BATCH):
        stop = start + BATCH
        parts.append(log_probabilities(vectors[start:stop], alpha[start:stop]))
        if progress is not None:
            progress(min(stop - 1, K), K)
    found = np.concatenate(parts)
    return float(found[0]), found[1 : K + 1] - found[0]


def answers_without(
    vlm: VLM,
    sample: Sample,
    site: str,
    directions: Float[np.ndarray, "K D"],
    *,
    max_new_tokens: int = 20,
) -> list[str]:
    """Returns the model's answer with each direction removed at every position.

    Args:
        vlm: the model.
        sample: picture and prompt.
        site: the site that directions are removed at.
        directions: float[K, D].
        max_new_tokens: maximum number of tokens of an answer.

    Returns:
        K texts.

    Raises:
        ValueError: as for `removal_effects`.
        OSError: the picture can't be read.
    """
    (inputs,) = make_batch(vlm, [sample] * BATCH, BATCH, strict=True).inputs
    texts: list[str] = []
    for start in range(0, len(directions), BATCH):
        some = directions[start : start + BATCH]
        alpha = np.arange(BATCH) < len(some)
        vectors = np.ones((BATCH, directions.shape[1]), np.float32)
        vectors[: len(some)] = some
        edits = {site: ablate(vectors, alpha.astype(np.float32))}
        made = vlm.generate(inputs, max_new_tokens=max_new_tokens, edits=edits)
        texts += _decoded(vlm, made.tokens[: len(some)])
    return texts


def _decoded(vlm: VLM, tokens: jax.Array) -> Sequence[str]:
    return [text.strip() for text in vlm.decode(np.asarray(tokens))]
