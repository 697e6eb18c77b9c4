"""UNet weights against a base model: detection of their kind, their addition, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.controlnext_core.key_maps import Target, unet_key_map
from comfyui_controlnext.controlnext_core.unet_weights import (
    MAX_SAMPLES,
    WeightsKind,
    decide_kind,
    full_from_differences,
    host_differences,
    published_base,
    published_names,
)
from torch import Tensor

Tensors = dict[str, Tensor]
DIFFERENCE, FULL = WeightsKind.DIFFERENCE, WeightsKind.FULL
SD15_LIKE = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
KEY_MAP = unet_key_map(SD15_LIKE)
TO_OUT = [name for name in KEY_MAP if "to_out" in name]
"""Contents of the released SD1.5 files: 32 weights and 32 biases."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base() -> Tensors:
    """Base weights by host name, with the scale of trained weights: 0.02 for a weight, 1 for a norm."""
    tensors = {}
    for seed, (name, host) in enumerate(KEY_MAP.items()):
        shape = (12, 10) if name.endswith(".weight") and "norm" not in name else (12,)
        tensors[f"diffusion_model.{host}"] = noise(*shape, seed=seed) * 0.02 + ("norm" in name)
    return tensors


def part(base: Tensors, names: Iterable[str] = TO_OUT) -> Tensors:
    """Tensors of the base under published names."""
    return {name: base[f"diffusion_model.{KEY_MAP[name]}"].clone() for name in names}


def moved(tensors: Tensors, ratio: float, cosine: float) -> Tensors:
    """Tensors with |new| = ratio |old| and this cosine to the old ones, the rest in a random orthogonal direction."""
    found = {}
    for seed, (name, old) in enumerate(tensors.items()):
        side = noise(*old.shape, seed=1000 + seed)
        side -= old * (side * old).sum() / old.square().sum()
        along = cosine * old / old.norm() + (1 - cosine**2) ** 0.5 * side / side.norm()
        found[name] = ratio * old.norm() * along
    return found


def kind_of(file: Tensors, base: Tensors) -> WeightsKind:
    return decide_kind(file, published_base(file, KEY_MAP, base.get), "cat.safetensors")


# which kind


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("ratio", "cosine", "kind"),
    [
        (0.0, 0.0, DIFFERENCE),
        (0.02, 0.0, DIFFERENCE),
        (0.02, -0.9, DIFFERENCE),
        (0.29, 0.2, DIFFERENCE),
        (0.45, 0.1, DIFFERENCE),
        (0.4, 0.25, DIFFERENCE),
        (1.0, 0.9999, FULL),
        (1.1, 0.9, FULL),  # made for another fine-tune, which lies 0.5 of the norm away from this base
        (0.9, 0.7, FULL),
        (0.6, 0.95, FULL),
    ],
)
def test_kind_follows_size_and_direction(
    base: Tensors, ratio: float, cosine: float, kind: WeightsKind, dtype: torch.dtype
) -> None:
    file = {name: t.to(dtype) for name, t in moved(part(base), ratio, cosine).items()}
    assert kind_of(file, base) is kind


@pytest.mark.parametrize(
    ("ratio", "cosine"), [(0.4, 0.6), (0.4, 0.45), (0.45, -0.35), (0.6, 0.5), (1.0, 0.02), (3.0, 0.0), (1.0, -1.0)]
)
def test_what_lies_between_is_an_error_with_the_values(base: Tensors, ratio: float, cosine: float) -> None:
    message = rf"^cat\.safetensors: .* ratio is {ratio:.3f}, the cosine -?{abs(cosine):.3f}\..* set weights_kind"
    with pytest.raises(CheckpointError, match=message):
        kind_of(moved(part(base), ratio, cosine), base)


def test_biases_and_norms_have_no_say_in_the_kind(base: Tensors) -> None:
    file = moved(part(base), 0.02, 0.0)
    others = [name for name in KEY_MAP if name.endswith(".bias") or "norm" in name]
    assert kind_of(file | part(base, others), base) is DIFFERENCE
    with pytest.raises(CheckpointError, match="none of its .* tensors is a weight .* Set weights_kind"):
        kind_of(part(base, others), base)


def test_a_few_odd_tensors_do_not_turn_the_kind(base: Tensors) -> None:
    file = part(base)
    odd = [name for name in file if name.endswith(".weight")][:5]
    assert kind_of(file | {name: file[name] * 0 for name in odd}, base) is FULL


def test_kind_reads_only_some_of_the_largest_weights(base: Tensors) -> None:
    big = "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight"
    base[f"diffusion_model.{KEY_MAP[big]}"] = noise(40, 40)
    file, read = part(base), []

    def counted(name: str) -> Tensor | None:
        read.append(name)
        return published_base(file, KEY_MAP, base.get)(name)

    assert decide_kind(file, counted) is FULL
    assert read[0] == big and len(read) == MAX_SAMPLES < len(file) / 2


# differences for the host


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_differences_pass_bit_for_bit_under_host_names(base: Tensors, dtype: torch.dtype) -> None:
    file = {name: t.to(dtype) for name, t in moved(part(base), 0.02, 0.0).items()}
    found = host_differences(file, KEY_MAP, base.get, DIFFERENCE)
    assert len(found) == len(file) == 64
    for name, tensor in file.items():
        assert found[f"diffusion_model.{KEY_MAP[name]}"].dtype is dtype
        assert torch.equal(found[f"diffusion_model.{KEY_MAP[name]}"], tensor)


@pytest.mark.parametrize("prefix", ["", "unet.", "module.unet.", "model.diffusion_model."])
@pytest.mark.parametrize("host_names", [False, True], ids=["published", "host"])
def test_full_weights_become_what_is_missing_in_the_base(base: Tensors, prefix: str, host_names: bool) -> None:
    wanted = moved(part(base, KEY_MAP), 1.0, 0.99)
    file = {prefix + (KEY_MAP[name] if host_names else name): t.half() for name, t in wanted.items()}
    found = host_differences(file, KEY_MAP, base.get, kind_of(file, base))
    assert found.keys() == base.keys() and {t.dtype for t in found.values()} == {torch.float16}
    for name, tensor in wanted.items():
        host = f"diffusion_model.{KEY_MAP[name]}"
        difference = tensor.half().double() - base[host].double()
        # one rounding to fp16: half a unit in the last place, or half of the smallest subnormal
        assert ((found[host].double() - difference).abs() <= difference.abs() * 2**-11 + 2**-25 + 1e-8).all()


def test_full_weights_beyond_fp16_are_held_in_fp32(base: Tensors) -> None:
    name = TO_OUT[0]
    file = part(base, TO_OUT[:4]) | {name: torch.full((12, 10), 1e5)}
    found = host_differences(file, KEY_MAP, base.get, FULL)
    assert [t.dtype for t in found.values()] == [torch.float32]
    assert torch.equal(found[f"diffusion_model.{KEY_MAP[name]}"], file[name] - part(base)[name])


@pytest.mark.parametrize("kind", WeightsKind)
def test_zero_differences_are_left_out(base: Tensors, kind: WeightsKind) -> None:
    # 1e-8 is nothing in fp16, in which the difference is held
    file = {name: t + 1e-8 if kind is FULL else t * 0 for name, t in part(base).items()}
    changed = TO_OUT[7]
    file[changed] = file[changed] + 0.5
    assert [*host_differences(file, KEY_MAP, base.get, kind)] == [f"diffusion_model.{KEY_MAP[changed]}"]
    del file[changed]
    for nothing in (file, {}):
        with pytest.raises(CheckpointError, match="nothing to apply, .* Set weights_name to none"):
            host_differences(nothing, KEY_MAP, base.get, kind)


def test_caller_keeps_its_tensors(base: Tensors) -> None:
    file = moved(part(base), 1.0, 0.99)
    before = [t.clone() for t in (*file.values(), *base.values())]
    full_from_differences(host_differences(file, KEY_MAP, base.get, FULL), base.get)
    assert all(torch.equal(a, b) for a, b in zip(before, (*file.values(), *base.values()), strict=True))


def test_one_base_tensor_is_held_at_a_time(base: Tensors) -> None:
    alive: set[str] = set()

    def read(name: str) -> Tensor:
        assert len(alive) <= 1, f"{alive} still held while reading {name}"
        tensor = base[name].clone()
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        return tensor

    file = moved(part(base), 1.0, 0.99)
    decide_kind(file, published_base(file, KEY_MAP, read))
    full_from_differences(host_differences(file, KEY_MAP, read, FULL), read)


# files that do not fit


def unknown_names(file: Tensors) -> None:
    file.update({f"down_blocks.1.attentions.0.transformer_blocks.1.attn{i}.x": torch.ones(1) for i in range(7)})


def wrong_shape(file: Tensors) -> None:
    file[TO_OUT[-1]] = torch.ones(11)


def wrong_context(file: Tensors) -> None:
    file["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = torch.ones(320, 1024)


def nan(file: Tensors) -> None:
    file[TO_OUT[-1]][3] = torch.nan


def two_parts(file: Tensors) -> None:
    file["unet.conv_in.bias"] = torch.ones(12)


def mixed_names(file: Tensors) -> None:
    file["input_blocks.0.0.bias"] = torch.ones(12)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unknown_names, r"7 names that .* does not have: .*attn0.*attn4.x and 2 more\. The file looks made for SDXL"),
        (wrong_shape, r"'up_blocks.*' has shape \[11\], the connected model \[12\]\. .* made for SD1.5 or SD2.1: conn"),
        (
            wrong_context,
            r"'down_blocks.*to_k.weight' has shape \[320, 1024\], .* \[12, 10\]\. .* made for SD2.1: connect",
        ),
        (nan, r"'up_blocks.* holds NaN or infinite values\. The file is damaged: download"),
        (two_parts, r"some names begin with 'unet\.', 64 do not: .* save each part"),
        (mixed_names, r"64 names that the connected model does not have: down_blocks"),
    ],
)
@pytest.mark.parametrize("kind", WeightsKind)
def test_a_file_that_does_not_fit_is_named_and_loads_nothing(
    base: Tensors, kind: WeightsKind, spoil: Callable[[Tensors], None], message: str
) -> None:
    file = moved(part(base), 1.0, 0.9)
    spoil(file)
    with pytest.raises(CheckpointError, match=rf"^cat\.bin: {message}"):
        host_differences(file, KEY_MAP, base.get, kind, "cat.bin")


def test_a_base_weight_that_cannot_be_read_is_named(base: Tensors) -> None:
    with pytest.raises(CheckpointError, match=r"cannot give its tensor 'diffusion_model\..*ordinary checkpoint"):
        host_differences(part(base), KEY_MAP, lambda name: None, FULL)


# and back


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_full_weights_come_back_from_their_differences(base: Tensors, dtype: torch.dtype) -> None:
    file = {name: t.to(dtype) for name, t in moved(part(base), 1.0, 0.9).items()}
    differences, limits = host_differences(file, KEY_MAP, base.get, FULL), torch.finfo(dtype)
    full = full_from_differences(differences, base.get, dtype)
    for name, difference in differences.items():
        total = base[name].double() + difference.double()
        torch.testing.assert_close(
            full[name].double(), total, rtol=limits.eps, atol=limits.smallest_normal * limits.eps
        )
    back = published_names(full, KEY_MAP)
    assert back.keys() == file.keys()
    for name, tensor in back.items():
        assert tensor.dtype is dtype
        # the difference, below 0.1, was rounded to fp16 (2^-11), the sum to dtype
        torch.testing.assert_close(tensor, file[name], rtol=limits.eps, atol=0.1 * 2**-11)


def test_full_weights_need_the_same_base_and_room_in_their_dtype(base: Tensors) -> None:
    name = f"diffusion_model.{KEY_MAP[TO_OUT[0]]}"
    with pytest.raises(CheckpointError, match="does not fit torch.float16. Save in fp32"):
        full_from_differences({name: torch.full((12, 10), 1e5)}, base.get)
    for other in (base | {name: torch.ones(3)}, {}):
        with pytest.raises(CheckpointError, match="Connect the model that the control was"):
            full_from_differences({name: torch.ones(12, 10)}, other.get)
    with pytest.raises(CheckpointError, match="'diffusion_model.joint_blocks.0.x' has no published .* SD3"):
        published_names({"diffusion_model.joint_blocks.0.x": torch.ones(1)}, KEY_MAP)


# fused and swapped tensors (SD3)

FUSED = {
    "q": Target("qkv", (0, 0, 4)),
    "k": Target("qkv", (0, 4, 4)),
    "v": Target("qkv", (0, 8, 4)),
    "norm": Target("mod", swap_halves=True),
}
FUSED_BASE = {"diffusion_model.qkv": noise(12, 3), "diffusion_model.mod": noise(4, 3, seed=1)}


def test_fused_and_swapped_tensors_find_their_place() -> None:
    file = {name: noise(4, 3, seed=2 + i) for i, name in enumerate(FUSED)}
    found = host_differences(file, FUSED, FUSED_BASE.get, DIFFERENCE)
    assert torch.equal(found["diffusion_model.qkv"], torch.cat([file["q"], file["k"], file["v"]]))
    assert torch.equal(found["diffusion_model.mod"], file["norm"][[2, 3, 0, 1]])
    back = published_names(found, FUSED)
    assert back.keys() == file.keys() and all(torch.equal(back[name], file[name]) for name in file)
    assert len({t.untyped_storage().data_ptr() for t in back.values()}) == 4  # a file refuses shared storage


def test_part_of_a_fused_tensor_leaves_the_rest_alone() -> None:
    file = {"k": FUSED_BASE["diffusion_model.qkv"][4:8] + 1, "norm": FUSED_BASE["diffusion_model.mod"][[2, 3, 0, 1]]}
    found = host_differences(file, FUSED, FUSED_BASE.get, FULL)
    assert [*found] == ["diffusion_model.qkv"]
    assert found["diffusion_model.qkv"][:4].eq(0).all() and found["diffusion_model.qkv"][8:].eq(0).all()
    torch.testing.assert_close(found["diffusion_model.qkv"][4:8], torch.ones(4, 3).half(), rtol=0, atol=1e-3)
