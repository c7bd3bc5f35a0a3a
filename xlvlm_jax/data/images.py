"""Reads image files as RGB images, the way a person sees them."""

import base64
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_SIDE = 12_000


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Returns the first frame of an image file, in mode RGB, rotated by its EXIF orientation.

    Transparent parts become white; 16-bit values are scaled to 8 bits (in a 32-bit file if any is
    above 255).

    Args:
        path: the image file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the image has more than MAX_SIDE pixels on a side, which is checked before
            decoding, or its pixels have no 8-bit meaning.
        OSError: the file can't be read, or not decoded; for a damaged file, an error that is also a
            ValueError.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:
                raise _TooLargeError(f"{image.width} x {image.height} pixels")
            image.load()
            return _rgb(_upright(image), image.format)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image file") from None
    except (_TooLargeError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: {error}, expected at most {MAX_SIDE} x {MAX_SIDE}; make it smaller"
        ) from None
    except _DepthError as error:
        raise ValueError(f"{path}: {error}; save it with 8 bits per channel") from None
    except UnidentifiedImageError:
        empty = path.is_file() and path.stat().st_size == 0
        reason = "the file is empty" if empty else "not an image in a known format"
        raise _DamagedError(f"{path}: {reason}") from None
    except Exception as error:  # decoders of damaged files may raise any error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        # Other errors with a number are the file system's.
        damaged = getattr(error, "errno", None) is None or isinstance(error, IsADirectoryError)
        kind = _DamagedError if damaged else OSError
        raise kind(f"{path}: cannot be decoded ({reason.splitlines()[0]})") from error


def data_uri(picture: Image.Image, side: int) -> str:
    """Returns a picture as a data URI (JPEG), its longer side at most `side` pixels."""
    if max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


class _DamagedError(OSError, ValueError):
    pass


class _TooLargeError(Exception):
    pass


class _DepthError(Exception):
    pass


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data is no reason to reject the picture
        return image


def _rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    if image.mode == "F":
        raise _DepthError("floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips all values above 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise _DepthError("32-bit pixels")
        # 32-bit files of 8-bit values are common: those are not scaled. Of PGM files, Pillow gives
        # the mode "I" to those of 16 bits, and scales their values to 65,535.
        is_wide = image.mode != "I" or file_format == "PPM" or values.max() > 255
        image = Image.fromarray((values >> 8 if is_wide else values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
