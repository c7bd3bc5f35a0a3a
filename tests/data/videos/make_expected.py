"""Makes expected.npz, the arrays of transformers' processors for two drawn videos.

    pip install '.[test]' torchvision==0.28.0 num2words==0.5.14
    XLA_FLAGS= python -m tests.data.videos.make_expected

Not run by the tests, which need no torchvision. Run it from the root of the repository.
"""

from pathlib import Path

import numpy as np

from tests.ports import video_cases

arrays, different = {}, []
for name, family in video_cases.FAMILIES.items():
    processor = video_cases.theirs(name)
    for case in family.cases:
        made = video_cases.process(name, processor, **video_cases.CASES[case])
        if "pixel_values_videos" in made:
            # The same image processor makes pixel_values here and there.
            del made["pixel_values"]
        kind = "pixel_values_videos" if "pixel_values_videos" in made else "pixel_values"
        if name == "smolvlm":
            # Without the frames of zeros that fill up videos.
            made[kind] = made[kind][made[kind].any((2, 3, 4))]
        # The values of pixels are whole numbers.
        pixels = made[kind] * 127.5 + 127.5
        assert np.abs(pixels - pixels.round()).max() < 1e-4
        pixels = pixels.round().astype(np.uint8)
        # Several cases have the same pixels: store them once, and their number.
        numbers = [i for i, each in enumerate(different) if np.array_equal(each, pixels)]
        if not numbers:
            different.append(pixels)
        made[kind] = np.array((numbers or [len(different) - 1])[0])
        arrays |= {f"{name}/{case}/{key}": value for key, value in made.items()}
arrays |= {f"pixels/{i}": pixels for i, pixels in enumerate(different)}
np.savez_compressed(Path(__file__).parent / "expected.npz", allow_pickle=False, **arrays)
