"""Client of a running ComfyUI over its API: queue a workflow, follow its progress, fetch the result.

A workflow is in the API format: {node id: {"class_type": str, "inputs": {...}}}. All calls block; the websocket runs
inside `run`. Proxies of the environment are not used: the server is local or named.
"""

import asyncio
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Workflow = Mapping[str, Mapping[str, Any]]
OnEvent = Callable[[str, dict[str, Any]], None]

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ComfyError(RuntimeError):
    """Error of a server that could not be reached, refused a request, or ended."""


class PromptError(ComfyError):
    """Error of a workflow that was refused or failed while running; the message names the nodes.

    node_errors: {node id: text}; a single entry for one that failed while running.
    """

    def __init__(self, message: str, node_errors: Mapping[str, str]) -> None:
        super().__init__(message)
        self.node_errors = dict(node_errors)


@dataclass(frozen=True)
class FinishedWorkflow:
    """Result of a finished workflow.

    outputs: {node id: {"images": [...], ...}} as in the server's history. cached, executed: node ids. seconds: wall
    time.
    """

    prompt_id: str
    outputs: dict[str, Any]
    seconds: float
    cached: tuple[str, ...] = ()
    executed: tuple[str, ...] = ()
    history: dict[str, Any] = field(default_factory=dict, repr=False)


class ComfyClient:
    """Client of the ComfyUI server at `address` ("127.0.0.1:8188")."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client_id = uuid.uuid4().hex

    def request(self, path: str, data: bytes | None = None, content_type: str = "application/json") -> bytes:
        """GET `path`, or POST `data` to it; returns the body. Raises ComfyError, PromptError for a refused workflow."""
        request = urllib.request.Request(f"http://{self.address}{path}", data=data)
        if data is not None:
            request.add_header("Content-Type", content_type)
        try:
            with _opener.open(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(path, error.code, error.read()) from None
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise ComfyError(
                f"http://{self.address}{path}: no answer from ComfyUI ({reason}). Is it running?"
            ) from error

    def get(self, path: str) -> Any:
        """GET the JSON at `path`."""
        return json.loads(self.request(path))

    def post(self, path: str, body: Any) -> Any:
        """POST `body` as JSON; returns the JSON answer, None where it is empty."""
        answer = self.request(path, json.dumps(body).encode())
        return json.loads(answer) if answer.strip() else None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """Description of all nodes of the server (or the named one): inputs, outputs, tooltips."""
        return self.get("/object_info" + (f"/{urllib.parse.quote(node)}" if node else ""))

    def queue(self, workflow: Workflow) -> str:
        """Queue `workflow`; returns its prompt id. Raises PromptError when the server refuses it."""
        return self.post("/prompt", {"prompt": workflow, "client_id": self.client_id})["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """Record of a finished workflow on the server; None while it is not finished."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self) -> None:
        """Ask the server to stop the running workflow."""
        self.post("/interrupt", {})

    def free(self, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask the server to unload models and drop cached outputs; it does so when the queue is empty.

        The server's thread for prompts misses a request that comes after it last looked for one and before it waits
        for the next prompt; ask again where memory must be free.
        """
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def upload_image(self, image: Path | bytes, name: str | None = None) -> str:
        """Upload an image file to the server's input folder; returns the name for LoadImage."""
        content = image if isinstance(image, bytes) else image.read_bytes()
        name = name or (image.name if isinstance(image, Path) else "image.png")
        boundary = uuid.uuid4().hex
        head = 'Content-Disposition: form-data; name="{}"'
        parts = (
            f"--{boundary}\r\n{head.format('overwrite')}\r\n\r\ntrue\r\n--{boundary}\r\n"
            f'{head.format("image")}; filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        )
        body = parts.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        answer = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]

    def image(self, entry: Mapping[str, str]) -> bytes:
        """Content of the file of one entry in an output's "images" list."""
        fields = {key: entry.get(key, "") for key in ("filename", "subfolder", "type")}
        return self.request(f"/view?{urllib.parse.urlencode(fields)}")

    def run(self, workflow: Workflow, on_event: OnEvent | None = None, timeout: float = 600.0) -> FinishedWorkflow:
        """Queue `workflow`, wait for its end, return its outputs.

        on_event(type, data): called for each message of the server about this workflow ("executing", "progress", ...).
        timeout: seconds, after which the workflow is interrupted. Raises PromptError when it is refused or fails,
        ComfyError.
        """
        return asyncio.run(self._run(workflow, on_event, timeout))

    async def _run(self, workflow: Workflow, on_event: OnEvent | None, timeout: float) -> FinishedWorkflow:
        import aiohttp

        started = time.monotonic()
        url = f"http://{self.address}/ws?clientId={self.client_id}"
        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
                prompt_id = self.queue(workflow)
                seen = await asyncio.wait_for(_until_done(socket, prompt_id, on_event), timeout)
        except (asyncio.TimeoutError, TimeoutError) as error:
            self.interrupt()
            raise ComfyError(f"The workflow did not finish within {timeout:g} s and was interrupted.") from error
        except aiohttp.ClientError as error:
            raise ComfyError(f"{url}: the connection to ComfyUI failed ({error}).") from error
        record = self.history(prompt_id)
        if record is None:
            raise ComfyError(f"ComfyUI has no record of workflow {prompt_id}: {self.whereabouts()}")
        raise_failure(record)
        seconds = time.monotonic() - started
        return FinishedWorkflow(
            prompt_id, record["outputs"], seconds, tuple(seen["cached"]), tuple(seen["executed"]), record
        )

    def whereabouts(self) -> str:
        """Facts about the server for an error message."""
        return f"server at {self.address}"


async def _until_done(socket: Any, prompt_id: str, on_event: OnEvent | None) -> dict[str, list[str]]:
    """Read messages until the workflow has left the server's queue; returns the ids of cached and executed nodes."""
    seen: dict[str, list[str]] = {"cached": [], "executed": []}
    async for message in socket:
        if not isinstance(message.data, str):  # a preview picture
            continue
        event = json.loads(message.data)
        data = event.get("data") or {}
        if data.get("prompt_id") != prompt_id:
            continue
        if on_event is not None:
            on_event(event["type"], data)
        if event["type"] == "execution_cached":
            seen["cached"] += data["nodes"]
        if event["type"] == "executing":
            if data.get("node") is None:
                return seen
            seen["executed"].append(data["node"])
    raise ComfyError("ComfyUI closed the connection before the workflow was done.")


def raise_failure(record: Mapping[str, Any]) -> None:
    """Raise PromptError if the history record says that the workflow failed or was interrupted."""
    for kind, data in record["status"]["messages"]:
        if kind == "execution_error":
            text = f"{data['exception_type']}: {data['exception_message'].strip()}"
            raise PromptError(f"node {data['node_id']} ({data['node_type']}) failed: {text}", {data["node_id"]: text})
        if kind == "execution_interrupted":
            raise PromptError(f"interrupted at node {data.get('node_id')} ({data.get('node_type')})", {})


def _refusal(path: str, code: int, body: bytes) -> ComfyError:
    """Exception for an HTTP error; for /prompt with the server's message about each node."""
    text = body.decode(errors="replace").strip()
    try:
        answer = json.loads(text)
        summary = answer["error"]["message"], answer["error"].get("details", "")
        nodes = answer["node_errors"] or {}
    except (ValueError, KeyError, TypeError):
        return ComfyError(f"{path}: ComfyUI answered {code}: {text[:500]}")
    node_errors = {
        node: f"{found['class_type']}: "
        + "; ".join(f"{item['message']}: {item['details']}" for item in found["errors"])
        for node, found in nodes.items()
    }
    lines = [f"node {node} {text}" for node, text in node_errors.items()]
    return PromptError("ComfyUI refused the workflow: " + "\n  ".join([" ".join(summary).strip(), *lines]), node_errors)


class Progress:
    """Progress display of a workflow: the current picture and the time left, on one line.

    pictures: name of each picture by the id of the node that samples it, in any order. The time left is computed from
    the sampling steps so far, and shown from the second picture on. Where the output is not a terminal, each picture
    gets a line.
    """

    def __init__(self, pictures: Mapping[str, str], out: TextIO | None = None) -> None:
        self.pictures, self.out = pictures, out or sys.stdout
        self.one_line = self.out.isatty()
        self.begun: dict[str, None] = {}
        self.started, self.shown = 0.0, ""

    def __call__(self, kind: str, data: dict[str, Any]) -> None:
        """Callback `on_event` of ComfyClient.run."""
        node = data.get("node")
        if kind not in ("executing", "progress") or node is None or node not in self.pictures:
            return
        now = time.monotonic()
        self.started = self.started or now
        self.begun[node] = None
        part = data["value"] / data["max"] if kind == "progress" else 0.0
        done = len(self.begun) - 1 + part
        left = (now - self.started) * (len(self.pictures) / done - 1) if done >= 1 else None
        self._show(f"picture {len(self.begun)} of {len(self.pictures)}: {self.pictures[node]}", left)

    def _show(self, text: str, left: float | None) -> None:
        if not self.one_line:
            if text != self.shown:
                print(f"  {text}{time_left(left)}", file=self.out, flush=True)
            self.shown = text
            return
        line = f"  {text}{time_left(left)}"
        print(f"\r{line:<{len(self.shown)}}", end="", file=self.out, flush=True)
        self.shown = line

    def end(self) -> None:
        """End the line."""
        if self.one_line and self.shown:
            print(file=self.out, flush=True)


def time_left(seconds: float | None) -> str:
    """Text such as ', about 40 s left'; empty for None, where the time is unknown."""
    if seconds is None:
        return ""
    return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"
