"""ControlNet-XS through the host's sampler: both doors, halves, ranges, masks, stacks, queue runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, REASSOCIATED, Studio, picture, relative
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("xs")
    return {
        "plain": tiny_models.make_controlnet_xs(folder / "plain.safetensors"),
        "own_time": tiny_models.make_controlnet_xs(folder / "own_time.safetensors", own_time=True, seed=1),
        "adapter": tiny_models.make_controlnet_xs(
            folder / "adapter.safetensors", own_time=True, seed=1, format="diffusers"
        ),
    }


def load(files: dict[str, Path], name: str = "own_time", norm_rule: str = "auto") -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    return load_controlnet_xs(files[name], norm_rule).control


@pytest.fixture
def control(studio: Studio, files: dict[str, Path]) -> Iterator[Any]:
    yield load(files)


@pytest.mark.parametrize("name", ["plain", "own_time", "adapter"])
def test_both_doors_give_the_same_bits(studio: Studio, plain: Tensor, files: dict[str, Path], name: str) -> None:
    control, hint = load(files, name), picture()
    by_stock = studio.sample(None, *studio.stock(control, hint))
    assert torch.equal(by_stock, studio.sample(studio.ours(studio.model, control, hint)))
    assert relative(by_stock, plain) > 0.05


def test_an_adapter_is_the_same_control_under_other_names(studio: Studio, files: dict[str, Path]) -> None:
    pictures = [
        studio.sample(None, *studio.stock(load(files, name, "official"), picture())) for name in ("own_time", "adapter")
    ]
    assert torch.equal(*pictures)


def test_wiring_one_half_is_the_same_as_choosing_it(studio: Studio, control: Any) -> None:
    positive, negative = studio.stock(control, picture())
    both = studio.sample(None, positive, negative)
    for half, wired in (("positive", (positive, None)), ("negative", (None, negative))):
        chosen = studio.sample(studio.ours(studio.model, studio.options(control, half), picture()))
        assert relative(chosen, studio.sample(None, *wired)) < REASSOCIATED
        assert relative(chosen, both) > 0.01


def test_strength_zero_and_steps_outside_the_range_are_the_plain_model(
    studio: Studio, plain: Tensor, control: Any
) -> None:
    calls: list[int] = []
    hooks = [control.loaded.net.encoder[0].register_forward_hook(lambda *_: calls.append(1))]
    for settings in ({"strength": 0.0}, {"start": 0.0, "end": 0.0}, {"start": 0.4, "end": 0.6}):
        assert torch.equal(studio.sample(None, *studio.stock(control, picture(), **settings)), plain)
        assert torch.equal(studio.sample(studio.ours(studio.model, control, picture(), **settings)), plain)
    zeros = studio.options(control, mask=torch.zeros(1, 8, 8))
    assert torch.equal(studio.sample(None, *studio.stock(zeros, picture())), plain)
    off = studio.options(control, schedule="0:0, 1:0")
    assert torch.equal(studio.sample(None, *studio.stock(off, picture())), plain)
    assert calls == []
    hooks[0].remove()


def test_the_range_takes_whole_steps(studio: Studio, plain: Tensor, control: Any) -> None:
    calls: list[int] = []
    hook = control.loaded.net.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    first = studio.sample(None, *studio.stock(control, picture(), end=0.4), steps=3)
    assert len(calls) in (1, 2)
    hook.remove()
    assert relative(first, studio.sample(steps=3)) > 0.01
    assert relative(first, studio.sample(None, *studio.stock(control, picture()), steps=3)) > 0.01


def test_queue_runs_repeat_and_leave_nothing_behind(studio: Studio, plain: Tensor, control: Any) -> None:
    conds = studio.stock(control, picture())
    encoded: list[int] = []
    timed: list[int] = []
    hooks = [
        control.loaded.net.hint_encoder[0].register_forward_hook(lambda *_: encoded.append(1)),
        control.loaded.net.time_embedding.register_forward_hook(lambda *_: timed.append(1)),
    ]
    one = studio.sample(None, *conds)
    two = studio.sample(None, *conds)
    studio.sample(None, *conds, seed=9)
    assert torch.equal(one, two)
    assert len(encoded) == 1  # one hint, for all steps, halves, seeds and runs
    assert len(timed) == 2  # two steps
    for hook in hooks:
        hook.remove()
    assert torch.equal(studio.sample(), plain)
    assert control.run is None


def test_a_batch_is_its_images(studio: Studio, control: Any) -> None:
    hints = picture(count=2)
    batch = studio.sample(None, *studio.stock(control, hints), batch=2)
    for i in range(2):
        alone = studio.sample(None, *studio.stock(control, hints[i : i + 1]), first=i)
        assert relative(batch[i : i + 1], alone) < REASSOCIATED


def test_a_mask_of_ones_is_no_mask_and_half_of_one_is_less(studio: Studio, control: Any) -> None:
    half = torch.zeros(1, 8, 8)
    half[..., :4] = 1
    masked = studio.sample(None, *studio.stock(studio.options(control, mask=half), picture()))
    whole = studio.sample(None, *studio.stock(control, picture()))
    ones = studio.sample(None, *studio.stock(studio.options(control, mask=torch.ones(1, 8, 8)), picture()))
    assert torch.equal(ones, whole)
    assert relative(masked, whole) > 0.01


def test_it_stacks_with_controlnext_and_a_stock_controlnet_in_any_order(
    studio: Studio, files: dict[str, Path], tmp_path: Path
) -> None:
    import comfy.controlnet

    stock_net = comfy.controlnet.load_controlnet(str(tiny_models.make_stock_controlnet(tmp_path / "stock.pth")))
    parts = {"xs": load(files), "xs2": load(files, "plain"), "next": studio.load().control, "stock": stock_net}

    def sample(*order: str) -> Tensor:
        conds = (studio.positive, studio.negative)
        for name in order:
            conds = studio.apply_to(*conds, parts[name], picture(list(parts).index(name)), 0.6, 0.0, 1.0)
        return studio.sample(None, *conds)

    whole = sample("xs", "next", "stock", "xs2")
    assert torch.equal(whole, sample("xs2", "stock", "xs", "next"))
    for missing in parts:
        assert relative(whole, sample(*(name for name in parts if name != missing))) > 1e-3


def test_the_other_door_stacks_too(studio: Studio, files: dict[str, Path]) -> None:
    """MODEL door inside, CONTROL_NET door outside: the same as both through one door."""
    one, two = load(files), load(files, "plain")
    conds = studio.apply_to(*studio.stock(one, picture(0)), two, picture(1))
    mixed = studio.sample(studio.ours(studio.model, two, picture(1)), *studio.stock(one, picture(0)))
    assert torch.equal(mixed, studio.sample(None, *conds))


def test_freeu_and_deep_shrink_of_the_host_run_beside_it(studio: Studio, control: Any) -> None:
    from comfy_extras.nodes_freelunch import FreeU
    from comfy_extras.nodes_model_downscale import PatchModelAddDownscale

    def patched(node: Any, *settings: Any) -> Any:
        found = node.execute(studio.model, *settings) if hasattr(node, "execute") else None
        return found[0] if found is not None else node().patch(studio.model, *settings)[0]

    freeu = patched(FreeU, 1.3, 1.4, 0.9, 0.2)
    shrink = patched(PatchModelAddDownscale, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")
    after = patched(PatchModelAddDownscale, 2, 2.0, 0.0, 1.0, False, "bicubic", "bicubic")
    for model in (freeu, shrink, after):
        out = studio.sample(model, *studio.stock(control, picture()))
        assert out.isfinite().all()
        assert relative(out, studio.sample(model)) > 0.01
        assert torch.equal(out, studio.sample(studio.ours(model, control, picture())))


@pytest.mark.parametrize("cells", [CELLS + 1, 18])
def test_any_size(studio: Studio, control: Any, cells: int) -> None:
    latent = torch.zeros(1, 4, cells, cells + 4)
    out = studio.sample(None, *studio.stock(control, picture()), latent=latent, steps=1)
    assert out.shape == latent.shape
    assert relative(out, studio.sample(latent=latent, steps=1)) > 0.01


def test_a_wrong_pair_is_refused_before_the_first_step(studio: Studio, tmp_path: Path) -> None:
    sdxl = load({"sdxl": tiny_models.make_controlnet_xs(tmp_path / "sdxl.safetensors", "sdxl")}, "sdxl")
    deep = load({"deep": tiny_models.make_controlnet_xs(tmp_path / "deep.safetensors", "sd15_deep")}, "deep")
    for control, words in (
        (sdxl, "ControlNet-XS for SDXL, but the connected model is SD1.5"),
        (deep, "encoder blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            studio.ours(studio.model, control, picture())
        with pytest.raises(ValueError, match=words):
            studio.sample(None, *studio.stock(control, picture()))


def test_the_network_is_the_hosts_to_load_and_its_features_go_with_it(studio: Studio, control: Any) -> None:
    import comfy.model_management

    studio.sample(None, *studio.stock(control, picture()))
    assert control.loaded.patcher in [m.model for m in comfy.model_management.current_loaded_models]
    assert len(studio.cache) == 3  # one hint, two timesteps
    control.loaded.patcher.detach()
    assert len(studio.cache) == 0


def test_an_older_load_of_a_file_does_not_take_its_features_along(studio: Studio, files: dict[str, Path]) -> None:
    older, newer = load(files), load(files)
    studio.sample(None, *studio.stock(newer, picture()))
    kept = len(studio.cache)
    del older
    gc.collect()
    assert len(studio.cache) == kept > 0
