"""Base class of the ported models: image features joined to token embeddings, one decoder.

B batch, T positions of the prompt, S cache slots, D width, V vocabulary.

Each model file subclasses `VisionLanguageModel` with its towers and `embed_inputs`. Forward pass,
prefill and decode step are the same for all models and are implemented here.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from ports.intervene import edits, steer
from ports.names import normal_name
from ports.nn import attention, decoder
from ports.parallel import sharding

Array = jax.Array
Inputs = Mapping[str, Any]
EXAMPLE_TEXT = 8  # text tokens in the ports' example inputs, in addition to the image's tokens
EMBEDDINGS = ("embed_tokens", "wte")  # what decoders call the module that embeds tokens


class ImageStates(NamedTuple):
    """What the decoder reads at image tokens: N states in their order, and then others."""

    embedded: Array  # float[N or more, D], the input of the first layer
    injected: tuple[Array, ...] = ()  # likewise, what is added after each of the first layers

    def resized(self, size: int) -> "ImageStates":
        """Returns the first `size` states, padded with zeros; there must be at least N."""

        def fit(states: Array) -> Array:
            return jnp.pad(states[:size], ((0, max(size - len(states), 0)), (0, 0)))

        return jax.tree.map(fit, self)


@runtime_checkable
class TextDecoder(Protocol):
    """A decoder: embeds tokens, and maps embeddings to states after the final norm."""

    def embed_tokens(self, tokens: Array, /) -> Array:
        """Maps tokens int[B, T] to [B, T, D]."""
        ...

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array,
        start: Array | None = None,
        last_only: bool = False,
    ) -> Array:
        """Maps embeddings to states, as `decoder.Decoder` does."""
        ...


class VisionLanguageModel(nn.Module):
    """A vision tower joined to a decoder. Subclasses implement what raises NotImplementedError.

    Attributes:
        config: a configuration with `text`, the decoder's, and `image_tokens`, the ids of the
            tokens that stand for an image.
        dtype: dtype of the computation.
        decoder_path: Flax path of the decoder, where its cache is stored among the variables.
        head_path: Flax path of the language-model head.
        axes: sharding rules of the parameters.
        cache_path: path below the decoder of the module in layer {} that holds the cache.
        norm_name: name of the final norm in the decoder.
        prefix_lm: whether all tokens of a prompt see each other both ways, so that an answer in the
            same text must be marked (see `blocks`).
        position_inputs: arrays of pictures that `positions` reads; with the tower's result at hand,
            others are not needed.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    decoder_path: ClassVar[tuple[str, ...]]
    head_path: ClassVar[tuple[str, ...]]
    axes: ClassVar[sharding.Axes]
    cache_path: ClassVar[tuple[str, ...]] = ("layers_{}", "self_attn")
    norm_name: ClassVar[str] = "norm"
    prefix_lm: ClassVar[bool] = False
    position_inputs: ClassVar[tuple[str, ...]] = ()

    @property
    def text_decoder(self) -> TextDecoder:
        """The decoder."""
        raise NotImplementedError

    @property
    def num_embeddings(self) -> int:
        """Number of embeddings; ids from 0 to this number - 1 are valid."""
        return self.config.text.num_embeddings

    @property
    def tied(self) -> dict[str, str]:
        """{name of a tied head in a checkpoint: name of the embeddings}; empty if not tied."""
        if not self.config.text.tie_embeddings:
            return {}
        table = (*self.decoder_path, "embed_tokens")
        return {".".join(self.head_path) + ".weight": ".".join(table) + ".weight"}

    def untied(self) -> "VisionLanguageModel":
        """Returns the same module with a separate head."""
        text = dataclasses.replace(self.config.text, tie_embeddings=False)
        return self.clone(config=dataclasses.replace(self.config, text=text))

    def unembed(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the head only."""
        raise NotImplementedError

    def unembed_through_norm(self, x: Array) -> Array:
        """Maps x[..., D] to logits float32[..., V] with the final norm and the head."""
        return self.unembed(getattr(self.text_decoder, self.norm_name)(x))

    def embed_inputs(self, inputs: Inputs) -> Array:
        """Maps the processor's arrays to the input of the first decoder layer, [B, T, D]."""
        raise NotImplementedError

    def embed_with_injections(self, inputs: Inputs) -> tuple[Array, Sequence[Array]]:
        """Maps the processor's arrays to the input of the first decoder layer, [B, T, D], and the
        features [B, T, D] that are added after each of the first layers (DeepStack).
        """
        return self.embed_inputs(inputs), ()

    def encode_images(self, inputs: Inputs) -> ImageStates:
        """Computes what the decoder reads at image tokens; inputs with it skip the vision tower.

        Args:
            inputs: the processor's arrays.

        Returns:
            The states, for the key "image_states" of inputs with the same images.
        """
        x, injections = self.embed_with_injections(inputs)
        found = is_image(jnp.asarray(inputs["input_ids"]), self.config.image_tokens).reshape(-1)
        order = jnp.argsort(~found, stable=True)
        embedded, *injected = (
            states.reshape(-1, states.shape[-1])[order] for states in (x, *injections)
        )
        return ImageStates(embedded, tuple(injected))

    def _embedded(self, inputs: Inputs) -> tuple[Array, Sequence[Array]]:
        """Does `embed_with_injections`, without the vision tower if it has run already."""
        images: ImageStates | None = inputs.get("image_states")
        if images is None:
            return self.embed_with_injections(inputs)
        tokens = jnp.asarray(inputs["input_ids"])
        found = is_image(tokens, self.config.image_tokens)
        # The image token may be outside the embedding table.
        x = self.text_decoder.embed_tokens(jnp.where(found, 0, tokens))
        none = jnp.zeros_like(x)
        added = [place_images(none, found, states) for states in images.injected]
        return place_images(x, found, images.embedded), added

    def is_after_images(self, site: str) -> bool:
        """Returns whether a site comes after text and images are joined, and so does not change
        what `encode_images` returns.
        """
        before = {normal_name(".".join((*self.decoder_path, name))) for name in EMBEDDINGS}
        return self.is_of_decoder(site) and normal_name(site) not in before

    def blocks(self, inputs: Inputs) -> Array | None:
        """Returns int[B, T]: positions of a prompt with the same number see each other both ways,
        except for -1; None if every position sees only earlier ones.
        """
        return None

    @property
    def kv_heads(self) -> sharding.KVHeads:
        """{module path: number of key-value heads} of modules that are sharded by whole heads."""
        return {self.decoder_path: self.config.text.num_kv_heads}

    def is_of_decoder(self, site: str) -> bool:
        """Returns whether a site is in the decoder or head, which also run for generated tokens."""
        path, head = ".".join(self.decoder_path), ".".join(self.head_path)
        site = normal_name(site)
        return site in (path, head) or site.startswith(path + ".")

    def is_before_norm(self, site: str) -> bool:
        """Returns whether a site is in the decoder, before its final norm."""
        path, head = ".".join(self.decoder_path), ".".join(self.head_path)
        return self.is_of_decoder(site) and normal_name(site) not in (
            path,
            head,
            f"{path}.{self.norm_name}",
        )

    def positions(self, inputs: Inputs) -> Array:
        """Returns the rotary positions of the tokens; needs no parameters.

        Args:
            inputs: the processor's arrays.

        Returns:
            int32[B, T], or int32[B, T, 3] for M-RoPE.
        """
        given = inputs.get("position_ids")
        return decoder.token_positions(attention_mask(inputs)) if given is None else given

    def next_positions(self, inputs: Inputs) -> Array:
        """Returns int32[B], the rotary position of the first token after each row."""
        return self.positions(inputs).reshape(len(inputs["input_ids"]), -1).max(-1) + 1

    def places(self, inputs: Inputs) -> edits.Places:
        """Describes the positions of a prompt, for edits that select positions by kind.

        Args:
            inputs: the processor's arrays. An optional `position_kinds` int[B, T] overrides the
                kinds, to mark the generated part of a text that contains an answer; `columns`
                int[B, T] are the caller's columns, if padding has moved them.

        Returns:
            Kind, index and column of each position.
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
        """Maps the processor's arrays to logits float32[B, T, V] at every position.

        A token id without an embedding gives NaN from its position on; `VLM` refuses such ids.
        """
        states = self.states(inputs)
        with steer.at_places(self.places(inputs)):
            return self.unembed(states)

    def states(self, inputs: Inputs, last_only: bool = False) -> Array:
        """Maps the processor's arrays to states after the final norm, [B, T, D] or [B, 1, D]."""
        x, injections = self._embedded(inputs)
        mask, blocks = attention.token_mask(attention_mask(inputs)), self.blocks(inputs)
        options: dict[str, Any] = {"last_only": last_only}
        # Decoders without them need not know these arguments.
        options |= {} if blocks is None else {"blocks": blocks}
        options |= {"injections": injections} if injections else {}
        with steer.at_places(self.places(inputs)):
            return self.text_decoder(x, self.positions(inputs), mask, **options)

    def init_cache(self, batch: int, slots: int) -> dict:
        """Makes an empty cache, the variable collection "cache" of this module."""
        dtype = jnp.dtype(self.dtype)
        return self._below_decoder(
            decoder.init_cache(self.config.text, batch, slots, dtype, self.cache_path)
        )

    def prompt_cache_axes(self, sites: Iterable[str]) -> dict:
        """Returns the `vmap` axes of a prompt's cache for several variants of edits.

        Args:
            sites: the edited sites.

        Returns:
            A prefix of the tree of `init_cache`, {...: {layer: None or 0}}: None for layers whose
            keys and values the edits do not change, so that all variants share one copy.
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
        """Counts the decoder layers whose keys and values do not depend on a site's states.

        A layer itself counts only for its output: a module inside it may come before or after its
        keys and values.
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
        """Computes the logits of the last position and fills the cache.

        Args:
            inputs: the processor's arrays.
            last_only: compute only the last position in the last layer.

        Returns:
            float32[B, V].
        """
        states = self.states(inputs, last_only)[:, -1:]
        with steer.at_places(jax.tree.map(lambda x: x[..., -1:], self.places(inputs))):
            return self.unembed(states)[:, 0]

    def continue_prefill(
        self,
        tokens: Array,
        positions: Array,
        mask: Array,
        slot: Array,
        places: edits.Places,
        last_only: bool = True,
    ) -> Array:
        """Continues the prefill of prompts whose beginning is in the cache.

        Args:
            tokens: int32[B, T], text without images.
            positions: their rotary positions, int32[B, T].
            mask: bool[B, 1, T, S], which cache slots each token sees.
            slot: int32[], cache slot of the first token.
            places: what the positions are.
            last_only: compute only the last position in the last layer.

        Returns:
            Logits of the last position, float32[B, V].
        """
        with steer.at_places(places):
            x = self.text_decoder.embed_tokens(tokens)
            x = self.text_decoder(x, positions, mask, start=slot, last_only=last_only)
        with steer.at_places(jax.tree.map(lambda x: x[..., -1:], places)):
            return self.unembed(x[:, -1:])[:, 0]

    def extend(
        self,
        tokens: Array,
        positions: Array,
        mask: Array,
        slot: Array,
        column: Array | None = None,
    ) -> Array:
        """Runs text tokens that continue a cached prompt, and adds them to the cache.

        Args:
            tokens: int32[B, T].
            positions: their rotary positions, int32[B, T].
            mask: bool[B or 1, 1, T, S], which cache slots each token sees.
            slot: int32[], cache slot of the first token.
            column: int32[], the caller's column of the first token, if it differs from `slot`.

        Returns:
            States after the final norm, [B, T, D].
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
        """Runs one token per row.

        Args:
            tokens: int32[B].
            positions: int32[B].
            valid: bool[B, S], which cache slots the token sees.
            slot: int32[], its cache slot.
            column: int32[], the caller's column, if it differs from `slot`.

        Returns:
            Logits float32[B, V].
        """
        tokens, mask = tokens[:, None], valid[:, None, None, :]
        states = self.extend(tokens, positions[:, None], mask, slot, column)
        with steer.at_places(_generated_places(tokens, mask, slot, column)):
            return self.unembed(states)[:, 0]


def _columns(inputs: Inputs) -> Array:
    """Returns int32[B or 1, T], the columns of the caller's inputs."""
    given = inputs.get("columns")
    return jnp.arange(inputs["input_ids"].shape[1])[None] if given is None else jnp.asarray(given)


def next_column(inputs: Inputs) -> Array | None:
    """Returns the column after the caller's last one, if the inputs have `columns`; else None."""
    return _columns(inputs).max() + 1 if "columns" in inputs else None


def _generated_places(
    tokens: Array, mask: Array, slot: Array, column: Array | None
) -> edits.Places:
    # A token sees itself and all earlier tokens: its index is one less than their number.
    index = jnp.broadcast_to(mask[:, 0].sum(-1, dtype=jnp.int32) - 1, tokens.shape)
    kind = jnp.full(tokens.shape, edits.GENERATED)
    first = slot if column is None else column
    return edits.Places(kind, index, (first + jnp.arange(tokens.shape[1]))[None])


def attention_mask(inputs: Inputs) -> Array:
    """Returns the inputs' attention mask; without one, every position is a token."""
    mask = inputs.get("attention_mask")
    return jnp.ones_like(inputs["input_ids"]) if mask is None else jnp.asarray(mask)


def is_image(tokens: Array, image_tokens: tuple[int, ...]) -> Array:
    """Returns bool[B, T], which of the tokens int[B, T] stand for an image."""
    return jnp.isin(tokens, jnp.array(image_tokens))


def check_image_tokens(
    input_ids: np.ndarray,
    image_tokens: tuple[int, ...],
    num_images: int,
    num_features: int,
    expected: str,
    what: str = "image",
) -> None:
    """Checks that the prompts contain as many image tokens as there are image features.

    Args:
        input_ids: int[B, T].
        image_tokens: ids of the image tokens.
        num_images: number of images in the batch.
        num_features: number of features in the batch.
        expected: the right number, in words, for the message.
        what: "image" or "video".

    Raises:
        ValueError: the numbers differ.
    """
    count = int(np.isin(input_ids, image_tokens).sum())
    if num_images and not count:
        raise ValueError(
            f"the batch has {num_images} {what}s but no {what} token (id {image_tokens[0]}) "
            f"in its prompts; put <{what}> into each prompt that has one"
        )
    if count != num_features:
        raise ValueError(
            f"{num_images} {what}s give {num_features} {what} features, but the prompts hold "
            f"{count} {what} tokens; expected {expected}"
        )


def place_images(x: Array, is_image: Array, features: Array, valid: Array | None = None) -> Array:
    """Puts image features, in order, at the positions of the image tokens.

    Args:
        x: [B, T, D], token embeddings.
        is_image: bool[B, T], the image tokens.
        features: [F, D], in the order of the image tokens, row by row.
        valid: bool[F], the features to use, as many as there are image tokens; None for all.

    Returns:
        [B, T, D].
    """

    def placed(x: Array, is_image: Array, features: Array, valid: Array | None) -> Array:
        index = jnp.cumsum(is_image.reshape(-1)) - 1
        if valid is not None:
            features = features[jnp.argsort(~valid, stable=True)]
        features = features[jnp.clip(index, 0, len(features) - 1)].reshape(x.shape)
        return jnp.where(is_image[..., None], features.astype(x.dtype), x)

    rows = len(x)
    if not sharding.is_on_mesh() or not len(features) or len(features) % rows:
        return placed(x, is_image, features, valid)
    # If every row has its share of the features, as with one image per prompt, each device places
    # those of its own rows. Else the features cross the devices.
    own = features.reshape(rows, -1, features.shape[-1])
    own = sharding.constrain(own, "batch", "positions", "embed")
    real = jnp.ones(len(features), bool) if valid is None else valid
    real = sharding.constrain(real.reshape(rows, -1), "batch", "positions")
    is_even = jnp.all(real.sum(1) == is_image.sum(1))

    def by_row() -> Array:
        # Constrained here too: what is inside a conditional is divided by itself.
        order = jnp.argsort(~real, axis=1, stable=True)
        index = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, own.shape[1] - 1)
        index = jnp.take_along_axis(order, index, axis=1) if valid is not None else index
        chosen = jnp.take_along_axis(own, index[..., None], axis=1)
        chosen = jnp.where(is_image[..., None], chosen.astype(x.dtype), x)
        return sharding.constrain(chosen, "batch", "positions", "embed")

    return jax.lax.cond(is_even, by_row, lambda: placed(x, is_image, features, valid))
