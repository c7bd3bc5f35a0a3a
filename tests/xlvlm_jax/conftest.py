"""What the tests of pages share."""

import shutil

import pytest


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
