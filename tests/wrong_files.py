"""Files that people put into the wrong folder, and files that are broken: a loader must refuse each in words."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_lora, make_sd15, make_stock_controlnet
from comfyui_controlnext.tools.tiny_models.layouts import Shapes, conv, linear
from comfyui_controlnext.tools.tiny_models.storage import random_tensor, save, write_atomically
from torch import Tensor

CODE_MARKER = "code_was_run"  # the folder that the pickle with code makes next to itself when its code runs
ADAPTER_WIDTHS = (8, 16, 32, 32)  # of the T2I-Adapter; published ones start at 320
XS_WIDTH = 32  # of the ControlNet-XS stream at the first level


def make_wrong_files(folder: Path) -> dict[str, Path]:
    """One file of each kind in `folder` (sound ones first), by a name for test ids. Small: 20 MB together.

    "pickle_with_code" makes the folder CODE_MARKER next to itself if anything runs what is in it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "lora": make_lora(folder / "lora.safetensors"),
        "stock_controlnet": make_stock_controlnet(folder / "stock_controlnet.pth"),
        "t2i_adapter": save(folder / "t2i_adapter.safetensors", _random(_t2i_adapter())),
        "controlnet_xs": save(folder / "controlnet_xs.safetensors", _random(_controlnet_xs())),
        "controlnet_xs_diffusers": save(
            folder / "controlnet_xs_diffusers.safetensors", _random(_controlnet_xs_diffusers())
        ),
        "checkpoint": make_sd15(folder / "checkpoint.ckpt"),
        "vae": save(folder / "vae.safetensors", _random(_vae())),
        "truncated": _truncated(folder / "truncated.safetensors"),
        "header_overflow": _bytes(folder / "header_overflow.safetensors", (2**63 - 1).to_bytes(8, "little") + b'{"a":'),
        "header_not_json": _bytes(folder / "header_not_json.safetensors", (8).to_bytes(8, "little") + b"not json"),
        "pickle_with_code": _pickle_with_code(folder / "pickle_with_code.bin"),
        "empty": _bytes(folder / "empty.safetensors", b""),
        "text": _bytes(folder / "text.safetensors", b"<html>404: this is not a model</html>\n"),
        "folder": _folder(folder / "folder.safetensors"),
    }


def _random(shapes: Shapes) -> dict[str, Tensor]:
    return {name: random_tensor(name, shape, 0.1, seed=0).half() for name, shape in shapes.items()}


def _t2i_adapter() -> Shapes:
    """A whole T2I-Adapter of the first kind (the host loads it): 8x8 pixels of 3 colours into a stack of blocks."""
    shapes = conv("conv_in", 3 * 64, ADAPTER_WIDTHS[0])
    for index in range(2 * len(ADAPTER_WIDTHS)):
        width, before = ADAPTER_WIDTHS[index // 2], ADAPTER_WIDTHS[(index - 1) // 2 if index else 0]
        if before != width:
            shapes |= conv(f"body.{index}.in_conv", before, width, 1, 1)
        shapes |= conv(f"body.{index}.block1", width, width) | conv(f"body.{index}.block2", width, width, 1, 1)
    return shapes


def _controlnet_xs() -> Shapes:
    """The names that tell a published ControlNet-XS apart, a few of its 400."""
    shapes = conv("control_model.input_blocks.0.0", 4, XS_WIDTH)
    shapes |= conv("enc_zero_convs_in.0.0", 320, 320, 1, 1) | conv("enc_zero_convs_out.0.0", XS_WIDTH, 320, 1, 1)
    shapes |= conv("dec_zero_convs_out.0.0", 4 * XS_WIDTH, 1280, 1, 1)
    shapes |= conv("middle_block_out.0", 4 * XS_WIDTH, 1280, 1, 1)
    shapes |= conv("input_hint_block.0", 3, 16) | conv("input_hint_block.14", 256, XS_WIDTH)
    return shapes | linear("control_model.time_embed.0", XS_WIDTH, 4 * XS_WIDTH) | {"scale_list": (25,)}


def _controlnet_xs_diffusers() -> Shapes:
    """Names of the adapter's tensors in diffusers."""
    shapes = conv("conv_in", 4, XS_WIDTH) | conv("control_to_base_for_conv_in", XS_WIDTH, 320, 1, 1)
    shapes |= conv("controlnet_cond_embedding.conv_in", 3, 16)
    shapes |= conv("controlnet_cond_embedding.conv_out", 256, XS_WIDTH)
    shapes |= conv("down_blocks.0.base_to_ctrl.0", 320, 320, 1, 1)
    shapes |= conv("down_blocks.0.ctrl_to_base.0", XS_WIDTH, 320, 1, 1)
    shapes |= conv("mid_block.ctrl_to_base", 4 * XS_WIDTH, 1280, 1, 1)
    shapes |= conv("up_connections.0.ctrl_to_base.0", 4 * XS_WIDTH, 1280, 1, 1)
    return shapes | linear("time_embedding.linear_1", XS_WIDTH, 4 * XS_WIDTH)


def _vae() -> Shapes:
    """Ends of an autoencoder, as in a VAE file."""
    shapes = conv("encoder.conv_in", 3, 16) | conv("encoder.conv_out", 16, 8) | conv("decoder.conv_in", 4, 16)
    shapes |= conv("decoder.conv_out", 16, 3) | conv("quant_conv", 8, 8, 1, 1)
    return shapes | conv("post_quant_conv", 4, 4, 1, 1)


def _truncated(path: Path) -> Path:
    """A ControlNeXt encoder whose download stopped halfway."""
    make_controlnext(path, "gen2", dtype=torch.float16)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return path


class _MakesMarker:
    """Unpickles into a call of os.mkdir."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def _pickle_with_code(path: Path) -> Path:
    """A torch file with an encoder's tensor and, beside it, code."""
    marker = path.with_name(CODE_MARKER)
    content = {"mid_convs.1.weight": torch.zeros(320, 256, 1, 1), "down_res": _MakesMarker(marker)}
    return write_atomically(path, lambda file: torch.save(content, file))


def _bytes(path: Path, content: bytes) -> Path:
    return write_atomically(path, lambda file: file.write_bytes(content))


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path
