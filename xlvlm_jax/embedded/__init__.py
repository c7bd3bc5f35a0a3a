"""The embedded model: a small LLaVA, and the CLIP pair it grew from, trained on drawn scenes.

Both ship with the package in the Hugging Face layout. `xlvlm train-demo` makes them again.
"""

from pathlib import Path

LLAVA = Path(__file__).parent / "llava"
CLIP = Path(__file__).parent / "clip"
