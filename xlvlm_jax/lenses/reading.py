"""The logit lens: reads the states of every layer and token through the final norm and the head.

L layers, B batch, T positions, D width, V vocabulary, k words.

nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ports import VLM
from ports.inputs.padding import bucket_length
from ports.intervene.edits import Edits
from ports.nn.vision_language import VisionLanguageModel
from ports.parallel import compiled
from ports.tables import html_arrays, kind
from xlvlm_jax.solvers.collectives import keep_pace
from xlvlm_jax.solvers.linalg import matmul

Array = jax.Array
# Numbers of logits in memory at a time.
LOGITS = 2**25


class LensReading(NamedTuple):
    """The most likely next tokens according to the states of each layer and position.

    Attributes:
        sites: L sites, in the order they were given in.
        tokens: int32[L, ..., k], ids, most likely first.
        probabilities: float32[L, ..., k] of these.
        entropy: float32[L, ...], of all tokens' probabilities, in nats.
    """

    sites: tuple[str, ...]
    tokens: Int[Any, "..."]
    probabilities: Float[Any, "..."]
    entropy: Float[Any, "..."]

    def __repr__(self) -> str:
        return f"LensReading({len(self.sites)} sites; tokens: {kind(self.tokens)})"

    def _repr_html_(self) -> str:
        return html_arrays(
            {name: getattr(self, name) for name in self._fields[1:]}, title=repr(self)
        )


@compiled.program(static=["through_norm", "k"])
def _top(
    model: VisionLanguageModel,
    params: dict,
    x: Array,
    carry: Array | None,
    through_norm: bool,
    k: int,
) -> tuple[Array, Array, Array]:
    if carry is not None:
        x = matmul(x.astype(jnp.float32), carry.T)
    bound = model.bind({"params": params})
    logits = (bound.unembed_through_norm if through_norm else bound.unembed)(x)
    logp = jax.nn.log_softmax(logits)
    best, tokens = jax.lax.top_k(logp, k)
    entropy = -jnp.sum(jnp.where(jnp.isfinite(logp), jnp.exp(logp) * logp, 0), -1)
    return tokens, jnp.exp(best), entropy


def read_states(
    vlm: VLM,
    states: Mapping[str, Float[Any, "*batch D"]],
    *,
    k: int = 5,
    carried: Mapping[str, Float[Any, "D D"]] | None = None,
    block: int | None = None,
) -> LensReading:
    """Reads states as the words that the head favours; the final norm comes first, if it is due.

    Runs on the host and cannot be traced; each block of states is one call of a compiled program.

    Args:
        vlm: the model.
        states: site -> [..., D], all of the same shape; names as for `VLM.find_site`.
        k: number of words per state.
        carried: site -> [D, D], a matrix by which its states are carried to the last layer first
            (see `fit_jacobian_lens`).
        block: states per block; None for as many as keep the logits small.

    Returns:
        Tokens, probabilities and entropy.

    Raises:
        ValueError: there are no states, k is not in 1..V, or a site is unknown or before the
            decoder.

    Examples:
        >>> import numpy as np, ports
        >>> from xlvlm_jax import lenses
        >>> vlm = ports.load("embedded")
        >>> state = np.ones((1, 192), "float32")
        >>> lenses.read_states(vlm, {vlm.layers[-1]: state}, k=2).tokens.shape
        (1, 1, 2)
    """
    V = vlm.sizes.text.vocab_size
    if not 1 <= k <= V:
        raise ValueError(f"k is {k}; expected 1 to {V} words")
    if not states:
        raise ValueError("there are no states to read; give some sites")
    # Names may be spelled in several ways.
    sites = {name: vlm.find_site(name) for name in states}
    carries = {vlm.find_site(name): matrix for name, matrix in (carried or {}).items()}
    shape = np.shape(next(iter(states.values())))
    # Few positions share a program with as many or a few more.
    size = min(block or max(1, LOGITS // V), max(bucket_length(math.prod(shape[:-1])), 1))
    found = []
    for name, given in states.items():
        site = sites[name]
        if not vlm.module.is_of_decoder(site):
            raise ValueError(f"{name!r} is before the decoder, whose words it has none of")
        flat = jnp.reshape(jnp.asarray(given), (-1, shape[-1]))
        carry = None if site not in carries else jnp.asarray(carries[site])
        static = (vlm.is_before_norm(site), k)
        parts = []
        for start in range(0, max(len(flat), 1), size):
            rows = flat[start : start + size]
            # The last block has the size of the others: one program.
            rows = jnp.pad(rows, ((0, size - len(rows)), (0, 0)))
            arrays = (vlm.params, rows, carry)
            parts.append(keep_pace(_top(vlm.module, *arrays, *static, mesh=vlm.mesh)))
        found.append(
            [
                np.concatenate([np.asarray(part) for part in column])[: len(flat)]
                for column in zip(*parts, strict=True)
            ]
        )
    tokens, probabilities, entropy = (np.stack(column) for column in zip(*found, strict=True))
    return LensReading(
        tuple(states),
        tokens.reshape(len(sites), *shape[:-1], k),
        probabilities.reshape(len(sites), *shape[:-1], k),
        entropy.reshape(len(sites), *shape[:-1]),
    )


def logit_lens(
    vlm: VLM,
    inputs: Mapping[str, Any],
    *,
    sites: str | Sequence[str] | None = None,
    k: int = 5,
    edits: Edits | None = None,
    carried: Mapping[str, Float[Any, "D D"]] | None = None,
    block: int | None = None,
) -> LensReading:
    """Reads every layer at every position of a batch.

    At the last layer, these are the model's own predictions. Runs on the host and cannot be traced.

    Args:
        vlm: the model.
        inputs: the processor's arrays.
        sites: sites of the decoder, or patterns; None for `vlm.layers`.
        k: number of words per layer and position.
        edits: edits of the states, as for `VLM.forward`: a lens on a steered run.
        carried: site -> [D, D], as for `read_states`.
        block: as for `read_states`.

    Returns:
        Tokens and probabilities [L, B, T, k], and entropy [L, B, T]; at padding without meaning.

    Raises:
        ValueError: as for `VLM.forward` and `read_states`.

    Examples:
        >>> import ports
        >>> from PIL import Image
        >>> from xlvlm_jax import lenses
        >>> vlm = ports.load("embedded")
        >>> prompt, picture = vlm.render("What is in the picture?"), Image.new("RGB", (64, 64))
        >>> read = lenses.logit_lens(vlm, vlm.process([prompt], [picture]), k=1)
        >>> vlm.tokenizer.decode(read.tokens[-1, 0, -1])
        'dog'
    """
    asked = vlm.layers if sites is None else vlm.check_sites(sites, one_state=True)
    states = vlm.states(inputs, sites=asked, edits=edits)
    return read_states(
        vlm, {site: states[site] for site in asked}, k=k, carried=carried, block=block
    )
