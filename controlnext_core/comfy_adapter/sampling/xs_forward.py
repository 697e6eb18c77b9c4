"""ControlNet-XS in one forward of the host's UNet: every control runs beside the base, block by block.

The wrapper and its patches exist for one call of the UNet. Patch points used: `emb_patch` (time embedding),
`input_block_patch` (before the skip is stored), `input_block_patch_after_skip` (the input of the next block),
`output_block_patch` (before the features are concatenated with the skip; the middle's correction is added at the first
of them, since only other controls' residuals come in between).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ....models.controlnet_xs import Walk, fit
from ..bases.forward_options import TransformerOptions
from ..bases.unet import AFTER_SKIP, BEFORE_OUTPUT, UNetPatches
from .next_forward import untraced

XS_KEY = "controlnext_xs"
EMB, BEFORE_SKIP = "emb_patch", "input_block_patch"


@dataclass
class Companion:
    """Control in one forward, for the rows of the batch to which it applies."""

    name: str
    walk: Walk
    rows: Tensor | None
    """Indices of those rows of the batch; None = all rows."""
    context: Tensor
    """Text context (rows, T, context_dim)."""
    strengths: tuple[float, float, float]
    """Factors of the additions to the base's encoder, middle and decoder."""
    mask: Callable[[Tensor], Tensor | None]
    """(features) -> (1 or rows, 1, H, W) in [0, 1] at their size, or None."""
    own_time: Tensor | None = None
    """Time embedding of the control, (1, D)."""
    mix: float = 0.0
    """Share of the control's time embedding in place of the base's: 0 none, 1 all of it."""

    def take(self, batch: Tensor) -> Tensor:
        """Rows of a batch to which the control applies."""
        return batch if self.rows is None else batch.index_select(0, self.rows)

    def add(self, total: Tensor, correction: Tensor, h: Tensor, strength: float) -> Tensor:
        """total + strength * mask * correction in the control's rows; all (rows, C, H, W), the correction at any size.

        h: the corrected features, used for their size.
        """
        delta = fit(correction, h)
        mask = self.mask(h)
        if mask is not None:
            delta = delta * mask.to(delta.dtype)
        if self.rows is None:
            return torch.add(total, delta, alpha=strength)
        return total.index_add(0, self.rows, delta, alpha=strength)


@dataclass(frozen=True)
class XSJob:
    """Part of one control in one forward."""

    order: tuple[Any, ...]
    """Sort key of the controls, so that the order of nodes does not change the rounding."""
    start: Callable[[Tensor, Tensor, TransformerOptions], Companion | None]
    """(x, context, transformer_options), the inputs of the UNet -> the companion, or None for no control."""
    owner: object
    """Object that joins a forward once: its next job replaces this one."""


class XSForward:
    """DIFFUSION_MODEL wrapper of one forward: installs the patches for the duration of the call."""

    def __init__(self, jobs: tuple[XSJob, ...] = ()) -> None:
        self.jobs = jobs

    def __deepcopy__(self, memo: dict[int, Any]) -> XSForward:
        return self  # packs that copy transformer_options must not copy networks with it

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Tensor | None = None,
        control: Any = None,
        transformer_options: TransformerOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        options: TransformerOptions = {**(transformer_options or {})}
        started = (job.start(x, context, options) for job in sorted(self.jobs, key=lambda job: job.order))
        companions = [companion for companion in started if companion is not None]
        if not companions:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        lockstep = Lockstep(companions, executor.class_obj, y)
        options["patches"] = lockstep.patches(options.get("patches", {}))
        options.pop("original_shape", None)  # the UNet's forward sets it: a sign that it ran
        out = executor(x, timesteps, context, y, control, options, **kwargs)
        lockstep.check_finished(ran="original_shape" in options)
        return out


def join_forward(transformer_options: TransformerOptions, job: XSJob) -> None:
    """Add a job to the options of the coming forward, in place of an earlier job of the same owner; see `collect`.

    The dictionaries and lists inside are replaced, not written to. This wrapper is the innermost one.
    """
    wrappers = dict(transformer_options.get("wrappers", {}))
    of_unet = dict(wrappers.get(WrappersMP.DIFFUSION_MODEL, {}))
    jobs = of_unet.pop(XS_KEY)[0].jobs if XS_KEY in of_unet else ()
    others = (other for other in jobs if other.owner is not job.owner)
    of_unet[XS_KEY] = [XSForward((*others, replace(job, start=untraced(job.start))))]
    transformer_options["wrappers"] = {**wrappers, WrappersMP.DIFFUSION_MODEL: of_unet}


class Lockstep:
    """UNet patches of one forward pass, with counters of the blocks done."""

    def __init__(self, companions: Sequence[Companion], unet: Any, y: Tensor | None) -> None:
        self.companions, self.unet, self.y = companions, unet, y
        self.blocks = len(companions[0].walk.net.encoder)
        self.embs: list[Tensor] = []
        self.encoded = self.decoded = 0

    def patches(self, others: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Host's patches with this pack's added: after those of ControlNeXt, before FreeU and deep shrink."""
        new = {name: list(patches) for name, patches in others.items()}
        new[EMB] = [self.mix_time, *new.get(EMB, []), self.take_time]
        new[BEFORE_SKIP] = [self.encode, *new.get(BEFORE_SKIP, [])]
        new[AFTER_SKIP] = [*new.get(AFTER_SKIP, []), self.take_base]
        outputs = new.get(BEFORE_OUTPUT, [])
        at = sum(isinstance(getattr(patch, "__self__", None), UNetPatches) for patch in outputs[:1])
        new[BEFORE_OUTPUT] = [*outputs[:at], self.decode, *outputs[at:]]
        return new

    def mix_time(self, emb: Tensor, model_channels: int, options: TransformerOptions) -> Tensor:
        """Patch `emb_patch`, first: emb + sum of mix * (own - emb), in fp32; the base uses the result too. emb:

        (B, D).
        """
        own = [c for c in self.companions if c.own_time is not None and c.mix]
        if not own:
            return emb
        plain = emb.float()
        mixed = plain
        for companion in own:
            assert companion.own_time is not None
            mix = torch.full_like(plain[:, :1], companion.mix if companion.rows is None else 0.0)
            if companion.rows is not None:
                mix = mix.index_fill(0, companion.rows, companion.mix)
            mixed = mixed + mix * (companion.own_time.float() - plain)
        return mixed.to(emb.dtype)

    def take_time(self, emb: Tensor, model_channels: int, options: TransformerOptions) -> Tensor:
        """Patch `emb_patch`, last: record the embedding, with its labels, that the base's blocks get."""
        whole = emb if self.unet.num_classes is None else emb + self.unet.label_emb(self.y)
        self.embs = [companion.take(whole) for companion in self.companions]
        return emb

    def encode(self, h: Tensor, options: TransformerOptions) -> Tensor:
        """Patch `input_block_patch`: run the control's block of this index and add its correction to the base."""
        self._expect("input", options, self.encoded)
        i, self.encoded = self.encoded, self.encoded + 1
        total = h
        for companion, emb in zip(self.companions, self.embs, strict=True):
            correction = companion.walk.encode(i, emb, companion.context)
            if correction is not None:
                total = companion.add(total, correction, h, companion.strengths[0])
        return total

    def take_base(self, h: Tensor, options: TransformerOptions) -> Tensor:
        """Patch `input_block_patch_after_skip`: pass the features to the control as the base's next block gets them."""
        for companion in self.companions:
            companion.walk.take_base(options["block"][1], companion.take(h))
        return h

    def decode(self, h: Tensor, skip: Tensor, options: TransformerOptions) -> tuple[Tensor, Tensor]:
        """Patch `output_block_patch`: add the middle's correction, once, and that of this decoder block."""
        self._expect("output", options, self.decoded)
        j, self.decoded = self.decoded, self.decoded + 1
        total = h
        for companion, emb in zip(self.companions, self.embs, strict=True):
            _, middle, decoder = companion.strengths
            if j == 0:
                total = companion.add(total, companion.walk.middle(emb, companion.context), h, middle)
            total = companion.add(total, companion.walk.decode(j), h, decoder)
        return total, skip

    def check_finished(self, ran: bool) -> None:
        """Raise RuntimeError where the UNet ran with only some of the patches; with none at all the step was cached."""
        done = self.encoded == self.decoded == self.blocks
        if not done and (ran or self.encoded or self.decoded):
            raise self._broken(
                f"{self.encoded} of {self.blocks} encoder and {self.decoded} of {self.blocks} decoder blocks ran"
            )

    def _expect(self, side: str, options: TransformerOptions, number: int) -> None:
        """Raise RuntimeError unless this block of this side is the UNet's next one."""
        if not self.embs:
            raise self._broken("its time embedding passed by our emb_patch")
        missing = side == "output" and self.encoded < self.blocks
        if missing or tuple(options["block"]) != (side, number):
            side, number = ("input", self.encoded) if missing else (side, number)
            raise self._broken(f"block {tuple(options['block'])} ran where {(side, number)} was next")

    def _broken(self, what: str) -> RuntimeError:
        names = ", ".join(companion.name for companion in self.companions)
        return RuntimeError(
            f"{names}: ControlNet-XS needs every block of the UNet in its order, with the host's patch points, but "
            f"{what}. Another node skips or replaces blocks (DeepCache and the like), or this ComfyUI's UNet has "
            "changed: take that node out, or update this pack."
        )
