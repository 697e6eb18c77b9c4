"""Facts of the pack in the registry and the repository: fields, lists of packages, icon, workflows, OpenCV."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from comfyui_controlnext.controlnext_core import opencv
from comfyui_controlnext.tools import environment, make_icon, releases
from PIL import Image

tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
ACTIONLINT = shutil.which("actionlint", path=str(Path(sys.executable).parent)) or shutil.which("actionlint")


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def asked(name: str) -> set[str]:
    """Lines of a requirements file, without comments."""
    lines = (line.partition("#")[0].strip() for line in text(name).splitlines())
    return {line for line in lines if line}


def test_the_registry_has_every_field() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    for word in ("video", "ControlNet-XS", "training", "transformers", "SDXL", "LoRA"):
        assert word in project["description"]
    systems = {name.rpartition(" :: ")[2] for name in project["classifiers"] if name.startswith("Operating System")}
    assert systems == {"Windows", "Linux", "MacOS"}
    assert "Environment :: GPU :: NVIDIA CUDA" in project["classifiers"]
    assert {"Repository", "Documentation", "Bug Tracker"} <= project["urls"].keys()
    assert comfy["PublisherId"] and comfy["DisplayName"] == "ComfyUI-ControlNeXt"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert comfy["requires-comfyui"].removeprefix(">=") in text("README.md")


def test_icon_and_banner_are_what_the_script_draws() -> None:
    comfy = PROJECT["tool"]["comfy"]
    for sheet, field in zip(make_icon.SHEETS, ("Icon", "Banner"), strict=True):
        assert comfy[field].endswith(f"/main/docs/{sheet.name}")
        path = ROOT / "docs" / sheet.name
        with Image.open(path) as image:
            shown = np.asarray(image.convert("RGB"), np.float32)
        drawn = make_icon.drawn(sheet).astype(np.float32)
        assert shown.shape == drawn.shape and path.stat().st_size < 50_000
        # 128 colours in place of all, and an OpenCV that smooths lines a little differently
        assert np.abs(shown - drawn).mean() < 3
        assert np.abs(shown - drawn[:, ::-1]).mean() > 20
    icon, banner = make_icon.SHEETS
    assert icon.width == icon.height <= 400 and banner.width * 9 == banner.height * 21


def test_lists_of_packages_agree() -> None:
    """Lists of packages in two forms: files for pip -r, and the lists of pyproject.toml for tools that read those."""
    lists = {name: set(items) for name, items in PROJECT["project"]["optional-dependencies"].items()}
    assert set(PROJECT["project"]["dependencies"]) == asked("requirements.txt") == {"einops"}
    train = {re.sub("'", '"', item) for item in lists["train"]} - {opencv.PACKAGE}
    assert train == asked("controlnext_training/requirements.txt")
    pinned = asked("tools/requirements-test.txt")
    for item in lists["test"] - {opencv.PACKAGE}:
        assert item in pinned or any(pin.startswith(f"{item}==") for pin in pinned), item
    assert {re.split("==|;", pin)[0] for pin in pinned} == {re.split("==|;", i)[0] for i in lists["test"]} - {
        opencv.PACKAGE
    }


def test_opencv_is_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = opencv.require_opencv()
    assert cv2.Canny
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=rf'"{re.escape(sys.executable)}" -m pip install opencv-python-headless'):
        opencv.require_opencv()
    assert environment.PACKAGES["cv2"] == opencv.PACKAGE
    assert opencv.PACKAGE in text("docs/install.md") and '"OpenCV is not installed"' in text("docs/troubles.md")


def test_a_hint_says_that_opencv_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from comfyui_controlnext.controlnext_core.hints import HINTS

    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="OpenCV is not installed"):
        HINTS["canny"](np.zeros((8, 8, 3), np.float32))


def test_opencv_is_reached_through_one_function_alone() -> None:
    for folder in ("controlnext_core", "controlnext_training", "nodes", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            found = re.search(r"^\s*(import cv2|from cv2)", path.read_text("utf-8"), re.M)
            assert not found, f"{path.relative_to(ROOT)}: call opencv.require_opencv"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_the_commands_of_the_readme(path: Path) -> None:
    """Commands of the pack in workflow files can be run locally."""
    workflow = yaml.safe_load(path.read_text("utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for command in re.findall(r"run\.py ([a-z-]+)", " ".join(str(step.get("run", "")) for step in steps)):
        assert f"run.py {command}" in text("docs/run.md"), command
    for step in steps:
        assert re.search(r"@v\d|@[0-9a-f]{40}$", step.get("uses", "@v1")), f"{step['uses']} names no version"
    assert workflow["permissions"] == {"contents": "read"}


def test_the_matrix_has_every_system_python_and_comfyui() -> None:
    matrix = yaml.safe_load(text(".github/workflows/test.yml"))["jobs"]["test"]["strategy"]["matrix"]
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "windows", "macos"}
    assert set(matrix["python"]) == {"3.10", "3.11", "3.12", "3.13"}
    assert set(matrix["comfyui"]) == {"pinned", "latest", "master"}


def test_publishing_waits_for_tests_a_tag_and_a_person() -> None:
    workflow = yaml.safe_load(text(".github/workflows/publish.yml"))
    triggers, jobs = workflow[True], workflow["jobs"]  # YAML reads the key `on` as true
    assert triggers["push"] == {"tags": ["v*"]} and "workflow_dispatch" in triggers
    assert jobs["publish"]["needs"] == ["check"] and "startsWith(github.ref, 'refs/tags/v')" in jobs["publish"]["if"]
    assert jobs["publish"]["environment"] == "registry"
    runs = " ".join(str(step.get("run", "")) for step in jobs["check"]["steps"])
    assert "run.py archive" in runs and "run.py test" in runs
    assert "secrets." not in str(jobs["check"])


def test_issue_forms_ask_for_what_inspect_says() -> None:
    assert {path.name for path in FORMS} == {"config.yml", "fault.yml", "wish.yml"}
    fault = yaml.safe_load(text(".github/ISSUE_TEMPLATE/fault.yml"))
    fields = {part["id"]: part for part in fault["body"] if "id" in part}
    assert fields["inspect"]["validations"]["required"] and "Inspect ControlNeXt file" in str(fields["inspect"])
    assert {"what", "versions", "graph", "log"} <= fields.keys()


@pytest.mark.skipif(ACTIONLINT is None, reason="actionlint is not installed; CONTRIBUTING.md says how")
def test_workflows_pass_actionlint() -> None:
    done = subprocess.run(
        [str(ACTIONLINT), "-color=false", *map(str, WORKFLOWS)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_image_has_the_release_that_was_tested_and_does_not_train() -> None:
    image = text("Dockerfile")
    assert f"ARG COMFYUI={releases.PINNED.tag}\n" in image and f"ARG COMFYUI_COMMIT={releases.PINNED.commit}\n" in image
    assert f"{releases.PINNED.repository} /comfyui" in image
    assert "CONTROLNEXT_NO_TRAINING=1" in image and opencv.PACKAGE in image
    assert re.findall(r"^FROM \S+ AS (\w+)$", image, re.M) == ["cpu", "cuda"] and "\nFROM ${BASE}\n" in image
    share = yaml.safe_load(image.partition("<<'END' /comfyui/share.yaml\n")[2].partition("\nEND\n")[0])["share"]
    assert share["base_path"] == "/models" and {"checkpoints", "controlnet", "controlnext", "loras"} <= share.keys()


@pytest.mark.comfy
@pytest.mark.skipif(sys.platform == "win32", reason="the image is Linux")
def test_the_command_of_the_image_is_understood_by_the_host(host: Path, tmp_path: Path) -> None:
    """The image's command line, with folders of this test in place of the image's, starts the host."""
    shell, flag, line = json.loads(re.findall(r"^CMD (.+)$", text("Dockerfile"), re.M)[0])
    assert (shell, flag) == ("sh", "-c")
    words = line.replace("${COMFYUI_DEVICE}", "--cpu").split()
    assert words[:3] == ["exec", "/venv/bin/python", "main.py"]
    for name in ("input", "output", "state"):
        (tmp_path / name / "user").mkdir(parents=True)
        words = [re.sub(rf"^(sqlite:///)?/{name}\b", rf"\g<1>{tmp_path}/{name}", word) for word in words]
    (tmp_path / "share.yaml").write_text(f"share:\n  base_path: {tmp_path}\n  loras: loras\n", encoding="utf-8")
    words = [{"share.yaml": str(tmp_path / "share.yaml")}.get(word, word) for word in words]
    command = [sys.executable, str(ROOT / "tools" / "launcher.py"), str(host / "main.py"), *words[3:]]
    extra = ["--quick-test-for-ci", "--disable-all-custom-nodes", "--disable-api-nodes"]
    done = subprocess.run(
        [*command, *extra], capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "state" / "comfyui.db").exists()
