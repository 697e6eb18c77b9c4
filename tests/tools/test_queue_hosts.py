"""Queue on several hosts: the rules, and two real servers that share a models folder."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from comfyui_controlnext.tools import queue_hosts
from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError, PromptError
from comfyui_controlnext.tools.environment import SetupError

if TYPE_CHECKING:
    from comfyui_controlnext.tests.conftest import TinyModels
    from comfyui_controlnext.tools.comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, dict[str, Any]]
SAMPLER: Graph = {
    "a": {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1, "steps": 3}},
    "b": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
    "c": {"class_type": "Other", "inputs": {"seed": ["b", 0]}},
}


def test_each_run_has_seeds_of_its_own() -> None:
    runs = queue_hosts.runs_of(SAMPLER, 3)
    assert [run["a"]["inputs"]["seed"] for run in runs] == [2**64 - 1, 0, 1]
    assert [run["b"]["inputs"]["noise_seed"] for run in runs] == [5, 6, 7]
    assert all(run["c"]["inputs"]["seed"] == ["b", 0] and run["a"]["inputs"]["steps"] == 3 for run in runs)
    assert SAMPLER["a"]["inputs"]["seed"] == 2**64 - 1


def test_runs_that_would_be_equal_or_train_twice_are_refused() -> None:
    still = {"a": {"class_type": "EmptyImage", "inputs": {}}}
    training = {"a": {"class_type": "ControlNeXtTrain", "inputs": {"seed": 1}}}
    assert len(queue_hosts.runs_of(still, 1)) == len(queue_hosts.runs_of(training, 1)) == 1
    for graph, says in ((still, "no node has a seed"), (training, "train the same control")):
        with pytest.raises(SetupError, match=says):
            queue_hosts.runs_of(graph, 2)
    with pytest.raises(SetupError, match="must be 1 or more"):
        queue_hosts.runs_of(still, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read as JSON"),
        ('{"nodes": []}', "Export"),
        ("[]", "API's format"),
        ('{"a": {}}', "API's format"),
    ],
)
def test_other_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "gr\u00e4ph.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SetupError, match=says) as raised:
        queue_hosts.read_graph(path)
    assert str(path) in str(raised.value)


class FakeHost(ComfyClient):
    """Host without a network. fails: (number of the run, error) to raise; gate: waited for before a run ends."""

    def __init__(self, address: str, fails: dict[int, Exception] | None = None, gate: Any = None) -> None:
        super().__init__(address)
        self.fails, self.gate, self.ran = fails or {}, gate, []

    def queue(self, workflow: Any) -> str:
        return str(workflow["a"]["inputs"]["seed"])

    def history(self, prompt_id: str) -> dict[str, Any]:
        number = int(prompt_id)
        if self.gate is not None:
            assert self.gate.wait(10)
        if number in self.fails:
            raise self.fails[number]
        self.ran.append(number)
        return {"status": {"messages": []}, "outputs": {"9": {"images": [ENTRY, {**ENTRY, "type": "temp"}]}}}

    def image(self, entry: Any) -> bytes:
        return self.address.encode()


ENTRY = {"filename": "..\\..\\evil.png", "subfolder": "", "type": "output"}


def share(hosts: list[FakeHost], count: int, folder: Path) -> queue_hosts.SharedRuns:
    runs = queue_hosts.runs_of({"a": {"class_type": "KSampler", "inputs": {"seed": 0}}}, count)
    return queue_hosts.share_runs(hosts, runs, folder, lambda text: None)


def test_a_lost_host_gives_its_run_to_the_others(tmp_path: Path) -> None:
    """The other host is out of runs and waits when the run comes back."""
    lost = threading.Event()

    class Lost(FakeHost):
        def history(self, prompt_id: str) -> dict[str, Any]:
            while len(other.ran) < 3:
                lost.wait(0.01)
            raise ComfyError("gone")

    other, gone = FakeHost("other"), Lost("gone")
    shared = share([gone, other], 4, tmp_path)
    assert shared.done == dict.fromkeys(range(4), "other") and not shared.failed
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:05d}_evil.png" for number in range(4)]


def test_a_run_that_fails_is_not_tried_again_and_the_host_goes_on(tmp_path: Path) -> None:
    host = FakeHost("one", {1: PromptError("node a failed", {})})
    shared = share([host], 3, tmp_path)
    assert (sorted(shared.done), shared.failed) == ([0, 2], {1: "node a failed"})


def test_nothing_hangs_when_every_host_is_lost(tmp_path: Path) -> None:
    hosts = [FakeHost(name, dict.fromkeys(range(4), ComfyError("gone"))) for name in ("one", "two")]
    shared = share(hosts, 4, tmp_path)
    assert not shared.done and sorted(shared.waiting) == [0, 1, 2, 3]


def test_ctrl_c_takes_the_run_out_of_its_host(tmp_path: Path) -> None:
    posted: list[tuple[str, Any]] = []

    class Busy(FakeHost):
        def history(self, prompt_id: str) -> Any:
            shared.stop()  # as Ctrl-C does, while the run is computed
            return None

        def get(self, path: str) -> Any:
            return {"queue_running": [[0, "0"]], "queue_pending": []}

        def post(self, path: str, body: Any) -> None:
            posted.append((path, body))

    shared = queue_hosts.SharedRuns([0, 1])
    runs = queue_hosts.runs_of({"a": {"class_type": "KSampler", "inputs": {"seed": 0}}}, 2)
    queue_hosts.serve_runs(Busy("busy"), runs, shared, tmp_path, lambda text: None)
    assert posted == [("/queue", {"delete": ["0"]}), ("/interrupt", {"prompt_id": "0"})]
    assert not shared.done and not shared.failed and shared.take() is None


def test_a_host_that_has_forgotten_the_run_is_lost(tmp_path: Path) -> None:
    class Forgetful(FakeHost):
        def history(self, prompt_id: str) -> Any:
            return None

        def get(self, path: str) -> Any:
            return {"queue_running": [], "queue_pending": [[1, "another"]]}

    shared = share([Forgetful("new")], 2, tmp_path)
    assert not shared.done and not shared.failed and shared.waiting == [0, 1]


@pytest.mark.comfy
def test_two_servers_share_runs_and_a_models_folder(
    host: Path, server: ComfyServer, tiny: TinyModels, tmp_path: Path
) -> None:
    """Real servers, the command as a person types it: every run once, on both, the same picture whoever draws it."""
    from comfyui_controlnext.tests.training.test_training_nodes import node, plain_graph
    from comfyui_controlnext.tools.comfy_server import ComfyServer as Server

    graph = plain_graph(tiny)
    graph["save"] = node("SaveImage", images=["decoded", 0], filename_prefix="shared")
    graph["decoded"] = node("VAEDecode", samples=["sample", 0], vae=["checkpoint", 2])
    graph["sample"]["inputs"]["steps"] = 6
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    with Server.start(
        host, tmp_path / "b", models=tiny.models, arguments=["--cpu", "--disable-api-nodes"], log=tmp_path / "b.log"
    ) as second:
        folder = tmp_path / "pictures both"
        command = [sys.executable, str(ROOT / "run.py"), "queue", str(file), "--count", "6", "--out", str(folder)]
        for running in (server, second):
            command += ["--server", running.address]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        shares = [int(done.stdout.rsplit(f"{running.address}: ", 1)[1].split()[0]) for running in (server, second)]
        assert sum(shares) == 6 and min(shares) >= 1, done.stdout
        assert len(second.get("/history")) == shares[1]
        pictures = {path.name[:5]: path.read_bytes() for path in folder.iterdir()}
        assert sorted(pictures) == [f"{number:05d}" for number in range(6)]
        graph["sample"]["inputs"]["seed"] += 3
        (entry,) = second.run(graph).outputs["save"]["images"]
        assert pixels(second.image(entry)) == pixels(pictures["00003"])
        assert len({pixels(picture) for picture in pictures.values()}) == 6


def pixels(png: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()
