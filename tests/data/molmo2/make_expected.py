"""Makes expected.npz, the arrays of transformers' Molmo2Processor for three photographs.

    pip install '.[test]' torchvision==0.28.0 && python -m tests.data.molmo2.make_expected

Not run by the tests, which need no torchvision. Run it from the root of the repository.
"""

import tempfile
from pathlib import Path

import numpy as np
import transformers
from sklearn.datasets import load_sample_images

from tests.ports.models import test_molmo2

china, flower = (photo[::8, ::8] for photo in load_sample_images().images)
with tempfile.TemporaryDirectory() as directory:
    test_molmo2.make_config().save_pretrained(directory)
    test_molmo2.save_processor(Path(directory))
    processor = transformers.AutoProcessor.from_pretrained(directory)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}],
        add_generation_prompt=True,
    )
    arrays = processor(
        text=["what <|image|> is <|image|> it", prompt, "is it"],
        images=[china, flower.swapaxes(0, 1), flower[:, :30]],
        padding=True,
        return_tensors="np",
    )
arrays = {name: np.asarray(value) for name, value in arrays.items()}
# The values of pixels are whole numbers.
pixels = arrays["pixel_values"] * 127.5 + 127.5
assert np.abs(pixels - pixels.round()).max() < 1e-4
arrays["pixel_values"] = pixels.round().astype(np.uint8)
np.savez_compressed(Path(__file__).parent / "expected.npz", allow_pickle=False, **arrays)
