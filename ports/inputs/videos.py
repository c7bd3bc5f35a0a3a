"""Videos given as frames: reading them, choosing among their frames, and scaling their values.

Everything here gives the numbers of transformers' video processors, which require torchvision.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from PIL import Image

from ports.inputs import resizing
from ports.inputs.pictures import as_rgb
from ports.messages import counted

# Frames per second of a video whose rate is not known.
DEFAULT_RATE = 24.0


class Clip(NamedTuple):
    """Frames of a recording."""

    frames: np.ndarray  # uint8[F, height, width, 3]
    total: int  # frames of the recording
    rate: float | None = None  # frames per second of the recording; None where not known
    numbers: Sequence[int] | None = None  # of the frames in the recording; None where not known
    duration: float | None = None  # seconds of the recording; None where it follows from the rate

    @property
    def frame_rate(self) -> float:
        """Frames per second of these frames."""
        if self.numbers is None or self.rate is None:
            return self.rate or DEFAULT_RATE
        return len(self.numbers) / self.total * self.rate


def read_clips(videos: Any, metadata: Any = None) -> list[Clip]:
    """Reads videos that are given as frames.

    Args:
        videos: a list of videos, or one. A video is uint8[F, height, width, 3], or a list of PIL
            images or of uint8[height, width, 3]. Transparent PIL images are put on white, and
            rounded to whole values (transformers' video processors do not round).
        metadata: for each video a mapping with `total_num_frames`, `fps`, `frames_indices` and
            `duration` (seconds), or one mapping for one video; transformers' VideoMetadata is such
            a mapping.

    Returns:
        The clips.

    Raises:
        ValueError: a video has no frames, frames of different sizes or of another form, or there is
            metadata of another number of videos.
    """
    videos = [videos] if _is_one_video(videos) else list(videos)
    given = [metadata] if isinstance(metadata, Mapping) else metadata
    if given is None:
        given = [None] * len(videos)
    if len(given) != len(videos):
        raise ValueError(
            f"video_metadata is of {counted(len(given), 'video')}; expected one entry for each of "
            f"the {counted(len(videos), 'video')}"
        )
    return [_clip(i, *each) for i, each in enumerate(zip(videos, given, strict=True))]


def _is_one_video(videos: Any) -> bool:
    first = videos[0] if len(videos) else None
    return isinstance(first, Image.Image) or getattr(first, "ndim", 0) == 3


def _clip(i: int, video: Any, metadata: Mapping[str, Any] | None) -> Clip:
    try:
        frames = read_frames(video)
    except ValueError as error:
        raise ValueError(f"video {i}: {error}") from error
    if metadata is None:
        return Clip(frames, len(frames), None, range(len(frames)))
    said = {name: metadata[name] for name in metadata}
    total = said.get("total_num_frames")
    total = len(frames) if total is None else total
    return Clip(frames, total, *map(said.get, ("fps", "frames_indices", "duration")))


def read_frames(video: Any) -> np.ndarray:
    """Reads the frames of one video.

    Args:
        video: as in `read_clips`.

    Returns:
        uint8[F, height, width, 3].

    Raises:
        ValueError: there are no frames, or they have different sizes or another form.
    """
    if isinstance(video, list | tuple):
        read = [as_rgb(f) if isinstance(f, Image.Image) else np.asarray(f) for f in video]
        shapes = list(dict.fromkeys(frame.shape for frame in read))
        if len(shapes) > 1:
            first, other = (" x ".join(map(str, shape[:2])) for shape in shapes[:2])
            raise ValueError(f"it has frames of {first} and {other} pixels; resize them to one")
        video = np.stack(read) if read else np.zeros((0, 0, 0, 3), np.uint8)
    frames = np.asarray(video)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"it is {frames.dtype}{list(frames.shape)}; expected a list of PIL images or "
            "uint8[frames, height, width, 3]"
        )
    if not frames.size:
        raise ValueError("it has no frames; pass at least one, or leave the video out")
    return frames


@dataclasses.dataclass(frozen=True)
class Settings:
    """How frames are chosen, and how their values are scaled. Subclasses also resize them."""

    mean: tuple[float, ...]  # of the values 0 to 255
    deviation: tuple[float, ...]
    do_sample_frames: bool
    num_frames: int | None
    fps: float | None
    # Of transformers' class, for values missing in the files.
    defaults: ClassVar[Mapping[str, Any]] = {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 1 / 255,
        "do_sample_frames": False,
        "num_frames": None,
        "fps": None,
    }
    # Options that change the arrays, with the only values that are implemented.
    implemented: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_center_crop": False,
        "cap_pixels_per_frame": False,
        "resample": int(Image.Resampling.BICUBIC),
    }
    takes_both: ClassVar[bool] = False  # num_frames as the maximum, and fps

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Reads the values of a file.

        Raises:
            ValueError: a value is not implemented.
        """
        said = {name: value for name, value in values.items() if value is not None}
        for name, implemented in cls.implemented.items():
            if said.get(name, implemented) != implemented:
                raise ValueError(
                    f"{name} of the video processor is {said[name]!r}; expected {implemented!r}"
                )
        return cls(**cls.fields({**cls.defaults, **said}))

    @classmethod
    def fields(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class, from the values of a file and the defaults."""
        unit = np.float32(1 / said["rescale_factor"])
        mean, deviation = (
            tuple(float(np.float32(value) * unit) for value in said[name])
            for name in ("image_mean", "image_std")
        )
        same = ("do_sample_frames", "num_frames", "fps")
        return {"mean": mean, "deviation": deviation} | {name: said[name] for name in same}

    def choose(
        self,
        clip: Clip,
        do_sample_frames: bool | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
    ) -> Clip:
        """Chooses frames of a clip, if asked to here or by the checkpoint.

        Args:
            clip: all frames of a recording.
            do_sample_frames: whether to choose; None for the checkpoint's value.
            num_frames: how many frames to take.
            fps: how many per second to take instead.

        Returns:
            The clip, or one with some of its frames.

        Raises:
            ValueError: both numbers are given, frames are missing, or the rate is not known.
        """
        if num_frames is not None and fps is not None and not self.takes_both:
            raise ValueError("num_frames and fps are given; pass one of them")
        if not (self.do_sample_frames if do_sample_frames is None else do_sample_frames):
            return clip
        if clip.total != len(clip.frames):
            raise ValueError(
                f"a video has {counted(len(clip.frames), 'frame')}, and its metadata says "
                f"total_num_frames {clip.total}; pass all frames, or do_sample_frames=False"
            )
        if num_frames is None and fps is None:
            num_frames, fps = self.num_frames, self.fps
        numbers = self.numbers(clip, num_frames, fps)
        return clip._replace(frames=clip.frames[numbers], numbers=numbers.tolist())

    def numbers(self, clip: Clip, num_frames: int | None, fps: float | None) -> np.ndarray:
        """Returns the numbers of the chosen frames, int[F], evenly spaced from the first.

        Args:
            clip: all frames of a recording.
            num_frames: how many frames to take; None for as many as `fps` says, or all.
            fps: how many per second to take.

        Raises:
            ValueError: there are fewer frames, or the rate is not known.
        """
        if num_frames is None:
            num_frames = clip.total if fps is None else max(1, int(self.seconds(clip) * fps))
        self.check_count(clip, num_frames)
        return np.arange(num_frames) * clip.total // num_frames

    def seconds(self, clip: Clip) -> float:
        """Returns how long a recording is.

        Raises:
            ValueError: its rate is not known.
        """
        if clip.rate is None:
            raise ValueError(
                "fps asks for frames per second, but a video's own rate is not known; pass "
                "video_metadata with its fps, or num_frames"
            )
        return clip.total / clip.rate

    def check_count(self, clip: Clip, num_frames: int) -> None:
        """Checks that a clip has as many frames as asked for.

        Raises:
            ValueError: it has fewer, or none are asked for.
        """
        if not 1 <= num_frames <= clip.total:
            raise ValueError(
                f"{counted(num_frames, 'frame')} would be taken from a video of {clip.total}; "
                "pass another num_frames or fps"
            )

    def scale(self, frames: np.ndarray) -> np.ndarray:
        """Returns frames uint8[..., 3] less the mean, in deviations, float32[..., 3]."""
        mean, deviation = np.array([self.mean, self.deviation], np.float32)
        return (frames.astype(np.float32) - mean) / deviation


def sampled_evenly(total: int, count: int, first: float = 0.0) -> np.ndarray:
    """Returns the numbers of `count` of `total` frames, rounded down, as torch.arange does."""
    step = total / count
    steps = np.arange(math.ceil((total - first) / step))
    return (first + steps * step).astype(np.float32).astype(int)


@dataclasses.dataclass(frozen=True)
class SquareSettings(Settings):
    """The frames of all videos are resized to one size, without keeping their ratio."""

    height: int  # pixels
    width: int
    defaults: ClassVar[Mapping[str, Any]] = {
        **Settings.defaults,
        "size": {"height": 384, "width": 384},
    }

    @classmethod
    def fields(cls, said: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of this class, from the values of a file and the defaults.

        Raises:
            ValueError: `size` is not a height and a width.
        """
        size = said["size"]
        if set(size) != {"height", "width"}:
            raise ValueError(
                f"size of the video processor is {size}; expected the height and width of a frame"
            )
        return super().fields(said) | size

    def pixels(self, clips: Sequence[Clip]) -> np.ndarray:
        """Resizes the frames of videos and scales their values.

        Args:
            clips: V videos of F frames each.

        Returns:
            float32[V, F, 3, height, width].

        Raises:
            ValueError: the videos have different numbers of frames.
        """
        counts = sorted({len(clip.frames) for clip in clips})
        if len(counts) > 1:
            raise ValueError(
                f"videos have {counts[0]} and {counts[-1]} frames; expected as many of each: pass "
                "num_frames and do_sample_frames=True"
            )
        resized = [
            [resizing.bicubic(frame, self.height, self.width) for frame in clip.frames]
            for clip in clips
        ]
        return self.scale(np.array(resized)).transpose(0, 1, 4, 2, 3)
