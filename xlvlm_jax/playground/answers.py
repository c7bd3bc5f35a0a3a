"""Runs the model for a page: answers without and with steering, word by word, and maps.

V vocabulary.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.special import softmax

from ports import VLM
from ports.inputs.padding import bucket_length
from ports.intervene.edits import Edits
from ports.vlm import EncodedImages
from xlvlm_jax.concepts.picture_maps import MapRow, map_pictures
from xlvlm_jax.data import prompts
from xlvlm_jax.data.batches import Arrays, make_batch
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.playground.edits import Setting, edits_of, settings_of
from xlvlm_jax.playground.items import Item, with_unique_names
from xlvlm_jax.playground.pictures import Picture
from xlvlm_jax.playground.settings import Settings
from xlvlm_jax.playground.worker import Event
from xlvlm_jax.report.map_page import mapped

PLAIN, STEERED, INSTRUCTED = "plain", "steered", "instructed"
NUM_WORDS = 10  # words whose probability moved most
SEEN = 0.0005  # changes of probabilities below this are not shown
_KEPT = 32  # prompts and unsteered answers
_PICTURES = 8  # whose encoding is kept
# Short prompts are padded, so that those of a question and of a caption need two programs at most.
_MULTIPLE = 32
_NOTHING = "."  # a prompt
_PREPARED = (
    prompts.question("Is there a red ball in the picture?"),
    "What is in the picture?",
    prompts.question("What is in the picture, " + "and what is beside that, " * 2 + "if anything?"),
)

Value = TypeVar("Value")


class Answer(NamedTuple):
    """A whole answer."""

    text: str
    first: np.ndarray  # float32[V], probabilities of the first token


class _Recent(OrderedDict[Any, Value]):
    """The last few values that were put in or asked for."""

    def keep(self, key: Any, value: Value, most: int = _KEPT) -> Value:
        self[key] = value
        self.move_to_end(key)
        while len(self) > most:
            self.popitem(last=False)
        return value


class Answers:
    """A model, what steers it, and what is remembered of it. Used by one thread at a time.

    Attributes:
        vlm: the model.
        items: {id: what has a slider}.
        max_new_tokens: maximum number of tokens of an answer.
    """

    def __init__(self, vlm: VLM, items: Iterable[Item], max_new_tokens: int):
        self.vlm, self.max_new_tokens = vlm, max_new_tokens
        self.items = {item.id: item for item in items}
        self._inputs: _Recent[Arrays] = _Recent()
        self._unsteered: _Recent[Answer] = _Recent()
        self._encoded: _Recent[EncodedImages] = _Recent()

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites at which the page may add vectors: all layers, and those of its vectors."""
        own = (item.site for item in self.items.values() if item.is_vector)
        return tuple(dict.fromkeys((*self.vlm.layers, *own)))

    def add_item(self, item: Item) -> Item:
        """Adds an item, with another id if there is one of its id; returns it as it was added."""
        *_, added = with_unique_names([*self.items.values(), item])
        self.items[added.id] = added
        return added

    def answer(self, settings: Settings, picture: Picture) -> Iterator[Event]:
        """Answers a question without and with steering, and after the instruction.

        Args:
            settings: what the page asks for.
            picture: the picture.

        Yields:
            {"run": "plain", "steered" or "instructed", "text": the answer so far} per token, with
            "done" for the last; {"words": [{"word", "before", "after"}]}, probabilities of the
            first token, once it is steered; {"seconds": time since the work began} at the end.

        Raises:
            LookupError: a slider moves something unknown.
            ValueError: a slider does not fit the model, or the picture or prompt is refused.
        """
        began = time.perf_counter()
        moved = settings_of(self.vlm, self.items, settings.sliders)
        plain = yield from self._unsteered_answer(PLAIN, picture, settings.question)
        if moved:
            yield from self._steered_answer(picture, settings.question, moved, plain)
        if settings.instruction is not None:
            told = f"{settings.question} {settings.instruction}"
            yield from self._unsteered_answer(INSTRUCTED, picture, told)
        yield {"seconds": round(time.perf_counter() - began, 3)}

    def prepare(self, picture: Picture) -> Iterator[Event]:
        """Compiles the programs of a question, of a caption and of a long question.

        The sliders are arguments of these programs, so that steered answers need no others.

        Args:
            picture: any picture.

        Yields:
            {} after each step, of which one compiles at most one program.
        """
        seen = set()
        for prompt in _PREPARED:
            inputs = self._inputs_of(picture, prompt)
            yield {}
            length = bucket_length(inputs["input_ids"].shape[1], _MULTIPLE)
            if length in seen:
                continue
            seen.add(length)
            self._encoding_of(picture)
            yield {}
            edits = edits_of(self.vlm, inputs, (), self.sites)
            events = self._streamed(PLAIN, picture, inputs, edits)
            # The second token compiles the second program.
            for _ in itertools.islice(events, 2):
                yield {}
            events.close()

    def _unsteered_answer(
        self, run: str, picture: Picture, prompt: str
    ) -> Generator[Event, None, Answer]:
        key = (picture.id, prompt)
        if (known := self._unsteered.get(key)) is not None:
            yield {"run": run, "text": known.text, "done": True}
            return self._unsteered.keep(key, known)
        inputs = self._inputs_of(picture, prompt)
        edits = edits_of(self.vlm, inputs, (), self.sites)
        answer = yield from self._streamed(run, picture, inputs, edits)
        return self._unsteered.keep(key, answer)

    def _steered_answer(
        self, picture: Picture, prompt: str, moved: Sequence[Setting], plain: Answer
    ) -> Iterator[Event]:
        inputs = self._inputs_of(picture, prompt)
        edits = edits_of(self.vlm, inputs, moved, self.sites)
        answer = yield from self._streamed(STEERED, picture, inputs, edits)
        yield {"words": self._moved_words(plain.first, answer.first)}

    def _streamed(
        self, run: str, picture: Picture, inputs: Arrays, edits: Edits
    ) -> Generator[Event, None, Answer]:
        tokens, first, text = [], np.zeros(0, np.float32), ""
        steps = self.vlm.stream(
            inputs,
            max_new_tokens=self.max_new_tokens,
            edits=edits,
            images=self._encoding_of(picture),
            pad_to_multiple_of=_MULTIPLE,
        )
        for step in steps:
            if not tokens:
                logits = np.asarray(step.logits[0], np.float32)
                # Rules of the checkpoint may set some to -Inf, but never all.
                if not np.isfinite(logits.max()):
                    raise ValueError("the model's logits are not finite; turn the sliders down")
                first = softmax(logits)
            tokens.append(int(step.tokens[0]))
            text = str(self.vlm.decode(np.array(tokens))).strip()
            yield {"run": run, "text": text}
        yield {"run": run, "text": text, "done": True}
        return Answer(text, first)

    def _moved_words(self, before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
        most = np.argsort(-np.abs(after - before), kind="stable")[:NUM_WORDS]
        most = most[np.abs(after - before)[most] >= SEEN]
        words = self.vlm.decode(most[:, None]) if len(most) else []
        return [
            {"word": self._named(k, word), "before": float(before[k]), "after": float(after[k])}
            for k, word in zip(most.tolist(), words, strict=True)
        ]

    def _named(self, token: int, word: str) -> str:
        if token in self.vlm.eos_tokens:
            return "(end)"
        return word.strip() or f"token {token}"

    def map_of(self, item: Item, picture: Picture, question: str) -> Event:
        """Draws where in a picture an item is.

        Args:
            item: a concept (its activation is drawn) or a vector (the cosine with it).
            picture: the picture.
            question: what the model is asked about it.

        Returns:
            {"overlay": a PNG as data URI, "low", "high": values of its two ends, "unit": of these}.

        Raises:
            ValueError: the item is neither, or the model's image tokens have no place.
        """
        sample = self._sample(picture, question)
        zero = np.zeros((1, 1), np.float32)
        if item.concepts is not None and item.number is not None:
            found = map_pictures(
                self.vlm, [sample], concepts=item.concepts, numbers=[item.number], site=item.site
            )
        elif item.vector is not None:
            vectors = {item.name: (item.site, item.vector)}
            found = map_pictures(self.vlm, [sample], vectors=vectors)
        else:
            raise ValueError(f"{item.name} is not one direction, so it has no map")
        row: MapRow = found.rows[0]
        drawn = mapped(row, found.boxes, [picture.size], among=[zero, *row.maps])
        low, high = drawn.scale
        return {"overlay": drawn.overlays[0], "low": low, "high": high, "unit": drawn.unit}

    def _encoding_of(self, picture: Picture) -> EncodedImages:
        """Runs the vision tower, once per picture: what is asked about it does not matter."""
        if (known := self._encoded.get(picture.id)) is None:
            known = self.vlm.encode_images(self._inputs_of(picture, _NOTHING))
        return self._encoded.keep(picture.id, known, _PICTURES)

    def _inputs_of(self, picture: Picture, prompt: str) -> Arrays:
        key = (picture.id, prompt)
        if (known := self._inputs.get(key)) is not None:
            return self._inputs.keep(key, known)
        batch = make_batch(self.vlm, [self._sample(picture, prompt)], 1, strict=True)
        (inputs,) = batch.inputs
        return self._inputs.keep(key, inputs)

    def _sample(self, picture: Picture, prompt: str) -> Sample:
        return Sample(picture.name, picture.path, picture.name, prompt)
