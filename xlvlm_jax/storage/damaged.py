"""Files that are not what they should be: one clear line each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reported(path: Path, what: str, advice: str) -> Iterator[None]:
    """While the content of a file is put together: whatever is wrong with it, as a ValueError.

    what: it should be, as "concepts"; advice: what to do. An OSError is the disk's and passes, and
    so does a ValueError that names the file already.
    """
    try:
        yield
    except OSError:
        raise
    # A damaged file raises whatever the code stumbles over, in ours and in the libraries'.
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise ValueError(f"{path} holds no {what} that can be read ({said}); {advice}") from error
