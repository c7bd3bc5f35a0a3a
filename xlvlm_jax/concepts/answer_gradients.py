"""How an answer's probability depends on the states of a site, at every position of the prompt.

B batch, T positions, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ports import VLM
from ports.intervene.sites import capture
from ports.intervene.steer import substitute
from ports.nn.vision_language import Inputs, VisionLanguageModel
from ports.parallel import sharding

TOGETHER = 8  # tokens that the length of an answer is rounded up to, for fewer programs


class AnswerGradients(NamedTuple):
    """Log-probabilities of answers, and their derivatives with respect to the states of a site.

    Attributes:
        log_probability: float32[B], of all tokens of each answer, natural logarithm.
        states: [B, T, D], in the dtype of the model.
        gradients: [B, T, D], derivatives of `log_probability` with respect to the states.
    """

    log_probability: Float[jax.Array, " B"]
    states: Float[jax.Array, "B T D"]
    gradients: Float[jax.Array, "B T D"]


def answer_gradients(
    vlm: VLM, inputs: Inputs, lengths: Int[np.ndarray, " B"], site: str
) -> AnswerGradients:
    """Returns the gradient of each answer's log-probability with respect to the states of a site.

    One forward pass up to the site, one after it, and one backwards to it, in one program. At sites
    from which no later layer reads other positions (the last layer, the final norm) only the
    positions of the answer have a gradient. Runs on the host and cannot be traced.

    Args:
        vlm: the model.
        inputs: the processor's arrays, padded on the left; each row ends with its answer.
        lengths: int[B], number of tokens of each answer.
        site: a site of the decoder, before its head.

    Returns:
        float32 log-probabilities [B]; states and gradients [B, T, D] in the model's dtype.

    Raises:
        ValueError: the site is unknown or outside the decoder, an answer has no token or as many as
            its row, or as for `VLM.forward`.

    Examples:
        >>> import numpy as np, ports, xlvlm_jax
        >>> from PIL import Image
        >>> vlm = ports.load("embedded")
        >>> text = vlm.render("What is in the picture?") + " dog"
        >>> inputs = vlm.process([text], [Image.new("RGB", (112, 112))])
        >>> site = "language_model.model.layers.2"
        >>> found = xlvlm_jax.answer_gradients(vlm, inputs, np.array([1]), site)
        >>> found.gradients.shape == (*inputs["input_ids"].shape, 192)
        True
    """
    site = vlm.find_site(site, generated=True, one_state=True)
    if site == vlm.head:
        raise ValueError(f"{site!r} is the head; choose a site of the decoder before it")
    lengths = np.asarray(lengths)
    ids = np.asarray(inputs["input_ids"])
    real = np.asarray(inputs.get("attention_mask", np.ones(ids.shape, int))).sum(axis=1)
    if lengths.shape != (len(ids),) or (lengths < 1).any() or (lengths >= real).any():
        raise ValueError(
            f"answers have {lengths.tolist()} tokens in rows of {real.tolist()}; expected from one "
            "to one less than the row per row"
        )
    # One program for answers of about the same length.
    longest = min(-(-int(lengths.max()) // TOGETHER) * TOGETHER, ids.shape[1] - 1)
    found = _answer_gradients(
        vlm.module,
        vlm.params,
        vlm.place(inputs),
        jnp.asarray(lengths),
        site,
        longest,
        vlm._mesh,
    )
    length = ids.shape[1]
    return found._replace(states=found.states[:, -length:], gradients=found.gradients[:, -length:])


@functools.partial(jax.jit, static_argnames=("model", "site", "longest", "mesh"))
def _answer_gradients(
    model: VisionLanguageModel,
    params: dict,
    inputs: dict,
    lengths: jax.Array,
    site: str,
    longest: int,
    mesh: jax.sharding.Mesh | None,
) -> AnswerGradients:
    tokens = inputs["input_ids"][:, -longest:]
    # Rows are padded on the left: answers are at the end.
    is_answer = jnp.arange(longest) >= longest - lengths[:, None]

    def log_probability(states: jax.Array) -> tuple[jax.Array, jax.Array]:
        apply = substitute(model.apply, {site: states})
        last = apply({"params": params}, inputs, method="states")[:, -longest - 1 : -1]
        every = jax.nn.log_softmax(model.bind({"params": params}).unembed(last))
        own = jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]
        per_row = jnp.where(is_answer, own, 0).sum(axis=1)
        return per_row.sum(), per_row

    with sharding.on(mesh):
        _, captured = capture(model.apply, (site,))({"params": params}, inputs, method="states")
        states = captured[site]
        gradients, per_row = jax.grad(log_probability, has_aux=True)(states)
    return AnswerGradients(per_row, states, gradients)
