"""Host API as used by the code: every imported, accessed or called name exists, and accepts the call."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_controlnext.tests.fixtures.host_names import USING, host_classes, read, read_file

pytestmark = pytest.mark.comfy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
PACK = "comfyui_controlnext"


@pytest.mark.parametrize("path", USING)
def test_the_host_has_what_a_file_uses(path: str) -> None:
    reader = read_file(path)
    assert reader.problems == []
    assert reader.seen, "nothing of the host was recognised in a file that imports it"


def test_the_files_that_know_the_host_are_read() -> None:
    seen = {path: read_file(path).seen for path in USING}
    assert sum(seen.values()) > 250
    adapter = "controlnext_core/comfy_adapter"
    for path in ("sampling/host_control", "sampling/windows", "sampling/host_layers", "files/weights", "files/folders"):
        assert seen[f"{adapter}/{path}.py"] >= 3, path


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import comfy.gone", "comfy.gone"),
        ("from comfy.model_patcher import Gone", "has no Gone"),
        ("def f():\n    import comfy.ops\n    return comfy.ops.manual_cast.Gone", "has no Gone"),
        ("import folder_paths\nfolder_paths.gone()", "folder_paths has no gone"),
        ("import folder_paths\nfolder_paths.get_full_path('checkpoints')", "missing a required argument: 'filename'"),
        ("import comfy.sd\ncomfy.sd.load_diffusion_model_state_dict({}, gone=1)", "unexpected keyword argument 'gone'"),
        ("import comfy.sd\ncomfy.sd.load_diffusion_model_state_dict(*x, gone=1)", "unexpected keyword argument 'gone'"),
        ("from comfy.model_patcher import ModelPatcher\ndef f(m: ModelPatcher | None): m.gone", "has no gone"),
        ("from comfy.model_patcher import ModelPatcher\ndef f(m: ModelPatcher): m.clone().add_patches()", "'patches'"),
        ("from comfy.model_patcher import ModelPatcher\nm = ModelPatcher(1, 2, 3)\nm.clone().gone", "has no gone"),
        ("from comfy_api.latest import io\nio.Float.Input('a', gone=1)", "'gone'"),
        ("import folder_paths\nif hasattr(folder_paths, 'new'):\n    folder_paths.new()", ""),
        ("try:\n    from comfy.ops import new\nexcept ImportError:\n    new = None", ""),
        ("from comfy.model_patcher import ModelPatcher\ndef f(m: ModelPatcher):\n    m.new = 1\n    return m.new", ""),
        ("import comfy.ops\nclass A:\n    def f(self): self.gone\nA().gone", ""),
        ("from comfy.model_patcher import ModelPatcher\ndef f(m: ModelPatcher): return m.model.clone(), m.patches", ""),
    ],
)
def test_a_name_or_call_that_the_host_lacks_is_found(source: str, found: str) -> None:
    problems = read(source, {}).problems
    assert len(problems) == bool(found)
    assert found in "".join(problems)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("import comfy.ops\nf = getattr(comfy.ops, 'new', None)", {"new"}),
        ("from comfy.cli_args import args\nhasattr(args, 'new')", {"new"}),
        ("try:\n    from comfy.ops import new\nexcept ImportError:\n    new = None", {"new"}),
        ("import comfy.ops, os\ngetattr(os, 'new', None)\ngetattr(comfy.ops, 'new')", set()),
    ],
)
def test_names_that_are_asked_for_are_found(source: str, asked: set[str]) -> None:
    assert read(source, {}).asked == asked


def test_what_may_be_missing_is_listed_in_the_docs() -> None:
    asked = {name for path in USING for name in read_file(path).asked}
    assert {"CoreModelPatcher", "is_oom", "disable_pinned_memory"} <= asked
    text = PAGE.read_text("utf-8")
    assert [name for name in sorted(asked) if f"`{name}`" not in text] == []


def overridden() -> Iterator[tuple[type, str, Callable[..., Any], Callable[..., Any]]]:
    """Pairs of overriding methods (class of the pack, method, the pack's, the host's) for classes
    of ComfyUI's engine.
    """
    import comfy.controlnet

    for cls in host_classes(USING):
        if "get_control" in vars(cls):  # which the base class of the host's controls does not have
            yield cls, "get_control", vars(cls)["get_control"], comfy.controlnet.ControlNet.get_control
        for name, ours in vars(cls).items():
            ours = getattr(ours, "__func__", ours)
            engine = [base for base in cls.__mro__ if base.__module__.startswith("comfy.")]
            theirs = next((vars(base)[name] for base in engine if name in vars(base)), None)
            theirs = getattr(theirs, "__func__", theirs)
            if inspect.isfunction(ours) and inspect.isfunction(theirs) and not name.startswith("__"):
                yield cls, name, ours, theirs


def ways_to_call(function: Callable[..., Any]) -> Iterator[tuple[list[object], dict[str, object]]]:
    """Ways to call a function: all arguments by position; those without a default by position and the rest by name."""
    kinds = inspect.Parameter
    taken = inspect.signature(function).parameters.values()
    places = [p for p in taken if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    named = {p.name: object() for p in taken if p.kind == kinds.KEYWORD_ONLY}
    yield [object() for _ in places], named
    yield (
        [object() for p in places if p.default is p.empty],
        named | {p.name: object() for p in places if p.default is not p.empty},
    )


def problems_of(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Iterator[str]:
    """Reasons why a method of the pack does not accept the arguments of the host's; empty where it does."""
    for places, named in ways_to_call(theirs):
        try:
            inspect.signature(ours).bind(*places, **named)
        except TypeError as error:
            yield f"{ours.__qualname__}: {error}"


def test_methods_of_ours_take_what_the_host_passes() -> None:
    pairs = list(overridden())
    names = {f"{cls.__name__}.{name}" for cls, name, _, _ in pairs}
    assert {"HostControl.get_control", "HostControl.pre_run", "HostControl.get_models"} <= names, names
    assert [problem for _, _, ours, theirs in pairs for problem in problems_of(ours, theirs)] == []


def test_a_method_that_takes_less_is_found() -> None:
    def host(self: Any, model: Any, device: Any = None) -> None: ...
    def narrow(self: Any, model: Any) -> None: ...
    def renamed(self: Any, model: Any, where: Any = None) -> None: ...
    def wide(self: Any, model: Any, *args: Any, **kwargs: Any) -> None: ...

    assert [len(list(problems_of(ours, host))) for ours in (narrow, renamed, wide, host)] == [2, 1, 0, 0]


def wrapped() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Wrappers as (kind, the pack's wrapper, the function of the host that it wraps)."""
    import comfy.model_base
    import comfy.sampler_helpers
    import comfy.samplers
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    adapter = f"{PACK}.controlnext_core.comfy_adapter.sampling"
    door = importlib.import_module(f"{adapter}.attach")._Door
    yield "OUTER_SAMPLE", door.sample, comfy.samplers.CFGGuider.outer_sample
    yield "PREPARE_SAMPLING", door.prepare_sampling, comfy.sampler_helpers._prepare_sampling
    yield "APPLY_MODEL", door.apply_model, comfy.model_base.BaseModel._apply_model
    halves = importlib.import_module(f"{adapter}.halves")
    yield "CALC_COND_BATCH", halves.note_places, comfy.samplers._calc_cond_batch
    forward = importlib.import_module(f"{adapter}.xs_forward")
    yield "DIFFUSION_MODEL", forward.XSForward.__call__, UNetModel._forward


def test_wrappers_name_the_arguments_as_the_host_does() -> None:
    """The host hands over by place: what we name must stand where the wrapped function has that name."""
    for kind, ours, theirs in wrapped():
        here = list(inspect.signature(ours).parameters)
        named = [name for name in here[here.index("executor") + 1 :] if name not in ("args", "kwargs")]
        there = [name for name in inspect.signature(theirs).parameters if name != "self"]
        assert named == there[: len(named)], kind
        if "args" not in here:
            assert len(named) == len([name for name in there if name != "kwargs"]), kind
