"""Whole-model parity on video transformers: clips of several lengths, reference frames, masks, image-to-video."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.specs import SPECS
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, VACE_CHANNELS, Inputs, inputs, narrow_model
from comfyui_controlnext.tests.host.test_transformer_parity import SIGMA, STRENGTH, TOLERANCE, forward, relative
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tests.references import reference_transformers as reference
from torch import Tensor

pytestmark = pytest.mark.comfy

MODELS = ("wan", "wan_wide", "wan_5b")
LENGTHS = (1, 5, 9)
"""Numbers of latent frames."""
SIZE = (6, 9)
"""Sizes in latent cells; the second is odd, so that the host pads its tokens."""
EVEN = (6, 8)
"""Even size: the host does not pad its reference frame."""
TEXT = 7


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@functools.cache
def weights(model: str, seed: int = 11) -> dict[str, Tensor]:
    return released.random_weights(reference.FAMILIES[model].build, seed=seed, out=NARROW[model].width)


@pytest.fixture(scope="module")
def control_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Control for a narrow model, from a file."""
    from comfyui_controlnext.controlnext_core import checkpoint
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_control
    from comfyui_controlnext.controlnext_core.detection import read_control_file

    @functools.cache
    def load(model: str, seed: int = 11) -> Any:
        spec = SPECS["wan_5b" if model == "wan_5b" else "wan"]
        path: Path = tmp_path_factory.mktemp("controls") / "x.safetensors"
        checkpoint.save(path, weights(model, seed), {"controlnext.spec": spec.name})
        return load_control(read_control_file(checkpoint.peek(path)), spec.family)

    return load


def video(frames: int, model: str, size: tuple[int, int] = SIZE, seed: int = 5) -> Tensor:
    """Hint of a clip (frames, 3, H, W)."""
    height, width = (NARROW[model].pixels * side for side in size)
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run(model: str, given: Inputs, control: Any = None) -> Tensor:
    chunks = [1, 0] if len(given.x) == 2 else [0]
    return forward(model, given, {"cond_or_uncond": chunks, "sigmas": given.sigma}, control)


def expected(model: str, given: Inputs, terms: list[reference.Term], in_front: int = 0) -> Tensor:
    length, size = given.x.shape[2], (given.x.shape[3], given.x.shape[4])
    with reference.controlled(narrow_model(model), model, TEXT, size, terms, length=length, in_front=in_front):
        return run(model, given)


def compare(
    model: str, control: Any, given: Inputs, hint: Tensor, in_front: int = 0, mask: Tensor | None = None
) -> None:
    """Assert parity of a forward of both halves of the guidance. mask: (1, latent frames, h, w)."""
    grid = reference.grid_of((given.x.shape[3], given.x.shape[4]))
    bare = run(model, given)
    found = run(model, given, control.set_cond_hint(hint, STRENGTH, (0.0, 1.0)))
    frames = list(range(given.x.shape[2]))
    encoded = reference.encode_clip(model, weights(model), hint, SIGMA, grid, frames)
    rows = len(given.x)
    term = reference.Term(encoded.repeat(rows, 1, 1), torch.full((rows,), STRENGTH), mask)
    wanted = expected(model, given, [term], in_front)
    effect = (wanted - bare).double()
    assert float(effect.norm() / wanted.double().norm()) > 0.01, "the control does too little to be measured"
    assert relative(found, wanted) < TOLERANCE
    assert float((found - bare - effect).norm() / effect.norm()) < 10 * TOLERANCE
    assert torch.equal(run(model, given), bare), "something was left behind"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_a_clip_agrees_with_the_rule_over_all_its_frames(model: str, length: int, control_of: Any) -> None:
    given = inputs(model, SIZE, 2, TEXT, SIGMA, length=length)
    compare(model, control_of(model).copy(), given, video(4 * (length - 1) + 1, model))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_reference_frame_in_front_is_left_alone(length: int, control_of: Any) -> None:
    model = "wan_reference"
    given = inputs(model, EVEN, 2, TEXT, SIGMA, length=length)
    hint = video(4 * (length - 1) + 1, model, EVEN)
    given.more["reference_latent"] = torch.randn(2, 16, *EVEN, generator=torch.Generator().manual_seed(8))
    compare(model, control_of(model).copy(), given, hint, in_front=3 * 4)


@pytest.mark.parametrize("model", ["wan", "wan_reference"])
def test_frames_behind_the_clip_are_left_alone(model: str, control_of: Any) -> None:
    """Subjects of Phantom; on a model that could take a reference frame in front, and has none."""
    given = inputs(model, EVEN, 2, TEXT, SIGMA, length=5)
    given.more["time_dim_concat"] = torch.randn(2, 16, 2, *EVEN, generator=torch.Generator().manual_seed(8))
    compare(model, control_of(model).copy(), given, video(17, model, EVEN))


def test_image_to_video(control_of: Any) -> None:
    """The first frame stands in further channels of the latent, and its picture in the text's attention."""
    given = inputs("wan_i2v", SIZE, 2, TEXT, SIGMA, length=5)
    generator = torch.Generator().manual_seed(8)
    given.more["c_concat"] = torch.randn(2, 20, 5, *SIZE, generator=generator)
    given.more["clip_fea"] = torch.randn(2, 257, 1280, generator=generator)
    compare("wan_i2v", control_of("wan_i2v").copy(), given, video(17, "wan_i2v"))


def test_beside_vace(control_of: Any) -> None:
    """VACE's blocks add to the clip's tokens after the first block has run, and with it the control."""
    given = inputs("wan_vace", EVEN, 2, TEXT, SIGMA, length=5)
    generator = torch.Generator().manual_seed(8)
    given.more["vace_context"] = torch.randn(2, 1, VACE_CHANNELS, 5, *EVEN, generator=generator)
    given.more["vace_strength"] = [0.8]
    compare("wan_vace", control_of("wan_vace").copy(), given, video(17, "wan_vace", EVEN))


def test_one_hint_is_a_still_for_all_frames(control_of: Any) -> None:
    given, hint = inputs("wan", SIZE, 2, TEXT, SIGMA, length=5), video(1, "wan")
    compare("wan", control_of("wan").copy(), given, hint)
    still, moving = (
        run("wan", given, control_of("wan").copy().set_cond_hint(frames, 1.0, (0.0, 1.0)))
        for frames in (hint, hint.repeat(17, 1, 1, 1))
    )
    assert relative(still, moving) < TOLERANCE


@pytest.mark.parametrize("frames", [3, 7, 16])
def test_the_last_frame_is_held_and_the_log_says_so(
    frames: int, control_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    given = inputs("wan", SIZE, 2, TEXT, SIGMA, length=5)
    compare("wan", control_of("wan").copy(), given, video(frames, "wan"))
    said = f"x.safetensors: the hint has {frames} frames, the clip at least 17: its last frame is held."
    assert [record.getMessage() for record in caplog.records if "frames" in record.getMessage()] == [said]


def test_frames_that_are_not_used_are_counted(control_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    given = inputs("wan", SIZE, 1, TEXT, SIGMA, length=5)
    compare("wan", control_of("wan").copy(), given, video(20, "wan"))
    assert "x.safetensors: the hint has 20 frames: the last 3 are not used." in caplog.text


@pytest.mark.parametrize("frames", [1, 17])
def test_a_mask_for_all_frames_or_for_each(frames: int, control_of: Any) -> None:
    given = inputs("wan", EVEN, 2, TEXT, SIGMA, length=5)
    mask = torch.rand(frames, 48, 64, generator=torch.Generator().manual_seed(4))
    groups = [mask[:1], *mask[1:].split(4)] if frames > 1 else [mask] * 5
    wanted = torch.stack([group.mean(0) for group in groups])[None]
    control = control_of("wan").copy().with_options(masks=(mask,))
    compare("wan", control, given, video(17, "wan", EVEN), mask=wanted)


def test_several_controls_measure_the_same_tokens_in_any_order(control_of: Any) -> None:
    given, hint, grid = inputs("wan", SIZE, 2, TEXT, SIGMA, length=5), video(17, "wan"), reference.grid_of(SIZE)
    strengths = {11: 0.7, 12: 0.4}
    ours = [control_of("wan", seed).copy().set_cond_hint(hint, s, (0.0, 1.0)) for seed, s in strengths.items()]
    ours[0].set_previous_controlnet(ours[1])
    found = run("wan", given, ours[0])
    ours[0].set_previous_controlnet(None)
    ours[1].set_previous_controlnet(ours[0])
    assert torch.equal(run("wan", given, ours[1]), found)
    terms = [
        reference.Term(
            reference.encode_clip("wan", weights("wan", seed), hint, SIGMA, grid, list(range(5))).repeat(2, 1, 1),
            torch.full((2,), s),
        )
        for seed, s in strengths.items()
    ]
    assert relative(found, expected("wan", given, terms)) < TOLERANCE
