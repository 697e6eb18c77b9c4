"""The host's page in a browser, for the tests of the page: opening it, what goes wrong on it, reports on its nodes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
READY = """() => Boolean(window.app?.vueAppReady && window.app.graph?.nodes.length  // the default graph is there
    && LiteGraph.registered_node_types.ControlNeXtLoader)"""
TIMEOUT = 60_000  # ms, for one step on a busy machine; newer pages draw hundreds of templates in software
SEARCH = re.compile(r"^(Search Nodes|Add a node)\.\.\.$")  # placeholders of the search box: 1.32.9, 1.49.6
SETTINGS = {"Comfy.TutorialCompleted": True}
"""Settings of all pages: a new user would be shown the templates first."""
REPORTS = """() => Object.fromEntries(app.graph.nodes.filter(n => n.properties.controlnext_report)
    .map(n => [n.title, n.properties.controlnext_report]))"""
DRAWN = """[...document.querySelectorAll('div.controlnext_report')].map(
    report => [...report.children].map(line => line.textContent).join('\\n'))"""


@dataclass
class Browser:
    """A page of the host, and what went wrong on it."""

    page: Page
    shots: Path
    wrong: list[str] = field(default_factory=list)

    def shot(self, name: str, clip: Any = None) -> None:
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=self.shots / f"{name}.png", clip=clip)

    def load(self, address: str) -> None:
        """Go to the server's page and wait until it is there."""
        self.page.goto(f"http://{address}/")
        self.page.wait_for_function(READY, timeout=90_000)

    def of_ours(self) -> list[str]:
        """Errors on the page's console about this pack; the page's own questions to hosts elsewhere (https) are not."""
        asked_first = f"/extensions/{quote(ROOT.name)}/docs/ControlNeXtLoader/en.md"  # of two places for a help page
        named = [text for text in self.wrong if "controlnext" in text.lower() or f"/{quote(ROOT.name)}/" in text]
        return [text for text in named if "https://" not in text and asked_first not in text]

    def reports(self, enough: int) -> dict[str, str]:
        """{title: report} of nodes, once there are `enough`; each is drawn too."""
        self.page.wait_for_function(f"() => Object.keys(({REPORTS})()).length >= {enough}", timeout=120_000)
        shown = self.page.evaluate(REPORTS)
        self.page.wait_for_function(f"(texts) => texts.every(each => {DRAWN}.includes(each))", arg=list(shown.values()))
        return shown


@contextmanager
def opened_page(server: ComfyServer, shots: Path, width: int, settings: dict[str, Any] = SETTINGS) -> Iterator[Browser]:
    """A page, `width` x 1000 pixels, loaded once; skips where there is no browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    for name, value in {**SETTINGS, **settings}.items():
        server.post(f"/settings/{name}", value)
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=chromium_path(driver), args=ARGUMENTS)
        page = chromium.new_page(viewport={"width": width, "height": 1000})
        made = Browser(page, shots)
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: made.wrong.append(f"{error} {error.stack}"))
        page.on(
            "console", lambda line: made.wrong.append(f"{line.text} {line.location}") if line.type == "error" else 0
        )
        made.load(server.address)
        yield made
        chromium.close()


def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for screenshots: the one that CONTROLNEXT_SCREENSHOTS names, else a temporary one."""
    return Path(os.environ.get("CONTROLNEXT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))


def chromium_path(driver: Any) -> str:
    """A Chromium of this machine. Skips where there is none."""
    own = Path(driver.chromium.executable_path)
    found = next(filter(None, map(shutil.which, BROWSERS)), None) or (str(own) if own.is_file() else None)
    if found is None:
        pytest.skip("no Chromium here: install Debian's `chromium`, or run `python -m playwright install chromium`")
    return found
