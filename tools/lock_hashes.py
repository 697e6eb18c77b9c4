"""Hashes of the development tools, for every system and Python that they are installed on.

    python tools/lock_hashes.py

Writes requirements-test.lock.txt: the packages that requirements-test.txt depends on beyond the host's requirements,
each at the version of the pinned lists, with the hashes of the files that pip would install. pip is run for each target
and downloads only metadata. torch and the host's other packages are not included: they come from different indexes for
each accelerator and system, whose files differ at one version. To be run where both lists are installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOOLS = Path(__file__).resolve().parent
LOCK = TOOLS / "requirements-test.lock.txt"
HOST_LISTS = ("requirements-host.txt", "requirements-host-nodeps.txt")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LINUX = tuple(f"manylinux_2_{minor}" for minor in (5, 12, 17, 24, 26, 27, 28)) + ("manylinux2014",)
TARGETS: dict[str, tuple[str, ...]] = {
    "linux": tuple(f"{tag}_{machine}" for tag in LINUX for machine in ("x86_64",)),
    "linux-arm": tuple(f"{tag}_{machine}" for tag in LINUX for machine in ("aarch64",)),
    "win32": ("win_amd64",),
    "darwin": ("macosx_14_0_arm64",),
}
"""System -> platform tags of the wheels that run there."""
ELSEWHERE = ("colorama", "exceptiongroup", "tomli")
"""Packages that the tools need only on Windows or Python 3.10."""


def pins(*lists: str) -> dict[str, list[Requirement]]:
    """Requirements of the lists by name; two where the version depends on the Python."""
    found: dict[str, list[Requirement]] = {}
    for listing in lists:
        for line in (TOOLS / listing).read_text("utf-8").splitlines():
            if line and not line.startswith("#"):
                requirement = Requirement(line)
                found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def closure(names: Iterable[str]) -> set[str]:
    """Names of these installed packages and of all their dependencies in this environment."""
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        for text in needed:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def locked_names() -> list[str]:
    """Names of the packages in the lock file, sorted."""
    found = closure(pins("requirements-test.txt")) - closure(pins(*HOST_LISTS))
    return sorted({*found, *ELSEWHERE})


def hashes_for(requirements: Iterable[Requirement], python: str, tags: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs (name==version, sha256) of the files that pip installs for that Python and those platforms."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]
        command += ["--only-binary", ":all:", "--python-version", python, "--target", scratch, "--report", str(report)]
        command += [word for tag in tags for word in ("--platform", tag)]
        subprocess.run([*command, *(f"{r.name}{r.specifier}" for r in requirements)], check=True)
        for item in json.loads(report.read_text("utf-8"))["install"]:
            about = item["metadata"]
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            yield f"{canonicalize_name(about['name'])}=={about['version']}", digest


def main() -> None:
    wanted = [r for name, found in pins("requirements-test.txt", "constraints.txt").items() for r in found]
    names = set(locked_names())
    wanted = [requirement for requirement in wanted if canonicalize_name(requirement.name) in names]
    hashes: dict[str, set[str]] = {}
    for system, tags in TARGETS.items():
        for python in PYTHONS:
            here = {"python_version": python, "sys_platform": system.partition("-")[0]}
            chosen = [r for r in wanted if r.marker is None or r.marker.evaluate(here)]
            for pin, digest in hashes_for(chosen, python, tags):
                hashes.setdefault(pin, set()).add(digest)
            print(f"{system}, Python {python}: {len(chosen)} packages", flush=True)
    LOCK.write_text("".join(lock_lines(wanted, hashes)), "utf-8")


def lock_lines(wanted: Iterable[Requirement], hashes: dict[str, set[str]]) -> Iterator[str]:
    """Lines of the lock file, one per requirement."""
    yield "# Made by tools/lock_hashes.py. Installed with --no-deps --require-hashes after the host's packages.\n"
    for requirement in sorted(wanted, key=str):
        pin = re.sub(r"\s", "", f"{canonicalize_name(requirement.name)}{requirement.specifier}")
        marker = f"; {requirement.marker}" if requirement.marker else ""
        yield f"{pin}{marker} {' '.join(f'--hash=sha256:{digest}' for digest in sorted(hashes[pin]))}\n"


if __name__ == "__main__":
    main()
