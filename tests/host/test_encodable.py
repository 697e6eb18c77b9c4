"""Encodable text: no node emits text that cannot be encoded, which would end the host's thread for prompts."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint, encodable

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
LONE = "x\ud800y"


def test_a_text_is_changed_only_where_it_cannot_be_encoded() -> None:
    for text in ("", "plain", "naïve \u753b\u50cf \U0001f642", "x" * encodable.MAX_MESSAGE):
        assert encodable.encodable(text) == text
    assert encodable.encodable(LONE) == r"x\ud800y"
    cut = encodable.encodable("a" * 10_000 + "b" * 10_000)
    assert len(cut) < encodable.MAX_MESSAGE + 50 and cut.startswith("aaa") and cut.endswith("bbb")
    assert "12,000 letters left out" in cut


def test_texts_inside_results_are_found() -> None:
    value: Any = {LONE: [LONE, (LONE, 1, None)]}
    said = r"x\ud800y"
    assert encodable.encodable_parts(value) == {said: [said, (said, 1, None)]}
    tensor = torch.zeros(1)
    assert encodable.encodable_parts(tensor) is tensor


class OwnTextError(Exception):
    def __str__(self) -> str:
        return LONE


@pytest.mark.parametrize("cause", [ValueError(LONE), OwnTextError()])
@pytest.mark.parametrize("error", [ValueError(LONE), checkpoint.CheckpointError("a" * 90_000), OwnTextError(LONE)])
def test_an_error_and_its_causes_can_be_written(error: Exception, cause: Exception) -> None:
    try:
        raise error from cause
    except Exception as caught:
        said = encodable.make_encodable(caught)
    part: BaseException | None = said
    while part is not None:
        assert encodable.is_encodable(str(part)) and len(str(part)) < encodable.MAX_MESSAGE + 50
        part = None if part.__suppress_context__ and part.__cause__ is None else part.__cause__ or part.__context__
    assert isinstance(said, RuntimeError if isinstance(error, OwnTextError) else type(error))


def test_log_lines_can_be_written(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        encodable.logger("controlnext.test").info("seen %s", LONE)
    assert caplog.messages == [r"seen x\ud800y"]


def test_every_logger_of_the_pack_is_an_encodable_one() -> None:
    """Calls of `logging.getLogger` are in `encodable.py` only."""
    found = []
    for folder in ("controlnext_core", "controlnext_training", "models", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Attribute)]
            if any(n.attr in ("getLogger", "print_exc") for n in calls):
                found.append(path.name)
    assert found == ["encodable.py"]


def test_saved_metadata_is_escaped(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"title": LONE, "long": "a" * 20_000})
    assert checkpoint.peek(path).metadata == {"title": r"x\ud800y", "long": "a" * 20_000}


@pytest.mark.comfy
def test_every_node_speaks_through_the_one_class() -> None:
    from comfyui_controlnext.controlnext_core.comfy_adapter.control_node import METHODS, ControlNode
    from comfyui_controlnext.controlnext_training.nodes import NODE_CLASS_MAPPINGS as TRAINING
    from comfyui_controlnext.nodes import NODE_CLASS_MAPPINGS

    for node in (*NODE_CLASS_MAPPINGS.values(), *TRAINING.values()):
        assert issubclass(node, ControlNode)
        for name in METHODS:
            if name in node.__dict__:
                assert hasattr(node.__dict__[name].__func__, "__wrapped__"), f"{node.__name__}.{name}"


@pytest.mark.comfy
def test_results_and_errors_of_a_node_can_be_encoded() -> None:
    import inspect

    from comfyui_controlnext.controlnext_core.comfy_adapter.control_node import ControlNode
    from comfyui_controlnext.nodes._api import io, ui

    class Echo(ControlNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Echo", category="tests", inputs=[io.String.Input("text")])

        @classmethod
        def validate_inputs(cls, text: str) -> bool | str:
            return text

        @classmethod
        def execute(cls, text: str, fail: bool = False) -> io.NodeOutput:
            if fail:
                raise ValueError(text)
            return io.NodeOutput(text, 1, ui=ui.PreviewText(text))

    result = Echo.execute(LONE)
    assert result.args == (r"x\ud800y", 1) and result.ui == {"text": (r"x\ud800y",)}
    assert Echo.validate_inputs(LONE) == r"x\ud800y"
    assert inspect.getfullargspec(Echo.validate_inputs).args == ["cls", "text"]  # the host's way to read it
    with pytest.raises(ValueError, match=r"^x\\ud800y$"):
        Echo.execute(LONE, fail=True)


@pytest.mark.comfy
def test_no_surrogate_ends_the_thread_that_runs_prompts(server: ComfyServer, tiny: Any) -> None:
    from comfyui_controlnext.tools.comfy_client import PromptError

    folder = tiny.models / "controlnext"
    torch.save({LONE: torch.zeros(2)}, folder / "surrogate.ckpt")
    names = ["\ud800", "surrogate.ckpt"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"bad\xff.safetensors"))
        (folder / names[-1]).write_bytes(b"not a file of tensors")
    try:
        for name in names:
            with contextlib.suppress(PromptError):  # later hosts refuse names that are not in the list
                (text,) = server.run({"inspect": inspecting(name)}, timeout=60).outputs["inspect"]["text"]
                assert encodable.is_encodable(text) and "parameters" not in text
        (text,) = server.run({"inspect": inspecting(tiny.names["control"])}, timeout=60).outputs["inspect"]["text"]
        assert "parameters" in text
        listed = server.get("/object_info/ControlNeXtInspect")["ControlNeXtInspect"]["input"]["required"]
        assert "surrogate.ckpt" in str(listed) and "udcff" not in str(listed) and "\udcff" not in str(listed)
    finally:
        for path in (folder / name for name in names[1:]):
            path.unlink()


def inspecting(name: str) -> dict[str, Any]:
    return {"class_type": "ControlNeXtInspect", "inputs": {"control_name": name}}
