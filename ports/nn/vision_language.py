"""What the ported models have in common: image features joined to token embeddings, one decoder.

B batch, T positions of the prompt, S cache slots, D width, V vocabulary.

A model file subclasses `VisionLanguageModel` with its towers and `embed_inputs`; forward pass,
prefill and decode step are the same for all and stand here.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ports.intervene import edits, steer
from ports.names import normal_name
from ports.nn import decoder
from ports.parallel import sharding

Array = jax.Array
Inputs = Mapping[str, Any]
EXAMPLE_TEXT = 8  # text tokens of the ports' example inputs, beside those of the image


@runtime_checkable
class TextDecoder(Protocol):
    """A decoder: embeddings of tokens, and states after the final norm."""

    def embed_tokens(self, tokens: Array, /) -> Array:
        """tokens int[B, T] -> [B, T, D]."""
        ...

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array,
        start: Array | None = None,
        last_only: bool = False,
    ) -> Array:
        """As `decoder.Decoder`."""
        ...


class VisionLanguageModel(nn.Module):
    """A vision tower joined to a decoder. Subclasses set what raises here.

    `config` has `text`, the decoder's configuration, and `image_tokens`, the ids of the tokens
    that stand for an image.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32
    # The paths of the decoder's module, which is where its cache lies among the variables, and of
    # the language-model head.
    decoder_path: ClassVar[tuple[str, ...]]
    head_path: ClassVar[tuple[str, ...]]
    # Where each parameter lies on a mesh.
    axes: ClassVar[sharding.Axes]
    # Below the decoder: the module of layer {} that has the cache, and the final norm.
    cache_path: ClassVar[tuple[str, ...]] = ("layers_{}", "self_attn")
    norm_name: ClassVar[str] = "norm"

    @property
    def text_decoder(self) -> TextDecoder:
        """The decoder: called with embeddings, and with `embed_tokens` for the tokens'."""
        raise NotImplementedError

    @property
    def num_embeddings(self) -> int:
        """Token ids with an embedding: 0 up to this number, excluded."""
        return self.config.text.vocab_size

    @property
    def tied(self) -> dict[str, str]:
        """A tied head's name in a checkpoint -> that of the embeddings; empty if it is not tied."""
        if not self.config.text.tie_embeddings:
            return {}
        table = (*self.decoder_path, "embed_tokens")
        return {".".join(self.head_path) + ".weight": ".".join(table) + ".weight"}

    def untied(self) -> "VisionLanguageModel":
        """The same with a head of its own."""
        text = dataclasses.replace(self.config.text, tie_embeddings=False)
        return self.clone(config=dataclasses.replace(self.config, text=text))

    def unembed(self, x: Array) -> Array:
        """x[..., D] -> logits float32[..., V]: the language-model head alone."""
        raise NotImplementedError

    def unembed_through_norm(self, x: Array) -> Array:
        """x[..., D] -> logits[..., V]: the decoder's final norm, then the head."""
        return self.unembed(getattr(self.text_decoder, self.norm_name)(x))

    def embed_inputs(self, inputs: Inputs) -> Array:
        """The processor's arrays -> what enters the first decoder layer, [B, T, D]."""
        raise NotImplementedError

    @property
    def kv_heads(self) -> sharding.KVHeads:
        """Module path -> number of key-value heads, of what `sharding` divides by whole heads."""
        return {self.decoder_path: self.config.text.num_kv_heads}

    def is_of_decoder(self, site: str) -> bool:
        """Whether a site is in the decoder or its head, and so runs for generated tokens too."""
        path, head = ".".join(self.decoder_path), ".".join(self.head_path)
        site = normal_name(site)
        return site in (path, head) or site.startswith(path + ".")

    def is_before_norm(self, site: str) -> bool:
        """Whether what a site of the decoder puts out goes through its final norm to the head."""
        path, head = ".".join(self.decoder_path), ".".join(self.head_path)
        return self.is_of_decoder(site) and normal_name(site) not in (
            path,
            head,
            f"{path}.{self.norm_name}",
        )

    def positions(self, inputs: Inputs) -> Array:
        """The tokens' rotary positions, int32[B, T] or [B, T, 3]; needs no parameters.

        A generated token gets the position after the highest of its row.
        """
        given = inputs.get("position_ids")
        return decoder.token_positions(attention_mask(inputs)) if given is None else given

    def places(self, inputs: Inputs) -> edits.Places:
        """What a prompt's positions are, for edits that ask for some kinds of them.

        The inputs' own `position_kinds` int[B, T] go first: of a text that holds an answer, which
        part was generated. `columns` int[B, T] are the caller's, where padding has moved them.
        """
        tokens, mask = jnp.asarray(inputs["input_ids"]), attention_mask(inputs) != 0
        if mask.ndim == 3:
            mask = jnp.diagonal(mask, axis1=1, axis2=2)
        index = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
        kind = jnp.where(is_image(tokens, self.config.image_tokens), edits.IMAGE, edits.TEXT)
        kind = jnp.where(index == index[:, -1:], edits.LAST_PROMPT, kind)
        given = inputs.get("position_kinds")
        kind = jnp.where(mask, kind if given is None else given, edits.PADDING)
        return edits.Places(kind, index, _columns(inputs))

    def __call__(self, inputs: Inputs) -> Array:
        """The processor's arrays -> logits[B, T, V] at every position.

        A token id without an embedding gives NaN from its position on; `VLM` refuses it instead.
        """
        states = self.states(inputs)
        with steer.at_places(self.places(inputs)):
            return self.unembed(states)

    def states(self, inputs: Inputs, last_only: bool = False) -> Array:
        """The processor's arrays -> states after the final norm [B, T, D], or [B, 1, D]."""
        x = self.embed_inputs(inputs)
        mask = decoder.causal_mask(attention_mask(inputs))
        with steer.at_places(self.places(inputs)):
            return self.text_decoder(x, self.positions(inputs), mask, last_only=last_only)

    def init_cache(self, batch: int, slots: int) -> dict:
        """An empty cache, as the variable collection "cache" of this module."""
        dtype = jnp.dtype(self.dtype)
        return self._below_decoder(
            decoder.init_cache(self.config.text, batch, slots, dtype, self.cache_path)
        )

    def prompt_cache_axes(self, sites: Iterable[str]) -> dict:
        """The `vmap` axes of a prompt's cache under variants of edits at the sites.

        {...: {layer: None or 0}}: None where the edits leave the layer's keys and values as they
        are, so that one copy serves all variants. A prefix of the tree of `init_cache`.
        """
        count = self.config.text.num_layers
        shared = min(map(self._layers_before, sites), default=count)
        return self._below_decoder(
            {self.cache_path[0].format(i): None if i < shared else 0 for i in range(count)}
        )

    def _below_decoder(self, cache: dict) -> dict:
        for name in reversed(self.decoder_path):
            cache = {name: cache}
        return cache

    def _layers_before(self, site: str) -> int:
        """How many of the decoder's layers have computed keys and values before a site's states.

        Of a layer only its output counts as behind them: a module inside it may be either.
        """
        path, head = ".".join(self.decoder_path), ".".join(self.head_path)
        site = normal_name(site)
        if site in (path, head, f"{path}.{self.norm_name}"):
            return self.config.text.num_layers
        layers = normal_name(f"{path}.{self.cache_path[0].format(0)}").removesuffix("0")
        if not site.startswith(layers):
            return 0
        number, _, inside = site.removeprefix(layers).partition(".")
        return int(number) + (not inside)

    def prefill(self, inputs: Inputs, last_only: bool = True) -> Array:
        """As `__call__`, but the logits [B, V] of the last position only; fills the cache.

        last_only: the last layer puts out the last position alone; else, as the others, all.
        """
        states = self.states(inputs, last_only)[:, -1:]
        with steer.at_places(jax.tree.map(lambda x: x[..., -1:], self.places(inputs))):
            return self.unembed(states)[:, 0]

    def extend(
        self,
        tokens: Array,
        positions: Array,
        mask: Array,
        slot: Array,
        column: Array | None = None,
    ) -> Array:
        """Text tokens behind what the cache holds, whose keys and values they see and add to.

        tokens and their rotary positions int32[B, T]; mask bool[B or 1, 1, T, S], which cache slots
        each of them sees; slot int32[], where the first of them goes; column int32[], which the
        caller's next is, if another -> final states [B, T, D].
        """
        with steer.at_places(_generated_places(tokens, mask, slot, column)):
            x = self.text_decoder.embed_tokens(tokens)
            return self.text_decoder(x, positions, mask, start=slot)

    def decode_step(
        self,
        tokens: Array,
        positions: Array,
        valid: Array,
        slot: Array,
        column: Array | None = None,
    ) -> Array:
        """One token a row: tokens and positions int32[B], valid bool[B, S] -> logits[B, V]."""
        tokens, mask = tokens[:, None], valid[:, None, None, :]
        states = self.extend(tokens, positions[:, None], mask, slot, column)
        with steer.at_places(_generated_places(tokens, mask, slot, column)):
            return self.unembed(states)[:, 0]


def _columns(inputs: Inputs) -> Array:
    """int32[B or 1, T]: the columns of the caller's inputs."""
    given = inputs.get("columns")
    return jnp.arange(inputs["input_ids"].shape[1])[None] if given is None else jnp.asarray(given)


def next_column(inputs: Inputs) -> Array | None:
    """The column after the caller's last, if the inputs say which are the caller's."""
    return _columns(inputs).max() + 1 if "columns" in inputs else None


def _generated_places(
    tokens: Array, mask: Array, slot: Array, column: Array | None
) -> edits.Places:
    # A token sees itself and what precedes it: its index is one less than their number.
    index = jnp.broadcast_to(mask[:, 0].sum(-1, dtype=jnp.int32) - 1, tokens.shape)
    kind = jnp.full(tokens.shape, edits.GENERATED)
    first = slot if column is None else column
    return edits.Places(kind, index, (first + jnp.arange(tokens.shape[1]))[None])


def attention_mask(inputs: Inputs) -> Array:
    """The inputs' attention mask; without one, every position is a token."""
    mask = inputs.get("attention_mask")
    return jnp.ones_like(inputs["input_ids"]) if mask is None else jnp.asarray(mask)


def is_image(tokens: Array, image_tokens: tuple[int, ...]) -> Array:
    """bool[B, T]: which of the tokens int[B, T] stand for an image."""
    return jnp.isin(tokens, jnp.array(image_tokens))


def check_image_tokens(
    input_ids: np.ndarray,
    image_tokens: tuple[int, ...],
    num_images: int,
    num_features: int,
    expected: str,
    what: str = "image",
) -> None:
    """ValueError unless the prompts int[B, T] hold as many image tokens as there are features.

    expected: what the message says about the right number; what: "image" or "video".
    """
    count = int(np.isin(input_ids, image_tokens).sum())
    if num_images and not count:
        raise ValueError(
            f"the batch has {num_images} {what}s but no {what} token (id {image_tokens[0]}) "
            f"in its prompts; put <{what}> into each prompt that goes with one"
        )
    if count != num_features:
        raise ValueError(
            f"{num_images} {what}s give {num_features} {what} features, but the prompts hold "
            f"{count} {what} tokens; expected {expected}"
        )


def place_images(x: Array, is_image: Array, features: Array, valid: Array | None = None) -> Array:
    """Puts image features, in order, where the image tokens are.

    x[B, T, D], is_image bool[B, T], features[F, D]; valid bool[F] says which of the features count
    (None: all), as many as there are image tokens in the batch, read row by row -> [B, T, D].
    """
    index = jnp.cumsum(is_image.reshape(-1)) - 1
    if valid is not None:
        features = features[jnp.argsort(~valid, stable=True)]
    features = features[jnp.clip(index, 0, len(features) - 1)].reshape(x.shape)
    return jnp.where(is_image[..., None], features.astype(x.dtype), x)
