"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): text encoders with a state per token.

B texts, T positions, D width, H heads.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports import checkpoint
from ports.checkpoint import hub
from ports.inputs import vocabulary
from ports.inputs.model_inputs import check_length
from ports.nn import attention, layers
from ports.nn.encoder import EncoderConfig
from ports.parallel import compiled
from ports.programs import keep_programs

Array = jax.Array
MODEL_TYPES = ("bert", "roberta")


@dataclasses.dataclass(frozen=True)
class Config(EncoderConfig):
    """The values that the port needs from a transformers BertConfig or RobertaConfig."""

    model_type: str
    vocab_size: int
    num_positions: int  # rows in the table of positions
    first_position: int  # row of the first token: RoBERTa skips the rows up to the pad token's id
    num_token_types: int

    @classmethod
    def from_hf(cls, config: Any) -> "Config":
        """Reads a transformers BertConfig or RobertaConfig.

        Raises:
            ValueError: a value is not implemented: decoders, relative positions, an unknown
                activation, or a width that is not a multiple of the heads.
        """
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(config, name, False):
                raise ValueError(f"config.{name} is true; this port implements encoders only")
        positions = getattr(config, "position_embedding_type", None) or "absolute"
        if positions != "absolute":
            raise ValueError(
                f"config.position_embedding_type is {positions!r}; expected 'absolute'"
            )
        return cls(
            **dataclasses.asdict(EncoderConfig.from_hf(config)),
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            num_positions=config.max_position_embeddings,
            first_position=0 if config.model_type == "bert" else config.pad_token_id + 1,
            num_token_types=config.type_vocab_size,
        )

    @property
    def max_length(self) -> int:
        """Maximum length of a text in tokens, including special ones."""
        return self.num_positions - self.first_position


class Embeddings(nn.Module):
    """Normalised sum of the embeddings of token, position and the first token type."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps tokens int[B, T], padded on the right, to [B, T, D]."""
        cfg = self.config
        check_length(tokens, cfg.max_length)

        def table(size: int, name: str) -> nn.Embed:
            return nn.Embed(size, cfg.hidden_size, dtype=self.dtype, name=name)

        x = table(cfg.vocab_size, "word_embeddings")(tokens)
        x = x + table(cfg.num_token_types, "token_type_embeddings")(jnp.zeros_like(tokens))
        positions = cfg.first_position + jnp.arange(tokens.shape[1])
        x = x + table(cfg.num_positions, "position_embeddings")(positions)
        return layers.layer_norm(cfg.norm_eps, self.dtype, "LayerNorm")(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention without its output projection."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps x[B, T, D] and mask bool[B, 1, 1, T] to [B, T, D]."""
        heads = self.config.num_heads

        def project(name: str) -> Array:
            y = layers.dense(x.shape[-1], True, self.dtype, name)(x)
            return y.reshape(*x.shape[:2], heads, -1)

        y = attention.attend(project("query"), project("key"), project("value"), mask)
        return y.reshape(x.shape)


class Output(nn.Module):
    """The end of both halves of a block: a linear layer, the residual, a norm."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, y: Array, x: Array) -> Array:
        """Maps y[B, T, .] and residual x[B, T, D] to [B, T, D]."""
        x = x + layers.dense(self.config.hidden_size, True, self.dtype, "dense")(y)
        return layers.layer_norm(self.config.norm_eps, self.dtype, "LayerNorm")(x)


class Attention(nn.Module):
    """The first half of a block."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps x[B, T, D] and mask bool[B, 1, 1, T] to [B, T, D]."""
        y = SelfAttention(self.config, self.dtype, name="self")(x, mask)
        return Output(self.config, self.dtype, name="output")(y, x)


class Intermediate(nn.Module):
    """The hidden layer of a block's MLP."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps x[B, T, D] to [B, T, intermediate_size]."""
        y = layers.dense(self.config.intermediate_size, True, self.dtype, "dense")(x)
        return layers.activation(self.config.hidden_act)(y)


class Layer(nn.Module):
    """A post-norm transformer block."""

    config: Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        """Maps x[B, T, D] and mask bool[B, 1, 1, T] to [B, T, D]."""
        x = Attention(self.config, self.dtype, name="attention")(x, mask)
        y = Intermediate(self.config, self.dtype, name="intermediate")(x)
        return Output(self.config, self.dtype, name="output")(y, x)


class Encoder(nn.Module):
    """The stack of blocks."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        # Singular, as in the checkpoints.
        self.layer = [Layer(self.config, self.dtype) for _ in range(self.config.num_layers)]

    def __call__(self, x: Array, mask: Array) -> tuple[Array, ...]:
        """Maps x[B, T, D] and mask bool[B, 1, 1, T] to num_layers + 1 states [B, T, D]."""
        states = [x]
        for layer in self.layer:
            states.append(layer(states[-1], mask))
        return tuple(states)


class Bert(nn.Module):
    """The encoder, with the parameter names of transformers' BertModel and RobertaModel."""

    config: Config
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.embeddings = Embeddings(self.config, self.dtype)
        self.encoder = Encoder(self.config, self.dtype)

    def __call__(self, tokens: Array, attention_mask: Array) -> tuple[Array, ...]:
        """Encodes texts.

        Args:
            tokens: int[B, T], padded on the right.
            attention_mask: int[B, T].

        Returns:
            The states [B, T, D] of the embeddings and after each layer.
        """
        mask = attention_mask.astype(bool)[:, None, None, :]
        return self.encoder(self.embeddings(tokens), mask)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A BERT or RoBERTa model with its parameters, made by `load`."""

    module: Bert
    params: dict
    directory: Path

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.module.config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, from transformers."""
        from transformers import AutoTokenizer

        checkpoint.require_tokenizer(self.directory)
        with checkpoint.loading(self.directory, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)
        vocabulary.warn_of_longer_tokenizer(tokenizer, self.config.vocab_size, (), self.directory)
        return tokenizer

    def states(
        self, tokens: Array | np.ndarray, attention_mask: Array | np.ndarray, layer: int
    ) -> Array:
        """Computes the states after a number of layers; later layers are not computed.

        Args:
            tokens: int[B, T], padded on the right.
            attention_mask: int[B, T].
            layer: number of layers, 0 (the embeddings) to `config.num_layers`.

        Returns:
            [B, T, D].

        Raises:
            ValueError: a token id is outside the vocabulary, the texts are too long, or there are
                fewer layers.
        """
        if not 0 <= layer <= self.config.num_layers:
            raise ValueError(f"layer is {layer}; expected 0 to {self.config.num_layers}")
        vocabulary.check_ids(np.asarray(tokens), self.config.vocab_size)
        mask = jnp.asarray(attention_mask)
        return _states(self.module, layer, self.params, jnp.asarray(tokens), mask)


@compiled.program(static=["layer"])
def _states(module: Bert, layer: int, params: dict, tokens: Array, attention_mask: Array) -> Array:
    return module.bind({"params": params})(tokens, attention_mask)[layer]


# Heads of the tasks that checkpoints were trained on.
_NOT_NEEDED = ("cls.", "lm_head.", "pooler.", "classifier.", "qa_outputs.")
_OLD_LEAVES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def canonical_name(name: str) -> str | None:
    """Converts a tensor's name in the file to the port's; None for heads and buffers."""
    name = name.removeprefix("bert.").removeprefix("roberta.")
    if name.startswith(_NOT_NEEDED) or name.endswith("position_ids"):
        return None
    for old, new in _OLD_LEAVES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def load_text_encoder(directory: str | Path, *, dtype: str = "float32") -> TextEncoder:
    """Loads a checkpoint of model_type bert or roberta, with or without a task's head.

    Args:
        directory: a directory, or a repository id on the Hub.
        dtype: dtype of the parameters and the computation: "float32", "bfloat16" or "float16".

    Returns:
        The model with its parameters.

    Raises:
        FileNotFoundError: as for `ports.load`.
        ValueError: as for `ports.load`.
    """
    keep_programs()
    kind = checkpoint.read_dtype(dtype)
    directory = hub.find_directory(directory)
    config = Config.from_hf(checkpoint.read_config(directory, MODEL_TYPES))
    module = Bert(config, dtype=kind)
    ids = jax.ShapeDtypeStruct((1, min(8, config.max_length)), np.int32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    params = checkpoint.load_params(directory, abstract, canonical_name, dtype=kind)
    return TextEncoder(module, params, directory)


load = load_text_encoder  # the name in earlier releases
