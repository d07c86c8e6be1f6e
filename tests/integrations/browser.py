"""A Chromium for tests of pages, and the screens that they are looked at on."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright: Any = pytest.importorskip("playwright.sync_api")

SCREENS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "narrow": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2},
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        here = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if here is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        browser = started.chromium.launch(executable_path=here, args=["--enable-unsafe-swiftshader"])
        yield browser
        browser.close()
