"""Memory of a step on a transformer: the estimate against the count, its figures for 24 GB, and offloaded weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks.bench_video_memory import Allocations
from comfyui_controlnext.benchmarks.real_transformers import PUBLISHED, make_transformer
from comfyui_controlnext.controlnext_core.latent_clips import Clip
from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
from comfyui_controlnext.controlnext_training import journal
from comfyui_controlnext.controlnext_training.memory_estimate import (
    CLIP_ENCODER,
    CLIP_WIDENED,
    ENCODER,
    GIB,
    StepShape,
    advice,
    needed,
)
from comfyui_controlnext.models.controlnext import ControlNeXt
from comfyui_controlnext.tests.fixtures.narrow_training import (
    CLIP_FRAMES,
    FAMILIES,
    PICTURES,
    base_on,
    config_for,
    narrow_base,
    scenes,
    train_narrow,
)
from comfyui_controlnext.tests.fixtures.training_fixtures import (
    CPU,
    SIDE,
    Watcher,
    gradients_of,
    loop_on,
    run_in,
    same,
    shaken,
)
from comfyui_controlnext.tests.fixtures.transformer_fixtures import NARROW, inputs, narrow_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.comfy

ENCODER_LAW = 0.1
"""Relative error of the estimate of the encoder."""
OF_THE_LAW, SPREAD = (0.8, 1.1), 0.12
"""Share of the estimate that narrow models in bf16 need, and its spread over sizes."""
AS_PUBLISHED: dict[str, tuple[tuple[str, Any], ...]] = {
    "flux": (("mlp_ratio", 4.0),),
    "chroma": (("mlp_ratio", 4.0),),
    "lumina2": (("ffn_dim_multiplier", 4.0),),
    "z_image": (("ffn_dim_multiplier", 8 / 3),),
}
"""Widths of the published models' MLPs, by the width; the other narrow models have them."""
HEAD = {"flux": 128, "chroma": 128, "qwen_image": 128, "lumina2": 64, "z_image": 64, "wan": 128, "wan_5b": 128}
"""Width of a head. Where positions are rotations there are 2 x 2 numbers in fp32 for half of it, for each token: next
to nothing beside a published width, and up to a sixth of what a narrow model needs."""
SIZES = (32, 48, 64)
"""Sides of a latent in cells."""
CARD = 24e9


class Spy:
    """Stand-in for a device: its copies are clones, and it records them."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.made, self.pinnings = factor, 0, 0
        self.alive: list[Any] = []

    def pinned(self, tensor: Tensor) -> Tensor:
        self.pinnings += 1
        return tensor

    def copies(self, tensors: Any) -> list[Tensor]:
        import weakref

        found = [(t.float() * self.factor).to(t.dtype) if t.is_floating_point() else t.clone() for t in tensors]
        self.made += 1
        self.alive.append(weakref.ref(found[0]))
        return found

    def wait(self) -> None:
        pass

    @property
    def blocks_alive(self) -> int:
        return sum(reference() is not None for reference in self.alive)


def offloaded(family: str, monkeypatch: pytest.MonkeyPatch, spy: Spy, **settings: Any) -> dict[str, Tensor]:
    from comfyui_controlnext.controlnext_training.base_model import offload

    monkeypatch.setattr(offload, "Copier", lambda device: spy)
    return gradients_with(family, offload=True, **settings)


def gradients_with(family: str, **settings: Any) -> dict[str, Tensor]:
    loop = loop_on(narrow_base(family), config_for(family, checkpointing=True, **settings), scenes())
    shaken(loop.parameters, 0.01)
    return gradients_of(loop)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_wait_give_the_same_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are equal to the bit; and the blocks compute with the copies: changed copies change the result."""
    expected = gradients_with(family)
    assert same(offloaded(family, monkeypatch, spy := Spy()), expected) and spy.made and spy.pinnings > 20
    assert not same(offloaded(family, monkeypatch, Spy(1.01)), expected)


def test_one_block_is_fetched_ahead_and_at_most_two_are_there() -> None:
    """Upwards, then downwards as a backward pass does; each block is fetched once on either way."""
    from comfyui_controlnext.controlnext_training.base_model.offload import OffloadedBlocks

    blocks = [torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(5)]
    waiting = [block.weight for block in blocks]
    fetched, seen = OffloadedBlocks(blocks, CPU, spy := Spy()), []  # type: ignore[arg-type]
    for number in (0, 1, 2, 3, 4, 4, 3, 2, 1, 0):
        with fetched.on_device(number):
            assert blocks[number].weight is not waiting[number]
            assert torch.equal(blocks[number].weight, waiting[number])
            seen.append((spy.made, spy.blocks_alive))
        assert blocks[number].weight.data_ptr() == waiting[number].data_ptr()
    made, alive = [list(values) for values in zip(*seen, strict=True)]
    assert made == [2, 3, 4, 5, 5, 6, 7, 8, 9, 9], "the last one is there for the way down, and the one before it comes"
    assert max(alive) == 2


def test_weights_come_back_to_host_memory_after_an_error() -> None:
    from comfyui_controlnext.controlnext_training.base_model.offload import OffloadedBlocks

    block = torch.nn.Linear(4, 4).requires_grad_(False)
    fetched, before = OffloadedBlocks([block], CPU, Spy()), block.weight.data_ptr()  # type: ignore[arg-type]
    with pytest.raises(KeyError), fetched.on_device(0):
        assert block.weight.data_ptr() != before
        raise KeyError
    assert block.weight.data_ptr() == before


def counted(family: str, side: int, precision: str, length: int = 1, changes: Any = None) -> float:
    """Part of the estimate that both passes of a narrow model need at most, without the control and the rotations."""
    from comfyui_controlnext.controlnext_training.base_model.needs import widest
    from comfyui_controlnext.controlnext_training.base_model.trainable_copy import plain_attention

    base = base_on(narrow_model(family, changes=changes or AS_PUBLISHED.get(family, ())), family)
    settings = {"checkpointing": True, "trainable": "none", "precision": precision}
    loop = loop_on(base, config_for(family, **settings), scenes())
    given = inputs(family, (side, side), text=64, length=length)
    given.x.requires_grad_(True)
    network = loop.controlled.unet
    old = [*network.parameters(), *network.buffers(), given.x, given.context]
    options = {"optimized_attention_override": plain_attention}
    with Allocations(old) as made:
        shell = loop.controlled._shells[0]
        out = shell.apply_model(
            given.x, given.sigma, c_crossattn=given.context, transformer_options=options, **given.more
        )
        out.square().mean().backward()
    controlled, row = loop.controlled, loop.controlled.family
    tokens = length * (side // 2) ** 2 + (0 if row.one_latent else 64)
    width = NARROW[family].width
    inside = row.inside + row.inside_mlp * widest(network, row.blocks) / width
    shape = shape_of(width, controlled.blocks, inside)
    found = made.peak - tokens * HEAD.get(family, 0) // 2 * 4 * 4
    return found / needed(replace(shape, tokens=tokens, itemsize=controlled.dtype.itemsize)).blocks


SHORT = ("sd3", "qwen_image")
"""Families that are counted in every run of the suite."""


@pytest.mark.parametrize(
    "family", [family if family in SHORT else pytest.param(family, marks=pytest.mark.long) for family in PICTURES]
)
def test_the_estimate_of_the_blocks_holds_on_narrow_models_at_three_sizes(family: str) -> None:
    """Their parts are as wide, by the width, as those of the published ones; in bf16, as the estimate was counted."""
    parts = [counted(family, side, "bf16") for side in SIZES]
    assert OF_THE_LAW[0] < min(parts) and max(parts) < OF_THE_LAW[1], parts
    assert max(parts) - min(parts) < SPREAD, parts


@pytest.mark.parametrize(
    ("family", "ffn_dim", "most"),
    [
        ("wan", 747, OF_THE_LAW[1]),
        pytest.param("wan", 346, 1.15, marks=pytest.mark.long),
        pytest.param("wan_5b", 597, 1.25, marks=pytest.mark.long),
    ],
)
def test_the_estimate_of_the_blocks_holds_for_clips_at_three_lengths(family: str, ffn_dim: int, most: float) -> None:
    """The MLPs of 1.3B, of 14B and of 5B, by the width; clips of 1, 5 and 9 latent frames, at two sizes.

    A token has 64 numbers of the latent, and 192 in 5B, in fp32: much beside a width of 128, nothing beside a published
    one; hence what they need beyond the estimate.
    """
    sizes = [(32, 1), (32, 5), (16, 9)]
    parts = [counted(family, side, "bf16", length, (("ffn_dim", ffn_dim),)) for side, length in sizes]
    assert OF_THE_LAW[0] < min(parts) and max(parts) < most, parts
    assert max(parts) - min(parts) < SPREAD, parts


def test_in_fp32_a_step_needs_less_than_the_estimate() -> None:
    """Steps in bf16 store some values in fp32 as well, for norms and modulation: hence a factor of 0.74 for SD3."""
    assert counted("sd3", SIZES[0], "fp32") < 0.85 * counted("sd3", SIZES[0], "bf16")


def shape_of(width: int, blocks: int, inside: float, **more: Any) -> StepShape:
    """Step shape in fp32 with a batch of one and only blocks."""
    zero: dict[str, Any] = dict.fromkeys(("tokens", "pixels", "frozen", "largest", "trained"), 0)
    return StepShape(**zero | {"rows": 1, "width": width, "blocks": blocks, "inside": inside, "itemsize": 4} | more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [256, 384, 512])
def test_the_estimate_of_the_encoder_holds(side: int, dtype: torch.dtype) -> None:
    """Counted without computing, gradients of its weights left out, which are trained numbers."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.host_layers import WholeLayers

    net = ControlNeXt(config_of(SPECS["sd3"], 1536), device="meta", operations=WholeLayers).float()
    hint = torch.zeros(1, 3, side, side, dtype=dtype, device="meta")
    with Allocations([*net.parameters(), hint]) as made:
        begun = checkpoint(net.begin, hint, use_reentrant=False, preserve_rng_state=False)
        out: Any = checkpoint(
            net.narrow, begun, torch.zeros(1, device="meta"), use_reentrant=False, preserve_rng_state=False
        )
        out.float().square().mean().backward()
    found = made.peak - sum(parameter.nbytes for parameter in net.parameters())
    assert found / (side * side * dtype.itemsize) == pytest.approx(ENCODER, rel=ENCODER_LAW)


@pytest.mark.parametrize(
    ("variant", "width", "clip", "bound"),
    [
        ("wan", 1536, (17, 256, 256), "pass"),
        ("wan", 1536, (17, 512, 512), "pass"),
        ("wan", 16384, (17, 512, 512), "widened"),
        pytest.param("wan", 5120, (81, 480, 832), "widened", marks=pytest.mark.long),
        ("wan_5b", 3072, (49, 512, 512), "pass"),
    ],
)
def test_the_estimate_of_the_encoder_of_clips_holds(
    variant: str, width: int, clip: tuple[int, int, int], bound: str
) -> None:
    """Counted without computing, as above; either a pass of frames or the maps at the base's width decide."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.sampling.host_layers import WholeLayers
    from comfyui_controlnext.controlnext_training.base_model.clip_encoding import ClipEncoding, latent_frames_at_once

    spec, (frames, height, down), cell = SPECS[variant], clip, 16 if variant == "wan" else 32
    net = ControlNeXt(config_of(spec, width), device="meta", operations=WholeLayers).float()
    of_latent, size = Clip((frames - 1) // 4 + 1, 4), (height // cell, down // cell)
    hint = torch.zeros(frames, 3, height, down, dtype=torch.bfloat16, device="meta")
    with Allocations([*net.parameters(), hint]) as made:
        whole = (of_latent.length * size[0], size[1])
        out = ClipEncoding(net, spec, True).encode(hint, torch.zeros(1, device="meta"), whole, of_latent, 1)
        out.float().square().mean().backward()
    found = made.peak - sum(parameter.nbytes for parameter in net.parameters())
    tokens, pixels = of_latent.length * size[0] * size[1], height * down
    at_once = min(4 * latent_frames_at_once(spec, pixels, 2, of_latent), frames)
    shape = shape_of(width, 0, 0.0, tokens=tokens, pixels=pixels, itemsize=2, frames_in_pass=at_once)
    assert found / needed(shape).encoder == pytest.approx(1, abs=ENCODER_LAW)
    by_pass = CLIP_ENCODER * pixels * at_once > CLIP_WIDENED * tokens * width
    assert by_pass is (bound == "pass")


def test_the_dry_run_of_a_clip_says_it(tmp_path: Path) -> None:
    """Wan's tokens are those of all latent frames; its encoder takes all five frames in one pass."""
    train_narrow(tmp_path, "wan", watch := Watcher(), steps=1, checkpointing=True)
    assert watch.logged("a step is estimated to need ")
    (expected,) = journal.read(run_in(tmp_path, narrow_base("wan")).folder, "dry_run", "expected_bytes").values()
    network = narrow_base("wan").model.model.diffusion_model
    frozen = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    copies = 8 * max(tensor.numel() for tensor in network.parameters())
    parameters = loop_on(narrow_base("wan"), config_for("wan"), scenes(4, "wan")).parameters.values()
    trained = 16 * sum(parameter.numel() for parameter in parameters)
    assert expected == frozen + copies + trained + 4 * CLIP_ENCODER * SIDE * SIDE * CLIP_FRAMES


def published(name: str, side: int, bytes_a_weight: int) -> StepShape:
    """Step shape in bf16 with a batch of one on a published base, to_out of rank 16; bytes_a_weight: of the base."""
    from comfyui_controlnext.controlnext_training.base_model.trained_families import FAMILIES as ROWS

    row, spec = PUBLISHED[name], SPECS[PUBLISHED[name].variant]
    network = make_transformer(row, torch.bfloat16).diffusion_model
    kinds = ROWS[spec.family].blocks
    numbers = [parameter.numel() for parameter in network.parameters()]
    encoder = ControlNeXt(config_of(spec, row.width), device="meta")
    blocks = sum(isinstance(module, kinds) for module in network.modules())
    factors = 2 * 16 * row.width * blocks
    return StepShape(
        rows=1,
        tokens=(side // 16) ** 2 + row.text[0],
        width=row.width,
        blocks=blocks,
        inside=ROWS[spec.family].inside,
        pixels=side * side,
        itemsize=2,
        frozen=bytes_a_weight * sum(numbers),
        largest=max(numbers),
        trained=sum(p.numel() for p in encoder.parameters()) + factors,
    )


@pytest.mark.parametrize(
    ("name", "side", "gib"),
    [("Z-Image", 1024, 8.2), ("Flux.1", 512, 12.3), ("SD3.5-medium", 1024, 3.1), ("Qwen-Image", 512, 20.0)],
)
def test_the_estimate_says_that_they_fit_into_24_gb_in_fp8(name: str, side: int, gib: float) -> None:
    """The figures of docs/transformers.md. Nothing of it was run on a GPU."""
    total = needed(published(name, side, 1)).total
    assert total / GIB == pytest.approx(gib, abs=0.1) and total < CARD
    assert f"{name} {side}: {gib} GiB" in (Path(__file__).parents[2] / "docs" / "transformers.md").read_text("utf-8")


def test_what_does_not_fit_says_which_setting_makes_it_fit() -> None:
    flux = published("Flux.1", 512, 2)
    assert needed(flux).total > CARD and advice(flux, False, int(CARD)) == "Set offload = true."
    assert advice(published("Flux.1", 512, 1), False, int(CARD)) == ""
    many = replace(published("Z-Image", 1024, 1), rows=10)
    assert advice(many, True, int(CARD)) == "Set batch_size = 1 with accumulation = 10."
    both = replace(flux, rows=24)
    assert advice(both, False, int(4e9)) == "Set offload = true and batch_size = 1 with accumulation = 24."
    assert "smaller resolution" in advice(both, True, int(1e9))


def test_the_dry_run_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management

    watch = Watcher()
    train_narrow(tmp_path / "enough", "sd3", watch, steps=1, checkpointing=True)
    assert watch.logged("a step is estimated to need ") and not watch.logged("Set ")
    folder = run_in(tmp_path / "enough", narrow_base("sd3")).folder
    (expected,) = journal.read(folder, "dry_run", "expected_bytes").values()
    assert 6e7 < expected < 8e7, "most of it is 16 bytes for each number of the encoder"
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *args: int(expected) - 1)
    train_narrow(tmp_path / "short", "sd3", watch := Watcher(), steps=1, checkpointing=True)
    assert watch.logged("Take a smaller resolution")  # two blocks on the device are all of this model
