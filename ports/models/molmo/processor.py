"""Molmo's processor, in numpy and Pillow: crops, tokens and the position of each feature.

C crops, P patches per crop, K features per crop (P / 4).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ports import checkpoint
from ports.models.molmo.crops import FILL, MARKS, UNUSED, Crops, ImageSettings, cut


class Processor:
    """Converts texts and images to the arrays that the model takes.

    Attributes:
        settings: how images are cut.
        tokenizer: the checkpoint's tokenizer, from transformers.
        token_ids: ids of the image tokens, by the keys of MARKS.
        start_token: id at the start of every sequence.
    """

    chat_template = " User: {prompt} Assistant:"

    def __init__(
        self, settings: ImageSettings, tokenizer: Any, token_ids: dict[str, int], start_token: int
    ):
        self.settings, self.tokenizer = settings, tokenizer
        self.token_ids, self.start_token = token_ids, start_token

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Renders the prompt of one conversation; images are prepended when it is processed."""
        text = ""
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(part["text"] for part in content if part["type"] == "text")
            text += f" {message['role'].capitalize()}: {content}"
        return text + (" Assistant:" if add_generation_prompt else "")

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
            images: a PIL image, an array or a file's path, a list of them or None for each text;
                None for no images at all.
            text: a rendered prompt, or several.
            padding: pad rows of different lengths on the left.
            return_tensors: must be "np".

        Returns:
            input_ids and attention_mask int64[B, T]; if there are images, also images
            float32[B, C, P, values], image_masks float32[B, C, P] and image_input_idx
            int32[B, C, K]. Rows with fewer crops are padded with -1.

        Raises:
            ValueError: the numbers of images and texts differ, rows differ in length without
                padding, or an image can't be cut.
        """
        if return_tensors != "np":
            raise ValueError(f"return_tensors is {return_tensors!r}; expected 'np'")
        texts = [text] if isinstance(text, str) else list(text)
        images = [None] * len(texts) if images is None else list(images)
        if len(images) != len(texts):
            raise ValueError(
                f"there are {len(texts)} texts and images for {len(images)}; expected an image, "
                "or a list of images, for each text"
            )
        rows = [self._row(prompt, entry) for prompt, entry in zip(texts, images, strict=True)]
        length = max(len(ids) for ids, _ in rows)
        if not padding and any(len(ids) != length for ids, _ in rows):
            raise ValueError("the texts differ in length; pass padding=True")
        pad = self.tokenizer.pad_token_id
        pad = self.start_token if pad is None else pad
        arrays = {
            "input_ids": np.full((len(rows), length), pad, np.int64),
            "attention_mask": np.zeros((len(rows), length), np.int64),
        }
        most = max(sum(len(crops.patches) for crops in cuts) for _, cuts in rows)
        patches = self.settings.crop_patches**2
        if most:
            values, features = 3 * self.settings.patch_size**2, self.settings.pooled**2
            arrays |= {
                "images": np.full((len(rows), most, patches, values), FILL, np.float32),
                "image_masks": np.full((len(rows), most, patches), FILL, np.float32),
                "image_input_idx": np.full((len(rows), most, features), FILL, np.int32),
            }
        for row, (ids, cuts) in enumerate(rows):
            start = length - len(ids)
            arrays["input_ids"][row, start:] = ids
            arrays["attention_mask"][row, start:] = 1
            crop, token = 0, start + 1  # after the start token
            for each in cuts:
                where = np.s_[row, crop : crop + len(each.patches)]
                arrays["images"][where] = each.patches
                arrays["image_masks"][where] = each.masks
                used = each.positions >= 0
                arrays["image_input_idx"][where] = np.where(used, each.positions + token, UNUSED)
                crop, token = crop + len(each.patches), token + len(each.tokens)
        return arrays

    def _row(self, prompt: str, images: Any) -> tuple[list[int], list[Crops]]:
        """Returns the token ids of one row, and its images."""
        entries = [] if images is None else images
        entries = entries if isinstance(entries, list | tuple) else [entries]
        cuts = [cut(_pixels(image), self.settings) for image in entries]
        marks = [self.token_ids[mark] for crops in cuts for mark in crops.tokens]
        words = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if words[:1] == [self.start_token]:  # the prompt says it
            words = words[1:]
        return [self.start_token, *marks, *words], cuts


def _pixels(image: Any) -> np.ndarray:
    """Converts an array, or a PIL image or file with its rotation, to uint8[height, width, 3]."""
    if isinstance(image, str):
        from transformers.image_utils import load_image

        image = load_image(image)
    if isinstance(image, Image.Image):
        image = ImageOps.exif_transpose(image.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"an image is {pixels.dtype}{list(pixels.shape)}; expected a PIL image or "
            "uint8[height, width, 3]"
        )
    return pixels


def read_tokenizer(directory: Path) -> Any:
    """Loads the tokenizer of a checkpoint.

    config.json refers to remote code, so AutoTokenizer would ask to run it. The class is therefore
    chosen by its name in tokenizer_config.json.

    Raises:
        ValueError: the tokenizer does not load.
    """
    import transformers

    with checkpoint.loading(directory, "tokenizer"):
        values = checkpoint.read_json(directory / "tokenizer_config.json")
        name = str(values.get("tokenizer_class"))
        if name.startswith("Qwen2Tokenizer"):
            return transformers.Qwen2Tokenizer.from_pretrained(directory)
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def read_processor(directory: Path) -> Processor:
    """Loads the processor of a checkpoint.

    Raises:
        ValueError: a file is missing or can't be read.
    """
    with checkpoint.loading(directory, "processor"):
        values = checkpoint.read_json(directory / "preprocessor_config.json")
    tokenizer = read_tokenizer(directory)
    config = checkpoint.read_json(directory / "config.json")
    # Not convert_tokens_to_ids, which may return the id of the unknown token.
    vocabulary = tokenizer.get_vocab()
    ids = {
        name: config.get(f"image_{name}_token_id", vocabulary.get(mark))
        for name, mark in MARKS.items()
    }
    if None in ids.values():
        raise ValueError(f"the tokenizer of {directory} has no {' '.join(MARKS.values())}")
    # Qwen2 has no beginning-of-sequence token: the end-of-sequence token is used.
    start = config.get("bos_token_id", tokenizer.bos_token_id)
    start = tokenizer.eos_token_id if start is None else start
    return Processor(ImageSettings.from_json(values), tokenizer, ids, start)
