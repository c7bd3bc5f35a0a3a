"""The configuration of a decoder, from a Hugging Face text configuration."""

import dataclasses
from typing import Any

from ports.nn import layers
from ports.nn.rope import Rope

# What a model_type implies without its configuration saying so.
_GEMMA: dict[str, Any] = {"offset_norms": True, "scale_embeddings": True}
_GEMMA2: dict[str, Any] = {**_GEMMA, "post_norms": True}
_QWEN2: dict[str, Any] = {"qkv_bias": True, "output_bias": False}
_TRAITS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen3": {"qk_norm": True},
    "qwen3_vl_text": {"qk_norm": True},
    "molmo2_text": {"qk_norm": True, "output_bias": False},
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": {**_GEMMA2, "qk_norm": True},
}
# Values of a configuration that not every model_type has. transformers ignores those that a type
# does not have, even if its config.json has them, as files that were converted sometimes do.
_GEMMA_READS = ("attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window")
_READS: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": ("sliding_window",),
    "qwen2": ("sliding_window",),
    "qwen2_vl_text": ("sliding_window",),
    "qwen2_5_vl_text": ("sliding_window",),
    "qwen3": ("attention_bias", "sliding_window"),
    "qwen3_vl_text": ("attention_bias",),
    "molmo2_text": ("attention_bias", "additional_vocab_size"),
    "gemma": ("attention_bias",),
    "gemma2": (*_GEMMA_READS, "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": _GEMMA_READS,
}
_INTERLEAVED = ("qwen3_vl_text",)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a decoder.

    Attributes:
        vocab_size: number of logits.
        hidden_size: width of the states, D.
        intermediate_size: width inside the MLPs.
        num_layers: number of layers.
        num_heads: number of query heads.
        num_kv_heads: number of key-value heads.
        head_dim: width of a head.
        rope: rotary embedding.
        norm_eps: epsilon of the norms.
        hidden_act: activation of the MLPs.
        qkv_bias: whether query, key and value have biases.
        output_bias: whether the attention's output projection has a bias.
        mlp_bias: whether the MLPs have biases.
        tie_embeddings: whether the head is the transposed embeddings.
        sliding_window: number of positions that a query sees, including its own; None for all
            earlier ones.
        full_layers: layers without the window.
        sliding_rope: rotary embedding of the layers with the window; None for `rope`.
        unscaled_layers: layers whose rotary embedding has the base of `rope`, but no scaling.
        window_limits_blocks: whether positions that see each other both ways (see
            `Decoder.__call__`) must also be in the window.
        qk_norm: whether queries and keys are normalised per head, before the rotation.
        joint_qk_norm: whether they are normalised over all heads together (OLMo 2).
        offset_norms: whether norms multiply by 1 + their weight (Gemma).
        post_norms: whether attention and MLP are also followed by norms (Gemma 2 and 3).
        norms_after: whether the two norms of a layer follow attention and MLP (OLMo 2).
        scale_embeddings: whether embeddings are multiplied by the square root of the width.
        score_scalar: attention scores are divided by its square root; None for the head width.
        score_softcap: softcap of the attention scores; None for none.
        logit_softcap: softcap of the logits; None for none.
        num_injections: number of first layers after which features may be added (DeepStack).
        additional_vocab: number of embeddings after the vocabulary, which have no logits (Molmo2).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    norm_eps: float
    hidden_act: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    sliding_rope: Rope | None = None
    unscaled_layers: tuple[int, ...] = ()
    window_limits_blocks: bool = True
    qk_norm: bool = False
    joint_qk_norm: bool = False
    offset_norms: bool = False
    post_norms: bool = False
    norms_after: bool = False
    scale_embeddings: bool = False
    score_scalar: float | None = None
    score_softcap: float | None = None
    logit_softcap: float | None = None
    num_injections: int = 0
    additional_vocab: int = 0

    @classmethod
    def from_hf(cls, text: Any, tie_embeddings: bool, *model_types: str) -> "DecoderConfig":
        """Reads a transformers text configuration.

        Args:
            text: the text configuration.
            tie_embeddings: whether the head is tied to the embeddings.
            *model_types: the model_types that the family may have.

        Raises:
            ValueError: another model_type, or a value that is not implemented.
        """
        if text.model_type not in model_types:
            raise ValueError(
                f"text_config.model_type is {text.model_type!r}; expected "
                f"{' or '.join(map(repr, model_types))}"
            )

        def read(name: str) -> Any:
            return getattr(text, name, None) if name in _READS[text.model_type] else None

        hidden_act = read("hidden_activation") or text.hidden_act
        layers.activation(hidden_act)
        if text.num_hidden_layers < 1:
            raise ValueError(
                f"text_config has num_hidden_layers {text.num_hidden_layers}; expected at least 1"
            )
        if text.num_attention_heads % text.num_key_value_heads:
            raise ValueError(
                f"text_config has {text.num_attention_heads} attention heads, which is not a "
                f"multiple of its {text.num_key_value_heads} key-value heads"
            )
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        interleaved = text.model_type in _INTERLEAVED

        def rope(parameters: Any) -> Rope:
            return Rope.from_hf(parameters, head_dim, text.max_position_embeddings, interleaved)

        # Nested by the kind of layers, if they differ (Gemma 3).
        said = dict(text.rope_parameters)
        window, full_layers = _windows(text, read("sliding_window"))
        bias = bool(read("attention_bias"))
        values: dict[str, Any] = {
            "rope": rope(said.get("full_attention", said)),
            "sliding_rope": rope(said["sliding_attention"])
            if "sliding_attention" in said
            else None,
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": bool(read("mlp_bias")),
            "score_scalar": read("query_pre_attn_scalar"),
            "score_softcap": read("attn_logit_softcapping"),
            "logit_softcap": read("final_logit_softcapping"),
        }
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            norm_eps=text.rms_norm_eps,
            hidden_act=hidden_act,
            tie_embeddings=tie_embeddings,
            sliding_window=window,
            full_layers=full_layers,
            additional_vocab=read("additional_vocab_size") or 0,
            **(values | _TRAITS[text.model_type]),
        )

    @property
    def num_embeddings(self) -> int:
        """Number of embeddings, with those that have no logits."""
        return self.vocab_size + self.additional_vocab

    def window_of(self, layer: int) -> int | None:
        """Returns the window of a layer; None if it sees all earlier positions."""
        return None if layer in self.full_layers else self.sliding_window

    def rope_of(self, layer: int) -> Rope:
        """Returns the rotary embedding of a layer."""
        if layer in self.unscaled_layers:
            return Rope(self.rope.theta)
        if self.sliding_rope is None or self.window_of(layer) is None:
            return self.rope
        return self.sliding_rope


def _windows(text: Any, window: int | None) -> tuple[int | None, tuple[int, ...]]:
    """Returns the window of a text configuration, if it is used, and the layers without it."""
    if window is None or not getattr(text, "use_sliding_window", True):
        return None, ()
    kinds = getattr(text, "layer_types", None)
    if kinds is None or text.model_type == "mistral":  # where transformers ignores layer_types
        return window, ()
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != text.num_hidden_layers:
        raise ValueError(
            f"text_config.layer_types is {list(kinds)}; expected 'full_attention' or "
            f"'sliding_attention' for each of {text.num_hidden_layers} layers"
        )
    return (None, ()) if len(full) == len(kinds) else (window, full)
