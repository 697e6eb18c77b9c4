"""`python run.py queue`: run one workflow many times, with different seeds, on several ComfyUIs. Standard library only.

A host computes one run at a time and gets the next when it is free. A run of a host that refuses the workflow or
disconnects goes back to the queue; a run that fails during computation is not retried.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .comfy_client import ComfyClient, ComfyError, PromptError, raise_failure
from .environment import SetupError

Workflow = dict[str, dict[str, Any]]
SEEDS = ("seed", "noise_seed")
"""Names of inputs that differ from run to run."""
TRAINERS = ("ControlNeXtTrain",)
POLL_SECONDS = 0.3
JOIN_SECONDS = 0.2


class HostLostError(ComfyError):
    """Error of a host: it refused the workflow, does not answer, or lost the run. Another host may succeed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("graph", type=Path, metavar="GRAPH.json", help="a workflow in the API's format")
    parser.add_argument(
        "--server", action="append", required=True, metavar="HOST:PORT", help="a running ComfyUI; repeatable"
    )
    parser.add_argument("--count", type=int, default=1, metavar="N", help="runs; each adds 1 to every seed; default 1")
    parser.add_argument("--out", type=Path, default=Path("pictures"), metavar="DIR", help="default: pictures")
    parser.add_argument(
        "--upload", action="append", default=[], type=Path, metavar="FILE", help="copy to each host's input; repeatable"
    )


def read_graph(path: Path) -> Workflow:
    """Read a workflow in the API's format. Raises SetupError that says what kind of file it is instead."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{path}: cannot be read as JSON ({error}).") from error
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise SetupError(
            f"{path}: is a graph of the page. In ComfyUI choose Workflow > Export (API), and name that file."
        )
    sound = isinstance(graph, dict) and graph and all(isinstance(node, dict) for node in graph.values())
    if not sound or not all("class_type" in node and "inputs" in node for node in graph.values()):
        raise SetupError(f"{path}: is not a workflow in the API's format. In ComfyUI choose Workflow > Export (API).")
    return graph


def seeds_of(graph: Workflow) -> Iterator[tuple[dict[str, Any], str]]:
    """Pairs (inputs of a node, name) of every seed with a value in the graph; links to other nodes do not count."""
    for node in graph.values():
        for name in SEEDS:
            if type(node["inputs"].get(name)) is int:
                yield node["inputs"], name


def runs_of(graph: Workflow, count: int) -> list[Workflow]:
    """Make `count` copies; the seeds of copy i are those of the graph plus i, modulo 2^64.

    Raises SetupError where copies would be equal, or would train the same control.
    """
    if count < 1:
        raise SetupError(f"--count {count}: must be 1 or more.")
    if count > 1 and not any(True for _ in seeds_of(graph)):
        raise SetupError(f"--count {count}: no node has a seed, so every run would give the same. Leave --count out.")
    if count > 1 and any(node["class_type"] in TRAINERS for node in graph.values()):
        raise SetupError(f"--count {count}: the workflow has Train Control; {count} runs would train the same control.")
    runs = [json.loads(json.dumps(graph)) for _ in range(count)]
    for number, run in enumerate(runs):
        for inputs, name in seeds_of(run):
            inputs[name] = (inputs[name] + number) % 2**64
    return runs


@dataclass
class SharedRuns:
    """Runs by status (waiting, in progress, done, failed), shared by one thread per host."""

    waiting: list[int]
    busy: int = 0
    done: dict[int, str] = field(default_factory=dict)
    """Index of a run -> address of the host that computed it."""
    failed: dict[int, str] = field(default_factory=dict)
    """Index of a run -> error."""
    stopped: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self) -> int | None:
        """Take the next run; waits while none is left but one in progress may come back. None: all runs have ended."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or not self.busy or self.stopped)
            if self.stopped or not self.waiting:
                return None
            self.busy += 1
            return self.waiting.pop(0)

    def put(self, number: int, host: str = "", error: str = "") -> None:
        """Record the end of a run: done by `host`, failed with `error`, or, with neither, returned to the queue."""
        with self.changed:
            self.busy -= 1
            if error:
                self.failed[number] = error
            elif host:
                self.done[number] = host
            else:
                self.waiting.insert(0, number)
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def in_queue(client: ComfyClient, prompt: str) -> bool:
    """True: the host computes the run or has it queued. False: it does not."""
    queue = client.get("/queue")
    return any(item[1] == prompt for part in ("queue_running", "queue_pending") for item in queue[part])


def compute(client: ComfyClient, workflow: Workflow, shared: SharedRuns) -> dict[str, Any]:
    """Run the workflow on the host; returns its outputs.

    Raises PromptError where it fails there, HostLostError, ComfyError.
    """
    try:
        prompt = client.queue(workflow)
    except PromptError as error:
        raise HostLostError(str(error)) from error
    while (record := client.history(prompt)) is None:
        if shared.stopped:
            client.post("/queue", {"delete": [prompt]})
            client.post("/interrupt", {"prompt_id": prompt})
            raise HostLostError("stopped")
        if not in_queue(client, prompt) and client.history(prompt) is None:
            raise HostLostError("the host has no record of the run; was it started again?")
        time.sleep(POLL_SECONDS)
    raise_failure(record)
    return record["outputs"]


def save(client: ComfyClient, number: int, outputs: Mapping[str, Any], folder: Path) -> list[Path]:
    """Download the files of a run from its host's output folder; they are named NUMBER_NAME."""
    paths = []
    for found in outputs.values():
        for entries in (part for part in found.values() if isinstance(part, list)):
            for entry in (e for e in entries if isinstance(e, dict) and e.get("type") == "output"):
                name = PurePosixPath(str(entry["filename"]).replace("\\", "/")).name
                paths.append(folder / f"{number:05d}_{name}")
                paths[-1].write_bytes(client.image(entry))
    return paths


def serve_runs(
    client: ComfyClient, runs: Sequence[Workflow], shared: SharedRuns, folder: Path, say: Callable[[str], None]
) -> None:
    """Compute runs on one host until none is left or the host is lost."""
    while (number := shared.take()) is not None:
        try:
            paths = save(client, number, compute(client, runs[number], shared), folder)
        except PromptError as error:
            shared.put(number, error=str(error))
            say(f"run {number} failed on {client.address}: {error}")
        except ComfyError as error:
            shared.put(number)
            if not shared.stopped:
                say(f"{client.address} takes no more runs: {error}")
            return
        except Exception as error:  # a thread that ends silently would leave the others waiting
            shared.put(number, error=f"{type(error).__name__}: {error}")
            raise
        else:
            shared.put(number, client.address)
            say(f"run {number} done on {client.address}: {', '.join(path.name for path in paths) or 'no file'}")


def share_runs(
    clients: Sequence[ComfyClient], runs: Sequence[Workflow], folder: Path, say: Callable[[str], None]
) -> SharedRuns:
    """Compute all runs on the hosts, one at a time on each; returns them when nothing is left to do."""
    shared = SharedRuns(list(range(len(runs))))
    threads = [
        threading.Thread(target=serve_runs, args=(client, runs, shared, folder, say), daemon=True) for client in clients
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(JOIN_SECONDS)
    except KeyboardInterrupt:
        shared.stop()
        for thread in threads:
            thread.join(10.0)
        raise
    return shared


def run_queue(options: argparse.Namespace) -> int:
    """Run the command; returns 0 where every run was done, else 1."""
    runs = runs_of(read_graph(options.graph), options.count)
    addresses = [address.removeprefix("http://").rstrip("/") for address in dict.fromkeys(options.server)]
    clients = [ComfyClient(address) for address in addresses]
    for client in clients:
        client.get("/system_stats")
        for path in options.upload:
            client.upload_image(path)
    options.out.mkdir(parents=True, exist_ok=True)
    shared = share_runs(clients, runs, options.out, lambda text: print(text, flush=True))
    print(f"{len(shared.done)} of {len(runs)} runs done; files are in {options.out}")
    for address in addresses:
        print(f"  {address}: {sum(host == address for host in shared.done.values())}")
    return 0 if len(shared.done) == len(runs) else 1
