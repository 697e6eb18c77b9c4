"""Loader of ControlNeXt files: from a file to a control managed by the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher

from ....models.controlnext import ControlNeXt
from ... import checkpoint
from ...detection import ControlFile, choose_spec, read_control_file
from ...key_maps import KeyMap
from ...low_rank import LOW_RANK, Differences
from ...metadata import read_metadata
from ...specs import Family, Spec, config_of, with_normalization, with_trained_gain
from ...unet_weights import BaseWeights, WeightsKind, decide_kind, host_differences, published_base
from ..bases.base import check_pair
from ..bases.table import loaded_base
from ..sampling.host_layers import WholeLayers
from ..sampling.networks import into_host
from ..sampling.next_control import ControlNeXtControl, LoadedControlNeXt
from .folders import ChosenWeights, choose_weights
from .host_weights import add_host_differences, added_how, host_named, put_on
from .weights import base_weights
from .whole_unets import is_whole_unet


@dataclass(frozen=True)
class Loaded:
    """Outputs of the loader node, and the text shown on it."""

    model: ModelPatcher
    control: ControlNeXtControl
    report: str
    cautions: tuple[str, ...] = ()
    """Warnings for the user."""


def load_controlnext(
    model: ModelPatcher,
    path: Path,
    weights_name: str = "auto",
    weights_strength: float = 1.0,
    variant: str = "auto",
    weights_kind: str = "auto",
) -> Loaded:
    """Load an encoder and add its UNet weights to a clone of `model`: both, or an error.

    weights_name: see `folders.choose_weights`; weights_kind: `auto`, `difference`, `full` or `low_rank`. Raises
    CheckpointError, DetectionError or ValueError naming the file and what to do.
    """
    file = read_control_file(checkpoint.peek(path))
    base = loaded_base(model.model)
    check_pair(base, choose_spec(file, base.family, variant), file.out_channels, str(path))
    control = load_control(file, base.family, variant)
    chosen = choose_weights(file, weights_name)
    report = [f"{file.header.path.name}: {control.net.spec.title} ({control.net.spec.name})"]
    if chosen.path is None or weights_strength == 0:
        whose = "base" if control.net.spec.on_transformer else "UNet"
        report.append(f"{whose} weights: {chosen.why if chosen.path is None else 'off (strength 0)'}")
        cautions = _without_weights(file, chosen, model)
        return Loaded(model.clone(), control, "\n".join(report), cautions)
    control = ControlNeXtControl(replace(control.net, weights_source=str(chosen.path)))
    if (named := host_named(model, file, chosen)) is not None:
        patched, line = put_on(model, named, chosen, weights_kind, weights_strength)
        return Loaded(patched, control, "\n".join([*report, line]))
    found = differences_of(file, chosen, base.key_map(), base_weights(model), weights_kind)
    differences: Differences = {name: tensor for name, tensor in found.tensors.items()}
    report.append(
        f"UNet weights: {chosen.why}; {found.kind.value}, {len(found.tensors)} of {found.in_file} tensors, "
        f"strength {weights_strength:g}{added_how(model, differences)}"
    )
    patched = add_host_differences(model, differences, weights_strength, str(chosen.path))
    return Loaded(patched, control, "\n".join(report), found.cautions)


def _without_weights(file: ControlFile, chosen: ChosenWeights, model: ModelPatcher) -> tuple[str, ...]:
    """Warning for a control that was published with UNet weights and is loaded without them.

    The authors' files have none of this pack's metadata, and all of them come with weights. A whole UNet of Load
    ControlNeXt UNet contains them already.
    """
    published = file.metadata.spec is None and not all(spec.on_transformer for spec in file.candidates)
    if chosen.path is not None or is_whole_unet(model) or not (published or file.weights):
        return ()
    return (
        f"{file.header.path.name}: was published with UNet weights and is loaded without them, so the control is weak "
        "or wrong. Choose them as weights_name, or put them beside the control as unet.safetensors.",
    )


@dataclass(frozen=True)
class FoundDifferences:
    """Weight differences of the base that a file holds, or that follow from its full weights."""

    tensors: dict[str, torch.Tensor]
    """Differences by host name, with `diffusion_model.`; zero ones are left out."""
    kind: WeightsKind
    in_file: int
    """Number of tensors in the file."""
    cautions: tuple[str, ...] = ()
    """Warnings for the user."""


def differences_of(
    file: ControlFile, chosen: ChosenWeights, key_map: KeyMap, base: BaseWeights, weights_kind: str = "auto"
) -> FoundDifferences:
    """Weight differences of the chosen file for a base model.

    Raises CheckpointError, for the same reasons as `unet_weights.host_differences`.
    """
    source, tensors = str(chosen.path), _weights_of(file, chosen)
    kind = _kind_of(file, chosen, weights_kind)
    if kind is None:
        kind = decide_kind(tensors, published_base(tensors, key_map, base, source), source)
    found = host_differences(tensors, key_map, base, kind, source)
    cautions: tuple[str, ...] = ()
    if weights_kind != "auto":
        cautions = _other_kind(tensors, published_base(tensors, key_map, base, source), kind, source)
    return FoundDifferences(found, kind, len(tensors), cautions)


def _other_kind(
    tensors: Mapping[str, torch.Tensor], base: BaseWeights, kind: WeightsKind, source: str
) -> tuple[str, ...]:
    """Warning where the weights look like another kind than the chosen one; none where the kind cannot be measured."""
    try:
        seen = decide_kind(tensors, base, source)
    except checkpoint.CheckpointError:
        return ()
    if seen is kind:
        return ()
    return (
        f"{source}: weights_kind is {kind.value}, but the weights look like {seen.value}, and the model "
        "is damaged by them. Set weights_kind to auto.",
    )


def _weights_of(file: ControlFile, chosen: ChosenWeights) -> Mapping[str, torch.Tensor]:
    """UNet tensors of the chosen file, by published name; each is read at the time of access."""
    assert chosen.path is not None
    return checkpoint.open_tensors(chosen.path, file.weights if chosen.bundled else None)


def _kind_of(file: ControlFile, chosen: ChosenWeights, weights_kind: str) -> WeightsKind | None:
    """Kind of weights according to the user or the metadata; None: to be measured."""
    if weights_kind == LOW_RANK:
        raise checkpoint.CheckpointError(
            f"{chosen.path}: holds whole weights, no low-rank differences (.up, .down). Set weights_kind to auto."
        )
    if weights_kind != "auto":
        return WeightsKind(weights_kind)
    assert chosen.path is not None
    metadata = file.metadata if chosen.bundled else read_metadata(checkpoint.peek(chosen.path))
    return WeightsKind(metadata.weights_kind) if metadata.weights_kind else None


def load_control(file: ControlFile, family: Family, variant: str = "auto") -> ControlNeXtControl:
    """Build the encoder of a recognised file for a base of this family.

    Raises DetectionError where file, family and variant do not match, CheckpointError for a damaged file.
    """
    spec = _as_trained(choose_spec(file, family, variant), file)
    found = checkpoint.load(file.header.path, file.encoder.values())
    tensors = {name: found[stored] for name, stored in file.encoder.items()}
    net = ControlNeXt(config_of(spec, file.out_channels), device="meta", operations=WholeLayers)
    patcher, uid = into_host(net, tensors, spec.build, str(file.header.path))
    scale = float(net.scale) if net.config.learned_scale else None
    return ControlNeXtControl(LoadedControlNeXt(patcher, spec, file.header.path.name, uid, scale))


def _as_trained(spec: Spec, file: ControlFile) -> Spec:
    """Row of the variant, updated from the file's metadata about its training."""
    if file.metadata.normalization:
        spec = with_normalization(spec, file.metadata.normalization)
    return spec if file.metadata.gain is None else with_trained_gain(spec, file.metadata.gain)
