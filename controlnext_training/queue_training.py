"""Train on a running ComfyUI without a browser: queue a graph, show its progress, end with it.

    python queue_training.py GRAPH.json --set train.steps=500 --set data.folder=faces

GRAPH.json is a graph in the API's format (*Workflow > Export (API)*, or example_workflows/api/train_sd15.json). Ctrl-C
cancels: the run saves first, and the same command continues it. Exit status: 0 trained, 1 failed, 130 cancelled. This
file can be copied to any place; besides Python it needs aiohttp, which ComfyUI brings.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import os
import re
import signal
import socket
import struct
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

Graph = dict[str, dict[str, Any]]

NODE_TEXT = 3
"""Type number of the binary message in which ComfyUI sends a node's text."""


class QueueError(RuntimeError):
    """Error for a server that does not answer, refuses the graph, or disconnects."""


class Server:
    """ComfyUI server at `address` (HOST:PORT)."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.client = uuid.uuid4().hex
        # proxies of the environment do not apply to a server that was named
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Send a request, with `body` where given; returns the JSON answer.

        Raises QueueError with the server's message.
        """
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", content)
        request.add_header("Content-Type", "application/json")
        try:
            with self.opener.open(request, timeout=60) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise QueueError(refusal(error.read().decode("utf-8", "replace"))) from None
        except OSError as error:
            raise QueueError(
                f"no ComfyUI answers at {self.address} ({error}). Start it, or name it: --server"
            ) from None
        return json.loads(content) if content.strip() else None

    def inputs_of(self, kind: str) -> set[str]:
        """Names of the inputs of a class of nodes; empty for a class that the server lacks."""
        about = self.ask(f"/object_info/{urllib.parse.quote(kind)}") or {}
        groups = about.get(kind, {}).get("input", {})
        return {name for key in ("required", "optional") for name in groups.get(key, {})}


def refusal(answer: str) -> str:
    """Reasons in the server's answer for refusing a graph."""
    try:
        found = json.loads(answer)
        lines = [str(found["error"]["message"])]
        for node, about in (found.get("node_errors") or {}).items():
            lines += [f"  {node} ({about['class_type']}): {e['message']}: {e['details']}" for e in about["errors"]]
    except (ValueError, KeyError, TypeError):
        return f"ComfyUI answered: {answer[:500]}"
    return "\n".join(lines)


def changed(graph: Graph, settings: list[str], inputs_of: Callable[[str], Iterable[str]] = lambda kind: ()) -> Graph:
    """Graph with some inputs set: NODE.INPUT=VALUE, NODE an id or a class, VALUE JSON or else text.

    inputs_of: names of a class's inputs, called for an input that the graph does not set; () where unknown. Raises
    QueueError where there is no such node or input.
    """
    for setting in settings:
        where, equals, text = setting.partition("=")
        name, _, key = where.rpartition(".")
        nodes = [node for number, node in graph.items() if name in (number, node["class_type"])]
        if not equals or not nodes:
            known = ", ".join(f"{number} ({node['class_type']})" for number, node in graph.items())
            raise QueueError(f"--set {setting}: write NODE.INPUT=VALUE; the nodes are {known}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        for node in nodes:
            known_inputs = {*node["inputs"]} if key in node["inputs"] else {*inputs_of(node["class_type"])}
            if known_inputs and key not in known_inputs:
                close = difflib.get_close_matches(key, known_inputs, 1)
                meant = f"did you mean {close[0]}?" if close else f"it has {', '.join(sorted(known_inputs))}"
                raise QueueError(f"--set {setting}: {node['class_type']} has no input {key}; {meant}")
            node["inputs"][key] = value
    return graph


async def follow(server: Server, graph: Graph) -> int:
    """Queue the graph and show the messages of its nodes; returns the exit status. Raises QueueError."""
    url = f"ws://{server.address}/ws?clientId={server.client}"
    try:
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as messages:
            connection = messages.get_extra_info("socket")  # a step may take long: the system detects a lost connection
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            prompt = server.ask("/prompt", {"prompt": graph, "client_id": server.client})["prompt_id"]
            say(f"queued as {prompt}")
            cancel_on_ctrl_c(server, prompt)
            async for message in messages:
                if message.type is aiohttp.WSMsgType.ERROR:
                    break
                status = tell(message.data, prompt, graph)
                if status is not None:
                    return status
    except aiohttp.ClientError as error:
        raise QueueError(f"no ComfyUI answers at {server.address} ({error}). Start it, or name it: --server") from None
    raise QueueError(
        f"the connection to {server.address} is lost. If ComfyUI still runs, so does the training; if not, start it "
        "and run the same command: the run resumes from its last state."
    )


def cancel_on_ctrl_c(server: Server, prompt: str) -> None:
    """Cancel the graph at the first Ctrl-C and wait for its end; the second Ctrl-C does not wait."""
    asked: list[int] = []

    def cancel(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        os.write(1, b"cancelling; the run saves first\n")  # not `say`: its print may be the interrupted code
        server.ask("/queue", {"delete": [prompt]})
        server.ask("/interrupt", {"prompt_id": prompt})
        if all(entry[1] != prompt for entry in server.ask("/queue")["queue_running"]):
            raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), cancel)


def tell(content: str | bytes, prompt: str, graph: Graph) -> int | None:
    """Show one message of the server; returns the exit status with the last one, else None."""
    if isinstance(content, bytes):
        number, length = struct.unpack(">II", content[:8].ljust(8, b"\0"))
        if number == NODE_TEXT:
            show(content[8 + length :].decode("utf-8", "replace"))
        return None
    event = json.loads(content)
    data = event.get("data") or {}
    if data.get("prompt_id") != prompt:
        return None
    if event["type"] == "executing" and data.get("node") in graph:
        say(f"-- {graph[data['node']]['class_type']}")
    if event["type"] == "execution_error":
        say(f"{data['node_type']} failed: {data['exception_message'].strip()}")
    return {"execution_success": 0, "execution_error": 1, "execution_interrupted": 130}.get(event["type"])


PASSING = re.compile(r"(?:encoding|validating)\b.*?(?:(\d+) of (\d+))?$")
"""Progress texts, each of which replaces the previous one on the terminal."""
_width = 0
"""Length of the unfinished line on the terminal, in characters."""


def say(text: str) -> None:
    """Print lines; ends an unfinished line first."""
    global _width
    sys.stdout.write("\n" * bool(_width) + f"{text}\n")
    sys.stdout.flush()
    _width = 0


def show(text: str) -> None:
    """Print the text of a node. On a terminal progress stays on one line; elsewhere only its last text is printed."""
    global _width
    progress = PASSING.fullmatch(text)
    if progress is None:
        say(text)
    elif sys.stdout.isatty():
        sys.stdout.write(f"\r{text.ljust(_width)}")
        sys.stdout.flush()
        _width = max(_width, len(text))
    elif progress[1] and progress[1] == progress[2]:
        say(text)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Queue a training graph in a running ComfyUI and follow it.")
    parser.add_argument("graph", type=Path, metavar="GRAPH.json", help="a graph in the API's format")
    parser.add_argument("--server", default="127.0.0.1:8188", metavar="HOST:PORT", help="default 127.0.0.1:8188")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="repeatable")
    options = parser.parse_args(arguments)
    try:
        server = Server(options.server)
        graph = changed(json.loads(options.graph.read_text("utf-8")), options.set, server.inputs_of)
        return asyncio.run(follow(server, graph))
    except KeyboardInterrupt:
        return 130
    except (QueueError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
