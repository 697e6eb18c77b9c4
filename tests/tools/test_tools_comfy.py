"""Server, client and demo of tools/: the error paths with stand-ins, the rest with the real host."""

import io
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from comfyui_controlnext.tools import comfy_command, comfy_server, tiny_models
from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError, Progress, PromptError, time_left
from comfyui_controlnext.tools.comfy_server import ComfyServer
from comfyui_controlnext.tools.demo_weights import shipped
from comfyui_controlnext.tools.environment import SetupError
from comfyui_controlnext.tools.workflows import training_graphs
from PIL import Image

if TYPE_CHECKING:
    from conftest import TinyModels

ROOT = Path(__file__).resolve().parents[2]
FAKE_MAIN = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
print("h\\u00e9llo", sys.argv[1:], flush=True)
try:
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
except KeyboardInterrupt:
    print("bye", flush=True)
"""


@pytest.fixture
def stub() -> Iterator[tuple[ComfyClient, dict[str, tuple[int, bytes]]]]:
    """Client, and the table {path: (status, body)} from which its server answers."""
    answers: dict[str, tuple[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - the base class's name
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = answers.get(self.path, (404, b"no such page"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.05,))
        thread.start()
        yield ComfyClient(f"127.0.0.1:{httpd.server_address[1]}"), answers
        httpd.shutdown()
        thread.join()


def test_a_server_that_is_not_there_is_named() -> None:
    client = ComfyClient(f"127.0.0.1:{comfy_server.free_port()}")
    with pytest.raises(ComfyError, match=r"http://127\.0\.0\.1:\d+/queue: no answer .*Is it running\?"):
        client.get("/queue")
    with pytest.raises(ComfyError, match=r"the connection to ComfyUI failed"):
        client.run({})


def test_an_http_error_is_quoted(stub: tuple[ComfyClient, dict[str, tuple[int, bytes]]]) -> None:
    client, answers = stub
    answers["/view?filename=a&subfolder=&type=output"] = (500, b"Server got itself in trouble")
    with pytest.raises(ComfyError, match="/view.*: ComfyUI answered 500: Server got itself in trouble"):
        client.image({"filename": "a", "type": "output"})
    with pytest.raises(ComfyError, match="answered 404: no such page"):
        client.interrupt()


def test_a_refused_workflow_names_every_node_and_value(stub: tuple[ComfyClient, dict[str, tuple[int, bytes]]]) -> None:
    client, answers = stub
    problem = {"message": "Value not in list", "details": "control_name: 'x' not in []"}
    body = {
        "error": {"message": "Prompt outputs failed validation", "details": ""},
        "node_errors": {"6": {"class_type": "ControlNeXtLoader", "errors": [problem, problem]}},
    }
    answers["/prompt"] = (400, json.dumps(body).encode())
    with pytest.raises(PromptError, match="refused the workflow: Prompt outputs failed validation") as caught:
        client.queue({"6": {"class_type": "ControlNeXtLoader", "inputs": {}}})
    text = "ControlNeXtLoader: Value not in list: control_name: 'x' not in []"
    assert caught.value.node_errors == {"6": f"{text}; Value not in list: control_name: 'x' not in []"}
    assert f"node 6 {text}" in str(caught.value)


def test_an_empty_answer_is_none(stub: tuple[ComfyClient, dict[str, tuple[int, bytes]]]) -> None:
    client, answers = stub
    answers["/free"] = (200, b"")
    assert client.post("/free", {}) is None


@pytest.mark.parametrize("name", ["plain", "two words", "\u00e4\u4e2d \U0001f680", "it's 100% #1: {x}", "back\\slash"])
def test_the_path_file_reads_back_as_written(tmp_path: Path, name: str) -> None:
    models = tmp_path / "models"
    (models / "loras").mkdir(parents=True)
    config = comfy_server.prepare_base(tmp_path / "base", Path("/") / name / "clone", models)
    read = yaml.safe_load(config.read_text("utf-8"))
    assert read["controlnext_pack"] == {"custom_nodes": str(Path("/") / name)}
    assert read["own_models"] == {"loras": str(models / "loras")}


def test_a_port_in_use_is_said() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(SetupError, match=rf"Port {port} is in use.* --port {port + 1}"):
            comfy_server.require_free_port(port)
    comfy_server.require_free_port(comfy_server.free_port())


def test_a_free_port_is_none_that_outgoing_connections_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux, Windows and macOS give outgoing connections ports from 32768 or 49152 on, gVisor from 16000 on."""
    found = {comfy_server.free_port() for _ in range(20)}
    assert len(found) > 10 and 1024 <= min(found) and max(found) < 16_000
    with socket.socket() as busy:
        port = comfy_server.free_port()
        busy.bind(("127.0.0.1", port))
        monkeypatch.setattr(comfy_server, "PORTS", range(port, port + 1))
        monkeypatch.setattr(comfy_server, "TRIES", 1)
        with pytest.raises(SetupError, match=rf"No port from {port} to {port} is free"):
            comfy_server.free_port()


def fake_host(folder: Path, main: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(main, encoding="utf-8")
    return folder


def test_a_server_starts_and_stops_in_folders_with_any_name(tmp_path: Path) -> None:
    host, base = fake_host(tmp_path / "my h\u00f6st", FAKE_MAIN), tmp_path / "b\u00e4se 1"
    base.mkdir()
    with ComfyServer.start(host, base, arguments=["--cpu"], log=base / "server.log") as server:
        assert server.get("/anything") == {}
        options = server.log_lines()[0]
        assert options.startswith("h\u00e9llo") and f"'{ROOT.name}', '--cpu'" in options
    assert server.process.returncode == 0 and server.log_lines()[-1] == "bye"
    assert server.stop() == 0  # a second time is harmless


def test_a_server_that_dies_while_starting_is_shown_with_its_last_words(tmp_path: Path) -> None:
    host = fake_host(tmp_path / "host", "import sys\nprint('out of luck')\nsys.exit(3)\n")
    with pytest.raises(ComfyError, match=r"(?s)ended while starting: ended with status 3; log .*out of luck"):
        ComfyServer.start(host, tmp_path / "base", log=tmp_path / "server.log")


FAKE_IMPORT_FAILURE = """
print("Traceback (most recent call last):\\n  someone else's")
print("Traceback (most recent call last):\\n  File ours\\nKeyError: 'x'\\n")
print("Cannot import PACK module for custom nodes: 'x'")
print("   0.1 seconds (IMPORT FAILED): PACK", flush=True)
"""


WARNING_OF_NEWER_HOSTS = "\\x1b[1m\\x1b[33m[WARNING]\\x1b[0m "


@pytest.mark.parametrize("tag", ["", WARNING_OF_NEWER_HOSTS], ids=["plain", "coloured"])
def test_a_pack_that_does_not_import_is_shown_with_its_traceback(tag: str, tmp_path: Path) -> None:
    main = FAKE_IMPORT_FAILURE.replace("PACK", str(ROOT)).replace('print("', f'print("{tag}') + FAKE_MAIN
    host = fake_host(tmp_path / "host", main)
    with pytest.raises(ComfyError, match=r"could not import the pack:\n +Traceback.*\n +File ours\n") as caught:
        ComfyServer.start(host, tmp_path / "base", log=tmp_path / "server.log")
    assert "someone else" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    host = fake_host(tmp_path / "host", "import time\nprint('thinking', flush=True)\ntime.sleep(60)\n")
    server = ComfyServer.start(host, tmp_path / "base", log=tmp_path / "server.log", wait=False)
    with server, pytest.raises(ComfyError, match=r"(?s)did not answer within 1 s: running; log .*"):
        server.wait_until_ready(1.0)
    assert server.process.returncode is not None


def test_a_fresh_base_keeps_the_models_only(tmp_path: Path) -> None:
    for name in ("models/a", "output/b", "server.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    assert [path.name for path in comfy_server.fresh_base(tmp_path).iterdir()] == ["models"]


def test_workflow_paths_follow_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = {"1": {"class_type": "X", "inputs": {"control_name": "demo/a.safetensors", "text": "a/b", "n": 1}}}
    monkeypatch.setattr("os.sep", "\\")
    adapted = comfy_command.for_this_system(workflow)
    assert adapted["1"]["inputs"] == {"control_name": "demo\\a.safetensors", "text": "a/b", "n": 1}
    assert workflow["1"]["inputs"]["control_name"] == "demo/a.safetensors"


def photograph_to_edges() -> dict[str, Any]:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "p\u00f6rtrait 1.jpg"}},
        "2": {"class_type": "Canny", "inputs": {"image": ["1", 0], "low_threshold": 0.2, "high_threshold": 0.5}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "edges"}},
    }


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def progress_of_two(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> str:
    """Progress of two pictures of two steps, ten seconds a step, as reported by the host."""
    now = [1000.0]
    monkeypatch.setattr("comfyui_controlnext.tools.comfy_client.time.monotonic", lambda: now[0])
    shown = Progress({"7": "edges, strength 1", "9": "depth"}, screen)
    for node in ("3", "9", "7"):  # in whichever order the host takes them; 3 is a loader
        shown("executing", {"node": node})
        for step in (1, 2):
            now[0] += 10
            shown("progress", {"node": node, "value": step, "max": 2})
    shown("executing", {"node": None})
    shown.end()
    return screen.getvalue()


def test_progress_stays_on_one_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = progress_of_two(Screen(True), monkeypatch)
    lines = [line.rstrip() for line in text.rstrip("\n").split("\r") if line]
    assert text.count("\n") == 1 and text.endswith("\n")
    assert lines[0] == "  picture 1 of 2: depth" and lines[-1] == "  picture 2 of 2: edges, strength 1, about 0 s left"
    assert "  picture 2 of 2: edges, strength 1, about 10 s left" in lines
    widths = [len(line) for line in text.rstrip("\n").split("\r")]
    assert all(after >= len(before.rstrip()) for before, after in zip(lines, widths[2:], strict=False)), "overwritten"


def test_progress_elsewhere_is_a_line_for_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    text = progress_of_two(Screen(False), monkeypatch)
    assert text.splitlines() == [
        "  picture 1 of 2: depth",
        "  picture 2 of 2: edges, strength 1, about 20 s left",
    ]
    assert time_left(None) == "" and time_left(400) == ", about 7 min left"


def test_comfy_brings_the_demo_and_no_random_weights(tmp_path: Path) -> None:
    """Lists of the widgets begin with the demo's files, also where an earlier version left random weights."""
    tiny_models.make_demo_models(tmp_path)
    own = tmp_path / "models" / "loras" / "mine.safetensors"
    own.write_bytes(b"x")
    comfy_command.fill(tmp_path)
    for folder in ("checkpoints", "controlnext", "controlnet", "loras"):
        found = {path.name for path in (tmp_path / "models" / folder).rglob("*") if path.is_file()}
        assert found - {own.name} == {name for name, place in shipped.FOLDERS.items() if place == folder}
    assert own.is_file() and (tmp_path / "input" / "astronaut.jpg").is_file()
    pictures = sorted((tmp_path / "input" / training_graphs.FOLDER).iterdir())
    assert len(pictures) == 2 * comfy_command.PICTURES and (
        tmp_path / "input" / training_graphs.FOLDER / "1.txt"
    ).read_text("utf-8")
    changed = pictures[0]
    changed.unlink()
    comfy_command.fill(tmp_path)
    assert not changed.exists(), "the person's folder is left alone"


def test_files_under_our_names_without_our_stamp_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "models" / "checkpoints" / "tiny_sd15.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    tiny_models.server_models.remove_demo_models(tmp_path)
    assert path.is_file()


@pytest.mark.comfy
def test_a_workflow_runs_and_its_picture_comes_back(server: ComfyServer) -> None:
    assert server.upload_image(ROOT / "demo" / "astronaut.jpg", "p\u00f6rtrait 1.jpg") == "p\u00f6rtrait 1.jpg"
    kinds: list[str] = []
    run = server.run(photograph_to_edges(), on_event=lambda kind, data: kinds.append(kind))
    picture = Image.open(io.BytesIO(server.image(run.outputs["3"]["images"][0])))
    assert picture.size == (512, 512) and {"execution_start", "executing", "executed"} <= set(kinds)
    assert run.executed == ("1", "2", "3") and run.cached == ()
    again = server.run(photograph_to_edges())
    assert set(again.cached) == {"1", "2", "3"}


@pytest.mark.comfy
def test_refused_and_failed_workflows_are_explained_and_the_server_lives_on(server: ComfyServer) -> None:
    with pytest.raises(PromptError, match="node NoSuchNode does not exist|Node 'NoSuchNode' not found"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})
    bad = photograph_to_edges()
    bad["2"]["inputs"]["low_threshold"] = 7
    with pytest.raises(PromptError, match=r"node 2 Canny: Value 7.0 bigger than max") as refused:
        server.run(bad)
    assert set(refused.value.node_errors) == {"2"}
    broken = server.base / "input" / "broken.png"
    broken.write_bytes(b"this is no picture")
    failing = photograph_to_edges()
    failing["1"]["inputs"]["image"] = "broken.png"
    with pytest.raises(PromptError, match=r"node 1 \(LoadImage\) failed: .*UnidentifiedImageError") as failed:
        server.run(failing)
    assert set(failed.value.node_errors) == {"1"}
    server.upload_image(ROOT / "demo" / "astronaut.jpg", "p\u00f6rtrait 1.jpg")
    assert "3" in server.run(photograph_to_edges()).outputs


@pytest.mark.comfy
def test_the_pack_is_the_only_one_loaded_and_its_nodes_are_there(server: ComfyServer) -> None:
    assert "ControlNeXtLoader" in server.object_info("ControlNeXtLoader")
    lines = server.log_lines()
    start = lines.index("Import times for custom nodes:") + 1
    loaded = [line.split(" seconds: ")[-1] for line in lines[start : lines.index("", start)]]
    others = [path for path in loaded if not Path(path).is_relative_to(server.base)]  # the tests' own probe
    assert others == [str(ROOT)]


@pytest.mark.comfy
def test_a_copy_of_the_clone_under_any_name_loads_in_the_real_host(host: Path, tmp_path: Path) -> None:
    copy = tmp_path / "Meine Knoten \u00e9\u4e2d" / "Control NeXt (v1.0) \u00fc"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "demo_output")
    shutil.copytree(ROOT, copy, ignore=left_out)
    base = tmp_path / "B\u00e4sis 2"
    base.mkdir()
    arguments = ["--cpu", "--disable-api-nodes"]
    with ComfyServer.start(host, base, pack=copy, arguments=arguments, log=base / "server.log") as server:
        assert "ControlNeXtLoader" in server.object_info("ControlNeXtLoader")
        assert any(str(copy) in line and "seconds" in line and "FAILED" not in line for line in server.log_lines())
    assert server.process.returncode == 0


@pytest.mark.comfy
def test_the_host_in_this_process_is_on_the_cpu_and_private(host: Path, tiny: "TinyModels") -> None:
    import comfy.model_management
    import folder_paths

    import nodes

    assert comfy.model_management.get_torch_device().type == "cpu"
    assert Path(nodes.__file__).parent == host.resolve()
    assert not Path(folder_paths.models_dir).is_relative_to(host)
