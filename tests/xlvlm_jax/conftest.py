"""What the tests of pages share, and what a loop waits for."""

import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def waited_for(monkeypatch) -> Callable[[ModuleType], list[Any]]:
    """Returns a function: module -> the list of all that its loops will wait for.

    On several devices of a CPU, a loop that starts programs without waiting may hang (see
    `xlvlm_jax.solvers.collectives.keep_pace`), but not in a test, and not every time.
    """

    def watch(module: ModuleType) -> list[Any]:
        values, keep_pace = [], module.keep_pace

        def waiting(value: Any) -> Any:
            values.append(value)
            return keep_pace(value)

        monkeypatch.setattr(module, "keep_pace", waiting)
        return values

    return watch


@pytest.fixture(scope="session")
def browser():
    """Debian's chromium, driven by Playwright; skips without either."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium")
    with sync_api.sync_playwright() as playwright:
        # Its own sandbox does not start in most containers; the page comes from this test.
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()
