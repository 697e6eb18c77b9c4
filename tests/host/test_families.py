"""Sites other than that of SD1.5's second generation, through both doors of a real KSampler run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, Studio, picture, relative
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy

MAKERS = {
    "sd15_legacy": (tiny_models.make_sd15_deep, "sd15_legacy"),  # after the middle
    "sdxl": (tiny_models.make_sdxl, "gen2"),  # after the first convolution
    "sdxl_july": (tiny_models.make_sdxl_deep, "sdxl_july"),  # after the middle
}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest, loaded_studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base model with a control for it: (name, loaded control, positive, negative)."""
    import comfy.sd

    make_base, build = MAKERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    options = {"clip": False} if request.param.startswith("sdxl") else {}
    path = make_base(folder / "base.ckpt", **options)
    tiny_models.make_controlnext(folder / "control.safetensors", build)
    with torch.inference_mode():
        model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
        loaded = loaded_studio.load(folder / "control.safetensors", model=model)
    if not request.param.startswith("sdxl"):
        return request.param, loaded, loaded_studio.positive, loaded_studio.negative
    generator = torch.Generator().manual_seed(0)
    context, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((77, 2048), (1280,)))
    prompts = [[[context[i : i + 1], {"pooled_output": pooled[i : i + 1]}]] for i in range(2)]
    return request.param, loaded, *prompts


def step(studio: Studio, model: Any, prompts: Any) -> Tensor:
    return studio.sample(model, *prompts, steps=1)


def test_both_doors_agree_and_strength_zero_is_bitwise_the_plain_model(studio: Studio, pair: Any) -> None:
    name, loaded, *prompts = pair
    assert loaded.control.net.spec.name == name
    plain = step(studio, loaded.model, prompts)
    conds = studio.apply_to(*prompts, loaded.control, picture())
    through_stock = step(studio, loaded.model, conds)
    assert torch.equal(through_stock, step(studio, studio.ours(loaded.model, loaded.control, picture()), prompts))
    assert through_stock.isfinite().all() and relative(through_stock, plain) > 100 * REASSOCIATED
    off = studio.apply_to(*prompts, loaded.control, picture(), 0.0, 0.0, 1.0)
    assert torch.equal(step(studio, loaded.model, off), plain)
    assert torch.equal(step(studio, studio.ours(loaded.model, loaded.control, picture(), 0.0), prompts), plain)


@pytest.mark.parametrize("pair", ["sd15_legacy"], indirect=True)
def test_freeu_sees_what_the_control_added(studio: Studio, pair: Any) -> None:
    """FreeU acts where a control after the middle is added; the control comes first in any order of nodes."""
    from comfy_extras.nodes_freelunch import FreeU_V2

    _, loaded, *prompts = pair

    def freeu(model: Any) -> Any:
        return FreeU_V2().patch(model, 1.3, 1.4, 0.9, 0.2)[0]

    before = step(studio, freeu(studio.ours(loaded.model, loaded.control, picture())), prompts)
    after = step(studio, studio.ours(freeu(loaded.model), loaded.control, picture()), prompts)
    conds = studio.apply_to(*prompts, loaded.control, picture())
    assert torch.equal(before, after)
    assert torch.equal(step(studio, freeu(loaded.model), conds), before)
    for other in (freeu(loaded.model), studio.ours(loaded.model, loaded.control, picture())):
        assert relative(step(studio, other, prompts), before) > 100 * REASSOCIATED
