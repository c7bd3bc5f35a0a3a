"""SmolVLM's processor: tiles of images and frames of videos, which the model sees alike."""

import copy
import dataclasses
import datetime
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from ports.inputs import processor, resizing
from ports.inputs import videos as clips
from ports.models import port

_MAX_SIDE = 4096  # pixels of a frame in the first of two steps
_SKIPPED = 1.0  # seconds at both ends of a long video
_RESIZE = {
    int(Image.Resampling.BICUBIC): resizing.bicubic,
    int(Image.Resampling.LANCZOS): resizing.lanczos,
}


@dataclasses.dataclass(frozen=True)
class VideoSettings(clips.Settings):
    """How frames are chosen and resized: first to a longest side, then to a square."""

    longest: int  # pixels after the first step
    side: int  # pixels after the second
    resample: int  # number of a filter of Pillow
    defaults: ClassVar[Mapping[str, Any]] = {
        **clips.Settings.defaults,
        "size": {"longest_edge": 4 * 364},
        "max_image_size": {"longest_edge": 364},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": int(Image.Resampling.LANCZOS),
    }
    implemented: ClassVar[Mapping[str, Any]] = {
        **{k: v for k, v in clips.Settings.implemented.items() if k != "resample"},
        "do_pad": True,
    }
    takes_both: ClassVar[bool] = True

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads the values of a file, in which those of `video_sampling` replace others.

        Raises:
            ValueError: a value is not implemented.
        """
        said = dict(values)
        chosen = said.pop("video_sampling", None) or {}
        said |= {"num_frames": chosen["max_frames"], "fps": chosen["fps"]} if chosen else {}
        # A size of the file itself replaces that of its sampling.
        size = said.get("size") or chosen.get("video_size")
        return super().from_json({**said, "size": size})

    @classmethod
    def fields(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class, from the values of a file and the defaults.

        Raises:
            ValueError: a size is not that of a longest side, or a filter is not implemented.
        """
        for name in ("size", "max_image_size"):
            if set(said[name]) != {"longest_edge"}:
                raise ValueError(
                    f"{name} of the video processor is {said[name]}; expected a longest_edge"
                )
        if said["resample"] not in _RESIZE:
            raise ValueError(
                f"resample of the video processor is {said['resample']!r}; expected "
                f"{' or '.join(map(str, _RESIZE))}"
            )
        longest, side = (said[name]["longest_edge"] for name in ("size", "max_image_size"))
        own = {"longest": longest, "side": side, "resample": said["resample"]}
        return super().fields(said) | own

    def numbers(self, clip: clips.Clip, num_frames: int | None, fps: float | None) -> np.ndarray:
        """Returns the numbers of the chosen frames, int[F], evenly spaced.

        They are `fps` per second, but at most `num_frames`. A second at both ends of a long video
        is left out.

        Raises:
            ValueError: neither the checkpoint nor the caller says how many.
        """
        most = self.num_frames if num_frames is None else num_frames
        fps = self.fps if fps is None else fps
        if most is None or fps is None:
            raise ValueError(
                "frames of SmolVLM are chosen per second up to a number, which the checkpoint "
                "does not have in video_sampling; pass fps and num_frames"
            )
        seconds = self.seconds(clip) if clip.duration is None else clip.duration
        rate = clip.total / seconds if clip.rate is None else clip.rate
        first, last = 0, clip.total - 1
        if seconds - 2 * _SKIPPED > most * fps:
            first = int(_SKIPPED * rate)
            last = min(int(clip.total - _SKIPPED * rate), last)
            if first >= last:
                first, last = 0, clip.total - 1
        wanted = max(1, min(round(fps * seconds), most))
        return np.unique(np.linspace(first, last, wanted, dtype=int))

    def pixels(self, frames: np.ndarray) -> np.ndarray:
        """Resizes frames uint8[F, height, width, 3] to float32[F, 3, side, side]."""
        height, width = fit(frames.shape[1], frames.shape[2], min(self.longest, _MAX_SIDE))
        resize = _RESIZE[self.resample]
        squares = [resize(resize(f, height, width), self.side, self.side) for f in frames]
        return self.scale(np.stack(squares)).transpose(0, 3, 1, 2)


def fit(height: int, width: int, longest: int) -> tuple[int, int]:
    """Returns the height and width of a frame whose longer side becomes `longest` pixels; the other
    is rounded up to an even number.
    """
    ratio = width / height

    def even(length: float) -> int:
        return max(int(length) + int(length) % 2, 1)

    if width >= height:
        return even(longest / ratio), longest
    return longest, even(longest * ratio)


class Processor(processor.VideoProcessor):
    """Converts texts, images and videos to the arrays that the model takes.

    transformers' own class requires torchvision, because of its video processor.

    Besides input_ids, attention_mask and mm_token_type_ids, these are pixel_values float32[B, N, 3,
    height, width] and pixel_attention_mask int64[B, N, height, width], with up to N tiles and
    frames in each row.
    """

    image_token, video_token = "<image>", "<video>"
    settings_class = VideoSettings

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        tokens_per_image: int = 169,
        video_values: Mapping[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template, video_values)
        self.fake_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.whole_token = getattr(tokenizer, "global_image_token", "<global-img>")
        self.tokens_per_image = tokens_per_image

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Loads the processor of a checkpoint.

        Raises:
            ValueError: the processor does not load.
        """
        settings = port.read_settings(directory, "processor_config.json")
        images, tokenizer, template = port.read_parts(directory)
        return cls(
            images,
            tokenizer,
            settings.get("chat_template") or template,
            settings.get("image_seq_len", 169),
            port.read_video_settings(directory),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the processor has of processor_config.json."""
        return {"image_seq_len": self.tokens_per_image}

    @property
    def video_token_ids(self) -> list[int]:
        """None: videos become image tokens."""
        return []

    def __call__(
        self,
        images: Sequence[Any] | None = None,
        text: str | Sequence[str] = "",
        *,
        do_image_splitting: bool | None = None,
        size: Mapping[str, int] | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Makes the arrays of a batch.

        Args:
            images, text, options: as for the base class.
            do_image_splitting: whether to cut images into tiles; None for the checkpoint's value.
            size: longest side of an image before it is cut, {"longest_edge": pixels}.

        Returns:
            The arrays.

        Raises:
            ValueError: as for the base class, or images and frames become different sizes.
        """
        asked = {"do_image_splitting": do_image_splitting, "size": size}
        said = {name: value for name, value in asked.items() if value is not None}
        chosen = copy.copy(self)
        chosen.image_processor = functools.partial(self.image_processor, **said)
        return super(Processor, chosen).__call__(images, text, **options)

    def process_groups(self, groups: list[list[Any]]) -> dict[str, np.ndarray]:
        """Returns the tiles of the images of each text, and the rows and columns of tiles."""
        options = {"return_row_col_info": True, "return_tensors": "np"}
        return dict(self.image_processor(images=groups, **options))

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns the tokens of the tiles of an image, row by row, and of the whole."""
        texts = zip(arrays["rows"], arrays["cols"], strict=True)
        return [self._write(*each) for both in texts for each in zip(*both, strict=True)]

    def _write(self, rows: int = 0, columns: int = 0) -> str:
        tokens = self.image_token * self.tokens_per_image
        tiles = "".join(
            "".join(f"{self.fake_token}<row_{r + 1}_col_{c + 1}>{tokens}" for c in range(columns))
            + "\n"
            for r in range(rows)
        )
        between = "\n" if rows else ""
        return f"{tiles}{between}{self.fake_token}{self.whole_token}{tokens}{self.fake_token}"

    def process_videos(
        self, videos: Sequence[clips.Clip]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the frames of a flat list of videos, and the frames of each as text, with their
        times.

        Videos with fewer frames than the longest have frames of zeros, which the model leaves out.
        As in transformers, their texts count these.
        """
        pixels = [self.video_settings.pixels(clip.frames) for clip in videos]
        longest = max(map(len, pixels))
        padded = [np.pad(x, [(0, longest - len(x)), (0, 0), (0, 0), (0, 0)]) for x in pixels]
        arrays = {"video_pixels": np.stack(padded), "num_frames": np.array(list(map(len, pixels)))}
        return arrays, [self._describe(clip, longest) for clip in videos]

    def _describe(self, clip: clips.Clip, count: int) -> str:
        numbers = range(len(clip.frames)) if clip.numbers is None else clip.numbers
        times = [number / (clip.rate or clips.DEFAULT_RATE) for number in numbers]
        seconds = int(times[-1] if clip.duration is None else clip.duration)
        length = datetime.timedelta(seconds=seconds)
        frames = "".join(
            f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{self._write()}"
            for time in times
        )
        return (
            f"You are provided the following series of {in_words(count)} frames from a {length} "
            f"[H:MM:SS] video.\n{frames}\n\n"
        )

    def join(
        self, prompts: Sequence[str], arrays: dict[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """Returns the tiles of each text, the frames of each video, or, if there are both, all in
        one row, in the order of the prompts.

        Raises:
            ValueError: there are both, of different sizes.
        """
        frames = arrays.pop("video_pixels", None)
        if frames is None:
            return {name: arrays[name] for name in arrays if name not in ("rows", "cols")}
        counts, mask = arrays.pop("num_frames"), np.ones(frames[:, :, 0].shape, np.int64)
        if "pixel_values" not in arrays:
            return {"pixel_values": frames, "pixel_attention_mask": mask}
        tiles = arrays["pixel_values"]
        if tiles.shape[2:] != frames.shape[2:]:
            raise ValueError(
                f"images become {tiles.shape[3]} x {tiles.shape[4]} pixels and frames of videos "
                f"{self.video_settings.side} x {self.video_settings.side}; expected one size: pass "
                "images or videos"
            )
        of_images, of_videos = _tiles(arrays), zip(frames, counts, strict=True)
        either = f"({re.escape(self.image_token)})|{re.escape(self.video_token)}"
        order = [match[1] for prompt in prompts for match in re.finditer(either, prompt)]
        parts = [next(of_images) if is_image else _taken(*next(of_videos)) for is_image in order]
        pixels, masks = (np.concatenate(each)[None] for each in zip(*parts, strict=True))
        return {"pixel_values": pixels, "pixel_attention_mask": masks}


def _tiles(arrays: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Returns the tiles of each image in the rows of a batch, with the mask of their pixels."""
    for i, (rows, columns) in enumerate(zip(arrays["rows"], arrays["cols"], strict=True)):
        start = 0
        for count in (1 + r * c for r, c in zip(rows, columns, strict=True)):
            here = slice(start, start + count)
            yield arrays["pixel_values"][i, here], arrays["pixel_attention_mask"][i, here]
            start += count


def _taken(frames: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    return frames[:count], np.ones((count, *frames.shape[2:]), np.int64)


_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(number: int) -> str:
    """Returns a number below a million in British English, such as "one hundred and two"."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        rest = number % 10
        return _TENS[number // 10 - 2] + (f"-{_SMALL[rest]}" if rest else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    many, rest = divmod(number, unit)
    said = f"{in_words(many)} {name}"
    if not rest:
        return said
    return f"{said}{' and' if rest < 100 else ','} {in_words(rest)}"
