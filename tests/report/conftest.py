"""A browser for the tests of pages."""

from __future__ import annotations

import shutil
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chromium() -> Any:
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium")
    assert path is not None, "apt-get install chromium"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
