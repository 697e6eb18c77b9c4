"""Tests that need a GPU, on the device that the host samples on; `run.py gpu-day` runs them.

In its dry run they go through on the CPU with what of them does not need CUDA itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks.candidates import streams
from comfyui_controlnext.controlnext_core.injection import Term, fuse, prepare
from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
from comfyui_controlnext.models.controlnext import ControlNeXt
from comfyui_controlnext.tests.fixtures.sampling_fixtures import Studio, demo_pair, picture, relative
from comfyui_controlnext.tests.host.test_interruptions import lay
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]
MIB = 1024 * 1024
FP32_ON_GPU = 1e-4
"""Relative error of fp32 arithmetic without TF32, against fp64."""
STEPS = 3


@pytest.fixture
def device() -> torch.device:
    """Device of the host's sampling."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """Device of the host's sampling, which must be a CUDA device."""
    if device.type != "cuda":
        pytest.skip("needs CUDA itself")
    return device


def sampler_of(studio: Studio, control: Any, model: Any = None, **settings: Any) -> Callable[[], Tensor]:
    """Function that runs a queue run with that control through the stock node."""
    conds = studio.stock(control, picture())
    return lambda: studio.sample(model or studio.model, *conds, **{"steps": STEPS, **settings})


@pytest.fixture(params=["controlnext", "xs"])
def control(request: pytest.FixtureRequest, studio: Studio, tmp_path: Path) -> Iterator[Any]:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    path = tiny_models.make_controlnet_xs(tmp_path / "xs.safetensors", own_time=True)
    yield studio.load().control if request.param == "controlnext" else load_controlnet_xs(path).control


@pytest.mark.parametrize("variant", ["sd15", "sd15_legacy", "sdxl_july", "svd_v2"])
def test_encoder_and_addition_are_right_in_fp32(variant: str, device: torch.device) -> None:
    spec, row, generator = SPECS[variant], released.VARIANTS[variant], torch.Generator().manual_seed(0)
    weights = released.random_weights(row.build)
    network = ControlNeXt(config_of(spec)).eval().requires_grad_(False)
    network.load_state_dict(weights)
    hint, time = torch.rand(1, 3, 128, 128, generator=generator), torch.full((1,), 500.0)
    h = torch.randn(2, config_of(spec).out_channels, 16, 16, generator=generator)
    exact = {name: value.double() for name, value in weights.items()}
    wide = h.double()
    made = released.encode(row.build, exact, hint.double(), time).expand(2, -1, -1, -1)
    expected = wide + 0.7 * released.added(made, wide, row.order, row.eps)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        made = network.to(device)(hint.to(device), time.to(device))
        term = Term(prepare(made, (16, 16), spec.fusion), (0.7, 0.7), spec.fusion)
        found = fuse(h.to(device), [term])
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert relative(found.double().cpu(), expected) < FP32_ON_GPU
    assert relative(wide, expected) > 100 * FP32_ON_GPU, "the control must show"


def test_features_are_the_same_from_the_device_from_host_memory_and_made_each_time(
    studio: Studio, device: torch.device
) -> None:
    run = sampler_of(studio, studio.load().control)
    tier = "host" if device.type == "cpu" else "device"
    expected = run()
    assert studio.cache.used[tier] > 0
    assert torch.equal(run(), expected)
    for budgets in ({"device": 0, "host": 512 * MIB}, {"device": 0, "host": 0}):
        studio.cache.clear()
        studio.cache.budgets = dict(budgets)
        assert torch.equal(run(), expected) and torch.equal(run(), expected)
        assert studio.cache.used["device"] == 0 and bool(studio.cache.used["host"]) is bool(budgets["host"])


def test_what_spills_is_pinned(studio: Studio, cuda: torch.device) -> None:
    studio.cache.budgets = {"device": 0, "host": 512 * MIB}
    sampler_of(studio, studio.load().control)()
    kept = [entry for group in studio.cache._groups.values() for entry in group.entries.values()]
    assert kept and all(entry.is_pinned() for entry in kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("weights", [False, True], ids=["encoder", "with UNet weights"])
def test_a_base_in_few_bits_hears_the_control_as_in_fp32(
    studio: Studio, dtype: torch.dtype, weights: bool, tiny: Any, device: torch.device
) -> None:
    import comfy.sd

    def effect(model: Any) -> Tensor:
        loaded = demo_pair(studio, model) if weights else studio.load(model=model)
        bare = studio.sample(model, steps=STEPS)
        return sampler_of(studio, loaded.control, loaded.model)() - bare

    path = str(tiny.models / "checkpoints" / tiny.names["checkpoint"])
    narrow = comfy.sd.load_checkpoint_guess_config(
        path, output_vae=False, output_clip=False, model_options={"dtype": dtype}
    )
    assert narrow[0].model_dtype() == dtype
    one, other = effect(narrow[0]).flatten().double(), effect(studio.model).flatten().double()
    alike = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    assert alike > {torch.float16: 0.999, torch.bfloat16: 0.98, torch.float8_e4m3fn: 0.7}[dtype]


def out_of_memory() -> BaseException:
    import comfy.model_management

    return comfy.model_management.OOM_EXCEPTION("no room")


def cancel() -> BaseException:
    import comfy.model_management

    return comfy.model_management.InterruptProcessingException()


@pytest.mark.parametrize("make", [out_of_memory, cancel])
def test_after_a_run_that_broke_off_the_next_is_the_same(
    studio: Studio,
    control: Any,
    make: Callable[[], BaseException],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    run = sampler_of(studio, control)
    expected = run()
    studio.cache.clear()
    error = make()
    with monkeypatch.context() as patch:
        lay(patch, studio.model.model.diffusion_model.output_blocks[-1][0], "forward", error, 2)
        with pytest.raises(type(error)):
            run()
    assert torch.equal(run(), expected)


def test_after_the_device_was_really_full_the_next_run_is_the_same(
    studio: Studio, control: Any, cuda: torch.device
) -> None:
    import comfy.model_management

    small, big = sampler_of(studio, control), sampler_of(studio, control, cells=128, batch=8)
    expected = small()
    comfy.model_management.soft_empty_cache()
    free, _ = torch.cuda.mem_get_info(cuda)
    block = torch.empty(free - 256 * MIB, dtype=torch.uint8, device=cuda)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        big()
    del block
    comfy.model_management.soft_empty_cache()
    assert torch.equal(small(), expected)


def test_free_memory_takes_networks_and_features_off_the_device(
    studio: Studio, control: Any, device: torch.device
) -> None:
    import comfy.model_management

    run = sampler_of(studio, control)
    expected = run()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    network = control.get_models()[-1]
    assert studio.cache.used == {"device": 0, "host": 0}
    assert all(parameter.device.type == "cpu" for parameter in network.model.parameters())
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("around", [streams.beside_the_base, streams.fetched_ahead])
def test_a_second_stream_changes_nothing(studio: Studio, control: Any, around: Any, device: torch.device) -> None:
    studio.cache.budgets = {"device": 0, "host": 512 * MIB}
    run = sampler_of(studio, control)
    expected = run()
    with around(device):
        assert torch.equal(run(), expected) and torch.equal(run(), expected)


def test_sampling_on_a_stream_of_its_own_changes_nothing(studio: Studio, control: Any, cuda: torch.device) -> None:
    run = sampler_of(studio, control)
    expected = run()
    stream = torch.cuda.Stream(cuda)
    with torch.cuda.stream(stream):
        found = run()
    torch.cuda.synchronize(cuda)
    assert torch.equal(found, expected)
