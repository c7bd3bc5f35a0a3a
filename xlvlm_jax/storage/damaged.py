"""Reports damaged files in one clear line each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reported(path: Path, what: str, advice: str) -> Iterator[None]:
    """Converts any error in the block, which parses a file, to a ValueError.

    An OSError passes, as the disk's, and so does a ValueError that already names the file.

    Args:
        path: the file.
        what: what it should contain, such as "concepts".
        advice: what to do.

    Raises:
        ValueError: the block fails.
    """
    try:
        yield
    except OSError:
        raise
    # A damaged file can raise anything, in this code or in libraries.
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"{path} has no readable {what} ({said}); {advice}") from error
