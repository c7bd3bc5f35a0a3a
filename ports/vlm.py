"""`VLM`: a loaded vision-language model with its processor, the same class for every port."""

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ports import checkpoint, description, passes
from ports.checkpoint import hub, peft_io
from ports.decoding import generation_config, logits
from ports.decoding.generate import Generation
from ports.decoding.sampling import Sampling
from ports.decoding.text import decode_tokens
from ports.inputs import model_inputs, padding, prompts, vocabulary
from ports.intervene import layout, lora, steer
from ports.intervene.edits import Edits, as_edits
from ports.intervene.sites import as_sites, find_sites, list_sites
from ports.messages import few
from ports.models.port import Port
from ports.nn.vision_language import Inputs, VisionLanguageModel
from ports.parallel import sharding
from ports.passes import Output

Array = jax.Array


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
        module: VisionLanguageModel,
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
        self.eos_tokens, self.pad_token = generation_config.special_tokens(
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
        return peft_io.read(
            hub.find_directory(directory, peft_io.EXPECTED),
            self.params,
            self._port.canonical_name,
            architecture=self.architecture,
            tied=(self.head, f"{self.decoder}.embed_tokens") if self.is_tied else (),
        )

    def untied(self) -> "VLM":
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
        model = VLM(module, params, self.config, self._port, self.directory, self._mesh)
        model._use(self.generation_config)
        model.adapter = self.adapter
        return model

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the parameters and the computation."""
        return jnp.dtype(self.module.dtype)

    @property
    def decoder(self) -> str:
        """Name of the language model's decoder; its layers are below it."""
        return ".".join(self.module.decoder_path)

    @property
    def head(self) -> str:
        """Name of the language-model head."""
        return ".".join(self.module.head_path)

    @property
    def is_tied(self) -> bool:
        """Whether the head's weights are the embeddings."""
        return bool(self.module.tied)

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
        directory = self._with_tokenizer("processor")
        processor = self._port.read_processor(directory)
        self._port.complete_processor(processor, self.module.config, directory)
        if getattr(processor, "chat_template", None) is None:
            # It may be only in tokenizer_config.json.
            processor.chat_template = processor.tokenizer.chat_template
        vocabulary.check_image_token(processor, self.image_tokens, directory)
        self._warn_of(processor.tokenizer)
        return processor

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
        inputs: Inputs,
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
        edits, arrays = self._lay_out(edits, arrays)
        logits, states = passes.forward(
            self.module, self.params, self._place(arrays), edits, _distinct(asked), self._mesh
        )
        length = arrays["input_ids"].shape[1]
        return Output(logits[:, -length:], self._cut(states, asked, length))

    def states(
        self,
        inputs: Inputs,
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
        edits, arrays = self._lay_out(edits, arrays)
        arguments = (self.module, self.params, self._place(arrays), edits, _distinct(asked))
        states = passes.states(*arguments, self._mesh)
        return self._cut(states, asked, arrays["input_ids"].shape[1])

    def generate(
        self,
        inputs: Inputs,
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
        checked = self._check(inputs)
        model_inputs.check_count(max_new_tokens)
        asked = self.find_sites(sites, generated=True)
        edits, arrays = self._lay_out(edits, checked, max_new_tokens)
        arguments, options = self._generation(
            arrays, edits, max_new_tokens, _distinct(asked), sampling
        )
        result = passes.generate(*arguments, **options, prompt_states=prompt_states)
        states = self._cut(result.prompt_states, asked, checked["input_ids"].shape[1])
        return result._replace(
            states=_by_name(result.states, asked), prompt_states=padding.realign(checked, states)
        )

    def lower(
        self,
        inputs: Inputs,
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
        checked = self._check(inputs)
        if max_new_tokens is None:
            arrays, sites = self._place(checked), self.check_sites(sites)
            return passes.states.lower(self.module, self.params, arrays, {}, sites, self._mesh)
        model_inputs.check_count(max_new_tokens)
        sites = self.check_sites(sites, generated=True)
        arguments, options = self._generation(checked, {}, max_new_tokens, sites)
        return passes.generate.lower(*arguments, **options, prompt_states=prompt_states)

    def _generation(
        self,
        arrays: dict[str, np.ndarray],
        edits: layout.LaidOut,
        max_new_tokens: int,
        sites: tuple[str, ...],
        sampling: Sampling | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments and options of the compiled generation from checked inputs."""
        aligned = self._place(padding.align_right(arrays, self._port.per_position))
        options = {
            "max_new_tokens": max_new_tokens,
            "eos_tokens": self.eos_tokens,
            "pad_token": self.pad_token,
            "sites": sites,
            "mesh": self._mesh,
        }
        rules = self._rules(arrays)
        return (self.module, self.params, aligned, sampling, edits, rules), options

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
        return sharding.everywhere(rules, self._mesh)

    def sweep(
        self,
        inputs: Inputs,
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
        laid = [self._lay_out(edits, checked, max_new_tokens)[0] for edits in variants]
        edits = layout.stack_variants(laid)
        if not jax.tree.leaves(edits):  # no edits: all variants are the same
            answer = self.generate(inputs, max_new_tokens=max_new_tokens, sites=sites)
            return jax.tree.map(lambda leaf: jnp.stack([leaf] * len(laid)), answer)
        arguments, options = self._generation(
            padding.with_columns(checked), edits, max_new_tokens, _distinct(asked)
        )
        result = passes.generate(*arguments, **options, variants=True)
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
        return passes.unembed(self.module, self.params, jnp.asarray(x), method, self._mesh)

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
        asked = find_sites(as_sites(names), self.sites, self.hub_names, inside)
        outside = [name for name, site in asked.items() if site not in inside]
        if outside:
            raise ValueError(
                f"site {outside[0]!r} has no states for generated tokens; "
                f"choose sites below {self.decoder!r}, or use forward"
            )
        return asked

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
        return prompts.render(
            self.processor, prompt, image_text=self._port.image_text, where=self.directory
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
        return prompts.run_processor(self.processor, texts, images)

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

    def _lay_out(
        self,
        edits: Edits | None,
        arrays: dict[str, np.ndarray],
        max_new_tokens: int = 1,
    ) -> tuple[layout.LaidOut, dict[str, np.ndarray]]:
        """Returns edits as arguments of a compiled program, and the arrays with their columns.

        `max_new_tokens` tokens are generated; the last of them is not fed back to the model.
        """
        given = as_edits({} if edits is None else edits)
        if not given:
            return {}, arrays
        # "layers.*" and "layers.1" would also match layers of a vision tower.
        among = [site for site in self.sites if self.module.is_of_decoder(site)]
        batch, length = arrays["input_ids"].shape
        laid = layout.lay_out_edits(
            given,
            lambda name: find_sites([name], self.sites, self.hub_names, among).values(),
            self.module.is_of_decoder,
            (batch, length),
            padding.bucket_length(length),
            length + max_new_tokens - 1,
        )
        layout.require_token_sites(laid, lambda: self._token_sites, self.decoder)
        return sharding.everywhere(laid, self._mesh), padding.with_columns(arrays)

    def _cut(
        self, states: dict[str, Array], asked: Mapping[str, str], length: int
    ) -> dict[str, Array]:
        """Returns the states under the requested names, without the padding to the bucket."""
        cut = {
            site: value[:, -length:] if self.module.is_of_decoder(site) else value
            for site, value in states.items()
        }
        return _by_name(cut, asked)

    def _check(self, inputs: Inputs) -> dict[str, np.ndarray]:
        arrays = model_inputs.with_mask(model_inputs.to_numpy(inputs, self._port.inputs))
        vocabulary.check_ids(arrays["input_ids"], self.module.num_embeddings, self.image_tokens)
        return self._port.prepare_inputs(self.module.config, arrays)

    def prepare(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Checks the processor's arrays and pads them to a compiled length.

        Args:
            inputs: the arrays from the checkpoint's processor.

        Returns:
            The arrays that `module` takes.

        Raises:
            ValueError: a token id is outside the vocabulary, or images and prompts do not match.
        """
        return self._padded(self._check(inputs))

    def place(self, inputs: Inputs) -> dict[str, Array]:
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
        return sharding.put_batch(self._padded(arrays), self._mesh)


def _distinct(asked: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(asked.values()))


def _by_name(states: dict[str, Array], asked: Mapping[str, str]) -> dict[str, Array]:
    return {name: states[site] for name, site in asked.items() if site in states}
