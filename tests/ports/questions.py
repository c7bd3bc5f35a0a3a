"""Several questions about one picture, answered together and apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

import ports
from ports import passes
from ports.inputs import common_prefix

QUESTIONS = (0, 1, 1, 0, 1, 0, 0, 1)  # the picture of each row
LENGTHS = (3, 1, 7, 4, 2, 5, 1, 3)  # of each row's question


def ask(
    inputs: Mapping[str, np.ndarray], pictures: Sequence[int] = QUESTIONS
) -> dict[str, np.ndarray]:
    """Returns rows that each ask about the picture of one of the rows of `inputs`."""
    random = np.random.default_rng(5)
    rows = []
    for picture, length in zip(pictures, LENGTHS, strict=False):
        own = inputs["input_ids"][picture][inputs["attention_mask"][picture] == 1]
        rows.append([*own, *random.integers(3, 20, length)])
    length = max(map(len, rows))
    asked = {
        "input_ids": np.array([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": np.array([[0] * (length - len(r)) + [1] * len(r) for r in rows]),
    }
    old = inputs["input_ids"].shape[1] - inputs["attention_mask"].sum(1)
    for name, value in inputs.items():
        if name in asked or name.endswith("token_type_ids"):
            continue
        ends: Any = len(inputs["input_ids"])
        if "image_grid_thw" in inputs and name == "pixel_values":  # the patches of all pictures
            ends = np.cumsum(inputs["image_grid_thw"].prod(1))[:-1]
        parts = np.split(value, ends)
        asked[name] = np.concatenate([parts[picture] for picture in pictures])
        if name == "image_input_idx":
            moved = np.array([length - len(row) for row in rows]) - old[list(pictures)]
            places = asked[name]
            asked[name] = np.where(places < 0, places, places + moved[:, None, None])
    return asked


def both(
    vlm: ports.VLM,
    inputs: Mapping[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    method: str = "generate",
    *args: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """Returns the results with and without shared beginnings; the first did share."""
    seen, generate = [], passes.generate

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(options["shared"] is not None)
        return generate(*args, **options)

    monkeypatch.setattr(passes, "generate", noted)
    shared = getattr(vlm, method)(inputs, *args, max_new_tokens=4, **options)
    monkeypatch.setattr(common_prefix, "share", lambda *_: None)
    apart = getattr(vlm, method)(inputs, *args, max_new_tokens=4, **options)
    monkeypatch.undo()
    assert seen == [True, False]
    return shared, apart
