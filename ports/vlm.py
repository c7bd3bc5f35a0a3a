"""`VLM`: a loaded vision-language model that runs, the same class for every port."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ports import passes
from ports.decoding import logits, stream
from ports.decoding.generate import Generation
from ports.decoding.sampling import Sampling, check_values, without_idle
from ports.decoding.text import decode_tokens
from ports.inputs import common_prefix, model_inputs, padding, patch_layout, prompts, vocabulary
from ports.inputs.common_prefix import Shared
from ports.inputs.patch_layout import Layouts
from ports.intervene import layout
from ports.intervene.edits import Edits, as_edits, at_prompt, is_same_for_rows, only
from ports.intervene.sites import find_sites
from ports.loaded_model import LoadedModel, distinct
from ports.nn.vision_language import ImageStates, Inputs
from ports.parallel import sharding
from ports.passes import Output

Array = jax.Array


class EncodedImages(NamedTuple):
    """Result of `VLM.encode_images`.

    Attributes:
        num_tokens: number of image tokens that it is for.
        states: what the vision part gives the decoder, on the device.
    """

    num_tokens: int
    states: ImageStates


class VLM(LoadedModel):
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
                (`ports.add` ...); see `ports.steer`. In a vision tower, rows are images, crops,
                tiles or frames. For edits with an entry for each, and for functions, every number
                of them compiles a program; for others, few numbers do.

        Returns:
            Logits and states at all T positions. States of a vision tower are [N, P, D], N images,
            crops, tiles or frames; where it runs for images and for videos, a tuple of both.

        Raises:
            ValueError: a token id is outside the vocabulary, a site is unknown, an edit does not
                fit, or images and prompts do not match.
        """
        arrays, asked = self._check(inputs), self.find_sites(sites)
        edits, arrays = self._lay_out(edits, arrays)
        logits, states = passes.forward(
            self.module,
            self.params,
            self._place(arrays, variants=[edits]),
            edits,
            distinct(asked),
            mesh=self._mesh,
        )
        length = arrays["input_ids"].shape[1]
        return Output(logits[:, -length:], self._cut(states, asked, arrays))

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
        # Those of generated tokens change nothing here, and may differ between rows.
        edits = only(edits, at_prompt([edits]))
        chosen = distinct(asked)
        aligned, shared = arrays, None
        # Of what comes before text and pictures are joined there are no states by position, and of
        # the head only those of the last position.
        if all(self.module.is_of_decoder(site) and site != self.head for site in chosen):
            aligned, shared = self._divided(inputs, arrays, [edits])
        if shared is None:
            placed = self._place(arrays, variants=[edits])
            states = passes.states(self.module, self.params, placed, edits, chosen, mesh=self._mesh)
            return self._cut(states, asked, arrays)
        states = passes.states(
            self.module, self.params, self._place(aligned), edits, chosen, shared
        )
        return padding.realign(arrays, self._cut(states, asked, arrays))

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
                they are padded on the left to one of a few lengths. Of rows that ask about one
                picture, the picture and what their prompts have in common are computed once.
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
                not match, a value of `sampling` is outside its range, or a value in
                `generation_config` is not implemented.
        """
        checked = self._check(inputs)
        model_inputs.check_count(max_new_tokens)
        if sampling is not None:
            check_values(sampling)
            sampling = without_idle(sampling)
        asked = self.find_sites(sites, generated=True)
        edits, arrays = self._lay_out(edits, checked, max_new_tokens)
        divided = self._divided(inputs, arrays, [edits], max_new_tokens)
        arguments, options = self._generation(
            arrays, divided, edits, max_new_tokens, distinct(asked), sampling, [edits]
        )
        result = passes.generate(*arguments, **options, prompt_states=prompt_states)
        states = self._cut(result.prompt_states, asked, checked)
        return result._replace(
            states=_by_name(result.states, asked), prompt_states=padding.realign(checked, states)
        )

    def encode_images(self, inputs: Inputs) -> EncodedImages:
        """Computes what the decoder reads at image tokens, to ask several things about the same
        images with `stream`.

        Args:
            inputs: the arrays from the checkpoint's processor; what else the prompts say does not
                matter.

        Returns:
            The states, for `stream(images=...)`.

        Raises:
            ValueError: as for `forward`.
        """
        arrays = self._check(inputs)
        states = passes.encode_images(
            self.module, self.params, self._place(arrays), mesh=self._mesh
        )
        return EncodedImages(self._count_image_tokens(arrays), states)

    def _count_image_tokens(self, arrays: Mapping[str, np.ndarray]) -> int:
        return int(np.isin(arrays["input_ids"], self.image_tokens).sum())

    def stream(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int,
        edits: Edits | None = None,
        images: EncodedImages | None = None,
        pad_to_multiple_of: int = 1,
    ) -> Iterator[stream.Step]:
        """Answers a batch of prompts token by token, as `generate` does without sampling.

        Leaving the loop ends the work. A token costs a call of a compiled program; `generate`,
        which runs as one, is faster.

        Args:
            inputs: as for `generate`.
            max_new_tokens: as for `generate`.
            edits: as for `generate`; all reach the prompt and every step, where their positions
                decide what they change.
            images: of `encode_images`, for the same images: the vision tower does not run again,
                unless an edit changes its output or that of the token embeddings.
            pad_to_multiple_of: pad prompts to a multiple of this number of positions, so that those
                of different lengths compile fewer programs.

        Yields:
            Tokens int32[B] and the logits float32[B, V] that they were chosen from, until every
            row has ended.

        Raises:
            ValueError: as for `generate`, or `images` are for another number of image tokens.
                Which pictures they show is not checked.

        Examples:
            >>> import numpy as np, ports
            >>> from PIL import Image
            >>> vlm = ports.load("embedded")
            >>> prompt, picture = vlm.render("What is in the picture?"), Image.new("RGB", (64, 64))
            >>> inputs = vlm.process([prompt], [picture])
            >>> tokens = [step.tokens[0] for step in vlm.stream(inputs, max_new_tokens=2)]
            >>> tokens == vlm.generate(inputs, max_new_tokens=2).tokens[0].tolist()
            True
        """
        checked = self._check(inputs)
        model_inputs.check_count(max_new_tokens)
        laid, arrays = self._lay_out(edits, checked, max_new_tokens, pad_to_multiple_of)
        # Once, not at every step.
        laid, rules = jax.device_put((laid, self._rules(arrays, pad_to_multiple_of)))
        aligned = padding.align_right(arrays, self._port.per_position)
        kept: ImageStates | None = None
        if images is not None:
            count = self._count_image_tokens(arrays)
            if count != images.num_tokens:
                raise ValueError(
                    f"images are encoded for {images.num_tokens} image tokens, but the prompts "
                    f"hold {count}; encode the images of these prompts"
                )
            if all(map(self.module.is_after_images, laid)):
                kept = images.states
                # The rest is of pictures alone.
                read = {*padding.FILL, *self._port.per_position, *self.module.position_inputs}
                aligned = {name: value for name, value in aligned.items() if name in read}
        placed: dict[str, Any] = {**self._place(aligned, pad_to_multiple_of, [laid])}
        if kept is not None:
            placed["image_states"] = kept.resized(placed["input_ids"].size)
        ends = {"eos_tokens": self.eos_tokens, "pad_token": self.pad_token, "mesh": self._mesh}
        unfinished, step = stream.begin(
            self.module, self.params, placed, laid, rules, max_new_tokens, **ends
        )
        yield step
        for _ in range(max_new_tokens - 1):
            if unfinished.ended.all():
                return
            unfinished, step = stream.proceed(
                self.module, self.params, unfinished, laid, rules, **ends
            )
            yield step

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
        `vlm.lower(...).compile().memory_analysis()`. It is the program for rows that share no
        picture, which needs the most.

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
            arguments = (self.module, self.params, arrays, {}, sites)
            return passes.states.lower(*arguments, mesh=self._mesh)
        model_inputs.check_count(max_new_tokens)
        sites = self.check_sites(sites, generated=True)
        apart = padding.align_right(checked, self._port.per_position), None
        arguments, options = self._generation(checked, apart, {}, max_new_tokens, sites)
        return passes.generate.lower(*arguments, **options, prompt_states=prompt_states)

    def _generation(
        self,
        arrays: dict[str, np.ndarray],
        divided: tuple[dict[str, np.ndarray], Shared | None],
        edits: layout.LaidOut,
        max_new_tokens: int,
        sites: tuple[str, ...],
        sampling: Sampling | None = None,
        variants: Sequence[layout.LaidOut] = (),
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments and options of the compiled generation.

        `divided` comes from `_divided`, and `edits` are those of all `variants`.
        """
        aligned, shared = divided
        options = {
            "max_new_tokens": max_new_tokens,
            "eos_tokens": self.eos_tokens,
            "pad_token": self.pad_token,
            "sites": sites,
            "mesh": self._mesh,
            "at_prompt": at_prompt(variants),
            "shared": shared,
        }
        rules, aligned = self._rules(arrays), self._place(aligned, variants=variants)
        return (self.module, self.params, aligned, sampling, edits, rules), options

    def _divided(
        self,
        inputs: Inputs,
        arrays: dict[str, np.ndarray],
        variants: Sequence[layout.LaidOut],
        max_new_tokens: int = 0,
    ) -> tuple[dict[str, np.ndarray], Shared | None]:
        """Returns the arrays with padding on the left, and the prompts with equal beginnings only
        once if that saves work and changes nothing; pictures are then only in the latter.

        `arrays` are the checked `inputs`.
        """
        own, tokens = self._port.per_position, self.image_tokens
        arrays = padding.align_right(arrays, own)
        among = at_prompt(variants)
        early = (
            edit for edits in variants for listed in only(edits, among).values() for edit in listed
        )
        if self._mesh is not None or not all(map(is_same_for_rows, early)):
            return arrays, None
        places = padding.FILL.keys() | own.keys()
        rows = {name: value for name, value in arrays.items() if name in places}
        pictures = {name: value for name, value in arrays.items() if name not in places}
        per_image = getattr(self.sizes, "tokens_per_image", None)
        owned = common_prefix.pictures_of_rows(rows, pictures, tokens, per_image)
        is_given = owned is None and not own
        if is_given:
            # The port has joined the pictures of all rows; what the processor made may be apart.
            given = model_inputs.to_numpy(inputs, self._port.inputs)
            given = {name: value for name, value in given.items() if name not in places}
            owned = common_prefix.pictures_of_rows(rows, given, tokens, None)
        if owned is None:
            return arrays, None
        blocks = self.module.blocks(arrays)
        blocks = None if blocks is None else np.asarray(blocks)
        shared = common_prefix.share(rows, owned, tokens, self.pad_token, own, blocks)
        if shared is None:
            return arrays, None
        slots = shared.prefix["input_ids"].shape[1] + shared.tokens.shape[1] + max_new_tokens
        text = self.sizes.text
        # Beginnings alone would be rotated as in a shorter context.
        if text.rope.kind == "dynamic" and rows["attention_mask"].sum(1).max() > text.rope.length:
            return arrays, None
        windows = filter(None, map(text.window_of, range(text.num_layers)))
        # Padding between tokens must not count in a window.
        if min(windows, default=slots) < slots:
            return arrays, None
        if is_given:
            shared = shared._replace(prefix=self._port.prepare_inputs(self.sizes, shared.prefix))
        prefix = padding.pad_pieces(
            shared.prefix, self._port.pieces, len(shared.prefix["input_ids"])
        )
        shared = shared._replace(prefix=prefix)
        return rows, jax.tree.map(jnp.asarray, shared)

    def _rules(self, arrays: Mapping[str, np.ndarray], multiple: int = 1) -> logits.Rules | None:
        """Returns the rules that change logits when generating from these prompts."""
        options = self.logits_options
        if not options:
            return None
        length = arrays["input_ids"].shape[1]
        rules = logits.make_rules(
            options,
            vocabulary=self.sizes.text.vocab_size,
            end_tokens=self.eos_tokens,
            length=length,
            fill=padding.bucket_length(length, multiple) - length,
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
        arrays = padding.with_columns(checked)
        divided = self._divided(inputs, arrays, laid, max_new_tokens)
        arguments, options = self._generation(
            arrays, divided, edits, max_new_tokens, distinct(asked), None, laid
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
        return passes.unembed(self.module, self.params, jnp.asarray(x), method, mesh=self._mesh)

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
        self, texts: Sequence[str], images: Sequence[Any] | None = None, **options: Any
    ) -> dict[str, np.ndarray]:
        """Makes a batch for `forward` and `generate`.

        Args:
            texts: prompts from `render`.
            images: for each prompt an image, or a list of images, empty for none. An image is a PIL
                image, an array or a file's path.
            options: further arguments of the checkpoint's processor: `do_pan_and_scan=True` for the
                crops of Gemma 3, `suffix` (texts) for the answers of PaliGemma, `videos` (a flat
                list, each of PIL images or uint8[frames, height, width, 3]) with `video_metadata`
                and more (see `ports.inputs.processor.VideoProcessor`).

        Returns:
            The processor's arrays, padded on the left.

        Raises:
            ValueError: `texts` is a single string or `images` a single image, their numbers differ,
                a file does not exist, a prompt has no image token because it was not rendered, or
                the processor does not take an option, or not here.
        """
        if "videos" in options and not self._port.takes_videos:
            raise ValueError(
                "videos are not inputs of this model family; pass frames as images, one per image "
                "token"
            )
        return prompts.run_processor(self.processor, texts, images, options)

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
        size = max(self.module.num_embeddings, 1 + max(self.image_tokens, default=-1))
        return decode_tokens(self.tokenizer, tokens, size, self.eos_tokens, self.pad_token)

    def patch_layout(
        self,
        inputs: Inputs,
        *,
        sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> Layouts:
        """Tells where in its picture the state of each image token comes from.

        Args:
            inputs: the arrays from the checkpoint's processor.
            sizes: (height, width) in pixels of the original pictures of each row. Only processors
                that cut off edges (LLaVA-1.5's crops the middle) or pad them need them; without
                them, boxes are fractions of the picture that the model saw.

        Returns:
            For each row its pictures in the order of the prompt (a video frame by frame): their
            `positions` int[h, w] in T and `boxes` float[h, w, 4].

        Raises:
            ValueError: a token id is outside the vocabulary, images and prompts do not match, or
                `sizes` has other pictures than the prompts.
        """
        arrays = model_inputs.with_mask(model_inputs.to_numpy(inputs, self._port.inputs))
        self._check(inputs)
        if self._port.patch_layout is None:
            raise ValueError(f"the layout of {self.config.model_type}'s images is not implemented")

        def read_processor() -> Any:
            return self.processor if prompts.has_processor(self.directory) else None

        layouts = self._port.patch_layout(self.sizes, arrays, read_processor)
        if sizes is None:
            return layouts
        image_processor = None
        if self._port.crops_pictures:
            image_processor = getattr(read_processor(), "image_processor", None)
        return patch_layout.in_original(layouts, sizes, image_processor)

    def _lay_out(
        self,
        edits: Edits | None,
        arrays: dict[str, np.ndarray],
        max_new_tokens: int = 1,
        multiple: int = 1,
    ) -> tuple[layout.LaidOut, dict[str, np.ndarray]]:
        """Returns edits as arguments of a compiled program, and the arrays with their columns.

        `max_new_tokens` tokens are generated; the last of them is not fed back to the model.
        Prompts are padded to a `multiple`, as in `padding.bucket_length`.
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
            padding.bucket_length(length, multiple),
            length + max_new_tokens - 1,
        )
        layout.require_token_sites(laid, lambda: self._token_sites, self.decoder)
        return sharding.everywhere(laid, self._mesh), padding.with_columns(arrays)

    def _cut(
        self, states: dict[str, Array], asked: Mapping[str, str], arrays: Mapping[str, np.ndarray]
    ) -> dict[str, Array]:
        """Returns the states under the requested names, without the padding of `_padded`."""
        rows, length = arrays["input_ids"].shape
        counts = [len(arrays[name]) for name in self._port.pieces if name in arrays]

        def of_call(value: Any, counts: Sequence[int]) -> Any:
            padded = {padding.count_pieces(n, rows, self._num_shares): n for n in counts}
            return jax.tree.map(
                lambda x: x[: padded.get(len(x))] if len(padded) == 1 and x.ndim else x, value
            )

        def of_tower(value: Any) -> Any:
            # For images and for videos, a tower runs one after the other.
            if type(value) is not tuple or not counts or len(value) % len(counts):
                return of_call(value, counts)
            calls = len(value) // len(counts)
            return tuple(of_call(x, [counts[i // calls]]) for i, x in enumerate(value))

        cut = {
            site: value[:, -length:] if self.module.is_of_decoder(site) else of_tower(value)
            for site, value in states.items()
        }
        return _by_name(cut, asked)

    def _check(self, inputs: Inputs) -> dict[str, np.ndarray]:
        arrays = model_inputs.with_mask(model_inputs.to_numpy(inputs, self._port.inputs))
        vocabulary.check_ids(arrays["input_ids"], self.module.num_embeddings, self.image_tokens)
        return self._port.prepare_inputs(self.sizes, arrays)

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

    def _padded(
        self,
        arrays: dict[str, np.ndarray],
        multiple: int = 1,
        variants: Iterable[layout.LaidOut] = (),
    ) -> dict[str, np.ndarray]:
        """Pads arrays to a compiled length, and to a compiled number of images, tiles or frames.

        Not to the latter where one of the edits, of all `variants`, has an entry for each of them
        or may depend on all: it is for those that the caller sees.
        """
        rest = (
            edit
            for edits in variants
            for site, listed in edits.items()
            if not self.module.is_of_decoder(site)
            for edit in listed
        )
        if all(map(is_same_for_rows, rest)):
            arrays = padding.pad_pieces(
                arrays, self._port.pieces, len(arrays["input_ids"]), self._num_shares
            )
        return padding.pad_to_bucket(arrays, self.pad_token, self._port.per_position, multiple)

    @property
    def _num_shares(self) -> int:
        """Number of groups of devices that share a batch."""
        return 1 if self._mesh is None else self._mesh.shape.get("data", 1)

    def _place(
        self,
        arrays: dict[str, np.ndarray],
        multiple: int = 1,
        variants: Iterable[layout.LaidOut] = (),
    ) -> dict[str, Array]:
        return sharding.put_batch(self._padded(arrays, multiple, variants), self._mesh)


def _by_name(states: dict[str, Array], asked: Mapping[str, str]) -> dict[str, Array]:
    return {name: states[site] for name, site in asked.items() if site in states}
