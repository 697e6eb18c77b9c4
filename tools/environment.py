"""Choice of the Python for a command: the running one if it has all packages, else `.venv` beside the clone.

Standard library only. The environment has a stamp, the hashes of the pinned lists that were installed; the stamp is
removed before an installation and written after it, so a `.venv` without one is unfinished and is made again.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
LEVELS = ("host", "test")  # each contains the ones before it
LOCK = "requirements-test.lock.txt"
"""Packages that requirements-test.txt depends on, with hashes; made by `lock_hashes.py`."""

# Import names, looked up without importing. `opencv` and `einops` are the two that the pack itself asks for.
HOST_MODULES = (
    *("torch", "torchvision", "torchsde", "numpy", "scipy", "transformers", "tokenizers", "sentencepiece"),
    *("safetensors", "aiohttp", "requests", "yarl", "yaml", "PIL", "tqdm", "psutil", "alembic", "sqlalchemy", "av"),
    *("kornia", "spandrel", "pydantic", "pydantic_settings", "comfyui_frontend_package"),
)
PACKAGES = {"cv2": "opencv-python-headless", "einops": "einops"}  # the first only where no other OpenCV is
PACK_MODULES = tuple(PACKAGES)
TEST_MODULES = ("pytest", "ruff", "mypy", "hypothesis", "diffusers", "playwright")

# For processes that compute on the CPU: waiting threads sleep. Spinning ones cost a factor of 4 on a busy machine.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}

DISK_FULL = ("No space left on device", "[Errno 28]", "[WinError 112]", "not enough space on the disk")
OFFLINE = (
    *("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError", "Read timed out"),
    *("Failed to establish a new connection", "Temporary failure in name resolution", "getaddrinfo failed"),
    *("Network is unreachable", "Connection refused", "Connection reset", "Could not fetch URL", "SSLError"),
    *("Connection timed out", "nodename nor servname"),
)


class SetupError(RuntimeError):
    """Error that a user has to fix before the command can continue; the message says what to do."""


def missing(modules: Sequence[str]) -> list[str]:
    """Import names of `modules` that this interpreter cannot find. Imports none of them."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def pinned(name: str, listing: Path | None = None) -> str:
    """Version that `listing` (default: requirements-test.txt) pins for the distribution `name`.

    Raises KeyError without one.
    """
    listing = listing or TOOLS / "requirements-test.txt"
    match = re.search(rf"^{re.escape(name)}==([^;\s]+)", listing.read_text(encoding="utf-8"), re.M)
    if match is None:
        raise KeyError(f"{listing}: no pin for {name}")
    return match.group(1)


def satisfied(listing: Path) -> bool:
    """True: the running interpreter has every distribution of a requirements file, at the version of a `==` pin.

    False: not.
    """
    for name, version in re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:==([^\s;]+))?", listing.read_text("utf-8"), re.M):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            return False
        if version and found != version:
            return False
    return True


def serves(level: str) -> bool:
    """True: the running interpreter has all that `level` needs, with the pinned linter. False: something is missing."""
    if missing((*HOST_MODULES, *PACK_MODULES)):
        return False
    if level == "test":
        return not missing(TEST_MODULES) and metadata.version("ruff") == pinned("ruff")
    return True


def pack_requirements_message() -> str | None:
    """Command to type for a ComfyUI interpreter that lacks only the pack's requirements; else None."""
    lacking = missing(PACK_MODULES)
    if missing(HOST_MODULES) or not lacking:
        return None
    return (
        f"{sys.executable} runs ComfyUI but lacks {' and '.join(lacking)}. Nothing is installed there unasked. Type\n"
        f'    "{sys.executable}" -m pip install {" ".join(PACKAGES[name] for name in lacking)}\n'
        "and run the same command again, or add --venv for an environment of the project's own."
    )


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Context that holds the lock file `path`; waits while another process holds it.

    The system frees it if that process dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as handle:
        _lock(handle.fileno(), path)
        yield


def _lock(descriptor: int, path: Path) -> None:
    if sys.platform == "win32":
        import msvcrt
        import time

        while True:
            with contextlib.suppress(OSError):
                os.lseek(descriptor, 0, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                return
            time.sleep(0.5)
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Waiting for another run.py that is setting up ({path}).", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def explain_pip_failure(log: str, folder: Path) -> str:
    """Sentence about the cause of pip's failure, from its log. folder: where it was writing to."""
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / 1e9
    if any(text in log for text in DISK_FULL):
        return f"the disk is full ({free:.1f} GB free at {folder}). Free about 4 GB, then run the same command again."
    if any(text in log for text in OFFLINE):
        return (
            "the package index could not be reached. Check the connection (and pip's proxy or index settings), "
            "then run the same command again; finished downloads are kept in pip's cache."
        )
    absent = re.search(r"No matching distribution found for (\S+)", log)
    if absent:
        version = platform.python_version()
        return (
            f"there is no build of {absent.group(1)} for Python {version} on {platform.system()} "
            f"{platform.machine()}. Run run.py with another Python (3.10 to 3.14; 3.11 is the tested one)."
        )
    return "pip stopped with:\n    " + "\n    ".join(log.strip().splitlines()[-8:])


def run_pip(python: Path, arguments: Sequence[str], log: Path) -> None:
    """Run pip of `python`; raises SetupError with the cause when it fails. log: file for its full output.

    A terminal shows pip's own bars; elsewhere a line with the size is printed for each downloaded file.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    command = [str(python), "-m", "pip", *arguments, "--log", str(log), "--no-input", "--disable-pip-version-check"]
    if sys.stdout.isatty():
        status = subprocess.run(command, check=False).returncode
    else:
        with subprocess.Popen([*command, "--progress-bar", "off"], stdout=subprocess.PIPE) as process:
            for line in process.stdout or ():
                if line.lstrip().startswith(b"Downloading "):
                    print(f"  {line.decode(errors='replace').strip()}", flush=True)
        status = process.returncode
    if status:
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        why = explain_pip_failure(text, log.parent) if text else "pip is not available in this Python."
        raise SetupError(f"pip {arguments[0]} failed: {why}\n(full output: {log})")


@dataclass(frozen=True)
class Environment:
    """Environment of the clone at `root`. lists: requirement files; (): the pinned lists of tools/."""

    root: Path
    name: str = ".venv"
    lists: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def stamp(self) -> Path:
        return self.folder / "controlnext-stamp.json"

    def is_running(self) -> bool:
        """True: this process runs in the environment. False: in another one."""
        return Path(sys.prefix).resolve() == self.folder.resolve()

    def list_hashes(self, level: str) -> dict[str, str]:
        """Hashes of the lists for `level` and the ones below it, by level."""
        if self.lists:
            return {level: hashlib.sha256(b"".join(listing.read_bytes() for listing in self.lists)).hexdigest()}
        lists = {
            "host": ("requirements-host.txt", "requirements-host-nodeps.txt"),
            "test": ("requirements-test.txt", LOCK),
        }
        tools = self.root / "tools"
        shared = (tools / "constraints.txt").read_bytes()
        return {
            name: hashlib.sha256(shared + b"".join((tools / item).read_bytes() for item in lists[name])).hexdigest()
            for name in LEVELS[: LEVELS.index(level) + 1]
        }

    def installed(self) -> dict[str, str]:
        """Content of the stamp; empty where it is missing or cannot be read."""
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def works(self) -> bool:
        """True: the environment's Python starts.

        False: it does not, as after the removal of the Python it was made from.
        """
        try:
            return subprocess.run([self.python, "-c", "import pip"], capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def ready(self, level: str) -> bool:
        """True: the environment is complete for `level`. False: packages are missing."""
        installed = self.installed()
        return all(installed.get(name) == digest for name, digest in self.list_hashes(level).items()) and self.works()

    def ensure(self, level: str) -> Path:
        """Make or complete the environment for `level`; returns its Python. Raises SetupError."""
        if self.ready(level):
            return self.python
        with exclusive(self.root / ".cache" / "setup.lock"):
            if not self.ready(level):  # another run.py may have done it during the wait
                self._install(level)
        return self.python

    def _install(self, level: str) -> None:
        if not self.installed() or not self.works():
            self._create()
        print(f"Installing packages into {self.folder} (once; the first time 0.5 to 3 GB).", flush=True)
        done = {name: digest for name, digest in self.installed().items() if name in LEVELS}
        self.stamp.unlink(missing_ok=True)
        tools, log = self.root / "tools", self.root / ".cache" / "pip.log"
        wanted = self.list_hashes(level)
        if self.lists:
            run_pip(self.python, ["install", *(word for listing in self.lists for word in ("-r", str(listing)))], log)
            return self._write_stamp(wanted)
        pins = ["-c", str(tools / "constraints.txt"), "-r", str(tools / "requirements-host.txt")]
        if done.get("host") != wanted["host"]:
            run_pip(self.python, ["install", *pins], log)
            nodeps = str(tools / "requirements-host-nodeps.txt")
            run_pip(self.python, ["install", "--no-deps", "-r", nodeps], log)
        if level == "test":
            run_pip(self.python, ["install", "--no-deps", "--require-hashes", "-r", str(tools / LOCK)], log)
        self._write_stamp({**done, **wanted})

    def _write_stamp(self, content: dict[str, str]) -> None:
        scratch = self.stamp.with_suffix(".tmp")
        scratch.write_text(json.dumps(content), encoding="utf-8")
        os.replace(scratch, self.stamp)

    def _create(self) -> None:
        if self.folder.exists():
            print(f"{self.folder} is unfinished or does not start: making it again.", flush=True)
            try:
                shutil.rmtree(self.folder)
            except OSError as error:
                raise SetupError(
                    f"{self.folder} cannot be removed ({error}). Close what uses it, delete the folder, try again."
                ) from error
        base = getattr(sys, "_base_executable", None) or sys.executable
        done = subprocess.run([base, "-m", "venv", str(self.folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            text = done.stdout + done.stderr
            if any(full in text for full in DISK_FULL):
                raise SetupError(f"{self.folder}: {explain_pip_failure(text, self.root)}")
            raise SetupError(
                f"{base} cannot make a virtual environment at {self.folder}:\n{text.strip()}\n"
                "On Debian and Ubuntu: sudo apt install python3-venv. Elsewhere use the Python of python.org."
            )


def choose(level: str, own: bool) -> Path | None:
    """Python that must run the command; None: the running one.

    level: "host" or "test"; own: True insists on `.venv`, False allows other interpreters. Installs into `.venv` where
    needed. Raises SetupError.
    """
    environment = Environment(ROOT)
    if not own and not environment.is_running():
        if serves(level):
            return None
        message = pack_requirements_message()
        if message:
            raise SetupError(message)
        if level == "test" and serves("host"):
            print("This Python lacks the test tools; using the project's own .venv.", flush=True)
    python = environment.ensure(level)
    return None if environment.is_running() else python
