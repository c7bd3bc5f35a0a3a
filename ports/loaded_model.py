"""`LoadedModel`: a checkpoint in memory, and what is known of it without running it."""

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ports import checkpoint, description
from ports.checkpoint import hub, peft_io
from ports.decoding import generation_config
from ports.decoding.sampling import Sampling
from ports.inputs import vocabulary
from ports.intervene import lora, steer
from ports.intervene.edits import Places
from ports.intervene.sites import as_sites, find_sites, list_sites
from ports.messages import few
from ports.models.port import Port, Sizes
from ports.names import normal_name, site_name
from ports.nn import attention
from ports.nn.vision_language import Inputs, VisionLanguageModel
from ports.parallel import axis_types, compiled, sharding

Array = jax.Array


class LoadedModel:
    """A checkpoint in memory: module, parameters, configuration, processor and names of sites.

    `ports.VLM` is one that also runs; its docstring describes the attributes.
    """

    adapter: Path | None = None
    _tokenizer_seen = False
    # Whose processor and tokenizer to use; None for the checkpoint's own.
    _processor_directory: Path | None = None

    def __init__(
        self,
        module: VisionLanguageModel,
        params: dict,
        config: Any,
        port: Port,
        directory: Path | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.module, self.params, self.config, self.directory = module, params, config, directory
        self._port, self._mesh = port, axis_types.automatic(mesh)
        self._use(generation_config.read(directory))

    def __repr__(self) -> str:
        said = description.in_short(self.config.model_type, self.module, self.params)
        return f"{type(self).__name__}({said})"

    def _repr_html_(self) -> str:
        return description.as_html(
            self.config.model_type, self.module, self.params, self.site_shapes
        )

    def _use(self, values: dict[str, Any]) -> None:
        """Sets the values of a generation_config.json; raises ValueError for invalid ids."""
        self.generation_config = values
        self.eos_tokens, self.pad_token = generation_config.special_tokens(
            self.config, values, self.directory, self.module.num_embeddings
        )

    def with_adapter(self, directory: str | Path, *, donate: bool = False) -> Self:
        """Returns the model with a PEFT LoRA adapter merged into its linear layers.

        All other parameters are shared with this model.

        Args:
            directory: a directory or Hub id of the adapter.
            donate: free the replaced kernels, which makes this model unusable.

        Returns:
            The adapted model.

        Raises:
            FileNotFoundError: as for `ports.load`.
            ValueError: as for `ports.load`, or the model has an adapter already: `adapter`, which
                is recorded with results, names one.
        """
        if self.adapter is not None:
            raise ValueError(
                f"the model has the adapter {self.adapter} merged already; use the model without "
                "it, or merge both with peft's add_weighted_adapter and use the result"
            )
        directory = hub.find_directory(directory, peft_io.EXPECTED)
        adapter = self.read_adapter(directory)
        model = copy.copy(self)
        model.params = lora.merge(self.params, adapter, donate=donate)
        model.adapter = directory
        return model

    def with_generation_config(self, values: Mapping[str, Any]) -> Self:
        """Returns the model with other values instead of those of generation_config.json.

        All parameters are shared with this model.

        Args:
            values: the new values, by transformers' names; {} for none. The end-of-sequence and
                padding tokens are kept unless given here.

        Returns:
            The model with these values.

        Raises:
            ValueError: transformers does not know a key.
        """
        model = copy.copy(self)
        model._use(generation_config.given(values, self.generation_config))
        return model

    @property
    def logits_options(self) -> dict[str, Any]:
        """The values of `generation_config` that change greedy decoding.

        Raises:
            ValueError: a value is not implemented (num_beams, guidance_scale ...).
        """
        return generation_config.changing_logits(self.generation_config)

    def sampling(self, key: Array) -> Sampling:
        """Returns the sampling settings in `generation_config`, for `generate(sampling=...)`.

        Args:
            key: JAX random key.

        Returns:
            The settings; missing values have transformers' defaults (top_k 50).

        Raises:
            ValueError: a value is invalid or not implemented.
        """
        return Sampling(key, **generation_config.of_sampling(self.generation_config))

    def read_adapter(self, directory: str | Path) -> lora.Adapter:
        """Reads a PEFT LoRA adapter of this model without merging it (see `ports.adapted`).

        Args:
            directory: a directory or Hub id of the adapter.

        Returns:
            The adapter.

        Raises:
            FileNotFoundError: as for `ports.load`.
            ValueError: as for `ports.load`.
        """
        return peft_io.read(
            hub.find_directory(directory, peft_io.EXPECTED),
            self.params,
            self._port.canonical_name,
            architecture=self.architecture,
            tied=(self.head, f"{self.decoder}.embed_tokens") if self.is_tied else (),
        )

    def untied(self) -> Self:
        """Returns the model with a separate head, equal to the embeddings.

        An adapter can then change the head or the embeddings without the other, as in PEFT. All
        other parameters are shared with this model.

        Raises:
            ValueError: the head is not tied to the embeddings.
        """
        if not self.is_tied:
            raise ValueError("the model's head is not tied to its embeddings; use it as it is")
        params = checkpoint.untie(self.module, self.params, self._mesh)
        module = self.module.untied()
        model = type(self)(module, params, self.config, self._port, self.directory, self._mesh)
        model._use(self.generation_config)
        model.adapter = self.adapter
        model._processor_directory = self._processor_directory
        return model

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the parameters and the computation."""
        return jnp.dtype(self.module.dtype)

    @property
    def sizes(self) -> Sizes:
        """The port's own configuration: `text` (the decoder's), `image_tokens` and more."""
        return self.module.config

    @property
    def decoder(self) -> str:
        """Name of the language model's decoder; its layers are below it."""
        return ".".join(self.module.decoder_path)

    @property
    def layers(self) -> tuple[str, ...]:
        """Sites of the residual stream after each decoder layer: what the next one reads.

        Where features are added between two layers (DeepStack), the site after the addition.
        """
        text, name = self.sizes.text, self.module.cache_path[0]
        added = text.num_injections
        return tuple(
            f"{self.decoder}.{normal_name(('deepstack_{}' if i < added else name).format(i))}"
            for i in range(text.num_layers)
        )

    @property
    def head(self) -> str:
        """Name of the language-model head."""
        return ".".join(self.module.head_path)

    @property
    def is_tied(self) -> bool:
        """Whether the head's weights are the embeddings."""
        return bool(self.module.tied)

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """Mesh that the parameters are sharded over; None for one device."""
        return self._mesh

    @property
    def axes(self) -> sharding.Axes:
        """Sharding rules of the parameters."""
        return self.module.axes

    @property
    def kv_heads(self) -> sharding.KVHeads:
        """{path of an attention's stack: number of its key-value heads}."""
        return self.module.kv_heads

    def cache_bytes(self, rows: int, length: int) -> int:
        """Returns the bytes of the key-value cache of `rows` rows with `length` positions."""
        cache = jax.eval_shape(lambda: self.module.init_cache(rows, length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    @property
    def architecture(self) -> str | None:
        """The model's class in PyTorch, if config.json names it."""
        return next(iter(getattr(self.config, "architectures", None) or ()), None)

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """A digest that identifies the checkpoint (see `checkpoint.fingerprint`), computed once;
        None without a directory.
        """
        return None if self.directory is None else checkpoint.fingerprint(self.directory)

    @functools.cached_property
    def module_names(self) -> dict[str, str]:
        """{linear layer: the module's name in transformers}, the names in adapter files."""
        sites = lora.linear_layers(self.params)
        return peft_io.module_names(sites, self._port.transformers_name)

    @functools.cached_property
    def processor(self) -> Any:
        """The checkpoint's processor, from transformers or the port; loaded on first use.

        Raises:
            ValueError: files are missing or do not belong together.
        """
        processor = self._port.load_processor(self._directory_of("processor"), self.sizes)
        self._warn_of(processor.tokenizer)
        return processor

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, from transformers; loaded on first use."""
        tokenizer = self._port.load_tokenizer(self._directory_of("tokenizer"))
        self._warn_of(tokenizer)
        return tokenizer

    def _warn_of(self, tokenizer: Any) -> None:
        """Warns, once per model, if the tokenizer has more tokens than the model."""
        if not self._tokenizer_seen:
            self._tokenizer_seen = True
            vocabulary.warn_of_longer_tokenizer(
                tokenizer, self.module.num_embeddings, self.image_tokens, self.directory
            )

    @property
    def processor_directory(self) -> Path | None:
        """Directory of the checkpoint whose processor is used; None without a checkpoint."""
        return self.directory if self._processor_directory is None else self._processor_directory

    def with_processor(self, directory: Path) -> Self:
        """Returns the model with the processor and tokenizer of another checkpoint.

        Args:
            directory: directory of that checkpoint.
        """
        model = copy.copy(self)
        # Read again where they were read already.
        for name in ("processor", "tokenizer"):
            model.__dict__.pop(name, None)
        model._processor_directory, model._tokenizer_seen = directory, False
        return model

    def _directory_of(self, what: str) -> Path:
        """Returns the directory that holds it; raises ValueError if there is none."""
        if self.processor_directory is None:
            raise ValueError(f"the model has no directory and so no {what}; use ports.load")
        return self.processor_directory

    def example_inputs(self, batch: int = 1) -> dict[str, Any]:
        """Returns shapes and dtypes (`jax.ShapeDtypeStruct`) of a batch with one image per row."""
        return self._port.example_inputs(self.sizes, batch)

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for an image."""
        return self.sizes.image_tokens

    def positions(self, inputs: Inputs) -> Array:
        """Returns the rotary positions of tokens, int32[B, T], or int32[B, T, 3] for M-RoPE."""
        return self.module.positions(inputs)

    def places(self, inputs: Inputs) -> Places:
        """Returns the kind (image, text ...), index and column of each position of a prompt."""
        return self.module.places(inputs)

    def apply(self, params: dict, inputs: Inputs, **kwargs: Any) -> Any:
        """Computes logits; a pure function, for `capture` and `steer` to wrap.

        A token id outside the vocabulary gives NaN at its position and at all positions that see
        it, as no error can be raised under `jax.jit`.

        Args:
            params: the tree of parameters.
            inputs: the arrays from `prepare` or `place`, or those of the processor.
            **kwargs: passed to Linen's `Module.apply`.

        Returns:
            Logits float32[B, T, V].
        """
        with compiled.tracing(self.module.dtype, self._mesh):
            return self.module.apply({"params": params}, inputs, **kwargs)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the modules that can be captured or steered, in the order of computation."""
        return tuple(self.site_shapes)

    @property
    def site_shapes(self) -> dict[str, tuple[int, ...]]:
        """{site: shape of its states} for the port's example inputs; the last axis is D."""
        return self._traced[0]

    @property
    def attention_heads(self) -> dict[str, int]:
        """{site: number of heads H} of the sites whose states are the outputs of heads.

        These states [B, T, H * C], the input of the output projection, hold the C numbers of one
        head after those of another.
        """
        return self._traced[1]

    def project_heads(self, x: Array | np.ndarray, site: str) -> Array:
        """Maps outputs of attention heads to what they add to the stream that attention writes to.

        Args:
            x: [..., H * C], states or directions; zero for heads to leave out.
            site: which heads, one of `attention_heads`.

        Returns:
            [..., D], the output projection without its bias.

        Raises:
            ValueError: the site is not one of heads.
        """
        if site not in self.attention_heads:
            raise ValueError(f"got site {site!r}; expected heads: {few(self.attention_heads)}")
        (kernel,) = (
            leaf
            for path, leaf in traverse_util.flatten_dict(self.params).items()
            if path[-1] == "kernel"
            and site_name(path[:-2]) == site.removesuffix(".heads")
            and sharding.logical_axes(path, leaf.ndim, self.axes) == ("heads", "embed")
        )
        return jnp.matmul(jnp.asarray(x, kernel.dtype), kernel, precision="highest")

    @functools.cached_property
    def _traced(self) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        with attention.counting_heads() as heads:
            return list_sites(self.apply, self.params, self.example_inputs()), heads

    @functools.cached_property
    def _token_sites(self) -> frozenset[str]:
        return steer.token_sites(self.apply, self.params, self.example_inputs())

    def is_before_norm(self, site: str) -> bool:
        """Returns whether the decoder's final norm is applied between a site and the head.

        Args:
            site: name of a site.

        Returns:
            True for the decoder's layers and the modules inside them; False for the norm itself,
            the head, the vision tower and unknown names. This is the right `through_norm` for
            `unembed`.
        """
        return any(map(self.module.is_before_norm, (site, *self.hub_names(site))))

    def is_head(self, site: str) -> bool:
        """Returns whether the states of a site are logits, which `unembed` has been applied to.

        Args:
            site: name of a site.

        Returns:
            False for unknown names.
        """
        last = self.sites[-1]
        if not {site, *self.hub_names(site)} & {last, *self.hub_names(last)}:
            return False
        # Where the head is tied to the embeddings, the last site is the norm before it.
        return self.site_shapes[last][-1] != self.config.get_text_config().hidden_size

    def find_sites(
        self, names: str | Sequence[str], *, generated: bool = False, one_state: bool = False
    ) -> dict[str, str]:
        """Finds sites by name or pattern.

        Args:
            names: names as in `sites`, names of modules in today's transformers, the end of a
                single site's name ("layers.3" is the decoder's), or patterns such as "layers.*"
                (see `ports.intervene.sites.match_sites`); or one of these.
            generated: only accept sites that have a state for each generated token.
            one_state: refuse sites of the decoder with a state for each head, [B, T, H, C].

        Returns:
            {name: site}; sites that a pattern matches appear under their own name.

        Raises:
            ValueError: a name matches no site, or a site without states for generated tokens, or
                with one for each head.
        """
        decoder = [site for site in self.sites if self.module.is_of_decoder(site)]
        inside = decoder if generated else self.sites
        asked = find_sites(as_sites(names), self.sites, self.hub_names, inside, decoder)
        outside = [name for name, site in asked.items() if site not in inside]
        if outside:
            raise ValueError(
                f"site {outside[0]!r} has no states for generated tokens; "
                f"choose sites below {self.decoder!r}, or use forward"
            )
        for site in asked.values() if one_state else ():
            if len(shape := self.site_shapes[site]) == 4 and self.module.is_of_decoder(site):
                raise ValueError(
                    f"site {site!r} has a state for each of {shape[2]} heads; choose a site with "
                    "one state per token, such as the output of its layer"
                )
        return asked

    def check_sites(
        self, sites: str | Sequence[str], *, generated: bool = False, one_state: bool = False
    ) -> tuple[str, ...]:
        """Returns the sites found by `find_sites`, each once.

        Args:
            sites: names and patterns, as for `find_sites`.
            generated, one_state: as for `find_sites`.

        Returns:
            The sites.

        Raises:
            ValueError: as for `find_sites`.
        """
        return distinct(self.find_sites(sites, generated=generated, one_state=one_state))

    def find_site(self, name: str, *, generated: bool = False, one_state: bool = False) -> str:
        """Finds the only site that matches a name or pattern.

        Args:
            name: a name or pattern, as for `find_sites`.
            generated, one_state: as for `find_sites`.

        Returns:
            The site.

        Raises:
            ValueError: no site or several sites match.
        """
        found, *others = self.check_sites([name], generated=generated, one_state=one_state)
        if others:
            names = (found, *others)
            raise ValueError(f"{name!r} matches {len(names)} sites, {few(names)}; choose one")
        return found

    def hub_names(self, name: str) -> tuple[str, ...]:
        """Returns the port's names for a module named as in today's transformers."""
        return (self._port.hub_name(name),)


def distinct(asked: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the sites of {name: site}, each once."""
    return tuple(dict.fromkeys(asked.values()))
