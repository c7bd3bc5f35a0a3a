"""A processor for text and images from an image processor and a tokenizer of transformers.

For families whose own class in transformers requires torch or torchvision, often only because of
its video processor.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Processor:
    """Converts texts and images to the arrays that the model takes. Subclasses define `expand`.

    Attributes:
        image_processor: the checkpoint's image processor, from transformers.
        tokenizer: the checkpoint's tokenizer, from transformers.
        chat_template: a Jinja template, or None.
        image_token: the text for an image in a prompt.
    """

    image_token: str

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.chat_template = chat_template or tokenizer.chat_template

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of all tokens that an image may become, those of its features first."""
        return [self.tokenizer.convert_tokens_to_ids(self.image_token)]

    def process_images(self, images: list[Any]) -> dict[str, np.ndarray]:
        """Returns the arrays of the image processor for a flat list of images."""
        return dict(self.image_processor(images=images, return_tensors="np"))

    def process_groups(self, groups: list[list[Any]]) -> dict[str, np.ndarray]:
        """Returns the arrays of the images of each text; the same as for a flat list."""
        return self.process_images([image for group in groups for image in group])

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns the text of each image in a prompt, which replaces its `image_token`.

        Args:
            arrays: those from `process_images`; entries that are not for the model are removed.
        """
        raise NotImplementedError

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Renders the prompt of one conversation."""
        return self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] = "",
        *,
        padding: bool = False,
        return_tensors: str = "np",
    ) -> dict[str, np.ndarray]:
        """Makes the arrays of a batch.

        Args:
            images: PIL images in a flat list, or a list of images per text.
            text: a prompt, or several, with one `image_token` per image.
            padding: pad texts of different lengths, on the tokenizer's padding side.
            return_tensors: must be "np".

        Returns:
            input_ids and attention_mask int[B, T] and mm_token_type_ids int[B, T] (1 at image
            tokens); if there are images, also the arrays of the image processor.

        Raises:
            ValueError: the number of image tokens and images differ (per text, if the images are in
                lists), or the image processor rejects an image.
        """
        if return_tensors != "np":
            raise ValueError(f"return_tensors is {return_tensors!r}; expected 'np'")
        texts = [text] if isinstance(text, str) else list(text)
        entries = [] if images is None else list(images)
        groups = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in entries]
        flat = [image for group in groups for image in group]
        wanted, given = [prompt.count(self.image_token) for prompt in texts], list(map(len, groups))
        # With a flat list it is not known which text an image belongs to: compare the totals.
        if not any(isinstance(entry, list | tuple) for entry in entries):
            wanted, given = [sum(wanted)], [len(flat)]
        if wanted != given:
            raise ValueError(
                f"the texts contain {self.image_token} {', '.join(map(str, wanted))} times, but "
                f"there are {', '.join(map(str, given))} images; expected it once per image"
            )
        arrays: dict[str, np.ndarray] = {}
        if flat:
            try:
                arrays = self.process_groups(groups)
            except ValueError as error:
                first = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"the image processor rejects an image: {first}; crop it or leave it out"
                ) from error
            written = iter(self.expand(arrays))
            texts = [self._fill(prompt, written) for prompt in texts]
        tokens = self.tokenizer(texts, padding=padding, return_tensors="np")
        ids = np.asarray(tokens["input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": np.asarray(tokens["attention_mask"]),
            "mm_token_type_ids": np.isin(ids, self.image_token_ids).astype(ids.dtype),
            **arrays,
        }

    def _fill(self, prompt: str, written: Iterator[str]) -> str:
        first, *rest = prompt.split(self.image_token)
        return first + "".join(next(written) + part for part in rest)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the processor's files, for `load` and transformers."""
        self.image_processor.save_pretrained(directory)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(directory)
