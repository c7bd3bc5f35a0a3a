"""Qwen2-VL's processor for text and images.

transformers' own class also holds a video processor, which needs torchvision, and so the whole
class does. This one joins the same image processor (on its PIL backend) and tokenizer without it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ports import checkpoint


class Processor:
    """Texts and images -> the arrays that the model takes.

    Attributes:
        image_processor, tokenizer: those of the checkpoint, from transformers.
        chat_template: Jinja's text, or None.
        image_token: the text that stands for an image in a prompt.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.chat_template = chat_template or tokenizer.chat_template
        self.image_token = getattr(tokenizer, "image_token", "<|image_pad|>")

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """The rendered prompt of one conversation."""
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
        """A batch.

        Args:
            images: PIL images, one after the other or in a list a text.
            text: prompts, in which `image_token` stands once for each image.
            padding: fill texts of different lengths up, on the tokenizer's side.
            return_tensors: "np", which is all there is.

        Returns:
            input_ids and attention_mask int[B, T], mm_token_type_ids int[B, T] (1 at image tokens)
            and, with images, pixel_values float32[patches, values] and image_grid_thw int[I, 3].

        Raises ValueError unless texts ask for as many images as there are (each for as many as its
        list holds), or for an aspect ratio that the image processor refuses.
        """
        if return_tensors != "np":
            raise ValueError(f"return_tensors is {return_tensors!r}; expected 'np'")
        texts = [text] if isinstance(text, str) else list(text)
        entries = [] if images is None else list(images)
        groups = [entry if isinstance(entry, list | tuple) else [entry] for entry in entries]
        flat = [image for group in groups for image in group]
        wanted, given = [prompt.count(self.image_token) for prompt in texts], list(map(len, groups))
        # Images one after the other say nothing of the text that they belong to.
        if not any(isinstance(entry, list | tuple) for entry in entries):
            wanted, given = [sum(wanted)], [len(flat)]
        if wanted != given:
            raise ValueError(
                f"the texts ask for {', '.join(map(str, wanted))} images with {self.image_token}, "
                f"but there are {', '.join(map(str, given))}; put it into a prompt once for each "
                "of its images"
            )
        arrays: dict[str, np.ndarray] = {}
        if flat:
            try:
                arrays = dict(self.image_processor(images=flat, return_tensors="np"))
            except ValueError as error:
                first = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"the image processor refuses an image: {first}; cut it or leave it out"
                ) from error
            square = self.image_processor.merge_size**2
            counts = iter(int(count) for count in arrays["image_grid_thw"].prod(axis=1) // square)
            texts = [self._expand(prompt, counts) for prompt in texts]
        tokens = self.tokenizer(texts, padding=padding, return_tensors="np")
        image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        ids = np.asarray(tokens["input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": np.asarray(tokens["attention_mask"]),
            "mm_token_type_ids": (ids == image_id).astype(ids.dtype),
            **arrays,
        }

    def _expand(self, prompt: str, counts: Any) -> str:
        first, *rest = prompt.split(self.image_token)
        return first + "".join(self.image_token * next(counts) + part for part in rest)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes what `load` and transformers read."""
        self.image_processor.save_pretrained(directory)
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(directory)


def load(directory: Path) -> Any:
    """The processor of a checkpoint: transformers' with torchvision, else `Processor`.

    ValueError if the directory holds none that loads.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.utils.import_utils import is_torchvision_available

    # Remote code is neither run nor asked for.
    own = {"trust_remote_code": False}
    with checkpoint.loading(directory, "processor"):
        if is_torchvision_available():
            return AutoProcessor.from_pretrained(directory, backend="pil", **own)
        return Processor(
            AutoImageProcessor.from_pretrained(directory, backend="pil", **own),
            AutoTokenizer.from_pretrained(directory, **own),
            _chat_template(directory),
        )


def _chat_template(directory: Path) -> str | None:
    """The template of a file of its own, as older checkpoints have it."""
    file = directory / "chat_template.json"
    return checkpoint.read_json(file).get("chat_template") if file.exists() else None
