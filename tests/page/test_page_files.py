"""Script, help pages and templates of the pack reach the page from a folder of any name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
from comfyui_controlnext.controlnext_core.comfy_adapter import page_files

pytest.importorskip("aiohttp")
NAMES = ["My clone", "Küche (2)", "描画", "50% {new}", "plain"]


def answers(pack: Path, paths: list[str]) -> list[int]:
    """Statuses from a server with the pack's routes and the host's static ones."""
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    async def ask() -> list[int]:
        routes, app = web.RouteTableDef(), web.Application()
        page_files.add_routes(web, routes, pack)
        app.add_routes([*routes, web.static(f"/extensions/{pack.parent.name}", pack.parent)])
        async with TestClient(TestServer(app)) as client:
            return [(await client.get(path)).status for path in paths]

    return asyncio.run(ask())


@pytest.mark.parametrize("name", NAMES)
def test_page_files_are_served_from_a_folder_of_any_name(name: str, tmp_path: Path) -> None:
    pack = tmp_path / name
    for file in ("web/js/reports.js", "web/docs/A node/zh.md", "example_workflows/One, two.json", "secret.txt"):
        (pack / file).parent.mkdir(parents=True, exist_ok=True)
        (pack / file).write_text(file, "utf-8")
    start, templates = f"/extensions/{quote(name)}", f"/workflow_templates/{quote(name)}"
    sound = [f"{start}/js/reports.js", f"{start}/docs/A%20node/zh.md", f"{templates}/One%2C%20two.json"]
    assert answers(pack, sound) == [200, 200, 200]
    refused = ["/../secret.txt", "/..%2Fsecret.txt", "/js", "/js/none.js", "s/js/reports.js"]
    assert answers(pack, [start + path for path in refused]) == [404] * 5


@pytest.mark.parametrize("name", NAMES)
def test_a_running_host_gets_routes_where_the_name_is_encoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiohttp import web

    routes = web.RouteTableDef()
    host = SimpleNamespace(web=web, PromptServer=SimpleNamespace(instance=SimpleNamespace(routes=routes)))
    monkeypatch.setitem(page_files.sys.modules, "server", host)
    page_files.serve_page_files(tmp_path / name)
    assert len(routes) == (2 if quote(name) != name else 0)


def test_an_import_without_a_server_adds_no_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(page_files.sys.modules, "server", raising=False)
    page_files.serve_page_files(tmp_path / "My clone")
