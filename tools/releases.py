"""Choice of the ComfyUI for `demo`, `comfy` and `train`: a release of the official repository where git reaches it.

Standard library only. A release is cloned by its tag into `.host/`, its commit is compared with the one that this
project was tested with, and it runs in a separate environment with its requirements. Without git or network the wheel
of host.py is used, as the tests always do.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from . import host
from .environment import PACK_MODULES, ROOT, Environment, SetupError, exclusive, missing, satisfied

SECONDS = 10.0
"""Longest wait in seconds for an answer of the repository, and for a stalled transfer."""
WHEEL = "wheel"


@dataclass(frozen=True)
class Release:
    """Release tag of a repository. commit: hash that the clone must have; "": any, for tags named by the user."""

    tag: str
    commit: str
    repository: str

    def folder(self, root: Path = ROOT) -> Path:
        return root / ".host" / f"ComfyUI-{self.tag}"


PINNED = Release("v0.33.0", "2f35f4a08176d993cded35dac3332be4f7287f41", "https://github.com/comfyanonymous/ComfyUI.git")
"""Newest release on which the whole suite passed."""


@dataclass(frozen=True)
class Choice:
    """Choice of the ComfyUI for a command. release: None means the wheel; why: the reason as text."""

    release: Release | None
    why: str

    @property
    def line(self) -> str:
        """Sentence for the console: version and reason."""
        name = f"ComfyUI {self.release.tag}" if self.release else f"ComfyUI {host.VERSION} from the wheel"
        return f"{name}: {self.why}."

    @property
    def flag(self) -> str:
        """Value of --comfyui-release that makes the same choice."""
        return self.release.tag if self.release else WHEEL


def choose(wanted: str | None, root: Path = ROOT, pinned: Release = PINNED) -> Choice:
    """Choose the release for a command. wanted: a tag, "wheel", or None: `pinned`, or the wheel where git fails.

    Raises SetupError for a malformed tag, and for a wanted tag that git cannot reach.
    """
    if wanted == WHEEL:
        return Choice(None, "as --comfyui-release says")
    if wanted is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", wanted):
        raise SetupError(f"--comfyui-release {wanted}: is not a tag. Write one such as {pinned.tag}, or {WHEEL}.")
    release = pinned if wanted in (None, pinned.tag) else Release(str(wanted), "", pinned.repository)
    if host.is_comfyui(release.folder(root)):
        return Choice(release, "cloned before")
    trouble = unreachable(release)
    if trouble is None:
        return Choice(release, f"git reaches {release.repository}")
    if wanted is None:
        return Choice(None, trouble)
    raise SetupError(f"--comfyui-release {wanted}: {trouble}. Try again, or use --comfyui-release {WHEEL}.")


def unreachable(release: Release, seconds: float = SECONDS) -> str | None:
    """Reason, as text, why git cannot reach the release; None where it can. Takes at most `seconds`."""
    place = urlsplit(release.repository).hostname or release.repository
    git = shutil.which("git")
    if git is None:
        return "git is not installed"
    with tempfile.TemporaryFile() as said:
        command = [git, "ls-remote", "--exit-code", "--tags", release.repository, f"refs/tags/{release.tag}"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=_environment(),
            start_new_session=os.name != "nt",
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"{place} did not answer within {seconds:g} s"
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if status == 0:
        return None
    if status == 2 and not lines:
        return f"{place} has no tag {release.tag}"
    return f"git cannot reach {place} ({lines[-1] if lines else f'status {status}'})"


def _environment() -> dict[str, str]:
    """Environment in which git does not ask for a password and writes English messages."""
    return {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "SSH_ASKPASS": "", "LC_ALL": "C"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill git and its child processes."""
    if os.name != "nt":
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def clone(release: Release, root: Path = ROOT) -> Path:
    """Folder of the release, cloned and checked where it is missing. Raises SetupError."""
    target = release.folder(root)
    with exclusive(root / ".cache" / "host.lock"):
        if not host.is_comfyui(target):
            print(f"Cloning {release.repository} at {release.tag} into {target} (about 100 MB).", flush=True)
            _clone(release, target)
    return target


def _clone(release: Release, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f"{target.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
    stalled = ["-c", "http.lowSpeedLimit=1000", "-c", f"http.lowSpeedTime={SECONDS:.0f}"]
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    way = ["--depth", "1", "--single-branch", "--branch", release.tag, "-c", "advice.detachedHead=false"]
    try:
        _git(*stalled, "clone", *quiet, *way, release.repository, str(scratch), doing=f"cloning {release.tag}")
        found = _git("-C", str(scratch), "rev-parse", "HEAD", doing="reading the commit").strip()
        if release.commit and found != release.commit:
            raise SetupError(
                f"{release.repository}: {release.tag} is commit {found}, expected {release.commit}. The tag was moved "
                f"or the repository is another one, so it is not used. Use --comfyui-release {WHEEL}."
            )
        if not host.is_comfyui(scratch):
            raise SetupError(f"{release.repository}: no ComfyUI at {release.tag}. Use --comfyui-release {WHEEL}.")
        if target.exists():  # an earlier clone that lost files
            shutil.rmtree(target)
        host.rename_folder(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _git(*arguments: str, doing: str) -> str:
    """Standard output of git; its progress is shown. Raises SetupError."""
    command = [shutil.which("git") or "git", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=_environment(), check=False)
    if done.returncode:
        raise SetupError(f"git failed while {doing} (status {done.returncode}). Run the same command again.")
    return done.stdout.decode(errors="replace")


def python_for(release: Release, own: bool, root: Path = ROOT) -> Path | None:
    """Python that runs the release, None for the running one; makes the environment where needed.

    own: True insists on the project's environment; False allows the running Python. Raises SetupError.
    """
    needed = release.folder(root) / "requirements.txt"
    environment = Environment(root, f".venv-{release.tag}", (needed, root / "requirements.txt"))
    if not own and not environment.is_running() and satisfied(needed) and not missing(PACK_MODULES):
        return None
    python = environment.ensure("host")
    return None if environment.is_running() else python
