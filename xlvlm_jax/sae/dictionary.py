"""What a sparse autoencoder computes, for every architecture that SAELens 6 stores.

    x' = n(x) - b_dec                   n the normaliser; b_dec only where it is taken off
    h  = x' W_enc + b_enc               scaled by the norms of the decoder's rows where asked
    codes = act(h)
    x^ = n^-1(codes W_dec + b_dec)      n^-1 needs the mean and scale of x

with act by architecture:
    standard           relu(h)
    topk               relu of the k largest h            (Gao et al. 2024)
    abstopk            the k values of largest size, with their sign
    jumprelu           relu(h) where h > threshold        (Rajamanoharan et al. 2024)
    batchtopk          the same, with one threshold for all (Bussmann et al. 2024)
    gated              relu(x' (W_enc exp(r_mag)) + b_mag) where x' W_enc + b_gate > 0
    matching_pursuit   one atom of largest product after the other, each taken off the residual
    temporal           topk or relu of what attention to earlier positions does not predict
    transcoders        as standard, topk or jumprelu, from one site to another, plus W_skip x
    crosscoders        the same of two sources whose states stand side by side, [x_1, x_2]

SAELens has no crosscoders, and transcoders without topk. D width of the states, K codes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xlvlm_jax.solvers.linalg import matmul

AnyArray = jax.Array | np.ndarray
# Names of the architectures in files, and as methods.
METHODS = {
    "standard": "relu-sae",
    "topk": "topk-sae",
    "abstopk": "abstopk-sae",
    "jumprelu": "jumprelu-sae",
    "batchtopk": "batchtopk-sae",
    "matryoshka_batchtopk": "matryoshka-sae",
    "gated": "gated-sae",
    "matching_pursuit": "matching-pursuit-sae",
    "temporal": "temporal-sae",
    "transcoder": "transcoder",
    "skip_transcoder": "skip-transcoder",
    "jumprelu_transcoder": "jumprelu-transcoder",
    "jumprelu_skip_transcoder": "jumprelu-skip-transcoder",
    "topk_transcoder": "topk-transcoder",
    "topk_skip_transcoder": "topk-skip-transcoder",
    "batchtopk_transcoder": "batchtopk-transcoder",
    "batchtopk_skip_transcoder": "batchtopk-skip-transcoder",
    "crosscoder": "crosscoder",
    "topk_crosscoder": "topk-crosscoder",
    "batchtopk_crosscoder": "batchtopk-crosscoder",
}
NORMALISERS = ("none", "layer_norm", "constant_norm_rescale", "constant_scalar_rescale")
OF_TEMPORAL = ("constant_scalar_rescale",)
# Scaling that is folded into the weights, so that it does nothing when the SAE runs.
FOLDED = ("expected_average_only_in", "covariance_whitening")
LAYER_NORM_EPS = 1e-5
TEMPORAL_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants of a sparse autoencoder, by SAELens' names.

    Attributes:
        architecture: a key of `METHODS`.
        apply_b_dec_to_input: whether b_dec is taken off the normalised input.
        normalize_activations: one of `NORMALISERS`.
        rescale_acts_by_decoder_norm: whether codes are in units of the decoder rows' norms.
        hook_z: whether states have heads, [..., heads, head width], and D is their product.
        k: number of codes per state, for topk, abstopk and temporal.
        residual_threshold: norm of the residual below which matching pursuit ends a row.
        max_iterations: most atoms of matching pursuit; None for D.
        stop_on_duplicate_support: whether matching pursuit ends at a repeated choice.
        signed: whether matching pursuit takes the atom of largest product even if that is negative,
            as overcomplete does; SAELens then takes none.
        num_heads: attention heads of temporal.
        tied_weights: whether temporal encodes with the decoder.
        scale: factor of "constant_scalar_rescale".
        widths: of crosscoders, the width of each source.
        scales: of crosscoders, the factor of each source in whose units norms are compared.
    """

    architecture: str
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    hook_z: bool = False
    k: int | None = None
    residual_threshold: float = 1e-2
    max_iterations: int | None = None
    stop_on_duplicate_support: bool = True
    signed: bool = False
    num_heads: int = 8
    tied_weights: bool = True
    scale: float = 1.0
    widths: Sequence[int] = ()
    scales: Sequence[float] = ()

    def __post_init__(self) -> None:
        # JSON has lists, which cannot be constants of compiled programs.
        for name in ("widths", "scales"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def is_transcoder(self) -> bool:
        """Whether it maps states of one site to another."""
        return self.architecture.endswith("transcoder")

    @property
    def is_crosscoder(self) -> bool:
        """Whether it encodes states of two sources side by side."""
        return self.architecture.endswith("crosscoder")


@dataclasses.dataclass(frozen=True)
class Details:
    """What a file says about a dictionary. All are equal, so that none makes jit compile again.

    Attributes:
        values: JSON values by name.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """A sparse autoencoder or transcoder of K features; a JAX pytree of its parameters.

    `encode`, `decode` and `reconstruct` are pure and work under jit, vmap and grad.

    Attributes:
        params: arrays by SAELens' names: W_enc [D, K], W_dec [K, D], b_enc [K], b_dec [D] and those
            of the architecture.
        settings: its constants.
        site: name of the site as the file gives it; None if it does not.
        details: everything else that the file says about it.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax import sae
        >>> params = {"W_enc": np.eye(2), "W_dec": np.eye(2), "b_enc": [-1, -1], "b_dec": [0, 0]}
        >>> dictionary = sae.Dictionary.of(params, sae.Settings("standard"))
        >>> dictionary.encode(np.float32([[3, 0.5]])).tolist()
        [[2.0, 0.0]]
    """

    params: dict[str, Any]
    settings: Settings = dataclasses.field(metadata={"static": True})
    site: str | None = dataclasses.field(default=None, metadata={"static": True})
    details: Details = dataclasses.field(default=Details(), metadata={"static": True})

    @classmethod
    def of(
        cls,
        params: Mapping[str, Any],
        settings: Settings,
        site: str | None = None,
        details: Details = Details(),
        dtype: Any = jnp.float32,
    ) -> "Dictionary":
        """Makes a dictionary from arrays, checked.

        Args:
            params: arrays by name.
            settings: its constants.
            site: name of its site.
            details: what else is known of it.
            dtype: dtype of the parameters and the computation.

        Raises:
            ValueError: a parameter is missing, has another shape than the others imply, is not
                finite or does not belong to the architecture; or k exceeds the number of features.
        """
        check(params, settings)
        arrays = {name: jnp.asarray(np.asarray(value), dtype) for name, value in params.items()}
        return cls(arrays, settings, site, details)

    def __repr__(self) -> str:
        K, D = self.components.shape
        site = "" if self.site is None else f" of {self.site}"
        return f"Dictionary({self.method}: {K:,} features of width {D:,}{site})"

    @property
    def method(self) -> str:
        """Name of the method, such as "topk-sae"."""
        return METHODS[self.settings.architecture]

    @property
    def components(self) -> Float[Array, "K D"]:
        """The decoder's rows: what one unit of each code adds."""
        return self.params["W_dec"] / _units(self)[:, None]

    @property
    def target_site(self) -> str | None:
        """Name of the site that a transcoder writes, as the file gives it; None if it does not."""
        values = self.details.values
        return (values.get("metadata") or {}).get("hook_name_out") or values.get(
            "hf_hook_point_out"
        )

    @property
    def width(self) -> int:
        """D of the states that are encoded."""
        encoder = self.params.get("W_enc")
        return self.params["W_dec"].shape[1] if encoder is None else encoder.shape[0]

    def encode(self, states: Float[AnyArray, "..."]) -> Float[Array, "... K"]:
        """Returns the codes of states.

        Args:
            states: float[..., D], the site's states; float[..., heads, head width] for `hook_z`,
                and float[B, T, D] for temporal, whose codes depend on earlier positions.

        Returns:
            float[..., K], of the parameters' dtype.

        Raises:
            ValueError: the states have another width.
        """
        return _ENCODERS[self.settings.architecture](self, self._entered(states))

    def decode(
        self, codes: Float[AnyArray, "... K"], states: Float[AnyArray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Returns the states that codes stand for.

        Args:
            codes: float[..., K].
            states: the states that were encoded, whose mean and scale a normaliser restores, which
                a skip connection adds, and whose earlier positions predict the rest in temporal.
                Others do not need them.

        Returns:
            float[..., D], or the heads of `hook_z` where `states` are given.

        Raises:
            ValueError: `states` are needed and not given, or a width differs.
        """
        settings, params = self.settings, self.params
        codes = jnp.asarray(codes, params["W_dec"].dtype)
        K = params["W_dec"].shape[0]
        if codes.shape[-1:] != (K,):
            raise ValueError(f"codes have shape {codes.shape}; expected {K} as the last axis")
        if states is None and (reason := self._why_states()):
            raise ValueError(f"{reason}; call decode(codes, states) with the encoded states")
        if settings.architecture == "temporal":
            codes = codes + _temporal(self, self._entered(states))[1]
        found = matmul(codes / _units(self), params["W_dec"]).astype(codes.dtype)
        if _adds_bias(settings):
            found = found + params["b_dec"]
        if states is not None and not settings.is_transcoder:
            found = _undo(settings, found, self._flat(states))
        if "W_skip" in params:
            found = found + matmul(self._flat(states), params["W_skip"].T).astype(found.dtype)
        if settings.hook_z and states is not None:
            found = found.reshape(jnp.shape(states))
        return found

    def reconstruct(self, states: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        """Returns what the dictionary keeps of states: `decode(encode(states), states)`.

        Args:
            states: as for `encode`.

        Returns:
            The same shape as `states`; for transcoders the states of the other site.

        Raises:
            ValueError: the states have another width.
        """
        return self.decode(self.encode(states), states)

    def moved(self, components: Float[AnyArray, "K D"]) -> "Dictionary":
        """Returns the dictionary with other components, towards which the encoder's columns moved.

        A column moves by as much as its component, in proportion to their lengths.

        Args:
            components: float[K, D].
        """
        # Codes in units of the decoder's norms would take the new rows' norms.
        own = self.folded()
        params, before = own.params, own.components
        after = jnp.asarray(components, before.dtype)
        changed = {"W_dec": after}
        if "W_enc" in params:
            lengths = jnp.linalg.norm(before, axis=1)
            ratio = jnp.linalg.norm(params["W_enc"], axis=0) / jnp.where(lengths > 0, lengths, 1)
            changed["W_enc"] = params["W_enc"] + (after - before).T * ratio
        return dataclasses.replace(own, params=params | changed)

    def folded(self) -> "Dictionary":
        """Returns the dictionary of equal codes whose rows of the decoder have norm 1.

        Only where codes are in units of their norms (`rescale_acts_by_decoder_norm`), which the
        weights then contain; any other is returned as it is.
        """
        if not self.settings.rescale_acts_by_decoder_norm:
            return self
        params, units = self.params, _units(self)
        folded = {
            "W_dec": params["W_dec"] / units[:, None],
            "W_enc": params["W_enc"] * units,
            "b_enc": params["b_enc"] * units,
        }
        settings = dataclasses.replace(self.settings, rescale_acts_by_decoder_norm=False)
        return dataclasses.replace(self, params=params | folded, settings=settings)

    def _why_states(self) -> str | None:
        if self.settings.architecture == "temporal":
            return "a temporal dictionary predicts part of a state from earlier positions"
        if "W_skip" in self.params:
            return "the skip connection adds a product with the input"
        if self.settings.normalize_activations != "none" and not self.settings.is_transcoder:
            return f"{self.settings.normalize_activations} restores the input's mean and scale"
        return None

    def _flat(self, states: Any) -> Array:
        """Returns states [..., D] of the parameters' dtype; raises ValueError for another width."""
        x = jnp.asarray(states, self.params["W_dec"].dtype)
        if self.settings.hook_z:
            if x.ndim < 2 or x.shape[-1] * x.shape[-2] != self.width:
                raise ValueError(
                    f"states have shape {x.shape}; expected [..., heads, head width] with "
                    f"{self.width} values, as the dictionary was learnt on attention heads (hook_z)"
                )
            return x.reshape(*x.shape[:-2], self.width)
        if x.shape[-1:] != (self.width,):
            if self.settings.is_crosscoder:
                first, second = self.settings.widths
                raise ValueError(
                    f"states have shape {x.shape}; expected {self.width} columns: those of both "
                    f"sources side by side, {first} and {second}"
                )
            raise ValueError(
                f"states have shape {x.shape}, but the dictionary was learnt on states of width "
                f"{self.width}; pass states of {self.site or 'its site'}"
            )
        return x

    def _entered(self, states: Any) -> Array:
        """Returns what the encoder multiplies: normalised, without b_dec where it is taken off."""
        settings = self.settings
        x = _normalise(settings, self._flat(states))
        if settings.apply_b_dec_to_input and not settings.is_transcoder:
            x = x - self.params["b_dec"]
        return x


def _normalise(settings: Settings, x: Array) -> Array:
    if settings.normalize_activations == "layer_norm":
        # The deviation of n - 1, and the epsilon outside the root.
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / (centred.std(axis=-1, keepdims=True, ddof=1) + LAYER_NORM_EPS)
    if settings.normalize_activations == "constant_norm_rescale":
        return x * (x.shape[-1] ** 0.5 / jnp.linalg.norm(x, axis=-1, keepdims=True))
    if settings.normalize_activations == "constant_scalar_rescale":
        return x * settings.scale
    return x


def _undo(settings: Settings, x: Array, states: Array) -> Array:
    if settings.normalize_activations == "layer_norm":
        mean = states.mean(axis=-1, keepdims=True)
        return x * states.std(axis=-1, keepdims=True, ddof=1) + mean
    if settings.normalize_activations == "constant_norm_rescale":
        return x / (states.shape[-1] ** 0.5 / jnp.linalg.norm(states, axis=-1, keepdims=True))
    if settings.normalize_activations == "constant_scalar_rescale":
        return x / settings.scale
    return x


def _adds_bias(settings: Settings) -> bool:
    # Dictionaries that encode with the decoder add b_dec only where it was taken off.
    if settings.architecture == "matching_pursuit":
        return settings.apply_b_dec_to_input
    if settings.architecture == "temporal":
        return settings.apply_b_dec_to_input or not settings.tied_weights
    return True


def _units(dictionary: Dictionary) -> Array:
    """Returns [K], the lengths of the decoder's rows if codes are in units of them, else ones."""
    decoder = dictionary.params["W_dec"]
    if not dictionary.settings.rescale_acts_by_decoder_norm:
        return jnp.ones(len(decoder), decoder.dtype)
    return jnp.maximum(jnp.linalg.norm(decoder, axis=1), 1e-8)


def _hidden(dictionary: Dictionary, x: Array) -> Array:
    params = dictionary.params
    hidden = matmul(x, params["W_enc"]).astype(x.dtype) + params["b_enc"]
    return hidden * _units(dictionary)


def _relu(dictionary: Dictionary, x: Array) -> Array:
    return jax.nn.relu(_hidden(dictionary, x))


def _keep_largest(values: Array, by: Array, k: int) -> Array:
    """Returns the values where `by` is among the k largest of its row, else zero."""
    _, index = jax.lax.top_k(by, k)
    chosen = jnp.take_along_axis(values, index, axis=-1)
    return jnp.put_along_axis(jnp.zeros_like(values), index, chosen, axis=-1, inplace=False)


def _topk(dictionary: Dictionary, x: Array) -> Array:
    hidden = _hidden(dictionary, x)
    return _keep_largest(jax.nn.relu(hidden), hidden, dictionary.settings.k or hidden.shape[-1])


def _abstopk(dictionary: Dictionary, x: Array) -> Array:
    hidden = _hidden(dictionary, x)
    return _keep_largest(hidden, jnp.abs(hidden), dictionary.settings.k or hidden.shape[-1])


def _jumprelu(dictionary: Dictionary, x: Array) -> Array:
    hidden = _hidden(dictionary, x)
    return jnp.where(hidden > dictionary.params["threshold"], jax.nn.relu(hidden), 0)


def _gated(dictionary: Dictionary, x: Array) -> Array:
    params = dictionary.params
    gate = matmul(x, params["W_enc"]).astype(x.dtype) + params["b_gate"]
    size = matmul(x, params["W_enc"] * jnp.exp(params["r_mag"])).astype(x.dtype) + params["b_mag"]
    return jnp.where(gate > 0, jax.nn.relu(size), 0)


def _matching_pursuit(dictionary: Dictionary, x: Array) -> Array:
    settings, atoms = dictionary.settings, dictionary.params["W_dec"]
    K, D = atoms.shape
    most = D if settings.max_iterations is None else settings.max_iterations
    rows = x.reshape(-1, D)

    def allowed(values: Array) -> Array:
        return values if settings.signed else jax.nn.relu(values)

    def choose(_: Any, state: tuple) -> tuple:
        residual, codes, done = state
        chosen = allowed(matmul(residual, atoms.T)).argmax(axis=1)
        atom = atoms[chosen]
        value = allowed((residual * atom).sum(axis=1))
        value = jnp.where(done, 0, value).astype(codes.dtype)
        support = codes != 0
        codes = codes.at[jnp.arange(len(codes)), chosen].add(value)
        residual = residual - value[:, None] * atom
        if settings.stop_on_duplicate_support:
            done |= ((codes != 0) == support).all(axis=1)
        if settings.residual_threshold > 0:
            done |= jnp.linalg.norm(residual, axis=1) < settings.residual_threshold
        return residual, codes, done

    def unless_done(number: Any, state: tuple) -> tuple:
        # Not a while loop, which has no gradient.
        return jax.lax.cond(state[2].all(), lambda same: same, partial(choose, number), state)

    start = rows, jnp.zeros((len(rows), K), x.dtype), jnp.zeros(len(rows), bool)
    return jax.lax.fori_loop(0, most, unless_done, start)[1].reshape(*x.shape[:-1], K)


def _temporal(dictionary: Dictionary, x: Array) -> tuple[Array, Array]:
    """Returns codes [B, T, K] of what is new at each position, and of what attention predicts."""
    settings, params = dictionary.settings, dictionary.params
    decoder = params["W_dec"]
    encoder = decoder.T if settings.tied_weights else params["W_enc"]
    if x.ndim != 3:
        raise ValueError(f"states have shape {x.shape}; a temporal dictionary takes [B, T, D]")
    scale, dtype = 1 / (4 * x.shape[-1]), x.dtype  # products are of float32 or wider
    predicted = jnp.zeros((*x.shape[:2], len(decoder)), dtype)
    for layer in range(_num_layers(params)):
        entered = jax.nn.relu(matmul(x * scale, encoder))
        earlier = jnp.pad(entered[:, :-1], ((0, 0), (1, 0), (0, 0)))
        codes = jax.nn.relu(_attend(dictionary, layer, earlier, entered))
        drawn = matmul(codes, decoder)
        length = jnp.linalg.norm(drawn, axis=-1, keepdims=True) + TEMPORAL_EPS
        share = (drawn * x).sum(axis=-1, keepdims=True) / length**2
        predicted = predicted + codes * share
        x = x - share * drawn
    new = jax.nn.relu(matmul(x * scale, encoder))
    if settings.k is not None:
        new = _keep_largest(new, new, settings.k)
    return new.astype(dtype), predicted.astype(dtype)


def _num_layers(params: Mapping[str, Any]) -> int:
    return sum(name.endswith(".k_ctx.weight") for name in params)


def _attend(dictionary: Dictionary, layer: int, context: Array, target: Array) -> Array:
    heads, params = dictionary.settings.num_heads, dictionary.params

    def linear(name: str, x: Array) -> Array:
        path = f"attn_layers.{layer}.{name}"
        return matmul(x, params[f"{path}.weight"].T) + params[f"{path}.bias"]

    query, key, value = (
        linear(name, x).reshape(*x.shape[:2], heads, -1)
        for name, x in (("q_target", target), ("k_ctx", context), ("v_ctx", context))
    )
    scores = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest")
    T = scores.shape[-1]
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores * key.shape[-1] ** -0.5, -jnp.inf)
    mixed = jnp.einsum(
        "bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), value, precision="highest"
    )
    return linear("c_proj", mixed.reshape(target.shape))


Encoder = Callable[[Dictionary, Array], Array]
_ENCODERS: dict[str, Encoder] = {
    "standard": _relu,
    "topk": _topk,
    "abstopk": _abstopk,
    "jumprelu": _jumprelu,
    "batchtopk": _jumprelu,
    "matryoshka_batchtopk": _jumprelu,
    "gated": _gated,
    "matching_pursuit": _matching_pursuit,
    "temporal": lambda dictionary, x: _temporal(dictionary, x)[0],
    "transcoder": _relu,
    "skip_transcoder": _relu,
    "jumprelu_transcoder": _jumprelu,
    "jumprelu_skip_transcoder": _jumprelu,
    "topk_transcoder": _topk,
    "topk_skip_transcoder": _topk,
    "batchtopk_transcoder": _jumprelu,
    "batchtopk_skip_transcoder": _jumprelu,
    "crosscoder": _relu,
    "topk_crosscoder": _topk,
    "batchtopk_crosscoder": _jumprelu,
}
_RESCALED = (_relu, _topk, _abstopk, _jumprelu)  # encoders of `_hidden`


def shapes_of(
    settings: Settings, D: int, K: int, out: int, names: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters of an architecture.

    Args:
        settings: its constants.
        D: width of the input.
        K: number of features.
        out: width of the output.
        names: the parameters that are there, which tell the number of attention layers.
    """
    architecture = settings.architecture
    shapes: dict[str, tuple[int, ...]] = {"W_dec": (K, out), "b_dec": (out,)}
    if architecture == "matching_pursuit":
        return shapes
    if architecture == "temporal":
        if not settings.tied_weights:
            shapes["W_enc"] = (D, K)
        small = names.get("attn_layers.0.k_ctx.weight")
        small = K if small is None else np.shape(small)[0]
        for layer in range(max(_num_layers(names), 1)):
            for name, rows in (("k_ctx", small), ("q_target", small), ("v_ctx", K), ("c_proj", K)):
                shapes[f"attn_layers.{layer}.{name}.weight"] = (rows, K)
                shapes[f"attn_layers.{layer}.{name}.bias"] = (rows,)
        return shapes
    shapes["W_enc"] = (D, K)
    if architecture == "gated":
        return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (K,))
    shapes["b_enc"] = (K,)
    if _ENCODERS[architecture] is _jumprelu:
        shapes["threshold"] = (K,)
    if "skip" in architecture:
        shapes["W_skip"] = (out, D)
    return shapes


def check(params: Mapping[str, Any], settings: Settings) -> None:
    """Checks that parameters are those of an architecture, fit together and are finite.

    Raises:
        ValueError: they do not.
    """
    if settings.architecture not in METHODS:
        raise ValueError(
            f"architecture is {settings.architecture!r}; expected one of {', '.join(METHODS)}"
        )
    if settings.normalize_activations not in NORMALISERS:
        raise ValueError(
            f"normalize_activations is {settings.normalize_activations!r}; expected one of "
            f"{', '.join((*NORMALISERS, *FOLDED))}"
        )
    if settings.rescale_acts_by_decoder_norm and _ENCODERS[settings.architecture] not in _RESCALED:
        raise ValueError(
            f"rescale_acts_by_decoder_norm is true, but codes of {settings.architecture!r} are not "
            "in units of the decoder's norms; expected false"
        )
    if settings.normalize_activations in OF_TEMPORAL and settings.architecture != "temporal":
        raise ValueError(
            f"normalize_activations is {settings.normalize_activations!r}, which only architecture "
            f"'temporal' has, not {settings.architecture!r}; expected another"
        )
    if "W_dec" not in params or np.ndim(params["W_dec"]) != 2:
        raise ValueError(f"there is no matrix W_dec among {', '.join(sorted(params)) or 'nothing'}")
    K, out = np.shape(params["W_dec"])
    D = np.shape(params["W_enc"])[0] if np.ndim(params.get("W_enc", 0)) == 2 else out
    expected = shapes_of(settings, D, K, out, params)
    if not settings.is_transcoder and out != D:
        raise ValueError(f"W_enc is {D} wide and W_dec {out}; expected the same width")
    missing, extra = sorted(set(expected) - set(params)), sorted(set(params) - set(expected))
    if missing or extra:
        differ = [f"lacks {', '.join(missing)}"] * bool(missing)
        differ += [f"has {', '.join(extra)} too many"] * bool(extra)
        raise ValueError(
            f"a dictionary of architecture {settings.architecture!r} {' and '.join(differ)}"
        )
    for name, shape in expected.items():
        value = np.asarray(params[name])
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}; expected {shape}")
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{name} has values that are not finite")
    if settings.architecture == "temporal":
        small = expected["attn_layers.0.k_ctx.weight"][0]
        if settings.num_heads < 1 or K % settings.num_heads or small % settings.num_heads:
            raise ValueError(
                f"num_heads is {settings.num_heads}; expected a number that divides the {K} "
                f"features and the {small} rows of k_ctx"
            )
    if settings.is_crosscoder and (len(settings.widths) != 2 or sum(settings.widths) != D):
        raise ValueError(
            f"widths are {settings.widths}; expected those of two sources that add up to {D}"
        )
    if settings.is_crosscoder and len(settings.scales) != 2:
        raise ValueError(f"scales are {settings.scales}; expected one per source")
    if _ENCODERS[settings.architecture] in (_topk, _abstopk) and settings.k is None:
        raise ValueError(f"{settings.architecture} has no k, the number of codes per state")
    if settings.k is not None and not 1 <= settings.k <= K:
        raise ValueError(f"k is {settings.k}; expected 1 to the {K} features")
