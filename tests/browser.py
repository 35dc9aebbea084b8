"""Debian's Chromium, by Playwright; what it shows is kept as pictures under .cache/pictures."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
NEEDED = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
PICTURES = Path(__file__).parent.parent / ".cache" / "pictures"
WIDE, NARROW = (1280, 900), (390, 844)
PATIENCE_MS = 60_000  # where others use the core too

expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, without a window."""
    with sync_playwright() as playwright:
        # Its sandbox needs rights that a container's root has not; it only sees our own pages.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page(
    browser: Browser, url: str, size: tuple[int, int] = WIDE, scheme: str = "light"
) -> Iterator[Page]:
    """A page of the console at `url`; fails if a script of it did."""
    width, height = size
    context = browser.new_context(
        base_url=url,
        viewport={"width": width, "height": height},
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    shown, errors = context.new_page(), []
    shown.set_default_timeout(PATIENCE_MS)
    shown.on("pageerror", lambda error: errors.append(str(error)))

    def hear(message: ConsoleMessage) -> None:
        # A status that is an error is told so too, and the page shows it on purpose.
        if message.type == "error" and "Failed to load resource" not in message.text:
            errors.append(message.text)

    shown.on("console", hear)
    try:
        yield shown
    finally:
        context.close()
        print(*errors, sep="\n")  # beside what failed because of them
    assert errors == []


def picture(shown: Page, name: str) -> None:
    """Keeps what is shown as a picture, all of the page."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    shown.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def is_accessible(shown: Page) -> None:
    """axe-core finds nothing serious, contrast of WCAG AA among what it looks at."""
    found = Axe().run(shown).response["violations"]
    serious = [
        (each["id"], [node["html"] for node in each["nodes"]][:5])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []


def fits(shown: Page) -> None:
    """Nothing is wider than the window."""
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
