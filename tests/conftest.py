"""What all tests share: nothing is fetched from the hub, and products are exact."""

import os

# Before transformers and tokenizers are imported, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tests describe one device; those that need several start a process of their own.
os.environ["JAX_PLATFORMS"] = "cpu"

import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# The first example of a test may compile a program; the machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real configurations and reference outputs that lies beside a checkout."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside this checkout")
    return path


@pytest.fixture
def xlvlm(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """xlvlm(*arguments): status, output and errors of the command line."""
    from xlvlm_jax import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["xlvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run
