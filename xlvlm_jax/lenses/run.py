"""A lens on one picture and prompt, and on the answer that the model gives.

L layers, P positions of prompt and answer, k words.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ports import VLM
from ports.inputs.patch_layout import PatchLayout
from ports.intervene.edits import Edits
from xlvlm_jax.features.manifest import model_at
from xlvlm_jax.features.reader import Features
from xlvlm_jax.lenses.neighbours import Neighbours, describe, nearest
from xlvlm_jax.lenses.reading import LensReading, read_states
from xlvlm_jax.storage.same_model import require_model


class LensRun(NamedTuple):
    """What every layer would say at every position of a prompt and its answer."""

    tokens: Int[np.ndarray, " P"]  # of the prompt, then of the answer but its last
    texts: list[str]  # each token's text
    kinds: list[str]  # "image", "text" or "answer"
    reading: LensReading  # arrays [L, P, k]
    pictures: list[PatchLayout]  # `positions` count from the first of the P
    prediction: str
    neighbours: dict[str, Neighbours]  # site -> of each position [P, k]; of sites in the index
    resembled: dict[int, tuple[str, str]]  # row of the index -> its token, and its text

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns everything as arrays, for `numpy.savez`."""
        made = {
            "tokens": self.tokens,
            "kinds": np.array(self.kinds),
            "sites": np.array(self.reading.sites),
            "words": self.reading.tokens,
            "probabilities": self.reading.probabilities,
            "entropy": self.reading.entropy,
        }
        for i, picture in enumerate(self.pictures):
            made |= {
                f"picture {i} positions": picture.positions,
                f"picture {i} boxes": picture.boxes,
            }
        for site, found in self.neighbours.items():
            made |= {f"neighbours {site}": found.rows, f"cosine {site}": found.cosine}
        return made


def run_lens(
    vlm: VLM,
    inputs: Mapping[str, Any],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    k: int = 5,
    max_new_tokens: int = 20,
    edits: Edits | None = None,
    carried: Mapping[str, Float[Any, "D D"]] | None = None,
    index: Features | None = None,
) -> LensRun:
    """Answers a prompt and reads every layer at each of its positions and those of the answer.

    Prompt and answer are computed once, in one compiled program. Runs on the host and cannot be
    traced.

    Args:
        vlm: the model.
        inputs: the processor's arrays of one prompt.
        sizes: (height, width) of its pictures, as for `VLM.patch_layout`.
        k: number of words, and of neighbours, per layer and position.
        max_new_tokens: maximum number of tokens of the answer.
        edits: edits of the states, applied to prompt and answer.
        carried: site -> [D, D], as for `read_states`.
        index: features whose states are searched for neighbours, at the layers that it holds.

    Returns:
        Words, probabilities and pictures.

    Raises:
        ValueError: there are several prompts, the index has states of another model or of none of
            the layers, or as for `VLM.generate` and `read_states`.
    """
    ids = np.asarray(inputs["input_ids"])
    if len(ids) != 1:
        raise ValueError(f"a lens page shows one prompt; got {len(ids)}")
    layers = vlm.layers
    if index is not None:
        require_model(model_at(index.manifest, layers[0]), vlm, f"{index.path} holds states of")
    answer = vlm.generate(
        inputs,
        max_new_tokens=max_new_tokens,
        sites=layers,
        edits=edits,
        prompt_states=True,
    )
    said = np.asarray(answer.tokens)[0]
    ends = np.flatnonzero(np.isin(said, vlm.eos_tokens))
    count = int(ends[0]) + 1 if len(ends) else len(said)
    # The state that predicts the answer's first token is the prompt's last.
    states = {
        site: jnp.concatenate([answer.prompt_states[site][0], answer.states[site][0, 1:count]])
        for site in layers
    }
    tokens = np.concatenate([ids[0], said[: count - 1]])
    is_image = np.isin(tokens, vlm.image_tokens)
    layouts = vlm.patch_layout(inputs, sizes=None if sizes is None else [sizes])[0]
    for layout in layouts:
        is_image[layout.positions[layout.positions >= 0]] = True
    kinds = np.where(is_image, "image", "text").tolist()
    kinds[ids.shape[1] :] = ["answer"] * (count - 1)
    found, resembled = {}, {}
    if index is not None:
        held = [site for site in layers if site in index.sites]
        if not held:
            raise ValueError(
                f"{index.path} has states of none of the layers, but of {', '.join(index.sites)}; "
                "extract a layer, such as " + layers[len(layers) // 2]
            )
        found = {site: nearest(states[site], index.stored(site), k) for site in held}
        rows = np.concatenate([each.rows.ravel() for each in found.values()])
        resembled = describe(index, rows, vlm.tokenizer)
    return LensRun(
        tokens=tokens,
        texts=[vlm.tokenizer.decode([int(t)]) for t in tokens],
        kinds=kinds,
        reading=read_states(vlm, states, k=k, carried=carried),
        pictures=layouts,
        prediction=str(vlm.decode(said)).strip(),
        neighbours=found,
        resembled=resembled,
    )
