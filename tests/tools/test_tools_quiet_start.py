"""Filter of a starting host's console output, on recorded logs and with failures of the pack inserted."""

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from comfyui_controlnext.tools import comfy_command, comfy_server
from comfyui_controlnext.tools.comfy_client import ComfyError
from comfyui_controlnext.tools.quiet_start import Follower, QuietStart, quiet_logging

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
PACK = Path("/home/ann/My Clone")
NOISE = re.compile(r"Traceback|IMPORT FAILED|ERROR|Cannot import|did not import|pip install|ModuleNotFoundError")
LOG_0375 = """\
Device: cpu
torchaudio missing, ACE model will be broken
ComfyUI version: 0.3.75
Traceback (most recent call last):
  File "/hosts/c0375/nodes.py", line 2146, in load_custom_node
    module_spec.loader.exec_module(module)
  File "<frozen importlib._bootstrap_external>", line 940, in exec_module
  File "/hosts/c0375/comfy_extras/nodes_audio.py", line 4, in <module>
    import torchaudio
ModuleNotFoundError: No module named 'torchaudio'

Cannot import /hosts/c0375/comfy_extras/nodes_audio.py module for custom nodes: No module named 'torchaudio'

Import times for custom nodes:
   0.4 seconds: /home/ann/My Clone

WARNING: some comfy_extras/ nodes did not import correctly. This may be because they are missing some dependencies.

IMPORT FAILED: nodes_audio.py
IMPORT FAILED: nodes_audio_encoder.py

This issue might be caused by new missing dependencies added the last time you updated ComfyUI.
Please do a: pip install -r requirements.txt

Context impl SQLiteImpl.
********** ERROR ***********

comfyui-workflow-templates is not installed.

Please install the updated requirements.txt file by running:
/envs/e0375/bin/python -m pip install -r /hosts/c0375/requirements.txt

********** ERROR ***********
Starting server

To see the GUI go to: http://127.0.0.1:8188
"""
"""Output of ComfyUI 0.3.75 without torchaudio and without its workflow templates, shortened."""
TAG, WARN = "\x1b[32m[INFO]\x1b[0m ", "\x1b[1m\x1b[33m[WARNING]\x1b[0m "
LOG_033 = f"""\
{TAG}Device: cpu
{WARN}Traceback (most recent call last):
  File "/hosts/comfy033/nodes.py", line 2263, in load_custom_node
    module_spec.loader.exec_module(module)
  File "/hosts/comfy033/comfy_extras/nodes_math.py", line 11, in <module>
    from simpleeval import simple_eval
ModuleNotFoundError: No module named 'simpleeval'

{WARN}Cannot import /hosts/comfy033/comfy_extras/nodes_math.py module for custom nodes: No module named 'simpleeval'
{TAG}Import times for custom nodes:
{TAG}   0.8 seconds: /home/ann/My Clone
{TAG}
{WARN}WARNING: some comfy_extras/ nodes did not import correctly. This may be because of missing dependencies.

{WARN}IMPORT FAILED: nodes_math.py
{WARN}
This issue might be caused by new missing dependencies added the last time you updated ComfyUI.
{WARN}Please do a: pip install -r requirements.txt
{WARN}
{TAG}Database upgraded from None to 0006_add_loader_path
{TAG}To see the GUI go to: http://127.0.0.1:8188
"""
"""Output of ComfyUI 0.33.0 without one of its packages, shortened."""
OURS = """\
Traceback (most recent call last):
  File "/hosts/c0375/nodes.py", line 2146, in load_custom_node
    module_spec.loader.exec_module(module)
  File "/home/ann/My Clone/__init__.py", line 17, in <module>
    from comfyui_controlnext import nodes
KeyError: 'x'

Cannot import /home/ann/My Clone module for custom nodes: 'x'
   0.1 seconds (IMPORT FAILED): /home/ann/My Clone
"""
LOGS = pytest.mark.parametrize("log", [LOG_0375, LOG_033], ids=["0.3.75", "0.33"])


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


@LOGS
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_failures_of_parts_that_are_not_needed_stay_in_the_log(log: str, size: int) -> None:
    quiet = QuietStart(PACK)
    shown = "".join(map(quiet.feed, pieces(log, size)))
    assert NOISE.search(log) and not NOISE.search(shown)
    for kept in ("Device: cpu", "Import times for custom nodes", "/home/ann/My Clone", "To see the GUI go to"):
        assert kept in shown
    assert not re.search(r"\[WARNING\]\S* *$", shown, re.M), "no empty warnings"
    assert quiet.hidden >= 6


@LOGS
def test_a_failure_of_ours_is_shown_whole(log: str) -> None:
    quiet = QuietStart(PACK)
    place = log.index("Import times") if log is LOG_0375 else log.index(f"{TAG}Import times")
    shown = quiet.feed(log[:place] + OURS + log[place:])
    for line in OURS.splitlines():
        assert line in shown.splitlines() or not line
    assert "nodes_audio" not in shown and "nodes_math" not in shown


def test_another_folder_whose_name_begins_like_ours_is_not_ours() -> None:
    other = OURS.replace("My Clone", "My Clone-2")
    assert QuietStart(PACK).feed(other).strip() == ""
    launcher = OURS.replace("__init__.py", "tools/launcher.py").partition("Cannot")[0]
    assert QuietStart(PACK).feed(launcher).strip() == ""


def test_everything_is_shown_once_the_host_has_started() -> None:
    quiet = QuietStart(PACK)
    quiet.feed(LOG_0375)
    error = "!!! Exception during processing !!!\nTraceback (most recent call last):\n  File x\nValueError: y\n 10%|"
    assert quiet.feed(error) == error


def test_a_growing_file_is_followed_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_bytes(b"")
    seen: list[str] = []
    follower = Follower(log, QuietStart(PACK), seen.append)
    follower.start()
    with open(log, "ab", buffering=0) as file:
        file.write(b"first\r\nIMPORT FAILED: x.py\n")
        until = time.monotonic() + 10
        while not seen and time.monotonic() < until:
            time.sleep(0.01)
        assert seen == ["first\n"]
        file.write(b"To see the GUI go to: h\nlast")
    follower.stop()
    assert "".join(seen) == "first\nTo see the GUI go to: h\nlast"


SERVE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *arguments):
        pass
server = HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.timeout = 1
for _ in range(20):
    server.handle_request()
"""


@pytest.fixture
def handlers() -> Iterator[list[logging.Handler]]:
    """Handlers of the root logger, restored afterwards."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield root.handlers
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
        handler.close()


def test_a_host_in_this_process_is_quiet_too(
    tmp_path: Path, handlers: list[logging.Handler], capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "base" / "train.log"
    quiet_logging(PACK, log)
    for text in (
        "torchaudio missing, ACE model will be broken",
        f"Traceback (most recent call last):\n  {PACK.parent}",
    ):
        logging.warning(text)
    ours = f"Traceback (most recent call last):\n  File {PACK}/x.py"
    logging.warning(ours)
    logging.getLogger("comfyui_controlnext.x").warning("a hint was resized")
    shown = capsys.readouterr().err
    assert shown == f"WARNING: {ours}\nWARNING: a hint was resized\n"
    assert log.read_text("utf-8").count("WARNING: ") == 4


FAILS = """
print("Traceback (most recent call last):\\n  File someone.py\\nKeyError: 'other'\\n")
print("Cannot import /elsewhere module for custom nodes: 'other'")
print("Traceback (most recent call last):\\n  File ours\\nKeyError: 'x'\\n")
print("Cannot import PACK module for custom nodes: 'x'")
print("   0.1 seconds (IMPORT FAILED): PACK", flush=True)
"""


def test_comfy_ends_with_our_own_failure_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = tmp_path / "host"
    host.mkdir()
    (host / "main.py").write_text(FAILS.replace("PACK", str(ROOT)) + SERVE, "utf-8")
    monkeypatch.setattr(comfy_command, "COMFY_BASE", tmp_path / "base")
    monkeypatch.setattr(comfy_command, "fill", lambda base: base.mkdir())
    with pytest.raises(ComfyError, match=r"could not import the pack:\n +Traceback.*\n +File ours\n") as caught:
        comfy_command.serve(host, comfy_server.free_port(), None, cpu=True)
    assert "someone" not in str(caught.value) and "someone" not in capsys.readouterr().out
    assert "someone" in (tmp_path / "base" / "server.log").read_text("utf-8"), "the log has everything"


@pytest.mark.comfy
def test_the_real_host_starts_without_a_traceback_also_where_torchaudio_is_missing(server: "ComfyServer") -> None:
    started = next(i for i, line in enumerate(server.log_lines()) if "To see the GUI go to" in line)
    lines = server.log_lines()[:started]
    assert not [line for line in lines if re.search("Traceback|IMPORT FAILED|Cannot import", line)]
    assert "LoadAudio" in server.object_info("LoadAudio"), "the nodes of the module that imports torchaudio"
