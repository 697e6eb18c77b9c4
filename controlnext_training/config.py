"""Everything that a training run depends on, in one dataclass.

The keys of a recipe (TOML), the flags of the command line, the node's widgets and the metadata of the saved file are
all read from `TrainConfig`. A recipe may group keys under table headings; the headings mean nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from .choices import BOUNDS, CHOICES, LAYOUTS, SUBSETS
from .schedules import Schedule

BLOCK_SIDES = ("input", "middle", "output")
PLACES = ("base", "vae", "init_control", "data", "validation_data", "cache_folder", "output_folder", "runs_folder")
"""Settings that name files and folders."""


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the key, the value and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One training run."""

    # what is trained
    variant: str = "sd15"
    """Row of the table of variants to train (sd15, sdxl, svd_v2, ...), or xs for a ControlNet-XS."""
    base: str = ""
    """Checkpoint of the base model: a path, or a name in ComfyUI's checkpoints folder. The node takes it from MODEL."""
    vae: str = ""
    """File with another autoencoder than the checkpoint's own; empty = the checkpoint's."""
    trainable: str = "to_out"
    """Which UNet weights train beside the encoder: none, to_out, attn2_to_out, up_to_out, all, or re:EXPRESSION over
    published names."""
    blocks: str = ""
    """Keep of these only the weights in some blocks of the host's UNet: input, middle, output, or input.0-5, ... with
    commas; two controls trained on disjoint blocks can be combined. Empty = all blocks."""
    fusion: str = "released"
    """How the control joins the features: released (Cross Normalization as released), paper (equation 10),
    zero_conv (a last convolution that starts at zero) or add (plain addition)."""
    gain: float = 0.0
    """Gain of the control while training, saved in the file; 0 = the variant's own. The authors took 0.35 for sparse
    and 1.0 for dense hints."""
    init_control: str = ""
    """Control file to start from; empty = fresh weights."""
    xs_ratio: float = 0.1
    """ControlNet-XS: its widths as a part of the base's."""
    xs_own_time: bool = False
    """ControlNet-XS: a time embedding of its own, as some releases have; it learns more slowly."""

    # data
    data: tuple[str, ...] = ()
    """Folders, metadata.jsonl files or tar shards, relative to the recipe's folder; or synthetic:edges:200."""
    validation_data: tuple[str, ...] = ()
    """The same for validation; empty = the first of the data, which then do not train, if there are enough."""
    hint: str = "paired"
    """Where the hint comes from: paired (a picture of its own), or canny, soft_edge, lines, blur, mask, gray."""
    resolution: int = 512
    """Side of the square whose area every picture gets, in pixels; a multiple of 64 (8 for small bases)."""
    buckets: bool = True
    """Keep aspect ratios by sorting pictures into sizes of the same area; off = square centre crops."""
    bucket_step: int = 64
    """Sides are multiples of this many pixels."""
    caption_extension: str = ".txt"
    """Suffix of the caption beside a picture."""
    clip_frames: int = 14
    """SVD: frames of a clip."""
    clip_stride: int = 3
    """SVD: every n-th frame of the source."""
    max_samples: int = 0
    """Use no more than this many pictures; 0 = all."""

    # optimisation
    steps: int = 1000
    """Steps of the optimizer."""
    batch_size: int = 1
    """Pictures in one forward pass of one process."""
    accumulation: int = 1
    """Forward passes whose gradients are averaged to one step."""
    optimizer: str = "adamw"
    """adamw, or adamw8bit, prodigy, schedulefree where their packages are installed."""
    learning_rate: float = 1e-5
    """Of the UNet's weights."""
    control_learning_rate: float = 1e-4
    """Of the encoder or the control stream."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 1e-2
    """Decoupled weight decay; of the UNet it pulls the difference to zero, that is to the base model."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients longer than this, over all that trains, are shortened to it; 0 = off."""
    schedule: str = "constant"
    """Learning rate over the steps: constant, linear, cosine, cosine_restarts, polynomial or piecewise."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    schedule_cycles: int = 1
    """cosine_restarts: cycles; piecewise: equal parts, each at a tenth of the one before."""
    schedule_power: float = 1.0
    """polynomial: the power."""
    ema_decay: float = 0.0
    """Exponential moving average of what trains, saved instead of the last weights; 0 = off."""
    ema_on_cpu: bool = True
    """Keep the moving average in host memory."""

    # objective
    objective: str = "auto"
    """What the UNet predicts: auto (as the base model says), epsilon, v, edm or flow."""
    timesteps: str = "auto"
    """Law of the timesteps: auto (uniform; svd_cosine for SVD), uniform, logit_normal or svd_cosine."""
    min_snr_gamma: float = 0.0
    """Loss weight min(SNR, gamma) / SNR; 0 = off. 5 is common."""
    noise_offset: float = 0.0
    """Standard deviation of an offset per channel added to the noise."""
    caption_dropout: float = 0.0
    """Part of the samples, drawn anew each time, that train without their caption."""
    hint_dropout: float = 0.0
    """Part of the samples, drawn anew each time, that train with a black hint."""
    mask_weight: float = 0.0
    """Loss weight 1 + this inside a sample's mask; SVD's authors took 3.2 on sure hands."""
    seed: int = 0
    """Of every random number of the run."""

    # memory and speed
    precision: str = "auto"
    """Compute in auto (bf16 where the device is quick at it, else fp32), fp32, bf16 or fp16. What trains is fp32."""
    checkpointing: bool = False
    """Compute block by block again in the backward pass: less memory, about a third more time."""
    offload: bool = False
    """Keep the frozen weights in host memory and bring each in when it is needed; with checkpointing."""
    cache: bool = True
    """Keep encoded pictures and captions on disk, so that each is encoded once."""
    cache_folder: str = ""
    """Where; empty = beside the runs."""
    zero: bool = False
    """Split the state of adamw over the processes of a distributed run: less memory, a little more time."""

    # saving
    output_name: str = "control"
    """Name of the run and of its files."""
    output_folder: str = ""
    """Where the trained file goes; empty = ComfyUI's models/controlnext."""
    runs_folder: str = ""
    """Where states, logs and pictures go; empty = controlnext_training in ComfyUI's output folder."""
    save_every: int = 250
    """Steps between saved states, from which a run is resumed."""
    keep_states: int = 2
    """Older saved states are deleted."""
    layout: str = "single"
    """Of the trained file: single, or published (names as the authors' scripts read them); xs: xs_official or
    xs_diffusers."""
    save_dtype: str = "fp16"
    """Of the trained file: fp16, bf16 or fp32."""
    resume: bool = True
    """Go on where the last saved state of this name ends."""

    # seeing it
    log_every: int = 10
    """Steps between lines of the log."""
    validate_every: int = 250
    """Steps between validations; 0 = none."""
    validation_samples: int = 4
    """Pictures of a validation grid."""
    validation_steps: int = 20
    """Sampler steps of a validation picture."""
    validation_cfg: float = 5.0
    """Guidance of a validation picture."""
    tensorboard: bool = False
    """Write TensorBoard events, where it is installed. JSON lines are always written."""

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is unknown. Choose one of {', '.join(allowed)}.")
        for name, (low, high, what) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name}: {value} is out of range. It is {what}: {low:g} to {high:g}.")
        for name in ("offload",):
            if getattr(self, name) and not self.checkpointing:
                raise ConfigError(f"{name}: saves nothing without checkpointing. Set checkpointing = true as well.")
        if self.zero and self.optimizer != "adamw":
            raise ConfigError(f"zero: is for adamw, and optimizer is {self.optimizer}. Change one of them.")
        self._check_names()

    def _check_names(self) -> None:
        if not re.fullmatch(r"[^/\\:*?\"<>|\x00-\x1f]+", self.output_name) or set(self.output_name) <= {"."}:
            raise ConfigError(f"output_name: {self.output_name!r} is no file name. Use letters, digits, _ and -.")
        if self.resolution % 8:
            raise ConfigError(f"resolution: {self.resolution} is not a multiple of 8.")
        if self.resolution % self.bucket_step:
            raise ConfigError(f"resolution: {self.resolution} is not a multiple of bucket_step ({self.bucket_step}).")
        layouts = LAYOUTS[self.variant]
        if self.layout not in layouts:
            raise ConfigError(f"layout: {self.layout} is not for {self.variant}. Choose {' or '.join(layouts[:2])}.")
        if self.trainable.startswith("re:"):
            try:
                re.compile(self.trainable[3:])
            except re.error as error:
                raise ConfigError(f"trainable: {self.trainable[3:]!r} is no regular expression ({error}).") from None
        elif self.trainable not in SUBSETS:
            raise ConfigError(
                f"trainable: {self.trainable!r} is unknown. Choose {', '.join(SUBSETS)} or re:EXPRESSION."
            )
        parse_blocks(self.blocks)

    @property
    def effective_batch(self) -> int:
        """Pictures of one step in one process."""
        return self.batch_size * self.accumulation

    @property
    def learning_rate_schedule(self) -> Schedule:
        """The factor of the learning rates over the steps."""
        return Schedule(self.schedule, self.steps, self.warmup_steps, self.schedule_cycles, self.schedule_power)

    def to_json(self) -> str:
        """The whole configuration as JSON."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def to_shared_json(self) -> str:
        """The same for files that are given to others: of PLACES the last names, not where they lie on this machine."""
        settings = dataclasses.asdict(self)
        settings |= {key: _last_names(settings[key]) for key in PLACES}
        return json.dumps(settings, ensure_ascii=False)


def _last_names(value: str | tuple[str, ...]) -> Any:
    """Of a path of any system, or of each of several."""
    return PureWindowsPath(value).name if isinstance(value, str) else tuple(map(_last_names, value))


def parse_blocks(text: str) -> dict[str, range | None]:
    """`input.0-5, middle` -> {"input": range(0, 6), "middle": None}; None = every block of that side.

    Raises ConfigError.
    """
    found: dict[str, range | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(input|middle|output)(?:\.(\d+)(?:-(\d+))?)?", part)
        if match is None or match[1] in found:
            raise ConfigError(
                f"blocks: {part!r} is not understood. Write each of {', '.join(BLOCK_SIDES)} at most once, with or "
                "without numbers: input.0-5, middle, output.3."
            )
        first = match[2]
        found[match[1]] = None if first is None else range(int(first), int(match[3] or first) + 1)
    return found


@functools.cache
def field_docs() -> dict[str, str]:
    """Key -> its description, from the strings under the fields."""
    tree = ast.parse(Path(__file__).read_text("utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainConfig")
    docs = {}
    for line, after in zip(body, body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            docs[line.target.id] = " ".join(str(after.value.value).split())
    return docs
