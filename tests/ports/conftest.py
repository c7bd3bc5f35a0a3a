"""Checkpoints that several files of tests read; each is made once."""

from collections.abc import Callable

import pytest

from . import helpers


@pytest.fixture(scope="session")
def llava_pair(tmp_path_factory) -> Callable[[str], helpers.Pair]:
    """llava_pair(variant): the checkpoint of that name in `helpers.VARIANTS`."""
    made: dict[str, helpers.Pair] = {}

    def pair(variant: str) -> helpers.Pair:
        if variant not in made:
            text, top = helpers.VARIANTS[variant]
            directory = tmp_path_factory.mktemp("checkpoint") / variant.replace(" ", "-")
            made[variant] = helpers.make_llava(directory, helpers.llava_config(text, **top))
        return made[variant]

    return pair


@pytest.fixture(scope="session")
def small(llava_pair) -> helpers.Pair:
    """The small checkpoint for tests that any checkpoint does for."""
    return llava_pair("grouped queries")
