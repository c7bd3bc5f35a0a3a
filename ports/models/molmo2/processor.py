"""Molmo2's processor for text, pictures and videos: the arrays and the tokens.

transformers' own class requires torch and torchvision; this one gives the same arrays.

P patches per crop, F features, K patches of a feature, I pictures, V videos.

A picture becomes crops (see `crops`), a frame of a video one crop with the whole of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ports import checkpoint
from ports.inputs import pictures, processor
from ports.inputs import videos as clips
from ports.models import port
from ports.models.molmo2 import crops
from ports.models.molmo2.videos import VideoSettings

# Tokens whose type in mm_token_type_ids is 1.
PICTURE_TOKENS = (
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>"),
    *("<frame_start>", "<im_end>", "<frame_end>", "<im_low>"),
)


class Processor(processor.VideoProcessor):
    """Converts texts, pictures and videos to the arrays that the model takes.

    Besides input_ids, attention_mask and mm_token_type_ids (1 at all tokens of pictures and
    frames), these are pixel_values float32[crops, P, values], image_token_pooling int32[F, K],
    image_grids int64[I, 4] and image_num_crops int64[I]; of videos pixel_values_videos,
    video_token_pooling and video_grids int64[V, 3], the frames and the rows and columns of each.

    Attributes:
        image_processor: how pictures are cut.
        whole_lines, lines: whether a token ends each row of features of the whole, of the tiling.
        frame_lines: whether one ends each row of a frame's features.
        start: the token before the whole.
        frame: the tokens around the features of a frame.
    """

    image_token, video_token = "<|image|>", "<|video|>"
    settings_class = VideoSettings

    def __init__(
        self,
        image_processor: crops.ImageSettings,
        tokenizer: Any,
        chat_template: str | None = None,
        options: dict[str, Any] | None = None,
        video_values: Mapping[str, Any] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template, video_values)
        said = self._settings = dict(options or {})
        self.lines = said.get("image_use_col_tokens", True)
        whole_lines = said.get("use_single_crop_col_tokens")
        self.whole_lines = self.lines if whole_lines is None else whole_lines
        own_start = said.get("use_single_crop_start_token", True)
        self.start = "<low_res_im_start>" if own_start else "<im_start>"
        self.frame_lines = said.get("video_use_col_tokens", False)
        kind = "frame" if said.get("use_frame_special_tokens", True) else "im"
        self.frame = f"<{kind}_start>", f"<{kind}_end>"

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of all tokens that a picture may become, those of its features first."""
        return self.tokenizer.convert_tokens_to_ids(list(PICTURE_TOKENS))

    @property
    def video_token_ids(self) -> list[int]:
        """None: videos become tokens of pictures."""
        return []

    @property
    def settings(self) -> dict[str, Any]:
        """What the processor has of processor_config.json."""
        return self._settings

    def save_image_processor(self, directory: Path) -> None:
        """Writes preprocessor_config.json into a directory, which is created if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "preprocessor_config.json"
        processor.write_settings(file, self.image_processor.as_json())

    def process_images(self, images: list[Any]) -> dict[str, np.ndarray]:
        """Returns the crops of a flat list of pictures, with the patches of their features."""
        cuts = [crops.cut(_pixels(image), self.image_processor) for image in images]
        counts = np.array([len(each.patches) for each in cuts])
        starts = self.image_processor.side**2 * np.cumsum([0, *counts[:-1]])
        pooling = [
            np.where(each.pooling >= 0, each.pooling + start, -1)
            for each, start in zip(cuts, starts, strict=True)
        ]
        return {
            "pixel_values": np.concatenate([each.patches for each in cuts]),
            "image_token_pooling": np.concatenate(pooling).astype(np.int32),
            "image_grids": np.array([each.grid for each in cuts]),
            "image_num_crops": counts,
        }

    def expand(self, arrays: dict[str, np.ndarray]) -> list[str]:
        """Returns the tokens of a picture: features in rows, of the whole and of the tiling."""
        return [
            _view((self.start, "<im_end>"), rows, columns, self.whole_lines)
            + _view(("<im_start>", "<im_end>"), all_rows, all_columns, self.lines)
            for rows, columns, all_rows, all_columns in arrays["image_grids"].tolist()
        ]

    def process_videos(
        self, videos: Sequence[clips.Clip]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns the frames of videos with the patches of their features, and the text of each:
        the features of a frame come after its time in seconds.
        """
        settings = self.video_settings
        square = np.arange(settings.side**2, dtype=np.int32).reshape(settings.side, -1)
        pooled = crops.pooled(square, settings.pool)
        rows, columns = pooled.shape[:2]
        cuts = [settings.cut(clip.frames) for clip in videos]
        starts = settings.side**2 * np.arange(sum(map(len, cuts)), dtype=np.int32)[:, None, None]
        pooled = pooled.reshape(-1, pooled.shape[-1])
        arrays = {
            "pixel_values_videos": np.concatenate(cuts),
            "video_token_pooling": np.where(pooled >= 0, pooled + starts, -1).reshape(
                -1, pooled.shape[-1]
            ),
            "video_grids": np.array([[len(frames), rows, columns] for frames in cuts]),
        }
        frame = _view(self.frame, rows, columns, self.frame_lines)
        return arrays, [" ".join(f"{time:.1f} {frame}" for time in _times(clip)) for clip in videos]

    def _with_images(
        self, text: str | Sequence[str], images: Sequence[Any] | None
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """As the base class, with texts that begin with the tokenizer's first token.

        Raises:
            ValueError: as for the base class, or a text has several videos.
        """
        texts = [text] if isinstance(text, str) else text
        most = max((prompt.count(self.video_token) for prompt in texts), default=0)
        if most > 1:
            raise ValueError(
                f"a text contains {self.video_token} {most} times; expected one video per text"
            )
        first = self.tokenizer.bos_token or self.tokenizer.eos_token
        texts = [prompt if prompt.startswith(first) else first + prompt for prompt in texts]
        return super()._with_images(texts, images)


def _view(around: tuple[str, str], rows: int, columns: int, has_ends: bool) -> str:
    """Returns the tokens of a grid of features, with one at the end of each row if it has ends."""
    line = "<im_patch>" * columns + "<im_col>" * has_ends
    return around[0] + line * rows + around[1]


def _times(clip: clips.Clip) -> list[float]:
    """Returns the seconds of each frame; without their numbers, they are the first."""
    numbers = range(len(clip.frames)) if clip.numbers is None else clip.numbers
    return [number / (clip.rate or clips.DEFAULT_RATE) for number in numbers]


def _pixels(image: Any) -> np.ndarray:
    """Converts an array, a PIL image or a file's path to uint8[height, width, 3].

    Grey pictures are widened, and transparent ones put on white. As in transformers, a file is
    turned as its EXIF data say, and loses its transparency without white.
    """
    if isinstance(image, str):
        from transformers.image_utils import load_image

        image = load_image(image)
    pixels = pictures.as_rgb(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"it is {pixels.dtype}{list(pixels.shape)}; expected a PIL image or "
            "uint8[height, width, 3]"
        )
    return pixels


def read_processor(directory: Path) -> Processor:
    """Loads the processor of a checkpoint.

    Raises:
        ValueError: a file is missing, can't be read, or has a value that is not implemented.
    """
    with checkpoint.loading(directory, "processor"):
        options = port.read_settings(directory, "processor_config.json")
        # Newer checkpoints have one file for everything.
        settings = options.get("image_processor") or checkpoint.read_json(
            directory / "preprocessor_config.json"
        )
        cutting = crops.ImageSettings.from_json(settings)
        template = port.read_template(directory)
        of_videos = port.read_video_settings(directory)
    return Processor(cutting, port.read_tokenizer(directory), template, options, of_videos)
