"""Causal language models that read text alone: the decoders of the families of LLaVA, on their own.

B batch, T positions, D width.

`ports.load_text` loads them, `ports.load` does not: they have no pictures to explain. They judge
texts, as Llama Guard does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ports.models.port import Port
from ports.nn import decoder, layers, vision_language
from ports.parallel import sharding

Array = jax.Array
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Config:
    """The values that the port needs from a transformers LlamaConfig, or that of another family."""

    text: decoder.DecoderConfig
    image_tokens: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers configuration.

        Raises:
            ValueError: a value is not implemented.
        """
        tied = bool(config.tie_word_embeddings)
        return cls(decoder.DecoderConfig.from_hf(config, tied, *MODEL_TYPES))


class CausalLM(vision_language.VisionLanguageModel):
    """A decoder and its head, whose only inputs are tokens."""

    config: Config
    axes = decoder.AXES
    decoder_path = ("model",)
    head_path = ("lm_head",)

    def setup(self):
        self.model = decoder.Decoder(self.config.text, self.dtype)
        if not self.config.text.tie_embeddings:
            self.lm_head = layers.head(self.config.text.vocab_size, self.dtype)

    @property
    def text_decoder(self) -> decoder.Decoder:
        """The decoder."""
        return self.model

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        tied = self.config.text.tie_embeddings
        return sharding.logits((self.model.embed_tokens.attend if tied else self.lm_head)(x))

    def embed_inputs(self, inputs: vision_language.Inputs) -> Array:
        """Maps input_ids int[B, T] to [B, T, D]."""
        return self.model.embed_tokens(inputs["input_ids"])


def example_inputs(config: Config, batch: int = 1, length: int | None = None) -> dict[str, Any]:
    """Returns shapes and dtypes of a batch, to trace initialisation with."""
    ids = jax.ShapeDtypeStruct((batch, length or vision_language.EXAMPLE_TEXT), np.int32)
    return {"input_ids": ids, "attention_mask": ids}


def prepare_inputs(config: Config, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays as they are."""
    return dict(inputs)


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in a checkpoint to the port's; None for buffers."""
    return None if name.endswith("rotary_emb.inv_freq") else name


def read_processor(directory: Path) -> Any:
    """Refuses to load a processor, as there is none.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{directory} is a model of text without pictures; use its tokenizer")


PORT = Port(
    config=Config,
    module=CausalLM,
    inputs=("input_ids", "attention_mask", "position_ids"),
    example_inputs=example_inputs,
    prepare_inputs=prepare_inputs,
    canonical_name=canonical_name,
    read_processor=read_processor,
)
