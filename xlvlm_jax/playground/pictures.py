"""Pictures that pages have uploaded, kept as files while the server runs."""

import hashlib
import os
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from xlvlm_jax.data.images import read_image

MOST = 64  # pictures; the one that was used longest ago goes first
LARGEST = 32 * 2**20  # bytes of an uploaded file


class Picture(NamedTuple):
    """A picture of a page."""

    id: str  # the same for the same file
    name: str  # of the file that was uploaded
    path: Path  # where it lies now, as PNG
    upload: Path  # and the file itself
    size: tuple[int, int]  # width and height


class Pictures:
    """The pictures of all pages; a context manager, which deletes them in the end.

    Attributes:
        folder: the directory that holds them, and what else is to be deleted then.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="xlvlm-play-")
        self.folder = Path(self._folder.name)
        self._kept: dict[str, Picture] = {}
        self._lock = threading.RLock()  # requests of several tabs come from several threads

    def __enter__(self) -> "Pictures":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Deletes them all."""
        self._folder.cleanup()

    def add(self, content: bytes, name: str) -> Picture:
        """Keeps a picture.

        Args:
            content: the bytes of an image file.
            name: the file's name, for messages.

        Raises:
            ValueError: they are no picture, or one that is too large.
        """
        key = hashlib.sha256(content).hexdigest()[:24]
        with self._lock:
            if (known := self._kept.get(key)) is not None:
                return self._keep(known._replace(name=name))
        # A large picture takes seconds, during which others are asked about: without the lock, and
        # under names of its own, should another thread convert the same one.
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            upload, converted = Path(folder) / "upload", Path(folder) / "converted.png"
            upload.write_bytes(content)
            try:
                image: Image.Image = read_image(upload)
            except (OSError, ValueError) as error:
                reason = str(error).removeprefix(f"{upload}: ")
                raise ValueError(
                    f"{name}: {reason}; choose a picture, such as JPEG or PNG"
                ) from None
            image.save(converted)
            made = Picture(
                key, name, self.folder / f"{key}.png", self.folder / f"{key}.upload", image.size
            )
            with self._lock:
                os.replace(converted, made.path)
                os.replace(upload, made.upload)
                return self._keep(made)

    def blank(self) -> Picture:
        """Returns a picture of nothing, of a usual size, which is not among those added."""
        path, size = self.folder / "blank.png", (640, 480)
        Image.new("RGB", size).save(path)
        return Picture("blank", path.name, path, path, size)

    def get(self, key: str) -> Picture:
        """Returns a picture.

        Raises:
            LookupError: it was never uploaded, or was dropped for newer ones.
        """
        with self._lock:
            if key not in self._kept:
                raise LookupError("the picture is no longer here; choose it again")
            return self._keep(self._kept[key])

    def _keep(self, picture: Picture) -> Picture:
        self._kept.pop(picture.id, None)
        self._kept[picture.id] = picture
        while len(self._kept) > MOST:
            dropped = self._kept.pop(next(iter(self._kept)))
            for path in (dropped.path, dropped.upload):
                path.unlink(missing_ok=True)
        return picture
