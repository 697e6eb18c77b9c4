"""From a file's header to a row of the table, or an error that says what the file is and what to do with it.

Names, shapes and our own metadata decide, never the file's name. Where one set of names serves several variants the
base model decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..models.controlnext import ControlNeXt
from .checkpoint import CheckpointError, Header, compare_shapes
from .encodable import cut
from .key_maps import strip_prefix
from .metadata import ControlMetadata, read_metadata
from .specs import BUILDS, SPECS, Family, Spec, config_of

BUNDLE_ENCODER, BUNDLE_WEIGHTS = "controlnext.", "unet."
MARKS = ("mid_convs.1.weight", "down_res.0.norm1.weight")
"""Two names that every encoder has and no other file does."""


class DetectionError(CheckpointError):
    """A readable file that is not what is wanted here."""


@dataclass(frozen=True, slots=True)
class ControlFile:
    """A ControlNeXt file, before the base model is known."""

    header: Header
    build: str
    out_channels: int
    encoder: dict[str, str]
    """Published name -> name in the file."""
    weights: dict[str, str]
    """Name of a UNet weight -> name in the file; empty unless the file bundles them."""
    metadata: ControlMetadata

    @property
    def candidates(self) -> list[Spec]:
        """The rows that this file may be, the one its metadata names alone where it names one."""
        if self.metadata.spec:
            return [SPECS[self.metadata.spec]]
        return _rows_of(self.build)


def read_control_file(header: Header) -> ControlFile:
    """Recognise a ControlNeXt encoder, alone or bundled with UNet weights.

    Raises DetectionError for anything else, naming what the file is where that can be told.
    """
    encoder, weights = _split(header.shapes)
    if not all(mark in encoder for mark in MARKS):
        raise DetectionError(f"{header.path}: {_describe_foreign(header.shapes)}")
    shapes = {name: header.shapes[found] for name, found in encoder.items()}
    build = _build_of(shapes)
    out_channels = next(iter(shapes["mid_convs.1.weight"]), 0)
    problems = compare_shapes(_expected_shapes(build, out_channels or None), shapes)
    if problems:
        titles = " or ".join(spec.title for spec in _rows_of(build))
        raise DetectionError(
            f"{header.path}: looks most like {titles}, but does not match it: {problems}. "
            "The file is damaged, pruned or of an unknown kind: download it again."
        )
    metadata = read_metadata(header)
    if metadata.spec and not _same_names(SPECS[metadata.spec].build, build):
        raise DetectionError(
            f"{header.path}: its metadata says {metadata.spec}, but its names and shapes are those of "
            f"{_names(_rows_of(build))}. The file was put together wrongly: save or download it again."
        )
    return ControlFile(header, build, out_channels, encoder, weights, metadata)


def holds_encoder(header: Header) -> bool:
    """True means that the file has an encoder in it, alone or with UNet weights."""
    encoder, _ = _split(header.shapes)
    return all(mark in encoder for mark in MARKS)


def choose_spec(file: ControlFile, family: Family, variant: str = "auto") -> Spec:
    """The row for this file on a base of this family.

    variant: `auto`, or a row's name. Raises DetectionError where file, base model and variant do not go together.
    """
    path = file.header.path
    if variant != "auto":
        same_names = _rows_of(file.build)
        if SPECS[variant] not in same_names:
            raise DetectionError(
                f"{path}: variant={variant} needs other weights than this file holds; it can be "
                f"{_names(same_names)}. Set variant to one of these or to auto."
            )
        candidates = [SPECS[variant]]
    else:
        candidates = file.candidates
    fitting = [spec for spec in candidates if spec.family is family]
    if fitting:
        return fitting[0]
    raise DetectionError(
        f"{path}: is a control for {' / '.join(dict.fromkeys(s.family.value for s in candidates))} "
        f"({_names(candidates)}), but the connected model is {family.value}. Connect a checkpoint of that family, "
        f"or choose a control made for {family.value}."
    )


def _rows_of(build: str) -> list[Spec]:
    """The rows whose encoders have the names and shapes of this build."""
    return [spec for spec in SPECS.values() if _same_names(spec.build, build)]


def _names(specs: list[Spec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _split(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, str], dict[str, str]]:
    """Encoder names and bundled UNet names, each -> name in the file, outer prefixes stripped."""
    weights = {n.removeprefix(BUNDLE_WEIGHTS): n for n in shapes if n.startswith(BUNDLE_WEIGHTS)}
    encoder = [n for n in shapes if not n.startswith(BUNDLE_WEIGHTS)]
    try:
        return {bare: n for n, bare in strip_prefix(encoder).items()}, weights
    except CheckpointError:  # several parts under several prefixes: no encoder, told apart by `_describe_foreign`
        return {n: n for n in encoder}, weights


def _build_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The build whose names these are, by the fewest names that tell them apart."""
    if "embedding.0.weight" not in shapes:
        return "gen1a" if len(shapes.get("mid_convs.0.2.weight", ())) == 4 else "gen1a_norm"
    if "down_sample.2.conv.weight" in shapes:
        return "gen1b_scale" if "scale" in shapes else "gen1b"
    return "gen2"


@functools.cache
def _expected_shapes(build: str, out_channels: int | None = None) -> dict[str, tuple[int, ...]]:
    spec = next(spec for spec in SPECS.values() if spec.build == build)
    net = ControlNeXt(config_of(spec, out_channels), device="meta")
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


@functools.cache
def _same_names(one: str, other: str) -> bool:
    return one == other or (
        BUILDS[one].out_channels == BUILDS[other].out_channels and _expected_shapes(one) == _expected_shapes(other)
    )


Names = Mapping[str, tuple[int, ...]]


def _any(*parts: str) -> Callable[[Names], bool]:
    return lambda names: any(part in name for name in names for part in parts)


def _starts(*starts: str) -> Callable[[Names], bool]:
    return lambda names: any(name.startswith(starts) for name in names)


FOREIGN: tuple[tuple[Callable[[Names], bool], str], ...] = (
    (
        _any("enc_zero_convs_in.0.0.weight", "control_to_base_for_conv_in.weight", "ctrl_conv_in.weight"),
        "is a ControlNet-XS, another method than ControlNeXt. Load it with Load ControlNet-XS; it stacks with "
        "ControlNeXt.",
    ),
    (
        _any(".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", "lora_unet_", "lora_te"),
        "is a LoRA. Put it into models/loras and use a LoRA loader; it stacks with ControlNeXt.",
    ),
    (
        _starts("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner."),
        "is a full checkpoint. Put it into models/checkpoints, load it with Load Checkpoint, connect its MODEL here, "
        "and choose a ControlNeXt encoder (controlnet.safetensors) as control_name.",
    ),
    (
        _any(
            "controlnet_cond_embedding.",
            "input_hint_block.",
            "zero_convs.0.0.",
            "controlnet_down_blocks.",
            "controlnet_blocks.",
            "lora_controlnet",
        ),
        "is a classic ControlNet. Load it with the stock Load ControlNet Model node; it chains with ControlNeXt.",
    ),
    (
        _any(
            "body.0.resnets.0.block1.",
            "body.0.in_conv.",
            "body.0.block1.",
            "adapter.conv_in.",
            "adapter.body.",
        ),
        "is a T2I-Adapter. Load it with the stock Load ControlNet Model node; it chains with ControlNeXt.",
    ),
    (
        _any("control_image_embed.", "joint_transformer_blocks.", "transformer_blocks.0.attn.to_q"),
        "is a control for a diffusion transformer (SD3 or later), which this node does not support. "
        "Choose a ControlNeXt for SD1.5, SDXL or SVD.",
    ),
    (
        _any("to_out.0.weight", "attn2.to_", "attn1.to_"),
        "holds UNet weights and no encoder. It is the other half of a ControlNeXt: choose it as weights_name, and the "
        "encoder that came with it (controlnet.safetensors) as control_name.",
    ),
    (
        _starts("encoder.", "decoder.", "quant_conv.", "taesd_"),
        "is an image autoencoder. Put it into models/vae and load it with Load VAE.",
    ),
    (
        _starts("text_model.", "transformer.", "vision_model."),
        "is a text or image encoder. Put it into models/text_encoders or models/clip_vision.",
    ),
)


def _describe_foreign(shapes: Names) -> str:
    """What a file without an encoder's marks is, in words, and what to do with it."""
    for is_kind, words in FOREIGN:
        if is_kind(shapes):
            return words
    nearest, common = max(
        ((spec, len(_expected_shapes(spec.build).keys() & shapes.keys())) for spec in SPECS.values()),
        key=lambda pair: pair[1],
    )
    first = ", ".join(map(cut, list(shapes)[:3])) or "none"
    near = f" Nearest is {nearest.title} with {common} names in common." if common else ""
    return (
        f"is not a ControlNeXt encoder: {len(shapes)} tensors ({first}, ...), {' and '.join(MARKS)} missing.{near} "
        "Choose the controlnet.safetensors of a ControlNeXt release."
    )
