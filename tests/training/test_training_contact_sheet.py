"""Contact sheet of a dataset: every picture beside its hint, full rows, names and captions underneath."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comfyui_controlnext.controlnext_training.data import TensorDataset, contact_sheet, open_dataset
from comfyui_controlnext.controlnext_training.data.contact_sheet import GAP, LINES, TEXT
from comfyui_controlnext.controlnext_training.plots import SMOOTH
from comfyui_controlnext.tests.fixtures.data_fixtures import write
from PIL import Image

WORDS = (1 + LINES) * round(1.35 * TEXT) + GAP


def folder_of(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Folder of uniform gray pictures with hints 20 brighter; sizes: (height, width)."""
    for number, size in enumerate(sizes):
        write(root / "images" / f"{number}.png", np.full((*size, 3), 40 * number, np.uint8))
        write(root / "hints" / f"{number}.png", np.full((*size, 3), 40 * number + 20, np.uint8))
        (root / "images" / f"{number}.txt").write_text(f"number {number}", "utf-8")
    return root


def test_a_hint_stands_beside_its_picture_and_a_row_is_full(tmp_path: Path) -> None:
    dataset = open_dataset(folder_of(tmp_path, [(64, 64)] * 5), resolution=64)
    sheet = contact_sheet(dataset, count=4, width=400, height=100)
    assert isinstance(sheet, Image.Image) and sheet.mode == "RGB"
    side = (400 - 3 * GAP) // 4  # two pairs in a row
    assert sheet.size == (400, GAP + 2 * (side + WORDS))
    values = np.asarray(sheet)[..., 0]
    for number, index in enumerate((0, 1, 2, 3)):
        row, column = divmod(number, 2)
        top, left = GAP + row * (side + WORDS), GAP + column * (2 * side + GAP)
        found = values[top : top + side, left : left + 2 * side]
        assert (found[:, :side] == 40 * index).all() and (found[:, side:] == 40 * index + 20).all(), "no bars"


def test_names_and_captions_stand_under_the_pictures(tmp_path: Path) -> None:
    dataset = open_dataset(folder_of(tmp_path, [(64, 64)] * 2), resolution=64)
    values = np.asarray(contact_sheet(dataset, width=400, height=100)).astype(int)
    side = (400 - 3 * GAP) // 4
    under = values[GAP + side :]
    line = round(1.35 * TEXT)
    for left in (GAP, 2 * GAP + 2 * side):
        cell = under[:, left : left + 2 * side]
        assert np.abs(cell[:line] - SMOOTH).sum(axis=-1).min() < 60, "the name, in blue"
        assert cell[line : 2 * line].sum(axis=-1).min() < 200, "the caption, in ink"
    assert (under[:, 2 * side + GAP + 1 : 2 * side + 2 * GAP - 1] == 255).all(), "no text reaches the neighbour"


def test_pictures_of_other_aspects_fill_their_rows_too(tmp_path: Path) -> None:
    dataset = open_dataset(folder_of(tmp_path, [(64, 128), (128, 64), (64, 64)]), resolution=64, bucket_step=8)
    sheet = np.asarray(contact_sheet(dataset, width=600, height=120))
    row = sheet[GAP + 20]
    assert (row[GAP : 600 - GAP - 3] != 255).any(axis=-1).sum() > 600 - 5 * GAP - 6, "only the gaps are white"


def test_a_sample_that_is_gone_is_left_out_and_few_are_drawn(tmp_path: Path) -> None:
    dataset = open_dataset(folder_of(tmp_path, [(64, 64)] * 2), resolution=64)
    before = contact_sheet(dataset, width=400, height=100)
    (tmp_path / "images" / "0.png").unlink()
    after = np.asarray(contact_sheet(dataset, width=400, height=100))
    assert after[GAP + 30, GAP + 30, 0] == 40 and before.getpixel((GAP + 30, GAP + 30)) == (0, 0, 0)
    (tmp_path / "images" / "1.png").unlink()
    assert contact_sheet(dataset, width=400, height=100).size == (400, GAP)


def test_images_of_the_graph_are_named_by_their_number() -> None:
    images = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(3, 64, 64, 3).contiguous()
    sheet = contact_sheet(TensorDataset(images, images, ["a", "", "c"]), width=700, height=100)
    assert np.asarray(sheet)[GAP + 10, GAP + 10, 0] == 0
