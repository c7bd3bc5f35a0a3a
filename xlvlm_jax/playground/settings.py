"""What a page asks for: a picture, a question and the sliders, read from JSON."""

from typing import Any, NamedTuple

from ports.intervene.edits import add
from xlvlm_jax.data import prompts

# What a slider's positions may be, and what the page calls them.
WHERE = {
    "all": "everywhere",
    "image": "picture",
    "prompt": "picture and question",
    "text": "question and answer",
    "generated": "answer",
    "last_prompt": "end of the question",
    "predicting": "where the answer is predicted",
}
STRONGEST = 1000.0
LONGEST = 4000  # characters of a question or an instruction


class Slider(NamedTuple):
    """How strongly an item steers, and at which positions of which site."""

    item: str  # its id
    strength: float
    where: str | None  # None for the item's own
    site: str | None  # None for the item's own


class Settings(NamedTuple):
    """Everything that the answers on a page depend on."""

    picture: str  # its id
    question: str
    sliders: tuple[Slider, ...]  # those that are not at zero
    instruction: str | None  # asked for instead of steering; None for no such answer


def read_settings(data: Any) -> Settings:
    """Returns what JSON values of a page mean.

    Args:
        data: {"picture": id, "question": text, "sliders": [{"item": id, "strength": number,
            "where": name, "site": name}], "instruction": text, "short": whether to ask for a
            word or phrase}; where, site, and all after the question may be missing.

    Raises:
        ValueError: a value is missing, of another type, or out of range.
    """
    data = _object(data, "the settings")
    question = _text(data, "question")
    if not question.strip():
        raise ValueError("the question is empty; ask something about the picture")
    if data.get("short"):
        question = prompts.question(question)
    listed = data.get("sliders") or []
    if not isinstance(listed, list):
        raise ValueError(f"sliders is a {type(listed).__name__}; expected a list")
    sliders = [_slider(_object(each, "a slider")) for each in listed]
    instruction = (_text(data, "instruction") if data.get("instruction") else "").strip()
    return Settings(
        _text(data, "picture"),
        question,
        tuple(slider for slider in sliders if slider.strength != 0),
        instruction or None,
    )


def _slider(data: dict[str, Any]) -> Slider:
    strength = data.get("strength")
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise ValueError(f"the strength of a slider is {strength!r}; expected a number")
    # NaN is not in the range either, and whole numbers may be too large for a float.
    if not -STRONGEST <= strength <= STRONGEST:
        raise ValueError(
            f"the strength of a slider is {strength!r:.40}; expected a number from "
            f"{-STRONGEST:g} to {STRONGEST:g}"
        )
    where = _text(data, "where") if data.get("where") is not None else None
    if where is not None:
        add([0.0], where=where)
    site = _text(data, "site") if data.get("site") is not None else None
    return Slider(_text(data, "item"), float(strength), where, site)


def _object(data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{what}: a {type(data).__name__}; expected a JSON object")
    return data


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.40}; expected a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} holds half a character (a lone surrogate); expected a text")
    if len(value) > LONGEST:
        raise ValueError(f"{name} has {len(value)} characters; expected at most {LONGEST}")
    return value
