"""Fixtures of all tests: the pack under its one name, the real host in this process, a real server, small models.

`CONTROLNEXT_COMFYUI` names the ComfyUI (`python run.py test` sets it). Tests marked `comfy` need it; without it they
are skipped, files of nothing else are left out, and nothing of the host is on sys.path. With `CONTROLNEXT_ON_GPU=1` the
host samples on the GPU, for tests marked `gpu`; with `dry` those of them that ask for `device` go through on the CPU.
`python run.py gpu-day` sets it.
"""

import gc
import importlib
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[1]
HOST = os.environ.get("CONTROLNEXT_COMFYUI", "")
ON_GPU = os.environ.get("CONTROLNEXT_ON_GPU", "")
HOST_MODULES = ("comfy.sd", "comfy.samplers", "comfy.controlnet", "folder_paths", "nodes", "comfy_api.latest")

# `python -m pytest` puts the clone on sys.path, where its `nodes` and `models` would shadow the host's.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
runpy.run_path(str(ROOT / "_alias.py"))

from comfyui_controlnext.tools.host import VERSION as HOST_VERSION  # noqa: E402
from comfyui_controlnext.tools.launcher import declare_missing_torchvision_ops  # noqa: E402

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a background shell starts programs so; those that tests start and send Ctrl-C would inherit it and obey
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = [
    "comfyui_controlnext.tests.fixtures.sampling_fixtures",
    "comfyui_controlnext.tests.fixtures.lazy_layers",
    "comfyui_controlnext.tests.fixtures.transformer_stage",
]

_private_base = tempfile.TemporaryDirectory(prefix="controlnext-", ignore_cleanup_errors=True)


def _bring_in_the_host(host: Path) -> None:
    """Make the host importable here: on the CPU unless ON_GPU is set, with a private base directory."""
    if not (host / "main.py").is_file():
        raise pytest.UsageError(f"CONTROLNEXT_COMFYUI={host}: no main.py there; name the root of a ComfyUI")
    sys.path.insert(0, str(host))
    options = importlib.import_module("comfy.cli_args").args  # importing the host outside main.py parses no arguments
    options.cpu = ON_GPU != "1"
    options.base_directory = _private_base.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HOST_MODULES:
            importlib.import_module(name)


declare_missing_torchvision_ops()  # for diffusers, too, which tests without the host compare with
if HOST:
    _bring_in_the_host(Path(HOST))


@pytest.fixture(scope="session")
def pinned_host() -> bool:
    """True: the host has the version that `run.py` downloads, whose messages and titles the tests know.

    False: another.
    """
    return HOST_VERSION == importlib.import_module("comfyui_version").__version__


def pytest_collection_finish() -> None:
    """Keep imported modules: the garbage collection that the host requests at loads then skips
    their 400,000 objects.
    """
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked `long`")


def pytest_configure(config: pytest.Config) -> None:
    for module in ("comfy", "comfy_extras", "comfy_api", "comfy_execution", "torchsde", "transformers"):
        config.addinivalue_line("filterwarnings", rf"ignore:::{module}(\.|$)")  # not ours to mend


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out, without a host, the files whose every test needs it: they import it at their top."""
    if HOST or not collection_path.name.startswith("test_"):
        return None
    whole = re.search(r"^pytestmark = .*mark\.comfy\b", collection_path.read_text("utf-8"), re.MULTILINE)
    return True if whole else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "comfy": "" if HOST else "CONTROLNEXT_COMFYUI is not set; `python run.py test` sets it",
        "long": "" if config.getoption("--long") else "longer than the default budget; run with --long",
        "gpu": "" if torch.cuda.is_available() else "needs a CUDA device",
    }
    for item in items:
        dry = ON_GPU == "dry" and "device" in getattr(item, "fixturenames", ())
        for marker, reason in reasons.items():
            if reason and not (marker == "gpu" and dry) and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class TinyModels:
    """Small models as files. base: a base directory for the host; names: file names in its widgets, by role."""

    base: Path
    names: dict[str, str]

    @property
    def models(self) -> Path:
        return self.base / "models"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def host() -> Path:
    """Root of the real ComfyUI; only for tests marked `comfy`."""
    return Path(HOST)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Models of the demo, made once per session."""
    from comfyui_controlnext.tools.tiny_models import make_demo_models

    base = tmp_path_factory.mktemp("base")
    return TinyModels(base, make_demo_models(base))


@pytest.fixture(scope="session")
def server(host: Path, tiny: TinyModels) -> Iterator["ComfyServer"]:
    """Real server for the session, with the pack and the tiny models; also its client (`server.run(workflow)`)."""
    from comfyui_controlnext.tools.comfy_server import ComfyServer

    probe = tiny.base / "custom_nodes" / "controlnext_probe.py"
    probe.parent.mkdir(exist_ok=True)
    shutil.copyfile(ROOT / "tests" / "fixtures" / "server_probe.py", probe)
    arguments = ["--cpu", "--disable-api-nodes", "--whitelist-custom-nodes", ROOT.name, probe.name]
    with ComfyServer.start(host, tiny.base, arguments=arguments, log=tiny.base / "server.log") as running:
        yield running
