"""controlnext_core/picturebook: the pictures, and tools/demo_weights' base of SD3's shape for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core.picturebook import (
    COLORS,
    PLANES,
    THINGS,
    canvas,
    children,
    draw,
    draw_children,
    things,
)
from comfyui_controlnext.tools.demo_weights import assembling, autoencoder, mmdit, muon, painter, picture_base, running
from torch import Tensor

COUNT, SIDE = 40, 128
CAPTIONS = ["a red house and a yellow sun on a meadow under a pink sky", "a blue boat", ""]


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return [draw(3, index, SIDE) for index in range(COUNT)]


def test_a_picture_depends_on_seed_and_index_alone(pictures: list[Any]) -> None:
    again = draw(3, 7, SIDE)
    for name in ("image", *PLANES):
        assert np.array_equal(getattr(again, name), getattr(pictures[7], name))
    assert again.caption == pictures[7].caption
    assert len({picture.image.tobytes() for picture in pictures}) == COUNT
    assert not np.array_equal(draw(4, 7, SIDE).image, again.image)


def test_captions_name_every_kind_of_thing(pictures: list[Any]) -> None:
    named = " ".join(draw(3, index, 16).caption for index in range(300))
    assert len(THINGS) >= 10
    assert [kind for kind in THINGS if kind not in named] == []
    assert all(color in COLORS for kind in THINGS.values() for color in kind.colors)


@pytest.mark.parametrize("kind", THINGS)
def test_a_thing_has_its_colour_inside_its_mask(kind: str) -> None:
    for color in THINGS[kind].colors:
        board = canvas.Canvas(96, 96)
        board.near, board.is_thing = 200, True
        THINGS[kind].draw(things.Pen(board, 0.5, 0.9, 0.8), COLORS[color], canvas.Numbers("a thing"))
        inside = board.mask > 250
        assert inside.mean() > 0.06
        off = np.abs(board.image[inside].astype(int) - COLORS[color]).max(1)
        assert (off < 45).mean() > 0.1, color  # lighthouses are half white, and all have outlines
        beside = cv2.dilate(board.mask, np.ones((5, 5), np.uint8)) == 0  # outlines reach over a mask's rim
        assert (board.image[beside] > 0).mean() < 0.04  # a cup's steam
        assert (board.depth[inside] > 190).all()


def test_outlines_of_the_hint_lie_on_dark_lines(pictures: list[Any]) -> None:
    for picture in pictures:
        assert 0.01 < (picture.edges > 127).mean() < 0.25
        dark = (picture.image.max(2) < 120).astype(np.uint8)
        on_line = cv2.dilate(dark, np.ones((3, 3), np.uint8))[picture.edges > 127]
        assert on_line.mean() > 0.95


def test_things_are_nearer_than_what_is_behind_them(pictures: list[Any]) -> None:
    for picture in pictures:
        inside = picture.mask > 250
        assert 0.03 < inside.mean() < 0.7
        assert picture.depth[inside].mean() > picture.depth[picture.mask == 0].mean()


def test_the_pattern_of_a_wall_is_as_far_as_the_wall(pictures: list[Any]) -> None:
    walls = [picture for picture in pictures if picture.caption.endswith("wall")]
    assert len(walls) > 3
    for picture in walls:
        far = picture.depth[: SIDE // 3][picture.mask[: SIDE // 3] == 0]
        assert np.percentile(far, 1) > 10


def test_a_hint_has_three_channels_and_an_unknown_one_is_refused(pictures: list[Any]) -> None:
    assert pictures[0].hint("depth").shape == (SIDE, SIDE, 3)
    assert not pictures[0].hint("pose").any(), "nobody is there"
    with pytest.raises(ValueError, match="edges, mask, depth, pose"):
        pictures[0].hint("normal")


def test_children_are_in_every_picture_of_theirs_and_named() -> None:
    for index in range(30):
        picture = draw_children(3, index, 64)
        named = re.findall(rf"\ban? ({'|'.join(children.CHILDREN)}) in an? ({'|'.join(COLORS)}) shirt", picture.caption)
        assert len(named) == len(picture.people) in (1, 2), picture.caption


def test_the_word_for_a_childs_looks_decides_hair_and_skin() -> None:
    """A little above the nose is the skin's colour, and near the top of the head the hair's."""
    seen = set()
    for index in range(40):
        picture = draw_children(3, index, SIDE)
        looks = re.findall(rf"an? ({'|'.join(children.LOOKS)}) (?:boy|girl)", picture.caption)
        (x, y), (_, neck) = picture.people[0][:2].round().astype(int)
        head = (neck - y) * children.HEAD / (children.NECK - children.HEAD - 0.02)
        if len(looks) != 1 or y < head:
            continue
        seen |= set(looks)
        for part, color in zip((0.2, 0.75), children.LOOKS[looks[0]], strict=True):
            assert np.abs(picture.image[round(y - part * head), x].astype(int) - color).max() < 40, picture.caption
    assert len(seen) >= 3


def test_the_joints_of_a_child_lie_on_the_child() -> None:
    for index in range(20):
        picture = draw_children(3, index, SIDE)
        for points in picture.people:
            x, y = points.round().astype(int).clip(0, SIDE - 1).T
            inside = (points >= 0).all(1) & (points < SIDE).all(1)
            assert (picture.mask[y, x] > 0)[inside].mean() > 0.9, picture.caption  # bunches may hide an ear
            assert points[2, 0] < points[5, 0], "the right shoulder is on the left of who looks out of the picture"
            lengths = np.linalg.norm(points[[2, 3, 8, 9]] - points[[3, 4, 9, 10]], axis=1)
            assert np.allclose(lengths / lengths[0], np.asarray((0.145, 0.135, 0.185, 0.185)) / 0.145, atol=1e-6)


def test_a_pose_hint_has_openpose_sticks_where_the_joints_are() -> None:
    """The nose is red (OpenPose's first hue), the neck orange, the left ankle violet, not exchanged."""
    picture = draw_children(3, 0, 512)
    hint, points = picture.hint("pose"), picture.people[0].astype(int)
    assert hint.shape == (512, 512, 3) and hint.dtype == np.uint8
    for joint, color in ((0, (255, 0, 0)), (1, (255, 85, 0)), (13, (85, 0, 255))):
        x, y = points[joint]
        assert tuple(hint[y, x]) == color, joint
    assert 0.002 < (hint.max(-1) > 0).mean() < 0.1


def test_poses_differ_and_stand_on_the_ground() -> None:
    poses = [children.joints(canvas.Numbers(f"pose {index}")) for index in range(50)]
    assert all(pose.shape == (18, 2) and abs(max(pose[10, 1], pose[13, 1]) + 0.035) < 1e-9 for pose in poses)
    assert np.stack(poses)[:, [4, 7]].std(0).min() > 0.05, "hands move"


def test_a_wide_picture_is_filled() -> None:
    picture = draw(3, 1, (64, 160))
    assert picture.image.shape == (64, 160, 3)
    assert (picture.image.max(2) > 0).all()


def test_a_curve_of_cut_corners_stays_inside_its_points() -> None:
    square = canvas.box(0, 0, 1, 1)
    curve = canvas.smooth(square)
    assert len(curve) == 32 and curve.min() >= 0 and curve.max() <= 1
    straight = canvas.smooth(canvas.polygon((0, 0), (1, 1), (2, 2)), closed=False)
    assert np.allclose(straight[:, 0], straight[:, 1]) and np.allclose(straight[[0, -1]], [[0, 0], [2, 2]])


@pytest.mark.parametrize("shape", [(48, 16), (16, 64), (32, 32)])
def test_orthogonal_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = muon.orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4 and values.max() < 1.35
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_muon_steps_matrices_by_their_rate_and_the_rest_with_adam() -> None:
    fused = torch.nn.Parameter(torch.zeros(48, 16))
    bias = torch.nn.Parameter(torch.zeros(5))
    optimizer = muon.Muon([("x.attn.qkv.weight", fused), ("x.bias", bias)], 0.02, 1e-3)
    fused.grad, bias.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(2)), torch.ones(5)
    optimizer.step(0.5)
    for part in fused.detach().split(16):  # q, k and v step each for itself
        assert 0.004 < torch.linalg.svdvals(part / 1).mean() < 0.014
    torch.testing.assert_close(bias.detach(), torch.full((5,), -5e-4), atol=1e-6, rtol=0)


def test_a_slice_begins_and_ends_with_small_steps() -> None:
    assert running.rate_at(0.0, 0) == pytest.approx(1 / running.WARMUP)
    assert running.rate_at(0.3, 10**6) == 1.0
    assert running.rate_at(1.0, 10**6) == pytest.approx(0.02)


@pytest.fixture(scope="module")
def network() -> Any:
    """Network with random weights, except for those of inputs that it must not read."""
    model = mmdit.new_mmdit().requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=random) * 0.03
        if name == "context_embedder.weight":
            noise[:, : mmdit.CODES] = 0
        value.copy_(value.add(noise).half())  # as the file holds it
    return model


@pytest.fixture(scope="module")
def loaded(network: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Model, clip and vae from the loader behind CheckpointLoaderSimple."""
    import comfy.sd

    path = tmp_path_factory.mktemp("picturebook") / "sd3.ckpt"
    weights = {name: value.half() for name, value in network.state_dict().items()}
    halves = {name: value.half() for name, value in painter.new_painter().state_dict().items()}
    assembling.write_sd3_checkpoint(path, mmdit.as_the_host_loads(weights), autoencoder.whole(halves))
    return comfy.sd.load_checkpoint_guess_config(str(path))[:3]


@pytest.mark.comfy
def test_equal_words_behind_the_end_count_as_one(network: Any, loaded: tuple[Any, Any, Any], tmp_path: Path) -> None:
    model, clip = loaded[0].model, loaded[1]
    assert type(model.model_config).__name__ == "SD3"
    texts = picture_base.texts_of(picture_base.text_model(tmp_path), CAPTIONS)
    assert [len(text["words"]) for text in texts] == [21, 10, 7]
    words, pooled = zip(*(clip.encode_from_tokens(clip.tokenize(c), return_pooled=True) for c in CAPTIONS), strict=True)
    behind = torch.cat(words)[0, 20:, mmdit.CODES : mmdit.WIDTH]
    assert behind.std() > 1 and (behind - behind[0]).square().mean().sqrt() < 0.03  # they see the layer norm's scale
    x = torch.randn(3, 16, 24, 24, generator=torch.Generator().manual_seed(6))
    s = torch.tensor([0.2, 0.5, 0.9])
    short = mmdit.predict(network, x, s, picture_base.batch_of(texts))
    with torch.inference_mode():
        whole = model.diffusion_model.float()(x, 1000 * s, torch.cat(words).float(), torch.cat(pooled).float())
    assert whole.std() > 1
    assert (short - whole).square().mean().sqrt() < 2e-3
    torch.testing.assert_close(short, whole, atol=2e-2, rtol=0)
    bare = mmdit.predict(network, x, s, picture_base.batch_of([texts[2]] * 3))
    assert (bare[0] - short[0]).abs().max() > 0.1


@pytest.mark.comfy
def test_the_start_is_the_best_linear_guess() -> None:
    random = torch.Generator().manual_seed(7)
    z, noise = (torch.randn(6, 16, 24, 24, generator=random) for _ in range(2))
    s = torch.tensor([0.05, 0.25, 0.5, 0.6, 0.8, 0.95])
    share = s.view(-1, 1, 1, 1)
    text = picture_base.batch_of([{"words": torch.zeros(3, 768), "pooled": torch.zeros(768)}] * 6)
    with torch.no_grad():
        out = mmdit.predict(mmdit.new_mmdit(), (1 - share) * z + share * noise, s, text)
    error = (out - (noise - z)).square().mean((1, 2, 3))
    best = 1 / (s.square() + (1 - s).square())  # of variables of variance 1 that do not depend on each other
    torch.testing.assert_close(error, best, atol=0.3, rtol=0.1)


@pytest.mark.comfy
def test_latents_reach_the_autoencoder_as_the_network_sees_them(loaded: tuple[Any, Any, Any]) -> None:
    model, vae = loaded[0].model, loaded[2]
    network = painter.new_painter().requires_grad_(False)
    pixels = torch.from_numpy(draw(3, 2, 64).image)[None].float() / 255
    seen = model.process_latent_in(vae.encode(pixels))
    own = network.taesd_encoder(pixels.permute(0, 3, 1, 2))
    assert own.std() > 0.1
    torch.testing.assert_close(seen.float(), own, atol=2e-2, rtol=0)


def test_bias_counts_the_last_word_for_all_that_follow() -> None:
    scores = torch.randn(1, 1, 1, 77 + 4, generator=torch.Generator().manual_seed(8))
    scores[..., 5:77] = scores[..., 5:6]
    values = torch.arange(77.0 + 4)
    values[5:77] = 5
    expected = scores.softmax(-1) @ values
    short: Tensor = torch.cat([scores[..., :6], torch.zeros(1, 1, 1, 2), scores[..., 77:]], dim=-1)
    bias = mmdit.bias_of(torch.tensor([6]), 8, 4)
    got = (short + bias).softmax(-1) @ torch.cat([values[:6], torch.zeros(2), values[77:]])
    torch.testing.assert_close(got, expected)
