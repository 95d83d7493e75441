"""Chromium for the tests of the page: where it is, and pages that complain of nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from playwright.sync_api import Page as Tab

    from neocog.web.page import Page

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; skips the test, loudly, where there is none."""
    names = (os.environ.get("CHROMIUM", "chromium"), "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("NOT TESTED: the page in a browser (no Chromium; `make browser` installs it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, where: Path | str, **options: Any) -> Iterator[Tab]:
    """A page in a tab of its own. At the end: no error on its console, no request elsewhere."""
    options = {"viewport": {"width": 1400, "height": 900}, "locale": "en-US", **options}
    context = browser.new_context(**options)
    tab = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    address = where.absolute().as_uri() if isinstance(where, Path) else where
    tab.goto(address)
    wait(tab)
    try:
        yield tab
    finally:
        context.close()
    assert errors == []
    home = address.partition("#")[0]
    assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []


def wait(tab: Tab) -> None:
    """Until what is looked at is drawn."""
    tab.wait_for_function(
        """() => { const { box, channel, y, x } = window.neocog.page.state;
        return document.documentElement.dataset.shown === [box, channel, y, x].join(","); }"""
    )


def go(tab: Tab, **place: object) -> None:
    """Looks at something and waits until it is drawn."""
    tab.evaluate("(place) => window.neocog.page.go(place)", place)
    wait(tab)


def box_of(page: Page, name: str, kind: str) -> int:
    boxes = page.data["boxes"]
    return next(i for i, b in enumerate(boxes) if (b["name"], b["kind"]) == (name, kind))


def state(tab: Tab) -> dict:
    return tab.evaluate("() => window.neocog.page.state")
