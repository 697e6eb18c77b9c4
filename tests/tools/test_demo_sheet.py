"""Demo sheet and shipped weights: the demo as a user runs it, and the weights that it unpacks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_core import picturebook
from comfyui_controlnext.tools import demo_sheet
from comfyui_controlnext.tools.demo_boards import BOOK, CHILDREN, HINTS, SCENE_SEED, UNET_BOOK, draw_hint
from comfyui_controlnext.tools.demo_weights import packing, shipped
from comfyui_controlnext.tools.environment import SetupError
from PIL import Image

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

MEGABYTE = 1e6


def png(color: str, side: int = UNET_BOOK.side) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), color).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(64, 64), (320, 64, 3, 3), (7, 5000)])
def test_packing_is_off_by_no_more_than_half_a_step_of_the_row(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random) * torch.rand(shape[0], generator=random).view(
        -1, *[1] * (len(shape) - 1)
    )
    packed = packing.pack({"w": weight})
    assert packed["w"].dtype is torch.int8 and packed["w"].shape == shape
    back = packing.unpack(packed)["w"]
    assert back.dtype is torch.float16
    largest = weight.abs().flatten(1).amax(1)
    off = (back.float() - weight).abs().flatten(1).amax(1)
    assert bool((off <= largest / 254 + largest * 2**-11).all())


@pytest.mark.parametrize("shape", [(64, 64), (320, 64, 3, 3), (7, 5001), (4097, 1)])
def test_packing_in_six_bits_is_close_and_three_quarters_the_size(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random)
    packed = packing.pack({"w": weight}, 6)
    assert packed["w"].dtype is torch.uint8
    assert packed["w"].numel() == shape[0] * 3 * -(-weight[0].numel() // 4)
    back = packing.unpack(packed)["w"]
    assert back.dtype is torch.float16 and back.shape == shape
    plain = (weight.flatten(1) / (scale := weight.flatten(1).abs().amax(1, True) / 31)).round() * scale
    error, of_plain = ((found.float().flatten(1) - weight.flatten(1)).norm() for found in (back, plain))
    in_fp16 = 2**-11 * weight.norm()
    assert error <= of_plain + in_fp16 and error < 0.04 * weight.norm()


def test_six_bits_keep_every_integer_in_its_place() -> None:
    whole = torch.arange(-31, 32).float().repeat(70)[None].repeat(2, 1)
    assert torch.equal(packing.unpack(packing.pack({"w": whole}, 6))["w"].float(), whole)
    with pytest.raises(ValueError, match="bits: 4 is not one of 6, 8"):
        packing.pack({"w": whole}, 4)


def test_packing_leaves_small_tensors_and_zero_rows_alone() -> None:
    tensors = {"bias": torch.randn(5000).half(), "few": torch.randn(8, 8).half(), "none": torch.zeros(64, 64)}
    packed = packing.pack(tensors)
    assert packed["bias"].dtype is packed["few"].dtype is torch.float16
    back = packing.unpack(packed)
    assert back.keys() == tensors.keys()
    assert torch.equal(back["bias"], tensors["bias"]) and torch.equal(back["few"], tensors["few"])
    assert not back["none"].any()


def test_a_packed_tensor_without_its_factors_is_named() -> None:
    packed = packing.pack({"layer.weight": torch.randn(64, 64)})
    del packed["layer.weight" + packing.SCALE]
    with pytest.raises(KeyError, match=r"layer\.weight is in 8 bits .* not whole"):
        packing.unpack(packed)
    for part in (packing.SCALE, packing.SHAPE):
        packed = packing.pack({"layer.weight": torch.randn(64, 64)}, 6)
        del packed["layer.weight" + part]
        with pytest.raises(KeyError, match=rf"layer\.weight is in 6 bits and layer\.weight\{part} is missing"):
            packing.unpack(packed)


def test_the_shipped_weights_are_small_and_everything_the_demo_uses_is_there() -> None:
    parts = {name for names in shipped.SOURCES.values() for name in names}
    files = {path.name: path.stat().st_size for path in shipped.SHIPPED.glob("*.safetensors")}
    assert files.keys() == parts | shipped.FOLDERS.keys() - shipped.SOURCES.keys()
    assert sum(files.values()) < 40 * MEGABYTE


def test_models_are_unpacked_once_and_again_when_one_changes(tmp_path: Path) -> None:
    models = shipped.install(tmp_path, (shipped.PICTURE_LORA, shipped.XS))
    lora, control = models / "loras" / shipped.PICTURE_LORA, models / "controlnext" / shipped.XS
    before = lora.stat().st_mtime_ns, control.stat().st_mtime_ns
    shipped.install(tmp_path, (shipped.PICTURE_LORA, shipped.XS))
    assert (lora.stat().st_mtime_ns, control.stat().st_mtime_ns) == before
    control.unlink()
    stamp = models / shipped.STAMP
    stamp.write_text(json.dumps({**json.loads(stamp.read_text("utf-8")), shipped.PICTURE_LORA: "older"}), "utf-8")
    shipped.install(tmp_path, (shipped.PICTURE_LORA, shipped.XS))
    assert control.is_file() and lora.stat().st_mtime_ns > before[0]


def test_a_missing_file_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"picture_dusk\.safetensors is missing\. .*git checkout"):
        shipped.install(tmp_path / "base", (shipped.PICTURE_LORA,), shipped=tmp_path)
    assert not list((tmp_path / "base").rglob("*.safetensors"))


def test_a_hint_has_the_pictures_of_its_scene_under_their_names() -> None:
    scene = picturebook.draw_children(SCENE_SEED, 3, CHILDREN.side)
    hint = draw_hint(CHILDREN, 3)
    assert hint.caption == scene.caption and HINTS == picturebook.HINTS
    for name in HINTS:
        assert np.array_equal(getattr(hint, name), scene.hint(name)) and getattr(hint, name).any(), name


def test_the_sheet_shows_every_cell_in_its_place() -> None:
    hints = {row: draw_hint(UNET_BOOK, index) for row, index in enumerate(UNET_BOOK.scenes[:2])}
    columns = UNET_BOOK.columns[:2]
    colors = {(0, 0): "red", (0, 1): "lime", (1, 0): "blue", (1, 1): "yellow"}
    f1 = dict.fromkeys(colors, 0.5)
    sheet = demo_sheet.compose(UNET_BOOK, hints, columns, {place: png(color) for place, color in colors.items()}, f1)
    found = {
        color: np.argwhere((np.asarray(sheet) == Image.new("RGB", (1, 1), color).getpixel((0, 0))).all(2))
        for color in colors.values()
    }
    assert all(len(places) == UNET_BOOK.side**2 for places in found.values())
    top, left = (lambda color: found[color][0].tolist()[0]), (lambda color: found[color][0].tolist()[1])
    assert top("red") == top("lime") < top("blue") == top("yellow")
    assert left("red") == left("blue") < left("lime") == left("yellow")


def test_a_corner_shows_what_a_control_was_given_where_it_is_not_the_outlines() -> None:
    hint = draw_hint(BOOK, BOOK.scenes[0])
    columns = tuple(column for column in BOOK.columns if column.given(hint) is not None)
    assert [column.title for column in columns] == ["depth", "mask 1.2", "edges + depth"]
    cells = {(0, place): png("red", BOOK.side) for place in range(len(columns))}
    sheet = np.asarray(demo_sheet.compose(BOOK, {0: hint}, columns, cells, dict.fromkeys(cells, 0.5)))
    side = BOOK.side // demo_sheet.INSET
    for place, column in enumerate(columns):
        left = 10 + (place + 1) * (BOOK.side + 10)
        corner = sheet[26 + BOOK.side - side : 26 + BOOK.side, left + BOOK.side - side :][:, :side]
        small = np.asarray(Image.fromarray(column.given(hint)).resize((side, side)))
        assert np.array_equal(corner, small), column.title


@pytest.mark.comfy
def test_the_demo_draws_through_the_server_what_the_edges_show(
    server: ComfyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row of the sheet without and with ControlNet-XS, as `run.py demo` queues it."""
    shipped.install(server.base)
    hints = {0: draw_hint(UNET_BOOK, UNET_BOOK.scenes[0])}
    columns = UNET_BOOK.columns[:2]
    f1 = demo_sheet.scores(hints, demo_sheet.draw_cells(server, UNET_BOOK, hints, columns))
    assert f1[0, 1] > f1[0, 0] + 0.2
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0].strip() for line in said] == [
        "picture 1 of 2: without control",
        "picture 2 of 2: ControlNet-XS edges",
    ]


def test_every_picture_of_the_demo_has_its_words() -> None:
    assert [column.words for column in CHILDREN.columns][1:] == [f"pose, strength {s}" for s in (0.5, 1)]
    assert [column.words for column in UNET_BOOK.columns] == [
        "without control",
        "ControlNet-XS edges, strength 0.5",
        "ControlNet-XS edges, strength 1",
    ]
    assert [column.words for column in BOOK.columns] == [
        "without control",
        "edges, strength 0.5",
        "edges, strength 1",
        "depth, strength 1",
        "mask, strength 1.2",
        "edges and depth, strength 0.6",
        "edges, strength 1 and a LoRA",
    ]
    hints = {row: draw_hint(BOOK, index) for row, index in enumerate(BOOK.scenes)}
    graph = demo_sheet.workflow(BOOK, hints, BOOK.columns)
    names = demo_sheet.pictures(graph, BOOK.columns)
    assert len(names) == len(hints) * len(BOOK.columns)
    assert {graph[name]["class_type"] for name in names} == {"KSampler"}


def test_parts_of_the_sheet_stand_below_each_other_and_whole() -> None:
    parts = [("first", Image.new("RGB", (40, 30), "red")), ("second", Image.new("RGB", (60, 20), "lime"))]
    sheet = np.asarray(demo_sheet.stacked(parts))
    red, lime = ((sheet == color).all(2) for color in ((255, 0, 0), (0, 255, 0)))
    assert red.sum() == 40 * 30 and lime.sum() == 60 * 20
    assert np.argwhere(red)[-1][0] < np.argwhere(lime)[0][0]
    assert sheet.shape[1] == 60


def test_what_to_do_next_names_a_template_that_there_is() -> None:
    from comfyui_controlnext.tools.workflows.demo_graphs import demo

    told = demo_sheet.AFTERWARDS.format(seconds=61.4, sheet="a/sheet.png", pack="Pack")
    assert f"'{demo().title}'" in told and "Done in 61 s. Open a/sheet.png" in told and "run.py comfy" in told
