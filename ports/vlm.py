"""`VLM`: a loaded vision-language model with its processor, the same object for every port."""

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
    """What `VLM.forward` returns."""

    logits: Array  # float32[B, T, V], in every dtype of the model
    states: dict[str, Array]  # site -> [B, T, D]; of a vision site [images, patches, width]

    def __repr__(self) -> str:
        return f"Output(logits: {kind(self.logits)}; states: {few(self.states) or 'none'})"

    def _repr_html_(self) -> str:
        arrays = {"logits": self.logits, **named_states("states", self.states)}
        return html_arrays(arrays, title="Output")


# The mesh is an argument of every program: what was traced for one is not run on another.
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
    """A vision-language model with its parameters. `ports.load` makes it.

    Attributes:
        config: the transformers configuration, as read from config.json.
        params: the tree of parameters, as the Linen module takes it under "params".
        module: the Linen module.
        directory: where the checkpoint lies, or None.
        generation_config: the values of generation_config.json, by transformers' names. Those that
            change logits (repetition_penalty, suppress_tokens ...) apply to every generation;
            those of sampling where it is asked for, see `sampling`.
        eos_tokens, pad_token: ids that end a generated row and that fill it up afterwards.
        adapter: the directory of the LoRA adapter that the parameters include, or None.
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
        """Takes the values of a generation_config.json. ValueError for ids that can't be."""
        self.generation_config = values
        self.eos_tokens, self.pad_token = _special_tokens(
            self.config, values, self.directory, self.module.num_embeddings
        )

    def with_adapter(self, directory: str | Path, *, donate: bool = False) -> "VLM":
        """The model with a PEFT LoRA adapter merged into its linear layers.

        All other parameters are shared with this model; with `donate`, which gives up this one,
        the merged kernels take the place of the old ones.

        Raises FileNotFoundError and ValueError as `ports.load` does.
        """
        directory = hub.find_directory(directory, peft_io.EXPECTED)
        adapter = self.read_adapter(directory)
        model = copy.copy(self)
        model.params = lora.merge(self.params, adapter, donate=donate)
        model.adapter = directory
        return model

    def with_generation_config(self, values: Mapping[str, Any]) -> "VLM":
        """The model with these values instead of those of generation_config.json.

        All parameters are shared with this model. The tokens that end and fill rows stay, unless
        the values name others; with {} nothing else is left.

        Raises ValueError for a key that transformers does not know.
        """
        model = copy.copy(self)
        model._use(generation_config.given(values, self.generation_config))
        return model

    @property
    def logits_options(self) -> dict[str, Any]:
        """The values of `generation_config` that change greedy tokens.

        Raises ValueError for one that is not implemented (num_beams, guidance_scale ...).
        """
        return generation_config.changing_logits(self.generation_config)

    def sampling(self, key: Array) -> Sampling:
        """How the checkpoint's own generation_config.json draws tokens, for `generate(sampling=)`.

        What it does not say is as in transformers (top_k 50). Raises ValueError as
        `logits_options`.
        """
        return Sampling(key, **generation_config.of_sampling(self.generation_config))

    def read_adapter(self, directory: str | Path) -> lora.Adapter:
        """A PEFT LoRA adapter of this model, from a directory or the hub, not merged (see
        `ports.adapted`).
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
        """The model with a head of its own, equal to the embeddings; all else is shared.

        An adapter of head or embeddings then changes the one and leaves the other, as in PEFT.

        Raises ValueError if its head is not tied to the embeddings.
        """
        if not self.module.tied:
            raise ValueError("the model's head is not tied; use the model as it is")
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
        """The model's class in PyTorch, if config.json says."""
        return next(iter(getattr(self.config, "architectures", None) or ()), None)

    @functools.cached_property
    def fingerprint(self) -> str | None:
        """What tells the checkpoint from others (`checkpoint.fingerprint`); None without one.

        The files are read once: a run may ask before each batch.
        """
        return None if self.directory is None else checkpoint.fingerprint(self.directory)

    @functools.cached_property
    def module_names(self) -> dict[str, str]:
        """Linear layer -> the module's name in transformers, which adapters' files use."""
        sites = lora.linear_layers(self.params)
        return peft_io.module_names(sites, self._port.transformers_name)

    @functools.cached_property
    def processor(self) -> Any:
        """The checkpoint's own processor, from transformers or the port; read when asked for.

        Raises ValueError for files that are missing, or do not belong together.
        """
        directory = self._with_tokenizer("processor")
        processor = self._port.read_processor(directory)
        self._port.complete_processor(processor, self.module.config, directory)
        if getattr(processor, "chat_template", None) is None:
            # It may stand in tokenizer_config.json alone.
            processor.chat_template = processor.tokenizer.chat_template
        self._check_image_token(processor)
        self._warn_of(processor.tokenizer)
        return processor

    def _check_image_token(self, processor: Any) -> None:
        """ValueError if a processor's image token is another one than config.json's."""
        token = getattr(processor, "image_token", None)
        if token is None:
            return
        number = processor.tokenizer.convert_tokens_to_ids(str(token))
        if number not in self.image_tokens:
            raise ValueError(
                f"{self.directory}: image token {str(token)!r} has id {number} in the tokenizer, "
                f"config.json says {self.image_tokens[0]}; take both files from one checkpoint"
            )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer, from transformers; read when first asked for."""
        tokenizer = self._port.read_tokenizer(self._with_tokenizer("tokenizer"))
        self._warn_of(tokenizer)
        return tokenizer

    def _warn_of(self, tokenizer: Any) -> None:
        """Warns, once per model, of a tokenizer with more tokens than the model."""
        if not self._tokenizer_seen:
            self._tokenizer_seen = True
            vocabulary.warn_of_longer_tokenizer(
                tokenizer, self.module.num_embeddings, self.image_tokens, self.directory
            )

    def _with_tokenizer(self, what: str) -> Path:
        """The checkpoint's directory. ValueError if there is none, or none with a tokenizer."""
        if self.directory is None:
            raise ValueError(f"the model was made without a directory; load it to have a {what}")
        with checkpoint.loading(self.directory, what):
            checkpoint.require_tokenizer(self.directory)
        return self.directory

    def example_inputs(self, batch: int = 1) -> dict[str, Any]:
        """Shapes and dtypes (`jax.ShapeDtypeStruct`) of a batch with one image a row."""
        return self._port.example_inputs(self.module.config, batch)

    @property
    def image_tokens(self) -> tuple[int, ...]:
        """The ids of the tokens that stand for an image."""
        return self.module.config.image_tokens

    def apply(self, params: dict, inputs: vision_language.Inputs, **kwargs: Any) -> Any:
        """Pure: logits[B, T, V] of the processor's arrays. What `capture` and `steer` wrap.

        Keyword arguments go to Linen's `Module.apply`. A token id outside the vocabulary gives NaN
        at its position and all that see it (under `jax.jit` nothing can be raised).
        """
        with sharding.on(self._mesh):
            return self.module.apply({"params": params}, inputs, **kwargs)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names, in network order, of the modules that can be captured or steered."""
        return tuple(self.site_shapes)

    @functools.cached_property
    def site_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of the states at each site, for the port's example inputs; the last is D."""
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
        """One jitted pass over a batch.

        Args:
            inputs: the numpy arrays of the checkpoint's processor.
            sites: names of sites, or patterns such as "layers.*" (see `find_sites`), whose states
                to return.
            edits: site, or pattern for sites of the decoder -> edit or edits of its states
                (`ports.add` ...); see `ports.steer`.

        Raises:
            ValueError: a token id outside the vocabulary, an unknown site, an edit that does not
                fit, or images that do not fit the prompt.
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
        """As `forward`, without logits: what lies behind the last of `sites` is not computed."""
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
            inputs: the numpy arrays of the checkpoint's processor; rows may be padded on either
                side, and are padded on the left up to one of few lengths.
            max_new_tokens: M. A row ends by itself with an end-of-sequence token.
            sites: sites of the decoder whose states to return.
            edits: site -> edit or edits of its states (`ports.add` ...), in the prompt and at every
                step; see `ports.steer`.
            sampling: `ports.Sampling(key, temperature, top_p)`, or `vlm.sampling(key)` for the
                checkpoint's own; None decodes greedily, whatever its do_sample says.
            prompt_states: also return the states at the T prompt positions (of the head, which
                the prefill applies to the last position only, the state at that one).

        Raises:
            ValueError: a token id outside the vocabulary, an unknown site, a site outside the
                decoder, no room for a new token, an edit that does not fit, images that do not fit
                the prompt, or a value of `generation_config` that is not implemented.
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
        """The program of `generate`, or with no `max_new_tokens` of `states`, for such a batch.

        Nothing is computed, and parameters may be abstract. Compiled, it tells its memory:
        `vlm.lower(...).compile().memory_analysis()`. Raises as those two.
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
        """What the compiled generation takes, and the checked inputs before they are filled up."""
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
        """What changes logits in a generation from these prompts, as arguments of its program."""
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
        """Greedy answers of one batch under each of A variants of the same edits, in one program.

        Images are encoded once, and so are the prompts up to the first edited layer.

        Args:
            inputs: as for `generate`.
            variants: A edits with the same sites and kinds; vectors, strengths and positions may
                differ. Other sites: `ports.stacked` with a strength of zero at all sites but one.
            max_new_tokens, sites: as for `generate`.

        Returns:
            A Generation whose arrays have a leading axis A.

        Raises:
            ValueError: as `generate`, or variants of another structure.
        """
        checked = self._check(inputs)
        model_inputs.check_count(max_new_tokens)
        asked = self.find_sites(sites, generated=True)
        placed = [self._place_edits(edits, checked, max_new_tokens)[0] for edits in variants]
        structures = {jax.tree.structure(edits) for edits in placed}
        if len(structures) != 1:
            raise ValueError(
                f"{len(placed)} variants of edits have {len(structures)} structures; expected one: "
                "the same sites and kinds of edits, all with a mask or none (see ports.stacked)"
            )
        if not jax.tree.leaves(placed):  # no edits: nothing tells the variants apart
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
        """Returns logits[..., V] of x[..., D], in float32: the language-model head alone.

        Args:
            x: states, or directions in their space.
            through_norm: apply the decoder's final norm first, as the model does to what its last
                layer puts out (and the logit lens to that of any layer). RMSNorm, the norm of all
                ports, multiplies by its weight and divides by one positive number, so that of a
                direction, as of a state, the order of the logits does not depend on its length.
        """
        method = "unembed_through_norm" if through_norm else "unembed"
        return _unembed(self.module, self.params, jnp.asarray(x), method, self._mesh)

    def is_before_norm(self, site: str) -> bool:
        """Whether a site's states go through the decoder's final norm before the head reads them.

        True of its layers and what is in them; False of the norm itself, the head, the vision tower
        and names that are no site. `unembed(states, through_norm=...)` wants to know.
        """
        return any(map(self.module.is_before_norm, (site, *self.hub_names(site))))

    def find_sites(self, names: str | Sequence[str], *, generated: bool = False) -> dict[str, str]:
        """The sites that names and patterns mean.

        Args:
            names: names of sites, as in `sites`, or of modules in today's transformers, or the end
                of one site's name, or patterns such as "layers.*" (see
                `ports.intervene.sites.match_sites`); a string alone is one.
            generated: only sites that have a state for each generated token.

        Returns {name: site}, where a site that a pattern matched has its own name.

        Raises ValueError for what means no site, or one without a state for a generated token.
        """
        inside = [site for site in self.sites if not generated or self.module.is_of_decoder(site)]
        asked: dict[str, str] = {}
        for name in as_sites(names):
            among = self.sites if self._is_whole(name) else inside
            asked |= find_sites([name], among, self.hub_names)
        outside = [name for name, site in asked.items() if site not in inside]
        if outside:
            raise ValueError(
                f"site {outside[0]!r} has no state a generated token; "
                f"choose sites below {'.'.join(self.module.decoder_path)!r}, or use forward"
            )
        return asked

    def _is_whole(self, name: str) -> bool:
        """Whether a name is that of a site; a pattern and the end of a name are not."""
        known = set(map(normal_name, self.sites))
        return any(normal_name(said) in known for said in (name, *self.hub_names(name)))

    def check_sites(
        self, sites: str | Sequence[str], *, generated: bool = False
    ) -> tuple[str, ...]:
        """The sites that names and patterns mean, each once; raises as `find_sites`."""
        return _distinct(self.find_sites(sites, generated=generated))

    def find_site(self, name: str, *, generated: bool = False) -> str:
        """The one site that a name or a pattern means; ValueError if it means several, or none."""
        found, *others = self.check_sites([name], generated=generated)
        if others:
            names = (found, *others)
            raise ValueError(f"{name!r} means {len(names)} sites, {few(names)}; choose one of them")
        return found

    def hub_names(self, name: str) -> tuple[str, ...]:
        """What the port may call a module that today's transformers gives a name."""
        return (self._port.hub_name(name),)

    def render(self, prompt: str) -> str:
        """A user's prompt with one image, in the checkpoint's chat template, ready to be answered.

        A template for text alone gets the image as text, before the prompt in a line of its own.

        Raises ValueError if it is no string, or the checkpoint has no chat template or one that
        fails.
        """
        if not isinstance(prompt, str):
            raise ValueError(
                f"the prompt is a {type(prompt).__name__}; expected a string, one prompt a call"
            )
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"{self.directory} has no chat template; add the one of its model family as "
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
            except Exception as error:  # Jinja's kinds, and those of what a template does
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
                continue
            if not token or said.count(token) == 1 + prompt.count(token):
                return said
            reasons.append(f"it renders {said.count(token)} {token} for one image")
        raise ValueError(
            f"{self.directory}: its chat template fails ({reasons[0]}); replace it by the one of "
            "its model family, as chat_template.jinja"
        )

    def process(
        self, texts: Sequence[str], images: Sequence[Any] | None = None
    ) -> dict[str, np.ndarray]:
        """A batch for `forward` and `generate`: rendered prompts with one image each.

        An image is what the checkpoint's processor takes: a PIL image, an array, or the path of a
        file. Instead of it there may be a list of those of that prompt, an empty one for none.

        Raises ValueError for one string or one image, another number of images than of prompts, a
        file that is not there, or a prompt that was not rendered: it holds no token for its image.
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

    def _place_edits(
        self,
        edits: Edits | None,
        arrays: dict[str, np.ndarray],
        max_new_tokens: int = 1,
    ) -> tuple[dict[str, tuple[Edit, ...]], dict[str, np.ndarray]]:
        """The edits as arguments of a compiled program, and the arrays with what they need.

        max_new_tokens: how many are generated; the last of them enters no model.
        """
        given = as_edits({} if edits is None else edits)
        if not given:
            return {}, arrays
        placed: dict[str, tuple[Edit, ...]] = {}
        batch, length = arrays["input_ids"].shape
        missing = padding.bucket_length(length) - length

        def move(columns: Any) -> Any:
            """[B, T, ...] by the caller's columns, up to the bucket's length; none are beyond."""
            xp = np if isinstance(columns, np.ndarray) else jnp
            return xp.pad(columns, ((0, 0), (0, missing), *((0, 0),) * (columns.ndim - 2)))

        for name, listed in given.items():
            # "layers.*" and "layers.1" would fit the layers of a vision tower too.
            for site in self.check_sites([name], generated=not self._is_whole(name)):
                here = listed
                # In the towers rows and positions are those of images.
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
                    f"site {site!r} comes before image and text are joined, its positions are no "
                    "tokens: where can only be 'all' there; steer a site below "
                    f"{'.'.join(self.module.decoder_path)!r} at some of the positions"
                )
        return self._everywhere(placed), _with_columns(arrays)

    def _everywhere(self, tree: Any) -> Any:
        """Small arguments of a program, on the devices of all processes."""
        if self._mesh is None or sharding.replicated(self._mesh).is_fully_addressable:
            return tree
        everywhere = sharding.replicated(self._mesh)
        return jax.tree.map(lambda leaf: sharding.put(np.asarray(leaf), everywhere), tree)

    def _cut(
        self, states: dict[str, Array], asked: Mapping[str, str], length: int
    ) -> dict[str, Array]:
        """The states by the names asked for, without the positions that only fill up the bucket."""
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
                f"attention_mask has shape {mask.shape}; expected that of input_ids, "
                f"{arrays['input_ids'].shape}"
            )
        vocabulary.check_ids(arrays["input_ids"], self.module.num_embeddings, self.image_tokens)
        return self._port.prepare_inputs(self.module.config, arrays)

    def prepare(self, inputs: vision_language.Inputs) -> dict[str, np.ndarray]:
        """The processor's arrays as `module` is compiled for them: checked, padded to the bucket.

        Raises ValueError for a token id outside the vocabulary, or if images and prompts do not fit
        each other.
        """
        return self._padded(self._check(inputs))

    def place(self, inputs: vision_language.Inputs) -> dict[str, Array]:
        """As `prepare`, and on the model's devices: rows on the mesh axis "data"."""
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
            f"the edit at {site!r} changes nothing: it is for the tokens {where:.60}, and no row "
            f"has more than {length}",
            stacklevel=4,
        )


def _with_columns(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays, which remember the caller's columns wherever padding moves them."""
    ids = arrays["input_ids"]
    return arrays | {"columns": np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)}


def _distinct(asked: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(asked.values()))


def _by_name(states: dict[str, Array], asked: Mapping[str, str]) -> dict[str, Array]:
    return {name: states[site] for name, site in asked.items() if site in states}


def _special_tokens(
    config: Any, chosen: Mapping[str, Any], directory: Path | None, vocabulary_size: int
) -> tuple[tuple[int, ...], int]:
    """The ids that end a row, and the one that fills it; generation_config.json goes first.

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
