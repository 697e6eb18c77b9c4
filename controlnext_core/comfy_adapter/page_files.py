"""Files for the host's page, served where the name of the pack's folder keeps the host from it.

aiohttp 3.14 compares the decoded path of a request with the encoded prefix of a static route, so the host answers 404
for the script, help pages and templates of every pack whose folder name has a space or a letter outside ASCII. A
route with the folder's name as a pattern is compared decoded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from aiohttp import web

FOLDERS = {"/extensions": "web", "/workflow_templates": "example_workflows"}
"""{start of the address: folder of the pack}; the host answers each below /api too."""


def serve_page_files(pack: Path) -> None:
    """Add routes for the pack's page files to the running host, where the name of its folder needs encoding.

    Without a server (the pack is imported by a script) nothing happens. The host's own routes come first.
    """
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and quote(pack.name) != pack.name:
        add_routes(instance.routes, pack)


def add_routes(routes: web.RouteTableDef, pack: Path) -> None:
    """Add one route per entry of FOLDERS: files inside that folder of `pack`, 404 for everything else."""
    name = (
        re.escape(pack.name.replace("%", "%25")).replace("\\{", ".").replace("\\}", ".")
    )  # braces delimit the pattern
    for start, folder in FOLDERS.items():
        routes.get(f"{start}/{{pack:{name}}}/{{file:.+}}")(answer_from(pack / folder))


def answer_from(folder: Path) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The handler of a route with the path below `folder` as `file`."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.StreamResponse:
        file = (folder / request.match_info["file"]).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(file)

    return answer
