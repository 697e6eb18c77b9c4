"""Controls in training: a network, fresh or from a file, and its part in a forward pass of the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from ...controlnext_core import checkpoint
from ...controlnext_core.comfy_adapter.bases.base import LoadedBase, check_pair
from ...controlnext_core.comfy_adapter.bases.forward_options import TransformerOptions
from ...controlnext_core.comfy_adapter.files.folders import ChosenWeights, choose_weights
from ...controlnext_core.comfy_adapter.files.host_weights import host_named, shape_of
from ...controlnext_core.comfy_adapter.files.loading import differences_of, load_controlnext
from ...controlnext_core.comfy_adapter.files.saving import ADAPTER_FILE
from ...controlnext_core.comfy_adapter.files.weights import base_weights
from ...controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs
from ...controlnext_core.comfy_adapter.sampling.host_layers import Fp32Norms, WholeLayers
from ...controlnext_core.comfy_adapter.sampling.next_forward import Job, collect
from ...controlnext_core.comfy_adapter.sampling.xs_control import time_mix
from ...controlnext_core.comfy_adapter.sampling.xs_forward import Companion, XSJob, join_forward
from ...controlnext_core.control_files import write_control, write_host_control
from ...controlnext_core.detection import ControlFile, choose_spec, read_control_file
from ...controlnext_core.families import CONTEXT_FAMILIES
from ...controlnext_core.finite import check_weights
from ...controlnext_core.injection import Term, pool_to, prepare
from ...controlnext_core.latent_clips import clip_of
from ...controlnext_core.low_rank import (
    DOWN,
    UP,
    Difference,
    LowRank,
    Slice,
    in_host,
    name_of,
    read_differences,
    slice_of,
)
from ...controlnext_core.specs import SPECS, GainFormula, Spec, config_of, with_normalization, with_trained_gain
from ...controlnext_core.unet_weights import HOST_PREFIX, published_names
from ...controlnext_core.xs_convert import write as write_xs
from ...controlnext_core.xs_detection import read_xs_file
from ...controlnext_core.xs_specs import NORM_RULES, XSShape, build_config, design, heads_of
from ...models.controlnet_xs import ControlNetXS, Walk
from ...models.controlnext import ControlNeXt, PartialEncoding
from ...models.layers import zeroed
from ..choices import FUSIONS, XS
from ..config import ConfigError, TrainConfig
from ..trainables import Differences
from .clip_encoding import ClipEncoding, projected, quick_layout

XS_FAMILIES = tuple(CONTEXT_FAMILIES.values())


class TrainedControl(Protocol):
    """A control in training: a network, its part in a forward pass, and its trained file."""

    @property
    def net(self) -> nn.Module:
        """Trained network."""

    @property
    def trains_base(self) -> bool:
        """True: the weights of the base that the recipe selects train as well.

        False: only the control's network trains.
        """

    def join(
        self, options: TransformerOptions, latent: tuple[int, ...], hint: Tensor, timesteps: Tensor, strength: float
    ) -> None:
        """Add the control to the coming forward pass.

        latent: shape of the base's input; hint: (rows, 3, 8H, 8W) in [0, 1], one per row of the batch, or one per frame
        where a row is a clip; timesteps: (rows,), as for the UNet, or (1,) for all rows.
        """

    def save(
        self, stem: Path, differences: Differences, layout: str, dtype: torch.dtype, facts: Mapping[str, str]
    ) -> Path:
        """Write the trained file; differences: of the base's weights; facts: metadata of the run."""

    def check(self, header: checkpoint.Header) -> None:
        """Raise CheckpointError where a loader would refuse the trained file."""


def new_control(config: TrainConfig, facts: LoadedBase, device: torch.device) -> TrainedControl:
    """Control of this configuration for this base, its weights in fp32 on `device`, ready to train.

    Fresh weights depend only on the seed. Raises ConfigError, or ValueError where the base is of another family.
    """
    return _kind(config)(config, facts, device)


def check_base(config: TrainConfig, facts: LoadedBase) -> None:
    """Raise ConfigError or ValueError where this configuration's control is for another family of base models."""
    _kind(config).check_base(config, facts)


def load_trained(model: ModelPatcher, path: Path, config: TrainConfig) -> tuple[ModelPatcher, Any]:
    """Load (MODEL, CONTROL_NET) from a trained file. Raises CheckpointError."""
    return _kind(config).load(model, path, config.variant)


def _initialised(net: nn.Module, fresh: nn.Module, device: torch.device) -> None:
    """Copy the weights of `fresh`, of plain torch layers, into `net`, whose host layers start uninitialised."""
    checkpoint.load_strict(net, {name: t.float() for name, t in fresh.state_dict().items()}, "fresh weights")
    net.to(device).train().requires_grad_(True)


class _NeXt:
    """ControlNeXt encoder in training."""

    trains_base = True

    @staticmethod
    def check_base(config: TrainConfig, facts: LoadedBase) -> None:
        spec = SPECS[config.variant]
        place = facts.places.get(spec.fusion.site)
        check_pair(facts, spec, place.width if place else 0, f"variant {spec.name}")

    @staticmethod
    def load(model: ModelPatcher, path: Path, variant: str) -> tuple[ModelPatcher, Any]:
        loaded = load_controlnext(model, path, variant=variant)
        return loaded.model, loaded.control

    def __init__(self, config: TrainConfig, facts: LoadedBase, device: torch.device) -> None:
        spec = SPECS[config.variant]
        built = config_of(spec)
        if facts.family is spec.family:
            built = replace(built, out_channels=facts.places[spec.fusion.site].width)
        check_pair(facts, spec, built.out_channels, f"variant {spec.name}")
        self.facts = facts
        self.spec = _as_configured(spec, config)
        self.place = facts.places[spec.fusion.site]
        self.checkpointing = config.checkpointing
        self.net = ControlNeXt(built, device="meta", operations=WholeLayers)
        self._clips = ClipEncoding(self.net, self.spec, config.checkpointing)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fresh = ControlNeXt(built)
        if config.fusion == "zero_conv":
            zeroed(fresh.mid_convs[1])
        if config.init_control:
            fresh.load_state_dict(_encoder_of(Path(config.init_control), spec))
        _initialised(self.net, fresh, device)

    def join(
        self, options: TransformerOptions, latent: tuple[int, ...], hint: Tensor, timesteps: Tensor, strength: float
    ) -> None:
        clip = clip_of(self.spec.family, latent)

        def term(h: Tensor, given: TransformerOptions) -> Term:
            ready, size = quick_layout(hint.to(h.dtype)), (int(h.shape[-2]), int(h.shape[-1]))
            if clip is None:
                control = self._encode(ready, timesteps, size)
            else:
                control = self._clips.encode(ready, timesteps, size, clip, latent[0])
            return Term(control, self._gains(strength), self.spec.fusion)

        collect(options, self.place, latent, Job((), term, self))

    def _encode(self, hint: Tensor, timesteps: Tensor, size: tuple[int, int]) -> Tensor:
        """Features (rows, C, H, W), normalised and pooled, in the memory layout of inference."""
        if not self.checkpointing:
            return self._finish(self.net.begin(hint), timesteps, size)
        # in two parts, of which the backward pass stores one at a time: at full size 0.4 GiB and 0.2
        begun = checkpointed(self.net.begin, hint, use_reentrant=False, preserve_rng_state=False)
        return checkpointed(self._finish, begun, timesteps, size, use_reentrant=False, preserve_rng_state=False)

    def _finish(self, begun: PartialEncoding, timesteps: Tensor, size: tuple[int, int]) -> Tensor:
        fusion, dtype = self.spec.fusion, begun.first_half.dtype
        if not fusion.project_last:
            return prepare(self.net.finish(begun, timesteps), size, fusion).contiguous()
        return projected(
            self.net, pool_to(self.net.narrow(begun, timesteps).float(), size).to(dtype).contiguous(), size, fusion
        )

    def _gains(self, strength: float) -> tuple[float] | Tensor:
        """Gain of all rows, as a tensor with a gradient where the variant learns its scale."""
        gain = self.spec.fusion.gain
        if gain.formula is GainFormula.CONSTANT:
            return (gain.factor * strength,)
        scale = self.net.scale if gain.formula is GainFormula.LEARNED else torch.sigmoid(self.net.scale)
        return (gain.factor * strength * scale).reshape(1)

    def save(
        self, stem: Path, differences: Differences, layout: str, dtype: torch.dtype, facts: Mapping[str, str]
    ) -> Path:
        encoder = self.net.state_dict()
        weights = differences.by_weight()
        whole = {key: tensor for key, tensor in weights.items() if isinstance(key, str) and isinstance(tensor, Tensor)}
        if self.spec.on_transformer or len(whole) < len(weights):
            keyed = {in_host(key): difference for key, difference in weights.items()}
            shape_of = {HOST_PREFIX + name: shape for name, shape in differences.shapes.items()}.get
            return write_host_control(stem, encoder, keyed, self.spec, layout, dtype, facts, shape_of)
        published = published_names(whole, self.facts.key_map()) if whole else {}
        return write_control(stem, encoder, published, self.spec, layout, dtype, facts)

    def check(self, header: checkpoint.Header) -> None:
        read_control_file(header)


class _XS:
    """ControlNet-XS in training: the released size rules, `xs_ratio` of the base's widths."""

    rule = NORM_RULES["official"]
    trains_base = False

    @staticmethod
    def check_base(config: TrainConfig, facts: LoadedBase) -> None:
        _xs_shape(config, facts)

    @staticmethod
    def load(model: ModelPatcher, path: Path, variant: str) -> tuple[ModelPatcher, Any]:
        return model, load_controlnet_xs(path).control

    def __init__(self, config: TrainConfig, facts: LoadedBase, device: torch.device) -> None:
        self.shape = _xs_shape(config, facts)
        self.heads = heads_of(self.shape, (), f"xs_ratio {config.xs_ratio:g}")
        built = build_config(self.shape, self.heads, self.rule)
        operations = Fp32Norms if self.shape.fp32_norms else WholeLayers
        self.net = ControlNetXS(built, device="meta", operations=operations)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            fresh = ControlNetXS(built)
        if config.init_control:
            fresh.load_state_dict(_xs_tensors(Path(config.init_control), self.shape))
        _initialised(self.net, fresh, device)

    def join(
        self, options: TransformerOptions, latent: tuple[int, ...], hint: Tensor, timesteps: Tensor, strength: float
    ) -> None:
        def start(x: Tensor, context: Tensor, given: TransformerOptions) -> Companion:
            own_time = self.net.embed_time(timesteps, x.dtype) if self.net.config.own_time is not None else None
            return Companion(
                name="the control in training",
                walk=Walk(self.net, x, self.net.encode_hint(quick_layout(hint.to(x.dtype))).contiguous()),
                rows=None,
                context=context,
                strengths=(strength, strength, strength),
                mask=lambda h: None,
                own_time=own_time,
                mix=time_mix(strength),
            )

        join_forward(options, XSJob((), start, self))

    def save(
        self, stem: Path, differences: Differences, layout: str, dtype: torch.dtype, facts: Mapping[str, str]
    ) -> Path:
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.net.state_dict().items()}
        folder = layout == "xs_diffusers"
        path = stem / ADAPTER_FILE if folder else stem.with_name(f"{stem.name}.safetensors")
        layout = "xs_official" if layout == "single" else layout
        return write_xs(path, tensors, self.shape, self.heads, self.rule.name, layout, facts)

    def check(self, header: checkpoint.Header) -> None:
        read_xs_file(header)


def _kind(config: TrainConfig) -> type[_NeXt] | type[_XS]:
    """Class of the variant's control."""
    return _XS if config.variant == XS else _NeXt


def _xs_shape(config: TrainConfig, facts: LoadedBase) -> XSShape:
    if facts.family not in XS_FAMILIES:
        raise ConfigError(
            f"variant: xs is for SD1.5, SD2.1 and SDXL, and the connected model is {facts.family.value}. Connect one "
            "of these, or choose another variant."
        )
    return design(facts.config, config.xs_ratio, config.xs_own_time)


def _xs_tensors(path: Path, shape: XSShape) -> dict[str, Tensor]:
    file = read_xs_file(checkpoint.peek(path))
    if file.shape != shape:
        raise ConfigError(
            f"init_control: {path} has channels {file.shape.level_widths}, and xs_ratio makes {shape.level_widths}. "
            "Set xs_ratio and xs_own_time as they are in the file."
        )
    stored = checkpoint.load(path, file.names.values())
    check_weights(stored, str(path))
    return {ours: stored[name].float() for ours, name in file.names.items()}


def _as_configured(spec: Spec, config: TrainConfig) -> Spec:
    spec = with_normalization(spec, FUSIONS[config.fusion])
    return with_trained_gain(spec, config.gain) if config.gain else spec


def _encoder_of(path: Path, spec: Spec) -> dict[str, Tensor]:
    file = read_control_file(checkpoint.peek(path))
    found = choose_spec(file, spec.family)
    if found.build != spec.build:
        raise ConfigError(f"init_control: {path} is a {found.name}, and variant is {spec.name}. Choose the same.")
    stored = checkpoint.load(path, file.encoder.values())
    check_weights(stored, str(path))
    return {name: stored[key].float() for name, key in file.encoder.items()}


def start_from(differences: Differences, path: Path, facts: LoadedBase, model: ModelPatcher) -> None:
    """Initialise the differences from a control file, read as the loader reads it.

    Raises ConfigError where the file changes weights that are not trained here, or has another rank.
    """
    file = read_control_file(checkpoint.peek(path))
    chosen = choose_weights(file, "auto")
    if chosen.path is None:
        return
    found, slices = _by_parameter(file, chosen, facts, model)
    others = sorted(found.keys() - differences.parameters.keys())
    others = others or sorted(name for name in slices if slices[name] != differences.slices.get(name))
    if others:
        raise ConfigError(
            f"init_control: {chosen.path} changes {len(others)} weights that do not train here, first {others[0]}. Set "
            "trainable, blocks and rank as they were for that file."
        )
    try:
        differences.load(differences.tensors() | found)
    except ValueError as error:
        raise ConfigError(f"init_control: {chosen.path}: {error}") from error


def _by_parameter(
    file: ControlFile, chosen: ChosenWeights, facts: LoadedBase, model: ModelPatcher
) -> tuple[dict[str, Tensor], dict[str, Slice | None]]:
    """(differences of a file by the names of `Differences.parameters`, in fp32, slices by the names of weights)."""
    if (named := host_named(model, file, chosen)) is None:
        whole: Mapping[Any, Difference] = differences_of(file, chosen, facts.key_map(), base_weights(model)).tensors
    else:
        whole = read_differences(*named, shape_of(model), str(chosen.path))
    found: dict[str, Tensor] = {}
    for key, difference in whole.items():
        name = name_of(key).removeprefix(HOST_PREFIX)
        if isinstance(difference, LowRank):
            found[name + UP], found[name + DOWN] = difference.up.float(), difference.down.float()
        else:
            found[name] = difference.float()
    return found, {name_of(key).removeprefix(HOST_PREFIX): slice_of(key) for key in whole}
