"""Rotary position embedding: bases, scaling for long contexts, and positions of several components.

B batch, T positions, C head width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Kinds of scaling, and what their configurations must say.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """How a decoder rotates its heads.

    Attributes:
        theta: base of the frequencies.
        kind: how frequencies are scaled for contexts longer than those of training (see
            `frequencies`): "default" (not at all), "linear", "dynamic", "llama3" or "yarn".
        factor: by how much the context grows.
        length: context of the original training ("dynamic", "llama3" and "yarn").
        slow: frequencies with at most so many turns in `length` are scaled ("llama3", "yarn").
        fast: frequencies with at least so many turns in `length` are not scaled.
        whole: whether the bounds of "yarn" are rounded to whole frequencies.
        magnitude: factor on cosines and sines ("yarn").
        sections: number of frequencies that rotate with each component of the position (M-RoPE).
        interleaved: whether the components take turns among the frequencies (Qwen3-VL), instead of
            one after the other (Qwen2-VL).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    length: int = 0
    slow: float = 1.0
    fast: float = 32.0
    whole: bool = True
    magnitude: float = 1.0
    sections: tuple[int, ...] | None = None
    interleaved: bool = False

    @classmethod
    def from_hf(
        cls,
        parameters: Mapping[str, Any],
        head_dim: int,
        max_positions: int | None = None,
        interleaved: bool = False,
    ) -> "Rope":
        """Reads the `rope_parameters` of a transformers text configuration.

        Args:
            parameters: the rope_parameters, of one kind of layers if they differ.
            head_dim: width of a head.
            max_positions: the configuration's max_position_embeddings.
            interleaved: whether the family interleaves the components of the position.

        Raises:
            ValueError: the scaling is not implemented, or a value is missing.
        """
        said = {name: value for name, value in parameters.items() if value is not None}
        # transformers names rotary embedding with sections "default" or, in older files, "mrope".
        kind = said.get("rope_type", "default").replace("mrope", "default")
        if kind not in _NEEDS:
            raise ValueError(
                f"text_config has rope_type {kind!r}, which is not implemented; expected one of "
                f"{', '.join(_NEEDS)}"
            )
        if said.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("text_config.partial_rotary_factor other than 1 is not implemented")
        length = max_positions
        if kind in ("llama3", "yarn"):
            length = said.get("original_max_position_embeddings", max_positions)
        if kind == "yarn" and length and max_positions:
            said.setdefault("factor", max_positions / length)
        missing = [name for name in _NEEDS[kind] if name not in said]
        if missing:
            raise ValueError(f"text_config has rope_type {kind!r} without {', '.join(missing)}")
        sections = said.get("mrope_section")
        if sections is not None and sum(sections) != head_dim // 2:
            raise ValueError(
                f"mrope_section {list(sections)} adds up to {sum(sections)}; expected half the "
                f"head width, {head_dim // 2}"
            )
        low, high = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_slow", "beta_fast"),
        }.get(kind, ("", ""))
        return cls(
            theta=float(said["rope_theta"]),
            kind=kind,
            factor=1.0 if kind == "default" else float(said["factor"]),
            length=0 if kind in ("default", "linear") else int(length or 0),
            slow=float(said.get(low) or cls.slow),
            fast=float(said.get(high) or cls.fast),
            whole=bool(said.get("truncate", True)),
            magnitude=_magnitude(said) if kind == "yarn" else 1.0,
            sections=None if sections is None else tuple(sections),
            interleaved=interleaved and sections is not None,
        )


def _magnitude(parameters: Mapping[str, Any]) -> float:
    """Returns YaRN's factor on cosines and sines (Peng et al. 2023, section 3.4)."""
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(max(parameters["factor"], 1.0)) + 1.0

    own, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return grown(own) / grown(all_dim) if own and all_dim else grown(1.0)


def frequencies(rope: Rope, head_dim: int, reach: Array | int = 0) -> Array | np.ndarray:
    """Computes the angles by which the pairs of a head turn per position.

    Those of "linear" are divided by the factor. "dynamic" raises the base as soon as the context
    exceeds the original one. "llama3" and "yarn" divide only slow frequencies and blend the scaled
    and the unscaled ones in between: "llama3" by their turns, "yarn" by their index.

    Args:
        rope: base and scaling.
        head_dim: width of a head, C.
        reach: number of positions of the context ("dynamic").

    Returns:
        float32[C / 2].

    Peng et al. 2023 (YaRN; also describes linear and dynamic scaling); Llama 3: Grattafiori et al.
    2024.
    """
    powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # Rounded where PyTorch rounds: a frequency that differs in its last bit turns a head at
    # position 1000 by 1e-4 more or less.
    periods = (np.float64(np.float32(rope.theta)) ** powers).astype(np.float32)
    plain = 1 / periods
    if rope.kind == "dynamic":
        longer = rope.factor * jnp.maximum(reach, rope.length) / rope.length - (rope.factor - 1)
        grown = 1 / (rope.theta * longer ** (head_dim / (head_dim - 2))) ** powers
        return jnp.where(jnp.asarray(reach) > rope.length, grown, plain)
    if rope.kind == "default":
        return plain
    factor = np.float32(rope.factor)
    scaled = 1 / (factor * periods) if rope.kind == "yarn" else plain / factor
    if rope.kind == "linear":
        return scaled
    if rope.kind == "llama3":
        turns = plain * (rope.length / (2 * math.pi))
        share = (turns - rope.slow) / (rope.fast - rope.slow)
    else:
        # Index of the frequency that turns so many times in the original context.
        first, last = (
            head_dim * math.log(rope.length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.fast, rope.slow)
        )
        if rope.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        share = 1 - (np.arange(head_dim // 2) - first) / (last - first or 0.001)
    share = np.clip(share, 0, 1).astype(np.float32)
    return plain * share + scaled * (1 - share)


def angles(rope: Rope, positions: Array, head_dim: int) -> tuple[Array, Array]:
    """Computes the cosines and sines of rotary position embedding.

    With "dynamic" scaling they depend on the largest position of the batch. As in transformers,
    keys that are already in a cache keep the angles with which they were computed.

    Args:
        rope: base, scaling and sections.
        positions: int32[B, T], or int32[B, T, len(rope.sections)]; int32[B, T] has the same
            position in all components.
        head_dim: width of a head, C.

    Returns:
        float32[B, T, C] each, laid out for rotating the two halves of a head against each other,
        as in the Llama family.

    Su et al. 2021; sections: Qwen2-VL, Wang et al. 2024, section 2.1.
    """
    turn = frequencies(rope, head_dim, positions.max() + 1 if rope.kind == "dynamic" else 0)
    if positions.ndim == 3:
        assert rope.sections is not None, "positions with components need sections"
        positions = positions[..., _components(rope.sections, rope.interleaved)]
    else:
        positions = positions[..., None]
    halves = positions.astype(jnp.float32) * turn
    both = jnp.concatenate([halves, halves], axis=-1)
    return jnp.cos(both) * rope.magnitude, jnp.sin(both) * rope.magnitude


def _components(sections: tuple[int, ...], interleaved: bool) -> np.ndarray:
    """Returns the component of the position with which each frequency rotates, int[C / 2]."""
    if not interleaved:
        return np.repeat(np.arange(len(sections)), sections)
    # The components take turns until the shorter sections are used up; the first has the rest.
    component = np.zeros(sum(sections), int)
    for i, count in enumerate(sections[1:], 1):
        component[i : count * len(sections) : len(sections)] = i
    return component
