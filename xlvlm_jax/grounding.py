"""Concepts read back as words and as images (CoX-LMM, NeurIPS 2024, section 3.3).

Axes: K concepts, D width, V vocabulary, N samples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from xlvlm_jax.words import concept_words

AnyArray = jax.Array | np.ndarray


def ground_text(
    components: Float[AnyArray, "K D"],
    unembed: Callable[[AnyArray], AnyArray],
    tokenizer: Any,
    num_words: int = 10,
    num_candidates: int = 50,
) -> list[list[str]]:
    """The words of each concept: what the language-model head reads in its direction.

    The `num_candidates` tokens of highest logit are decoded, lower-cased and stripped; the first
    `num_words` that are English words of more than two letters and no stop words, or numbers, are
    kept, each once. A concept may keep fewer, even none.

    Args:
        components: float[K, D]. They mean most for states that are taken after the final norm:
            `unembed` applies none.
        unembed: the language-model head alone, [K, D] -> logits [K, V].
        tokenizer: a Hugging Face tokenizer, or whatever decodes [id].

    Raises ValueError for counts below one, components of another width than the head takes, and
    components that are not finite.
    """
    for name, count in (("num_words", num_words), ("num_candidates", num_candidates)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    finite = np.isfinite(np.asarray(components)).all(axis=1)
    if not finite.all():
        raise ValueError(f"concept {int(np.argmin(finite))} holds NaN or Inf; factor Z again")
    try:
        logits = jnp.asarray(unembed(components))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"components are {components.shape[1]} wide, which the language-model head does not"
            f" take ({str(error).splitlines()[0]}); use the model that the states came from"
        ) from error
    _, candidates = jax.lax.top_k(logits, min(num_candidates, logits.shape[-1]))
    return [
        concept_words((tokenizer.decode([int(i)]) for i in ids), num_words)
        for ids in np.asarray(candidates)
    ]


def ground_images(
    activations: Float[AnyArray, "N K"], num_images: int = 5
) -> Int[np.ndarray, "K {num_images}"]:
    """The samples that activate each concept most, the strongest first; of equals, the earlier.

    Returns row numbers of `activations`, int64[K, num_images].

    Raises ValueError unless 1 <= num_images <= N, and for activations that are not finite.
    """
    N = activations.shape[0]
    if not 1 <= num_images <= N:
        raise ValueError(f"num_images must lie in 1..{N}, the number of samples; got {num_images}")
    activations = np.asarray(activations)
    finite = np.isfinite(activations).all(axis=1)
    if not finite.all():
        raise ValueError(f"activations of sample {int(np.argmin(finite))} hold NaN or Inf")
    return np.argsort(-activations, axis=0, kind="stable")[:num_images].T
