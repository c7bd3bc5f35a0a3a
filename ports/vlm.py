"""`VLM`: a loaded vision-language model with its processor, the same class for every port."""

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ports import checkpoint, description
from ports.checkpoint import hub, peft_io
from ports.decoding import generate, generation_config, logits
from ports.decoding.generate import Generation
from ports.decoding.sampling import Sampling
from ports.decoding.text import decode_tokens
from ports.inputs import model_inputs, padding, vocabulary
from ports.intervene import lora, steer
from ports.intervene.edits import (
    Edit,
    Edits,
    as_edits,
    check_batch,
    is_everywhere,
    lay_out,
    reaches,
)
from ports.intervene.sites import as_sites, capture, find_sites, list_sites
from ports.messages import few
from ports.models.port import Port
from ports.names import normal_name
from ports.nn import vision_language
from ports.parallel import sharding
from ports.tables import html_arrays, kind, named_states

Array = jax.Array


class Output(NamedTuple):
    """Result of `VLM.forward`.

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

    logits: Array  # float32[B, T, V], whatever the model's dtype
    states: dict[str, Array]  # site -> [B, T, D]; for a vision site [images, patches, width]

    def __repr__(self) -> str:
        return f"Output(logits: {kind(self.logits)}; states: {few(self.states) or 'none'})"

    def _repr_html_(self) -> str:
        arrays = {"logits": self.logits, **named_states("states", self.states)}
        return html_arrays(arrays, title="Output")


# The mesh is a static argument of every program: a program traced for one is not run on another.
@functools.partial(jax.jit, static_argnames=("model", "sites", "mesh"))
def _forward(
    model: vision_language.VisionLanguageModel,
    params: dict,
    inputs: dict,
    edits: Edits,
    sites: tuple[str, ...],
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Array, dict[str, Array]]:
    with sharding.on(mesh):
        return capture(steer.steer(model.apply, edits), sites)({"params": params}, inputs)


@functools.partial(jax.jit, static_argnames=("model", "sites", "mesh"))
def _states(
    model: vision_language.VisionLanguageModel,
    params: dict,
    inputs: dict,
    edits: Edits,
    sites: tuple[str, ...],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Array]:
    with sharding.on(mesh):
        return capture(steer.steer(model.apply, edits), sites)({"params": params}, inputs)[1]


@functools.partial(jax.jit, static_argnames=("model", "method", "mesh"))
def _unembed(
    model: vision_language.VisionLanguageModel,
    params: dict,
    x: Array,
    method: str,
    mesh: jax.sharding.Mesh | None = None,
) -> Array:
    with sharding.on(mesh):
        return getattr(model.bind({"params": params}), method)(x)


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "max_new_tokens",
        "eos_tokens",
        "pad_token",
        "sites",
        "prompt_states",
        "variants",
        "mesh",
    ),
)
def _generate(
    model: vision_language.VisionLanguageModel,
    params: dict,
    inputs: dict,
    sampling: Sampling | None = None,
    edits: Edits | None = None,
    rules: logits.Rules | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
) -> Generation:
    with sharding.on(mesh):
        return generate.generate(model, params, inputs, sampling, edits, rules, **options)


class VLM:
    """A vision-language model with its parameters, made by `ports.load`.

    Attributes:
        config: the transformers configuration, as read from config.json.
        params: the tree of parameters, as the Linen module takes it under "params".
        module: the Linen module.
        directory: the checkpoint, or None.
        generation_config: the values of generation_config.json, by transformers' names. Values that
            change logits (repetition_penalty, suppress_tokens ...) apply to every generation;
            sampling values only on request, see `sampling`.
        eos_tokens: ids that end a generated row.
        pad_token: id that fills a row after its end.
        adapter: the directory of the LoRA adapter merged into the parameters, or None.

    Examples:
        >>> import ports, xlvlm_jax
        >>> from PIL import Image
        >>> vlm = ports.load("embedded")
        >>> prompt, picture = vlm.render("What is in the picture?"), Image.new("RGB", (64, 64))
        >>> inputs = vlm.process([prompt], [picture])
        >>> logits = vlm.forward(inputs, sites=["language_model.model.layers.3"]).logits
        >>> vlm.tokenizer.decode([int(logits[0, -1].argmax())])  # how an answer begins
        'dog'
    """

    adapter: Path | None = None
    _tokenizer_seen = False

    def __init__(
        self,
        module: vision_language.VisionLanguageModel,
        params: dict,
        config: Any,
        port: Port,
        directory: Path | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.module, self.params, self.config, self.directory = module, params, config, directory
        self._port, self._mesh = port, mesh
        self._use(generation_config.read(directory))

    def __repr__(self) -> str:
        return f"VLM({description.in_short(self.config.model_type, self.module, self.params)})"

    def _repr_html_(self) -> str:
        return description.as_html(
            self.config.model_type, self.module, self.params, self.site_shapes
        )

    def _use(self, values: dict[str, Any]) -> None:
        """Sets the values of a generation_config.json; raises ValueError for invalid ids."""
        self.generation_config = values
        self.eos_tokens, self.pad_token = _special_tokens(
            self.config, values, self.directory, self.module.num_embeddings
        )

    def with_adapter(self, directory: str | Path, *, donate: bool = False) -> "VLM":
        """Returns the model with a PEFT LoRA adapter merged into its linear layers.

        All other parameters are shared with this model.

        Args:
            directory: a directory or Hub id of the adapter.
            donate: free the replaced kernels, which makes this model unusable.

        Returns:
            The adapted model.

        Raises:
            FileNotFoundError: as for `ports.load`.
            ValueError: as for `ports.load`.
        """
        directory = hub.find_directory(directory, peft_io.EXPECTED)
        adapter = self.read_adapter(directory)
        model = copy.copy(self)
        model.params = lora.merge(self.params, adapter, donate=donate)
        model.adapter = directory
        return model

    def with_generation_config(self, values: Mapping[str, Any]) -> "VLM":
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
        decoder, head = (".".join(p) for p in (self.module.decoder_path, self.module.head_path))
        return peft_io.read(
            hub.find_directory(directory, peft_io.EXPECTED),
            self.params,
            self._port.canonical_name,
            architecture=self.architecture,
            tied=(head, f"{decoder}.embed_tokens") if self.module.tied else (),
        )

    def untied(self) -> "VLM":
        """Returns the model with a separate head, equal to the embeddings.

        An adapter can then change the head or the embeddings without the other, as in PEFT. All
        other parameters are shared with this model.

        Raises:
            ValueError: the head is not tied to the embeddings.
        """
        if not self.module.tied:
            raise ValueError("the model's head is not tied to its embeddings; use it as it is")
        flat = traverse_util.flatten_dict(self.params)
        table = flat[*self.module.decoder_path, "embed_tokens", "embedding"]
        path, kernel = (*self.module.head_path, "kernel"), table.T
        if self._mesh is not None:
            where = sharding.param_sharding(
                self._mesh, path, kernel.shape, self.module.axes, self.module.kv_heads
            )
            kernel = jax.device_put(kernel, where)
        params = traverse_util.unflatten_dict(flat | {path: kernel})
        model = VLM(
            self.module.untied(), params, self.config, self._port, self.directory, self._mesh
        )
        model._use(self.generation_config)
        model.adapter = self.adapter
        return model

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
        directory = self._with_tokenizer("processor")
        processor = self._port.read_processor(directory)
        self._port.complete_processor(processor, self.module.config, directory)
        if getattr(processor, "chat_template", None) is None:
            # It may be only in tokenizer_config.json.
            processor.chat_template = processor.tokenizer.chat_template
        self._check_image_token(processor)
        self._warn_of(processor.tokenizer)
        return processor

    def _check_image_token(self, processor: Any) -> None:
        """Raises ValueError if the processor's image token differs from the one in config.json."""
        token = getattr(processor, "image_token", None)
        if token is None:
            return
        number = processor.tokenizer.convert_tokens_to_ids(str(token))
        if number not in self.image_tokens:
            raise ValueError(
                f"{self.directory}: image token {str(token)!r} has id {number} in the tokenizer, "
                f"but config.json says {self.image_tokens[0]}; use files from the same checkpoint"
            )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, from transformers; loaded on first use."""
        tokenizer = self._port.read_tokenizer(self._with_tokenizer("tokenizer"))
        self._warn_of(tokenizer)
        return tokenizer

    def _warn_of(self, tokenizer: Any) -> None:
        """Warns, once per model, if the tokenizer has more tokens than the model."""
        if not self._tokenizer_seen:
            self._tokenizer_seen = True
            vocabulary.warn_of_longer_tokenizer(
                tokenizer, self.module.num_embeddings, self.image_tokens, self.directory
            )

    def _with_tokenizer(self, what: str) -> Path:
        """Returns the checkpoint's directory; raises ValueError if it has no tokenizer."""
        if self.directory is None:
            raise ValueError(f"the model has no directory and so no {what}; use ports.load")
        with checkpoint.loading(self.directory, what):
            checkpoint.require_tokenizer(self.directory)
        return self.directory

    def example_inputs(self, batch: int = 1) -> dict[str, Any]:
        """Returns shapes and dtypes (`jax.ShapeDtypeStruct`) of a batch with one image per row."""
        return self._port.example_inputs(self.module.config, batch)

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for an image."""
        return self.module.config.image_tokens

    def apply(self, params: dict, inputs: vision_language.Inputs, **kwargs: Any) -> Any:
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
        with sharding.on(self._mesh):
            return self.module.apply({"params": params}, inputs, **kwargs)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the modules that can be captured or steered, in the order of computation."""
        return tuple(self.site_shapes)

    @functools.cached_property
    def site_shapes(self) -> dict[str, tuple[int, ...]]:
        """{site: shape of its states} for the port's example inputs; the last axis is D."""
        return list_sites(self.apply, self.params, self.example_inputs())

    @functools.cached_property
    def _token_sites(self) -> frozenset[str]:
        return steer.token_sites(self.apply, self.params, self.example_inputs())

    def forward(
        self,
        inputs: vision_language.Inputs,
        *,
        sites: str | Sequence[str] = (),
        edits: Edits | None = None,
    ) -> Output:
        """Runs one jitted forward pass over a batch.

        Args:
            inputs: the arrays from the checkpoint's processor.
            sites: names of sites, or patterns such as "layers.*" (see `find_sites`), whose states
                to return.
            edits: site, or pattern for sites of the decoder -> edit or edits of its states
                (`ports.add` ...); see `ports.steer`.

        Returns:
            Logits and states at all T positions.

        Raises:
            ValueError: a token id is outside the vocabulary, a site is unknown, an edit does not
                fit, or images and prompts do not match.
        """
        arrays, asked = self._check(inputs), self.find_sites(sites)
        edits, arrays = self._place_edits(edits, arrays)
        logits, states = _forward(
            self.module, self.params, self._place(arrays), edits, _distinct(asked), self._mesh
        )
        length = arrays["input_ids"].shape[1]
        return Output(logits[:, -length:], self._cut(states, asked, length))

    def states(
        self,
        inputs: vision_language.Inputs,
        *,
        sites: str | Sequence[str],
        edits: Edits | None = None,
    ) -> dict[str, Array]:
        """Computes states like `forward`, without logits and without layers after the last site.

        Args:
            inputs: as for `forward`.
            sites: as for `forward`.
            edits: as for `forward`.

        Returns:
            Site -> states [B, T, D].

        Raises:
            ValueError: as for `forward`.
        """
        arrays, asked = self._check(inputs), self.find_sites(sites)
        edits, arrays = self._place_edits(edits, arrays)
        arguments = (self.module, self.params, self._place(arrays), edits, _distinct(asked))
        states = _states(*arguments, self._mesh)
        return self._cut(states, asked, arrays["input_ids"].shape[1])

    def generate(
        self,
        inputs: vision_language.Inputs,
        *,
        max_new_tokens: int,
        sites: str | Sequence[str] = (),
        edits: Edits | None = None,
        sampling: Sampling | None = None,
        prompt_states: bool = False,
    ) -> Generation:
        """Answers a batch of prompts; prefill and decoding are one compiled program.

        Args:
            inputs: the arrays from the checkpoint's processor. Rows may be padded on either side;
                they are padded on the left to one of a few lengths.
            max_new_tokens: maximum number of new tokens, M; a row ends earlier at an
                end-of-sequence token.
            sites: sites of the decoder whose states to return.
            edits: site -> edit or edits of its states (`ports.add` ...), applied to the prompt and
                at every step; see `ports.steer`.
            sampling: `ports.Sampling(key, temperature, top_p)`, or `vlm.sampling(key)` for the
                checkpoint's settings; None decodes greedily, even if the checkpoint's do_sample is
                true.
            prompt_states: also return the states at the T prompt positions (for the head, only at
                the last position, the only one where the prefill computes it).

        Returns:
            Tokens int32[B, M] and the states that predicted them.

        Raises:
            ValueError: a token id is outside the vocabulary, a site is unknown or outside the
                decoder, max_new_tokens is less than 1, an edit does not fit, images and prompts do
                not match, or a value in `generation_config` is not implemented.
        """
        arguments, options, checked = self._generation(
            inputs, max_new_tokens, sites, edits, sampling, prompt_states
        )
        result = _generate(*arguments, **options)
        asked = self.find_sites(sites, generated=True)
        states = self._cut(result.prompt_states, asked, checked["input_ids"].shape[1])
        return result._replace(
            states=_by_name(result.states, asked), prompt_states=padding.realign(checked, states)
        )

    def lower(
        self,
        inputs: vision_language.Inputs,
        *,
        sites: str | Sequence[str],
        max_new_tokens: int | None = None,
        prompt_states: bool = False,
    ) -> jax.stages.Lowered:
        """Lowers the program that a call of `generate` or `states` would run, without running it.

        Parameters may be abstract. For the memory of the program, use
        `vlm.lower(...).compile().memory_analysis()`.

        Args:
            inputs: a batch, as for `generate`.
            sites: sites whose states to return.
            max_new_tokens: as for `generate`; None lowers the program of `states`.
            prompt_states: as for `generate`.

        Returns:
            The lowered program.

        Raises:
            ValueError: as for `generate` or `states`.
        """
        if max_new_tokens is not None:
            arguments, options, _ = self._generation(
                inputs, max_new_tokens, sites, None, None, prompt_states
            )
            return _generate.lower(*arguments, **options)
        arrays, sites = self._place(self._check(inputs)), self.check_sites(sites)
        return _states.lower(self.module, self.params, arrays, {}, sites, self._mesh)

    def _generation(
        self,
        inputs: vision_language.Inputs,
        max_new_tokens: int,
        sites: str | Sequence[str],
        edits: Edits | None,
        sampling: Sampling | None,
        prompt_states: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, np.ndarray]]:
        """Returns the arguments of the compiled generation, and the checked, unpadded inputs."""
        checked = self._check(inputs)
        model_inputs.check_count(max_new_tokens)
        sites = self.check_sites(sites, generated=True)
        edits, checked = self._place_edits(edits, checked, max_new_tokens)
        arrays = self._place(padding.align_right(checked, self._port.per_position))
        options = {
            "max_new_tokens": max_new_tokens,
            "eos_tokens": self.eos_tokens,
            "pad_token": self.pad_token,
            "sites": sites,
            "prompt_states": prompt_states,
            "mesh": self._mesh,
        }
        rules = self._rules(checked)
        return (self.module, self.params, arrays, sampling, edits, rules), options, checked

    def _rules(self, arrays: Mapping[str, np.ndarray]) -> logits.Rules | None:
        """Returns the rules that change logits when generating from these prompts."""
        options = self.logits_options
        if not options:
            return None
        length = arrays["input_ids"].shape[1]
        rules = logits.make_rules(
            options,
            vocabulary=self.module.config.text.vocab_size,
            end_tokens=self.eos_tokens,
            length=length,
            fill=padding.bucket_length(length) - length,
        )
        return self._everywhere(rules)

    def sweep(
        self,
        inputs: vision_language.Inputs,
        variants: Sequence[Edits],
        *,
        max_new_tokens: int,
        sites: str | Sequence[str] = (),
    ) -> Generation:
        """Answers one batch greedily under each of A variants of the same edits, in one program.

        Images are encoded once, and prompts are computed once up to the first edited layer.

        Args:
            inputs: as for `generate`.
            variants: A edits with the same sites and kinds; vectors, strengths and positions may
                differ. To vary the site, use `ports.stacked` with strength zero at all sites but
                one.
            max_new_tokens: as for `generate`.
            sites: as for `generate`.

        Returns:
            A Generation whose arrays have a leading axis A.

        Raises:
            ValueError: as for `generate`, or the variants differ in structure.
        """
        checked = self._check(inputs)
        model_inputs.check_count(max_new_tokens)
        asked = self.find_sites(sites, generated=True)
        placed = [self._place_edits(edits, checked, max_new_tokens)[0] for edits in variants]
        structures = {jax.tree.structure(edits) for edits in placed}
        if len(structures) != 1:
            raise ValueError(
                f"{len(placed)} variants of edits have {len(structures)} structures; expected the "
                "same sites and kinds of edits, all with a mask or all without (see ports.stacked)"
            )
        if not jax.tree.leaves(placed):  # no edits: all variants are the same
            answer = self.generate(inputs, max_new_tokens=max_new_tokens, sites=sites)
            return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(placed)), answer)
        result = _generate(
            self.module,
            self.params,
            self._place(padding.align_right(_with_columns(checked), self._port.per_position)),
            edits=jax.tree.map(lambda *leaves: jnp.stack(leaves), *placed),
            rules=self._rules(checked),
            max_new_tokens=max_new_tokens,
            eos_tokens=self.eos_tokens,
            pad_token=self.pad_token,
            sites=_distinct(asked),
            variants=True,
            mesh=self._mesh,
        )
        return result._replace(states=_by_name(result.states, asked))

    def unembed(self, x: Array | np.ndarray, *, through_norm: bool = False) -> Array:
        """Maps states or directions to logits with the language-model head.

        Args:
            x: [..., D], states or directions in their space.
            through_norm: apply the decoder's final norm first, as the model does after its last
                layer (and the logit lens after any layer). RMSNorm, the norm of all ports,
                multiplies by a weight and divides by a positive number, so the order of the logits
                does not depend on the length of a direction or state.

        Returns:
            Logits float32[..., V].
        """
        method = "unembed_through_norm" if through_norm else "unembed"
        return _unembed(self.module, self.params, jnp.asarray(x), method, self._mesh)

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

    def find_sites(self, names: str | Sequence[str], *, generated: bool = False) -> dict[str, str]:
        """Finds sites by name or pattern.

        Args:
            names: names as in `sites`, names of modules in today's transformers, the end of a
                single site's name, or patterns such as "layers.*" (see
                `ports.intervene.sites.match_sites`); or one of these.
            generated: only accept sites that have a state for each generated token.

        Returns:
            {name: site}; sites that a pattern matches appear under their own name.

        Raises:
            ValueError: a name matches no site, or a site without states for generated tokens.
        """
        inside = [site for site in self.sites if not generated or self.module.is_of_decoder(site)]
        asked: dict[str, str] = {}
        for name in as_sites(names):
            among = self.sites if self._is_whole(name) else inside
            asked |= find_sites([name], among, self.hub_names)
        outside = [name for name, site in asked.items() if site not in inside]
        if outside:
            raise ValueError(
                f"site {outside[0]!r} has no states for generated tokens; "
                f"choose sites below {'.'.join(self.module.decoder_path)!r}, or use forward"
            )
        return asked

    def _is_whole(self, name: str) -> bool:
        """Returns whether a name is the full name of a site, not a pattern or the end of one."""
        known = set(map(normal_name, self.sites))
        return any(normal_name(said) in known for said in (name, *self.hub_names(name)))

    def check_sites(
        self, sites: str | Sequence[str], *, generated: bool = False
    ) -> tuple[str, ...]:
        """Returns the sites found by `find_sites`, each once.

        Args:
            sites: names and patterns, as for `find_sites`.
            generated: as for `find_sites`.

        Returns:
            The sites.

        Raises:
            ValueError: as for `find_sites`.
        """
        return _distinct(self.find_sites(sites, generated=generated))

    def find_site(self, name: str, *, generated: bool = False) -> str:
        """Finds the only site that matches a name or pattern.

        Args:
            name: a name or pattern, as for `find_sites`.
            generated: as for `find_sites`.

        Returns:
            The site.

        Raises:
            ValueError: no site or several sites match.
        """
        found, *others = self.check_sites([name], generated=generated)
        if others:
            names = (found, *others)
            raise ValueError(f"{name!r} matches {len(names)} sites, {few(names)}; choose one")
        return found

    def hub_names(self, name: str) -> tuple[str, ...]:
        """Returns the port's names for a module named as in today's transformers."""
        return (self._port.hub_name(name),)

    def render(self, prompt: str) -> str:
        """Renders a user's prompt with one image in the checkpoint's chat template.

        If the template does not support images, the image is inserted as text, on its own line
        before the prompt.

        Args:
            prompt: the user's text.

        Returns:
            The prompt for `process`, ending where the answer starts.

        Raises:
            ValueError: `prompt` is not a string, or the checkpoint has no chat template or one that
                fails.
        """
        if not isinstance(prompt, str):
            raise ValueError(
                f"the prompt is a {type(prompt).__name__}; expected a string, one prompt per call"
            )
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"{self.directory} has no chat template; add that of its model family as "
                "chat_template.jinja"
            )
        token = str(getattr(self.processor, "image_token", ""))
        parts = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = f"{self._port.image_text.format(token)}\n{prompt}"
        reasons = []
        for content in (parts, text, [{"type": "text", "text": text}]):
            message = [{"role": "user", "content": content}]
            try:
                said = self.processor.apply_chat_template(message, add_generation_prompt=True)
            except Exception as error:  # Jinja's errors, and any that the template's code raises
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
                continue
            if not token or said.count(token) == 1 + prompt.count(token):
                return said
            reasons.append(f"it renders {said.count(token)} {token} for one image")
        raise ValueError(
            f"{self.directory}: its chat template fails ({reasons[0]}); replace it with that of "
            "its model family, as chat_template.jinja"
        )

    def process(
        self, texts: Sequence[str], images: Sequence[Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Makes a batch for `forward` and `generate`.

        Args:
            texts: prompts from `render`.
            images: for each prompt an image, or a list of images, empty for none. An image is a PIL
                image, an array or a file's path.

        Returns:
            The processor's arrays, padded on the left.

        Raises:
            ValueError: `texts` is a single string or `images` a single image, their numbers differ,
                a file does not exist, or a prompt has no image token because it was not rendered.
        """
        mark = getattr(self.processor, "image_token", None)
        pairs = model_inputs.pair_prompts(texts, images, mark)
        self.processor.tokenizer.padding_side = "left"
        batch = self.processor(
            text=[text for text, _ in pairs],
            images=[listed for _, listed in pairs],
            padding=True,
            return_tensors="np",
        )
        return {name: np.asarray(value) for name, value in batch.items()}

    def decode(self, tokens: Any) -> str | list[str]:
        """Decodes token ids to text, without special and pad tokens.

        Args:
            tokens: int[T] or int[N, T], as returned by `generate`; any array or list.

        Returns:
            One string for [T], N strings for [N, T].

        Raises:
            ValueError: the tokens are not integers, have another number of axes, or an id is
                outside the vocabulary.
        """
        size = max(self.module.num_embeddings, 1 + max(self.image_tokens))
        return decode_tokens(self.tokenizer, tokens, size, self.eos_tokens, self.pad_token)

    def _place_edits(
        self,
        edits: Edits | None,
        arrays: dict[str, np.ndarray],
        max_new_tokens: int = 1,
    ) -> tuple[dict[str, tuple[Edit, ...]], dict[str, np.ndarray]]:
        """Returns edits as arguments of a compiled program, and the arrays with their columns.

        `max_new_tokens` tokens are generated; the last of them is not fed back to the model.
        """
        given = as_edits({} if edits is None else edits)
        if not given:
            return {}, arrays
        placed: dict[str, tuple[Edit, ...]] = {}
        batch, length = arrays["input_ids"].shape
        missing = padding.bucket_length(length) - length

        def move(columns: Any) -> Any:
            """Pads [B, T, ...] on the right, from the caller's columns to the bucket length."""
            xp = np if isinstance(columns, np.ndarray) else jnp
            return xp.pad(columns, ((0, 0), (0, missing), *((0, 0),) * (columns.ndim - 2)))

        for name, listed in given.items():
            # "layers.*" and "layers.1" would also match layers of a vision tower.
            for site in self.check_sites([name], generated=not self._is_whole(name)):
                here = listed
                # In the towers, rows and positions are those of images.
                if self.module.is_of_decoder(site):
                    for edit in here:
                        check_batch(edit, batch, length)
                        _warn_of_beyond(site, edit, length + max_new_tokens - 1)
                    here = tuple(lay_out(edit, move) for edit in here)
                placed[site] = (*placed.get(site, ()), *here)
        for site, listed in placed.items():
            if all(map(is_everywhere, listed)):
                continue
            if normal_name(site) not in self._token_sites:
                raise ValueError(
                    f"site {site!r} comes before image and text are joined, so its positions are "
                    "not tokens; expected where='all', or a site below "
                    f"{'.'.join(self.module.decoder_path)!r}"
                )
        return self._everywhere(placed), _with_columns(arrays)

    def _everywhere(self, tree: Any) -> Any:
        """Replicates small arguments of a program on the devices of all processes."""
        if self._mesh is None or sharding.replicated(self._mesh).is_fully_addressable:
            return tree
        everywhere = sharding.replicated(self._mesh)
        return jax.tree.map(lambda leaf: sharding.put(np.asarray(leaf), everywhere), tree)

    def _cut(
        self, states: dict[str, Array], asked: Mapping[str, str], length: int
    ) -> dict[str, Array]:
        """Returns the states under the requested names, without the padding to the bucket."""
        cut = {
            site: value[:, -length:] if self.module.is_of_decoder(site) else value
            for site, value in states.items()
        }
        return _by_name(cut, asked)

    def _check(self, inputs: vision_language.Inputs) -> dict[str, np.ndarray]:
        arrays = model_inputs.to_numpy(inputs, self._port.inputs)
        if "input_ids" not in arrays or arrays["input_ids"].ndim != 2:
            raise ValueError(
                "inputs have no input_ids of shape [batch, positions]; pass what the processor "
                "returns with return_tensors='np'"
            )
        mask = arrays.setdefault("attention_mask", np.ones_like(arrays["input_ids"]))
        if mask.shape != arrays["input_ids"].shape:
            raise ValueError(
                f"attention_mask has shape {mask.shape}; expected the shape of input_ids, "
                f"{arrays['input_ids'].shape}"
            )
        vocabulary.check_ids(arrays["input_ids"], self.module.num_embeddings, self.image_tokens)
        return self._port.prepare_inputs(self.module.config, arrays)

    def prepare(self, inputs: vision_language.Inputs) -> dict[str, np.ndarray]:
        """Checks the processor's arrays and pads them to a compiled length.

        Args:
            inputs: the arrays from the checkpoint's processor.

        Returns:
            The arrays that `module` takes.

        Raises:
            ValueError: a token id is outside the vocabulary, or images and prompts do not match.
        """
        return self._padded(self._check(inputs))

    def place(self, inputs: vision_language.Inputs) -> dict[str, Array]:
        """Prepares inputs like `prepare` and puts them on the model's devices.

        Args:
            inputs: the arrays from the checkpoint's processor.

        Returns:
            The arrays, with rows sharded over the mesh axis "data".

        Raises:
            ValueError: as for `prepare`.
        """
        return self._place(self._check(inputs))

    def _padded(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return padding.pad_to_bucket(arrays, self.pad_token, self._port.per_position)

    def _place(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        arrays = self._padded(arrays)
        if self._mesh is None:
            return {name: jnp.asarray(value) for name, value in arrays.items()}
        return {
            name: sharding.put(value, sharding.batch_sharding(self._mesh, value.shape))
            for name, value in arrays.items()
        }


def _warn_of_beyond(site: str, edit: Edit, length: int) -> None:
    if not reaches(edit, length):
        where = f"from {int(edit.start)} on" if edit.at is None else f"{np.ravel(edit.at).tolist()}"
        warnings.warn(
            f"the edit at {site!r} changes nothing: it is for the tokens {where:.60}, but no row "
            f"has more than {length}",
            stacklevel=4,
        )


def _with_columns(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds `columns`, which keeps track of the caller's columns when padding moves them."""
    ids = arrays["input_ids"]
    return arrays | {"columns": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)}


def _distinct(asked: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(asked.values()))


def _by_name(states: dict[str, Array], asked: Mapping[str, str]) -> dict[str, Array]:
    return {name: states[site] for name, site in asked.items() if site in states}


def _special_tokens(
    config: Any, chosen: Mapping[str, Any], directory: Path | None, vocabulary_size: int
) -> tuple[tuple[int, ...], int]:
    """Returns the ids that end a row, and the pad id; generation_config.json takes precedence.

    Raises ValueError for an id outside the vocabulary.
    """
    text = config.get_text_config()
    eos = chosen.get("eos_token_id", text.eos_token_id)
    eos = tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (eos,))
    candidates = (
        chosen.get("pad_token_id"),
        getattr(config, "pad_token_id", None),
        text.pad_token_id,
        *eos[:1],
        0,
    )
    pad = next(token for token in candidates if token is not None)
    named = {"eos_token_id": eos, "pad_token_id": (pad,)}
    vocabulary.check_special_ids(named, vocabulary_size, directory)
    return eos, pad
