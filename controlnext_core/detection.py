"""Detection of a control from a file's header: a row of the table, or an error that names the file's kind and a remedy.

Names, shapes and this pack's metadata decide, never the file's name. Where one set of names serves several variants,
the base model decides.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..models.controlnext import ControlNeXt
from .checkpoint import CheckpointError, Header, compare_shapes
from .encodable import cut
from .foreign_files import Names, foreign_kind
from .key_maps import strip_prefix
from .metadata import ControlMetadata, read_metadata
from .specs import BUILDS, SPECS, Family, Spec

BUNDLE_ENCODER, BUNDLE_WEIGHTS, BUNDLE_BASE = "controlnext.", "unet.", "base."
"""Prefixes of names in a bundled file: the encoder, UNet weights by published names, weights of any base by host
names."""
MARKS = ("mid_convs.1.weight", "down_res.0.norm1.weight")
"""Names of two tensors that every encoder has and no other file does."""


class DetectionError(CheckpointError):
    """Error for a readable file of the wrong kind."""


@dataclass(frozen=True, slots=True)
class ControlFile:
    """ControlNeXt file, before the base model is known."""

    header: Header
    build: str
    out_channels: int
    encoder: dict[str, str]
    """Published name -> name in the file."""
    weights: dict[str, str]
    """Name of a weight of the base -> name in the file; empty unless the file bundles them."""
    host_names: bool
    """True: `weights` has host names, full or low-rank (`low_rank`). False: published names."""
    metadata: ControlMetadata

    @property
    def candidates(self) -> list[Spec]:
        """Rows of the table that the file may belong to; only the row named in its metadata, where there is one."""
        return [SPECS[self.metadata.spec]] if self.metadata.spec else self.rows

    @property
    def rows(self) -> list[Spec]:
        """Rows with these names and shapes.

        An encoder of the published width is for a UNet: those for transformers are wider.
        """
        of_unets = self.out_channels == BUILDS[self.build].out_channels
        return [spec for spec in _rows_of(self.build) if not (of_unets and spec.on_transformer)]


def read_control_file(header: Header) -> ControlFile:
    """Recognise a ControlNeXt encoder, with or without bundled weights of its base.

    Raises DetectionError for any other file, with its kind where that can be recognised.
    """
    encoder, weights, host_names = _split(header.shapes)
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
    return ControlFile(header, build, out_channels, encoder, weights, host_names, metadata)


def holds_encoder(header: Header) -> bool:
    """True: the file contains an encoder, with or without UNet weights. False: it contains none."""
    encoder, _, _ = _split(header.shapes)
    return all(mark in encoder for mark in MARKS)


def choose_spec(file: ControlFile, family: Family, variant: str = "auto") -> Spec:
    """Row of the table for this file on a base of this family.

    variant: `auto`, or a row's name. Raises DetectionError where file, base model and variant do not match.
    """
    path = file.header.path
    if variant != "auto":
        if SPECS[variant] not in file.rows:
            raise DetectionError(
                f"{path}: variant={variant} needs other weights than this file holds; it can be "
                f"{_names(file.rows)}. Set variant to one of these or to auto."
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
    """Rows whose encoders have the names and shapes of this build."""
    return [spec for spec in SPECS.values() if _same_names(spec.build, build)]


def _names(specs: list[Spec]) -> str:
    return ", ".join(spec.name for spec in specs)


def _split(shapes: Names) -> tuple[dict[str, str], dict[str, str], bool]:
    """(encoder names -> names in the file, bundled weight names -> names in the file, host_names), outer prefixes
    removed.
    """
    host_names = any(name.startswith(BUNDLE_BASE) for name in shapes)
    bundle = BUNDLE_BASE if host_names else BUNDLE_WEIGHTS
    weights = {n.removeprefix(bundle): n for n in shapes if n.startswith(bundle)}
    encoder = [n for n in shapes if not n.startswith(bundle)]
    try:
        return {bare: n for n, bare in strip_prefix(encoder).items()}, weights, host_names
    except CheckpointError:  # several parts under several prefixes: no encoder, told apart by `_describe_foreign`
        return {n: n for n in encoder}, weights, host_names


def _build_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Build with these names, recognised by the fewest names that distinguish it."""
    if "embedding.0.weight" not in shapes:
        return "gen1a" if len(shapes.get("mid_convs.0.2.weight", ())) == 4 else "gen1a_norm"
    if "down_sample.2.conv.weight" in shapes:
        return "gen1b_scale" if "scale" in shapes else "gen1b"
    return "gen2"


@functools.cache
def _expected_shapes(build: str, out_channels: int | None = None) -> dict[str, tuple[int, ...]]:
    config = BUILDS[build] if out_channels is None else replace(BUILDS[build], out_channels=out_channels)
    net = ControlNeXt(config, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


@functools.cache
def _same_names(one: str, other: str) -> bool:
    return one == other or _expected_shapes(one, 1) == _expected_shapes(other, 1)


def _describe_foreign(shapes: Names) -> str:
    """Kind of a file that has no encoder, in words, with the remedy."""
    if words := foreign_kind(shapes):
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
