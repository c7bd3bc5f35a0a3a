"""The compiled passes of a model: what `VLM` and the rest of the package run under `jax.jit`.

B batch, T positions, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import jax

from ports.decoding import generate as decoding
from ports.decoding import logits as logits_rules
from ports.decoding import prefill
from ports.decoding.generate import Generation
from ports.decoding.sampling import Sampling
from ports.inputs.common_prefix import Shared
from ports.intervene.edits import Edits
from ports.intervene.sites import capture
from ports.intervene.steer import steer
from ports.messages import few
from ports.nn.vision_language import ImageStates, VisionLanguageModel
from ports.parallel import compiled
from ports.tables import html_arrays, kind, named_states

Array = jax.Array


class Output(NamedTuple):
    """Result of `VLM.forward`.

    Attributes:
        logits: float32[B, T, V], whatever the model's dtype.
        states: site -> [B, T, D]; for a vision site [images, patches, width].

    Examples:
        >>> import ports, xlvlm_jax
        >>> from PIL import Image
        >>> vlm = ports.load("embedded")
        >>> prompt, picture = vlm.render("What is in the picture?"), Image.new("RGB", (64, 64))
        >>> inputs = vlm.process([prompt], [picture])
        >>> site = "language_model.model.layers.3"
        >>> out = vlm.forward(inputs, sites=[site])
        >>> out.logits.shape[:2] == inputs["input_ids"].shape, out.states[site].shape[-1]
        (True, 192)
    """

    logits: Array
    states: dict[str, Array]

    def __repr__(self) -> str:
        return f"Output(logits: {kind(self.logits)}; states: {few(self.states) or 'none'})"

    def _repr_html_(self) -> str:
        arrays = {"logits": self.logits, **named_states("states", self.states)}
        return html_arrays(arrays, title="Output")


@compiled.program(static=["sites"])
def forward(
    model: VisionLanguageModel,
    params: dict,
    inputs: dict,
    edits: Edits,
    sites: tuple[str, ...],
) -> tuple[Array, dict[str, Array]]:
    """Returns logits[B, T, V] and the states at the sites."""
    return capture(steer(model.apply, edits), sites)({"params": params}, inputs)


@compiled.program(static=["sites"])
def states(
    model: VisionLanguageModel,
    params: dict,
    inputs: dict,
    edits: Edits,
    sites: tuple[str, ...],
    shared: Shared | None = None,
) -> dict[str, Array]:
    """Returns the states at the sites alone: XLA drops what comes after the last of them.

    With `shared`, of prompts whose equal beginnings are computed once; the sites are then below
    the decoder.
    """
    if shared is not None:
        prompts = prefill.read(model, inputs, shared)
        slots = prompts.mask.shape[1]
        return prefill.prefill(model, params, prompts, edits, sites, slots, True)[2]
    return capture(steer(model.apply, edits), sites)({"params": params}, inputs)[1]


@compiled.program()
def encode_images(model: VisionLanguageModel, params: dict, inputs: dict) -> ImageStates:
    """Returns what the decoder reads at image tokens."""
    return model.bind({"params": params}).encode_images(inputs)


@compiled.program(static=["method"])
def unembed(model: VisionLanguageModel, params: dict, x: Array, method: str) -> Array:
    """Returns logits[..., V] of x[..., D]; method: "unembed" or "unembed_through_norm"."""
    return getattr(model.bind({"params": params}), method)(x)


@compiled.program(
    static=[
        "max_new_tokens",
        "eos_tokens",
        "pad_token",
        "sites",
        "prompt_states",
        "variants",
        "at_prompt",
    ]
)
def generate(
    model: VisionLanguageModel,
    params: dict,
    inputs: dict,
    sampling: Sampling | None = None,
    edits: Edits | None = None,
    rules: logits_rules.Rules | None = None,
    **options: Any,
) -> Generation:
    """Runs `ports.decoding.generate.generate`: prefill and decoding in one program."""
    return decoding.generate(model, params, inputs, sampling, edits, rules, **options)
