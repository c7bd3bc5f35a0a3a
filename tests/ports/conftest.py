"""Checkpoints that several test files read; each is created once."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ports import VLM

    from .helpers import Pair


@pytest.fixture(scope="session")
def llava_pair(tmp_path_factory) -> "Callable[[str], Pair]":
    """llava_pair(variant) returns the checkpoint of that name in `helpers.VARIANTS`."""
    from . import helpers  # which need PyTorch, as some of the tests here do not

    def make(directory: Path, variant: str) -> "Pair":
        text, top = helpers.VARIANTS[variant]
        return helpers.make_llava(directory, helpers.llava_config(text, **top))

    return helpers.made_once(tmp_path_factory, make)


@pytest.fixture(scope="session")
def small(llava_pair) -> "Pair":
    """Returns the small checkpoint, for tests that need any checkpoint."""
    return llava_pair("grouped queries")


@pytest.fixture(scope="session")
def vlms(tmp_path_factory, small) -> "dict[str, VLM]":
    """Returns a small model of every port."""
    import ports

    from . import molmo_helpers
    from .idefics2_helpers import make_idefics2
    from .qwen2_vl_helpers import make_qwen2_vl

    root = tmp_path_factory.mktemp("ports")
    molmo_helpers.make_checkpoint(root / "molmo", molmo_helpers.CONFIG)
    return {
        "llava": small.vlm,
        "idefics2": make_idefics2(root / "idefics2").vlm,
        "qwen2_vl": make_qwen2_vl(root / "qwen2_vl").vlm,
        "molmo": ports.load(root / "molmo"),
    }
