"""Writes what a page shows as a Python program."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from xlvlm_jax.playground.edits import Setting
from xlvlm_jax.playground.items import Item


def as_python(
    model: str,
    adapter: str | None,
    picture: str,
    question: str,
    settings: Sequence[Setting],
    max_new_tokens: int,
    uploads: Path | None = None,
) -> str:
    """Returns a program that prints the plain and the steered answer.

    Args:
        model: as `ports.load` takes it.
        adapter: the directory of the adapter merged into the model, or None.
        picture: the name of the picture's file.
        question: what the model is asked.
        settings: the sliders that are not at zero.
        max_new_tokens: maximum number of tokens of an answer.
        uploads: the directory of files that were uploaded, which ends with the server.

    Returns:
        Source text. It reads the picture and uploaded vectors from the working directory, and other
        concepts and vectors from where the page has them.

    Raises:
        ValueError: two uploaded vectors have the same file name.
    """
    _require_apart(settings, uploads)
    given = "" if adapter is None else f", adapter={adapter!r}"
    lines = [
        "import numpy as np",
        "import ports",
        "from xlvlm_jax import Concepts, SteeringVector, steering",
        "from xlvlm_jax.concepts.removal import concept_directions",
        "from xlvlm_jax.data.images import read_image",
        "",
        f"vlm = ports.load({model!r}{given})",
        f"prompt = vlm.render({question!r})",
        f"inputs = vlm.process([prompt], [read_image({picture!r})])",
        "",
        "edits = {}",
        "",
        "",
        "def steer(fitted, alpha, where):",
        "    for site, edit in fitted.edits_for(vlm, inputs, alpha, where).items():",
        "        edits.setdefault(site, []).append(edit)",
        "",
        "",
        *(line for setting in settings for line in _steering(setting, uploads)),
        'for name, chosen in {"plain": None, "steered": edits}.items():',
        f"    answer = vlm.generate(inputs, max_new_tokens={max_new_tokens}, edits=chosen)",
        '    print(f"{name}: {vlm.decode(answer.tokens)[0].strip()}")',
    ]
    text = "\n".join(lines) + "\n"
    unused = ["import numpy as np", "from xlvlm_jax.concepts.removal import concept_directions"]
    if not any(setting.item.concepts is not None for setting in settings):
        for line in unused:
            text = text.replace(f"{line}\n", "", 1)
    return text


def _is_uploaded(item: Item, uploads: Path | None) -> bool:
    return uploads is not None and item.path.is_relative_to(uploads)


def _require_apart(settings: Sequence[Setting], uploads: Path | None) -> None:
    """Raises ValueError if the program would read two uploads from the same file."""
    places: dict[str, Path] = {}
    uploaded = [each.item.path for each in settings if _is_uploaded(each.item, uploads)]
    for path in uploaded:
        if places.setdefault(path.name, path) != path:
            raise ValueError(
                f"two dropped vectors are named {path.name}; the program reads both from the "
                "working directory: rename one and drop it again"
            )


def _steering(setting: Setting, uploads: Path | None) -> Iterator[str]:
    item, strength, where, site = setting
    yield f"# {_described(item)}"
    path = item.path.name if _is_uploaded(item, uploads) else str(item.path.absolute())
    if item.concepts is not None:
        yield f"direction = concept_directions(Concepts.load({path!r}))[{item.number}]"
        fitted = f"SteeringVector(np.float32({item.scale!r}) * direction, {site!r})"
    elif item.vector is not None and site != item.site:
        fitted = f"SteeringVector(steering.load({path!r}).vector, {site!r})"
    else:
        fitted = f"steering.load({path!r})"
    yield f"steer({fitted}, alpha={strength!r}, where={where!r})"
    yield ""


def _described(item: Item) -> str:
    words = ", ".join(item.words[:5])
    told = f"{item.group}, {item.name}" + (f": {words}" if words else "")
    return " ".join(told.split())
