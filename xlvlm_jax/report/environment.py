"""What all pages share: the templates, the parts that they include, and how they are stored."""

import importlib.resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from xlvlm_jax.report.numbers import number, percent
from xlvlm_jax.storage import atomic

_PACKAGE = __name__.rpartition(".")[0]  # the package that holds the templates
# One transparent pixel: the source of images that CSS gives a thumbnail as background.
BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def environment() -> Environment:
    """Returns the templates of the package, with filters for numbers."""
    made = Environment(
        loader=PackageLoader(_PACKAGE, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "percent": percent}
    return made


def part(name: str) -> Markup:
    """Returns a file that a page includes as it is."""
    return Markup((importlib.resources.files(_PACKAGE) / name).read_text("utf-8"))


def store(path: Path, text: str) -> Path:
    """Writes a page atomically, and returns its path.

    Args:
        path: the file to write.
        text: the page.

    Raises:
        OSError: the page can't be written.
    """
    try:
        # A caption may contain a lone surrogate, which UTF-8 cannot encode.
        atomic.write(path, text.encode("utf-8", "replace"))
    except OSError as error:
        raise OSError(
            f"cannot write the page to {path}: {error.strerror}; give a file in a writable"
            " directory"
        ) from error
    return path
