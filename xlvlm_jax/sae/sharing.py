"""Which source has which feature of a crosscoder: a model before or after, a site or the other.

K features, D_m width of source m.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from xlvlm_jax.sae.dictionary import Dictionary


def decoders(dictionary: Dictionary) -> tuple[Float[Array, "K D1"], Float[Array, "K D2"]]:
    """Returns the decoder of each source of a crosscoder.

    Args:
        dictionary: a crosscoder.

    Returns:
        float[K, D_1] and float[K, D_2]: what one unit of each code adds to each source's states.

    Raises:
        ValueError: it is not a crosscoder.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import sae
        >>> W = np.float32([[3, 0, 1], [0, 0, 2]])  # of sources of widths 2 and 1
        >>> params = {"W_enc": W.T, "W_dec": W, "b_enc": [0, 0], "b_dec": [0, 0, 0]}
        >>> settings = sae.Settings("crosscoder", widths=(2, 1), scales=(1.0, 1.0))
        >>> [part.tolist() for part in sae.decoders(sae.Dictionary.of(params, settings))]
        [[[3.0, 0.0], [0.0, 0.0]], [[1.0], [2.0]]]
    """
    if not dictionary.settings.is_crosscoder:
        raise ValueError(
            f"{dictionary.method!r} has one decoder; expected a crosscoder, which has two"
        )
    first = dictionary.settings.widths[0]
    return dictionary.components[:, :first], dictionary.components[:, first:]


def relative_norms(dictionary: Dictionary) -> Float[np.ndarray, " K"]:
    """Returns how much each feature of a crosscoder belongs to the second source.

    Args:
        dictionary: a crosscoder.

    Returns:
        float32[K], |W_2k| / (|W_1k| + |W_2k|) of the decoders' norms, each in units of its source's
        scale: 0 for a feature of the first source alone, about 0.5 for one that both share, 1 for
        one of the second alone. NaN where both are zero.

    Raises:
        ValueError: it is not a crosscoder.

    Source: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing".

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import sae
        >>> W = np.float32([[3, 0, 1], [0, 0, 2]])
        >>> params = {"W_enc": W.T, "W_dec": W, "b_enc": [0, 0], "b_dec": [0, 0, 0]}
        >>> settings = sae.Settings("crosscoder", widths=(2, 1), scales=(1.0, 1.0))
        >>> sae.relative_norms(sae.Dictionary.of(params, settings)).tolist()
        [0.25, 1.0]
    """
    norms = [
        np.asarray(jnp.linalg.norm(part, axis=1), np.float64) * scale
        for part, scale in zip(decoders(dictionary), dictionary.settings.scales, strict=True)
    ]
    total = norms[0] + norms[1]
    with np.errstate(invalid="ignore"):
        return (norms[1] / total).astype(np.float32)


def whose(dictionary: Dictionary, exclusive: float = 1 / 6) -> Shaped[np.ndarray, " K"]:
    """Returns whether each feature of a crosscoder is of one source or shared.

    Args:
        dictionary: a crosscoder.
        exclusive: a feature is of one source if the other has at most this share of its norms; by
            default one norm is then at most a fifth of the other, as in Minder et al. 2025.

    Returns:
        For each feature "first", "second" or "shared".

    Raises:
        ValueError: it is not a crosscoder, or `exclusive` is not from 0 to 0.5.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import sae
        >>> W = np.float32([[3, 0, 1], [0, 0, 2]])
        >>> params = {"W_enc": W.T, "W_dec": W, "b_enc": [0, 0], "b_dec": [0, 0, 0]}
        >>> settings = sae.Settings("crosscoder", widths=(2, 1), scales=(1.0, 1.0))
        >>> sae.whose(sae.Dictionary.of(params, settings)).tolist()
        ['shared', 'second']
    """
    if not 0 <= exclusive <= 0.5:
        raise ValueError(f"exclusive must be from 0 to 0.5; got {exclusive}")
    share = relative_norms(dictionary)
    names = np.where(share >= 1 - exclusive, "second", "shared")
    return np.where(share <= exclusive, "first", names)
