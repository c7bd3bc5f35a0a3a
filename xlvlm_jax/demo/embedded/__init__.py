"""The embedded model: a small LLaVA, and the CLIP pair it grew from, trained on drawn scenes.

Both ship with the package in the Hugging Face layout. `xlvlm train-demo` makes them again.
"""

from pathlib import Path

from ports.checkpoint import hub

LLAVA = Path(__file__).parent / "llava"
CLIP = Path(__file__).parent / "clip"

# Three fine-tuned versions, on captions that name a colour, a place or a mood: LoRA adapters. The
# README beside them has the commands that make them.
ADAPTERS = {name: Path(__file__).parent / "adapters" / name for name in ("color", "place", "mood")}

hub.name_directory("embedded", LLAVA)
