"""Processors for text, images and videos from an image processor and a tokenizer of transformers.

For families whose own class in transformers requires torch or torchvision, often only because of
its video processor.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ports.inputs import videos as clips


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
        _check_tensors(return_tensors)
        return self._tokenised(*self._with_images(text, images), padding)

    def _with_images(
        self, text: str | Sequence[str], images: Sequence[Any] | None
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """Returns the texts with the tokens of their images, and the images' arrays."""
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
            texts = _filled(texts, self.image_token, self.expand(arrays))
        return texts, arrays

    def token_types(self, ids: np.ndarray) -> np.ndarray:
        """Returns what each token is, int[B, T]: 1 for image tokens."""
        return np.isin(ids, self.image_token_ids).astype(ids.dtype)

    def _tokenised(
        self, texts: list[str], arrays: Mapping[str, np.ndarray], padding: bool
    ) -> dict[str, np.ndarray]:
        tokens = self.tokenizer(texts, padding=padding, return_tensors="np")
        ids = np.asarray(tokens["input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": np.asarray(tokens["attention_mask"]),
            "mm_token_type_ids": self.token_types(ids),
            **arrays,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What the processor has of processor_config.json."""
        return {}

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the processor's files, for `load` and transformers."""
        self.save_image_processor(Path(directory))
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(directory)
        if self.settings:
            write_settings(Path(directory) / "processor_config.json", self.settings)

    def save_image_processor(self, directory: Path) -> None:
        """Writes preprocessor_config.json into a directory, which is created if missing."""
        self.image_processor.save_pretrained(directory)


class VideoProcessor(Processor):
    """A processor that also takes videos. Subclasses define `process_videos`, too.

    A tokenizer's own `image_token` and `video_token` replace those of the class.

    Attributes:
        video_token: the text for a video in a prompt.
        video_values: the values of the video processor's file.
    """

    video_token: str
    settings_class: ClassVar[type[clips.Settings]]  # class of `video_settings`

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        video_values: Mapping[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template)
        self.image_token = getattr(tokenizer, "image_token", type(self).image_token)
        self.video_token = getattr(tokenizer, "video_token", type(self).video_token)
        self.video_values = dict(video_values or {})

    @functools.cached_property
    def video_settings(self) -> Any:
        """How videos are processed; read on first use, since most inputs have none.

        Raises:
            ValueError: a value is not implemented.
        """
        return self.settings_class.from_json(self.video_values)

    @property
    def video_token_ids(self) -> list[int]:
        """Ids of all tokens whose type is that of videos."""
        return [self.tokenizer.convert_tokens_to_ids(self.video_token)]

    def token_types(self, ids: np.ndarray) -> np.ndarray:
        """Returns what each token is, int[B, T]: 1 for image tokens, 2 for video tokens."""
        return super().token_types(ids) + 2 * np.isin(ids, self.video_token_ids).astype(ids.dtype)

    def process_videos(
        self, videos: Sequence[clips.Clip]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the arrays of a flat list of videos, and the text of each in a prompt, which
        replaces its `video_token`.
        """
        raise NotImplementedError

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] = "",
        *,
        videos: Any = None,
        video_metadata: Any = None,
        do_sample_frames: bool | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        padding: bool = False,
        return_tensors: str = "np",
    ) -> dict[str, np.ndarray]:
        """Makes the arrays of a batch.

        Args:
            images, text, padding, return_tensors: as for the base class.
            videos: a flat list of videos in the order of the texts, each as in
                `ports.inputs.videos.read_clips`.
            video_metadata: the rate and the numbers of their frames, as in `read_clips`; without
                it, a second has 24 frames.
            do_sample_frames: take only some of the frames; None for the checkpoint's value.
            num_frames: how many frames to take.
            fps: how many frames per second to take instead.

        Returns:
            As the base class, with 2 at video tokens in mm_token_type_ids and the videos' arrays.

        Raises:
            ValueError: as for the base class; a video has no frames or frames of different sizes,
                or the number of video tokens and videos differ.
        """
        _check_tensors(return_tensors)
        texts, arrays = self._with_images(text, images)
        given = clips.read_clips([] if videos is None else videos, video_metadata)
        wanted = sum(prompt.count(self.video_token) for prompt in texts)
        if wanted != len(given):
            raise ValueError(
                f"the texts contain {self.video_token} {wanted} times, but there are {len(given)} "
                "videos; expected it once per video"
            )
        if given:
            options = (do_sample_frames, num_frames, fps)
            chosen = [self.video_settings.choose(clip, *options) for clip in given]
            of_videos, written = self.process_videos(chosen)
            texts = _filled(texts, self.video_token, written)
            arrays = arrays | of_videos
        prompts = [text] if isinstance(text, str) else list(text)
        return self._tokenised(texts, self.join(prompts, arrays), padding)

    def join(
        self, prompts: Sequence[str], arrays: dict[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """Returns the arrays of images and videos as the model takes them; they may be joined in
        the order of the prompts.
        """
        return arrays

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the processor's files, for `load` and transformers."""
        super().save_pretrained(directory)
        if self.video_values:
            write_settings(Path(directory) / "video_preprocessor_config.json", self.video_values)


def write_settings(file: Path, values: Mapping[str, Any]) -> None:
    """Writes the values of a processor's file."""
    file.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _check_tensors(return_tensors: str) -> None:
    if return_tensors != "np":
        raise ValueError(f"return_tensors is {return_tensors!r}; expected 'np'")


def _filled(texts: Sequence[str], token: str, written: Sequence[str]) -> list[str]:
    """Returns the texts with each token replaced, in order, by what is written for it."""
    following = iter(written)
    return [_fill(text.split(token), following) for text in texts]


def _fill(parts: Sequence[str], written: Iterator[str]) -> str:
    return parts[0] + "".join(next(written) + part for part in parts[1:])
