"""The embedded model: a small LLaVA and the CLIP model it builds on, trained on drawn scenes.

Both ship with the package in the Hugging Face layout. `xlvlm train-demo` trains them again.
"""

from pathlib import Path

from ports.checkpoint import hub

LLAVA = Path(__file__).parent / "llava"
CLIP = Path(__file__).parent / "clip"

# LoRA adapters: three fine-tuned on captions that name a colour, a place or a mood, and one that
# hallucinates. The README beside them lists the commands that made them.
ADAPTERS = {
    name: Path(__file__).parent / "adapters" / name
    for name in ("color", "place", "mood", "companions")
}

hub.name_directory("embedded", LLAVA)


def find_adapter(name: str | Path) -> Path:
    """Returns the directory of one of the embedded model's adapters, or of another one.

    Args:
        name: a name in `ADAPTERS`, a directory, or a repository id on the Hub.

    Raises:
        ValueError: it is neither; the names are listed.
    """
    if str(name) in ADAPTERS:
        return ADAPTERS[str(name)]
    if "/" not in str(name) and not Path(name).is_dir():
        raise ValueError(
            f"the embedded model has no adapter {str(name)!r}; expected {', '.join(ADAPTERS)}, or "
            "the directory of one"
        )
    return hub.find_directory(name)
