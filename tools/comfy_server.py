"""Server: starts and stops a ComfyUI with the pack, in a separate base directory.

The host finds the pack through `custom_nodes:` in an extra_model_paths.yaml that names the clone's parent folder; every
other pack, there and in the host, stays off (`--disable-all-custom-nodes`, with the clone's folder name whitelisted).
"""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from .comfy_client import ComfyClient, ComfyError
from .environment import PATIENT_THREADS, ROOT, SetupError

FOLDERS = ("models", "input", "output", "custom_nodes", "temp", "user")
DEMO_BASE, COMFY_BASE = ROOT / ".host" / "base-demo", ROOT / ".host" / "base-comfy"
"""Base directories of the ComfyUI that this project brings: for the demo; for `comfy` and `train`."""
COLOR = re.compile(r"\x1b\[[0-9;]*m")
LEVEL = re.compile(r"^\[(?:DEBUG|DETAIL|INFO|WARNING|ERROR|CRITICAL)\] ", re.M)
PORTS, TRIES = range(10_000, 16_000), 100
"""Ports below those of outgoing connections on every system, and the number of them that are tried."""
START_SECONDS = 180.0
STOP_SECONDS = 15.0


def free_port() -> int:
    """TCP port that is currently free on loopback.

    It is not one of those that a system gives to outgoing connections, which could take it before a server is up.
    """
    for port in random.SystemRandom().sample(PORTS, TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SetupError(f"No port from {PORTS.start} to {PORTS.stop - 1} is free. Choose one: --port NUMBER")


def require_free_port(port: int) -> None:
    """Raise SetupError if something listens on loopback `port`."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SetupError(
                f"Port {port} is in use, perhaps by another ComfyUI. Stop that one or choose another: --port {port + 1}"
            )


def prepare_base(base: Path, pack: Path = ROOT, models: Path | None = None) -> Path:
    """Make the base directory's folders and its extra_model_paths.yaml; returns the path of that file.

    models: a `models` folder of the user's, whose sub-folders are searched as well.
    """
    for name in FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    paths = {"controlnext_pack": {"custom_nodes": str(pack.parent)}}
    if models is not None and models.is_dir():
        paths["own_models"] = {item.name: str(item) for item in sorted(models.iterdir()) if item.is_dir()}
    config = base / "extra_model_paths.yaml"
    config.write_text(json.dumps(paths, ensure_ascii=False, indent=1), encoding="utf-8")  # JSON is YAML
    return config


def plain(text: str) -> str:
    """Text of a log without colours and without the levels (`[INFO]`) that newer hosts put before each message."""
    return LEVEL.sub("", COLOR.sub("", text))


class ComfyServer(ComfyClient):
    """ComfyUI server that this process started, usable as its client; a context manager that stops it."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, base: Path, log: Path | None) -> None:
        super().__init__(f"127.0.0.1:{port}")
        self.process = process
        self.base = base
        self.log = log

    @classmethod
    def start(
        cls,
        host: Path,
        base: Path,
        *,
        pack: Path = ROOT,
        port: int | None = None,
        models: Path | None = None,
        arguments: Sequence[str] = (),
        log: Path | None = None,
        wait: bool = True,
    ) -> "ComfyServer":
        """Start main.py of `host` with `pack`, wait until it answers.

        port: None for a free one. arguments: further ones for main.py, such as "--cpu". log: file for the server's
        output; without it that goes to the output of this process. Raises ComfyError with the end of the log.
        """
        config = prepare_base(base, pack, models)
        port = free_port() if port is None else port
        command = [
            *(sys.executable, str(ROOT / "tools" / "launcher.py"), "--stop-with-input", str(host / "main.py")),
            *("--port", str(port), "--disable-auto-launch", "--base-directory", str(base)),
            *("--extra-model-paths-config", str(config), "--database-url", "sqlite:///user/comfyui.db"),
            *("--disable-all-custom-nodes", "--whitelist-custom-nodes", pack.name, *arguments),
        ]
        with contextlib.ExitStack() as stack:
            sink: IO[bytes] | None = stack.enter_context(open(log, "wb")) if log is not None else None
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT if sink is not None else None,
                cwd=base,
                env={
                    **PATIENT_THREADS,
                    **os.environ,
                    "PYTHONIOENCODING": "utf-8:backslashreplace",
                    "PYTHONUNBUFFERED": "1",
                },
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        server = cls(process, port, base, log)
        if wait:
            try:
                server.wait_until_ready()
                server.require_pack(pack)
            except BaseException:
                server.stop()
                raise
        return server

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until /system_stats answers. Raises ComfyError if the process ends first or time runs out."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ComfyError(f"ComfyUI ended while starting: {self.whereabouts()}")
            with contextlib.suppress(ComfyError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise ComfyError(f"ComfyUI did not answer within {seconds:g} s: {self.whereabouts()}")

    def require_pack(self, pack: Path) -> None:
        """Raise ComfyError with the host's traceback if its log says that the pack did not import."""
        lines = self.log_lines()
        if any("(IMPORT FAILED)" in line and line.endswith(str(pack)) for line in lines):
            end = next(i for i, line in enumerate(lines) if line.startswith(f"Cannot import {pack} "))
            begin = max((i for i in range(end) if lines[i].startswith("Traceback")), default=end)
            raise ComfyError("ComfyUI could not import the pack:\n    " + "\n    ".join(lines[begin : end + 1]))

    def stop(self) -> int | None:
        """Stop the server: request it, then kill it. Returns the process's exit status."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()  # the launcher takes this as the sign to stop
        for insist in (self.process.terminate, self.process.kill, lambda: None):
            try:
                return self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                insist()
        return self.process.poll()

    def log_lines(self) -> list[str]:
        """Lines that the server has printed so far, without level and colours; empty without a log file."""
        if self.log is None:
            return []
        return plain(self.log.read_text(encoding="utf-8", errors="replace")).splitlines()

    def whereabouts(self) -> str:
        """Exit status, if the server has ended, and the end of its log."""
        status = self.process.poll()
        state = "running" if status is None else f"ended with status {status}"
        tail = "\n    ".join(self.log_lines()[-25:])
        return f"{state}; log {self.log}\n    {tail}" if self.log else state

    def __enter__(self) -> "ComfyServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def fresh_base(base: Path, keep: Sequence[str] = ("models",)) -> Path:
    """Empty the base directory except for the folders in `keep`; returns it."""
    if base.exists():
        for item in base.iterdir():
            if item.name not in keep:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
    base.mkdir(parents=True, exist_ok=True)
    return base


def device_arguments(cpu: bool) -> list[str]:
    """Options of main.py for the device: the CPU if requested or if torch finds nothing better."""
    import torch

    mps = torch.backends.mps.is_available()
    xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    return [] if not cpu and (torch.cuda.is_available() or mps or xpu) else ["--cpu"]
