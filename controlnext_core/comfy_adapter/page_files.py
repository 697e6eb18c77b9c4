"""Routes for files of the host's page, needed where the name of the pack's folder keeps the host from serving them.

aiohttp 3.14 compares the decoded path of a request with the encoded prefix of a static route, so the host answers 404
for the script, help pages and templates of every pack whose folder name has a space or a letter outside ASCII. A route
with the folder's name as a pattern is compared decoded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

UNENCODED = re.compile(r"[A-Za-z0-9._~-]*")
"""Names of unreserved characters only (RFC 3986), which a URL holds without encoding."""
FOLDERS = {"/extensions": "web", "/workflow_templates": "example_workflows"}
"""{start of the URL: folder of the pack}; the host serves each below /api too."""


def serve_page_files(pack: Path) -> None:
    """Add routes for the pack's page files to the running host, where the name of its folder needs encoding.

    Does nothing without a server (a script has imported the pack).
    """
    server = sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if instance is not None and not UNENCODED.fullmatch(pack.name):
        add_routes(server.web, instance.routes, pack)  # type: ignore[union-attr]


def add_routes(web: Any, routes: Any, pack: Path) -> None:
    """Add one route per entry of FOLDERS: files inside that folder of `pack`, 404 for everything else.

    web: the module `aiohttp.web`, as the host uses it; routes: its table of routes.
    """
    escaped = re.escape(pack.name.replace("%", "%25"))
    name = escaped.replace("\\{", ".").replace("\\}", ".")  # braces delimit the pattern
    for start, folder in FOLDERS.items():
        routes.get(f"{start}/{{pack:{name}}}/{{file:.+}}")(answer_from(web, pack / folder))


def answer_from(web: Any, folder: Path) -> Callable[[Any], Awaitable[Any]]:
    """Handler of a route that has the path below `folder` as its parameter `file`."""

    async def answer(request: Any) -> Any:
        file = (folder / request.match_info["file"]).resolve()
        if not file.is_relative_to(folder.resolve()) or not file.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(file)

    return answer
