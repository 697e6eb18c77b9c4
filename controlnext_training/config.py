"""Configuration of a training run: all settings in one dataclass.

The keys of a recipe (TOML), the flags of the command line, the node's widgets and the metadata of the saved file are
all read from `TrainConfig`. A recipe may group keys under table headings; the headings have no meaning.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ..controlnext_core.file_names import problem_of_control
from .choices import AUTO, FUSIONS, LAYOUTS, VARIANTS, parse_blocks, rank_of, subsets_of
from .data.outpainting import HINT_KINDS
from .data.samples import PAIRED
from .objective import LOG_NORMAL, OBJECTIVES, TIMESTEP_DISTRIBUTIONS
from .optimizers import OPTIMIZERS
from .patterns import MAX_LETTERS, Pattern, PatternError
from .schedules import SCHEDULES, Schedule
from .settings import EACH, OF_SOURCES, last_names, setting, settings_of
from .settings import ConfigError as ConfigError

MANY = 10_000_000
"""Largest number of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Configuration of one training run. Raises ConfigError for a value that cannot be used."""

    # what is trained
    variant: str = setting(
        "sd15",
        "Row of the table of variants to train (sd15, sdxl, svd_v2, ...), or xs for a ControlNet-XS.",
        choices=VARIANTS,
        fixed_on_resume=True,
    )
    base: str = setting(
        "",
        "Checkpoint or diffusion model of the base: a path, or a name in ComfyUI's checkpoints or diffusion_models "
        "folder. The node has MODEL instead.",
        is_path=True,
    )
    clip: tuple[str, ...] = setting(
        (),
        "Files of the text encoders, paths or names in ComfyUI's text_encoders folder, where the base's file holds "
        "none; empty = the checkpoint's. The node has CLIP instead.",
        is_path=True,
    )
    vae: str = setting(
        "", "File of an autoencoder to use in place of the checkpoint's own; empty = the checkpoint's.", is_path=True
    )
    trainable: str = setting(
        "to_out",
        "Weights of the base that train beside the encoder: none, to_out (output projections of attention), all; of a "
        "UNet also attn2_to_out, up_to_out; of Flux.1 and Chroma single_too; of Lumina2 and Z-Image values_too, "
        "refiners_too; Wan cross_too; or re:EXPRESSION over published names (UNet) or ComfyUI's (transformer).",
        fixed_on_resume=True,
    )
    blocks: str = setting(
        "",
        "Blocks of the base to which trainable is limited, with commas: input, middle, output or input.0-5 of a UNet; "
        "joint.0-11, double, single, refiner of a transformer. Two controls of disjoint blocks can be used together. "
        "Empty = all blocks; for qwen_image joint.0-29.",
        fixed_on_resume=True,
    )
    rank: int = setting(
        -1,
        "Rank of the differences of the base's matrices, as up @ down; 0 = whole differences, -1 = the variant's own: "
        "16 for a transformer, whole for a UNet.",
        low=-1,
        high=1024,
        fixed_on_resume=True,
    )
    fusion: str = setting(
        "released",
        "How the control joins the features: released (Cross Normalization as released), paper (equation 10), "
        "zero_conv (a last convolution that starts at zero) or add (plain addition).",
        choices=tuple(FUSIONS),
        fixed_on_resume=True,
    )
    gain: float = setting(
        0.0,
        "Gain of the control while training, saved in the file; 0 = the variant's own. The authors took 0.35 for "
        "sparse and 1.0 for dense hints.",
        low=0,
        high=1e3,
        fixed_on_resume=True,
    )
    init_control: str = setting("", "Control file to start from; empty = fresh weights.", is_path=True)
    xs_ratio: float = setting(
        0.1, "ControlNet-XS: its widths as a fraction of the base's.", low=1e-3, high=1, fixed_on_resume=True
    )
    xs_own_time: bool = setting(
        False,
        "ControlNet-XS: a time embedding of its own, as some releases have; it learns more slowly.",
        fixed_on_resume=True,
    )

    # data
    data: tuple[str, ...] = setting(
        (),
        "Folders, tables (metadata.jsonl, Parquet) or tar shards, relative to the recipe; or picturebook:edges:200.",
        is_path=True,
    )
    validation_data: tuple[str, ...] = setting(
        (),
        "The same for validation; empty = some of the data, drawn by the seed, which then do not train, if enough.",
        is_path=True,
    )
    hint: str = setting(
        PAIRED,
        "Source of the hint: paired (a picture of its own), or drawn from the picture: canny, soft_edge, lines, blur, "
        "mask, gray, low_resolution (blurred, shrunk, with noise and JPEG, for super-resolution), or outpaint (the "
        "picture with gray around a rectangle).",
        choices=HINT_KINDS,
    )
    resolution: int = setting(
        512,
        "Side in pixels of the square whose area every picture gets; a multiple of 64 (8 for small bases).",
        low=64,
        high=4096,
    )
    buckets: bool = setting(
        True, "Keep aspect ratios by sorting pictures into sizes of the same area; off = square centre crops."
    )
    bucket_step: int = setting(64, "Sides are multiples of this many pixels.", low=8, high=512)
    caption_extension: str = setting(".txt", "Suffix of the caption beside a picture.")
    clip_frames: int = setting(14, "Frames of a clip, of SVD any number, of Wan 1, 5, 9 and so on.", low=1, high=1024)
    clip_stride: int = setting(3, "Every n-th frame of a clip's source.", low=1, high=1024)
    repeats: tuple[int, ...] = setting((), f"Uses of each sample in an epoch, {EACH} = 1.", low=1, high=10_000)
    weights: tuple[float, ...] = setting((), f"Factor on the loss, {EACH} = 1.", low=0, high=1e3)
    crops: tuple[int, ...] = setting(
        (), f"Crops of each picture, its centre and drawn ones, the hint alike; {EACH} = 1.", low=1, high=64
    )
    flip: tuple[bool, ...] = setting(
        (), f"Mirror picture and hint in half of the uses, where left and right do not matter; {EACH} = off."
    )
    workers: int = setting(1, "Workers that read pictures ahead; 0 = none, 1 = a thread.", low=0, high=64)
    max_samples: int = setting(0, "Largest number of pictures to use; 0 = all.", low=0, high=1e12)

    # optimisation
    steps: int = setting(1000, "Steps of the optimizer.", low=1, high=MANY)
    batch_size: int = setting(1, "Pictures in one forward pass of one process.", low=1, high=4096)
    accumulation: int = setting(1, "Forward passes whose gradients are averaged to one step.", low=1, high=4096)
    optimizer: str = setting(
        "adamw",
        "Optimizer: adamw, adafactor (second moments of matrices as rows and columns: little memory), or adamw8bit, "
        "prodigy, schedulefree where their packages are installed.",
        choices=tuple(OPTIMIZERS),
        fixed_on_resume=True,
    )
    learning_rate: float = setting(1e-5, "Learning rate of the base's weights.", low=0, high=10)
    control_learning_rate: float = setting(1e-4, "Learning rate of the encoder or the control stream.", low=0, high=10)
    beta1: float = setting(0.9, "Decay of the first moment.", low=0, high=0.9999999)
    beta2: float = setting(0.999, "Decay of the second moment.", low=0, high=0.9999999)
    weight_decay: float = setting(
        1e-2,
        "Decoupled weight decay of matrices and kernels, not of norms and biases; it pulls the UNet's difference to "
        "zero, which is the base model.",
        low=0,
        high=10,
    )
    adam_eps: float = setting(1e-8, "Added to the root of the second moment; not for adafactor.", low=1e-30, high=1)
    max_grad_norm: float = setting(
        1.0,
        "Largest norm of the gradient over everything that trains; longer ones are scaled down. 0 = off.",
        low=0,
        high=1e9,
    )
    schedule: str = setting(
        "constant",
        "Learning rate over the steps: constant, linear, cosine, cosine_restarts, polynomial or piecewise.",
        choices=tuple(SCHEDULES),
    )
    warmup_steps: int = setting(0, "Steps over which the learning rate rises from zero.", low=0, high=MANY)
    schedule_cycles: int = setting(
        1, "cosine_restarts: cycles; piecewise: equal parts, each at a tenth of the one before.", low=1, high=1000
    )
    schedule_power: float = setting(1.0, "polynomial: the power.", low=0, high=100)
    ema_decay: float = setting(
        0.0,
        "Exponential moving average of the trained weights, saved instead of the last ones; 0 = off.",
        low=0,
        high=0.9999999,
    )
    ema_on_cpu: bool = setting(True, "Keep the moving average in host memory; of a GPU, updated beside the steps.")

    # objective
    objective: str = setting(
        AUTO,
        "Output that the UNet learns to predict: auto (as the base model says), epsilon, v, edm or flow.",
        choices=(AUTO, *OBJECTIVES),
    )
    timesteps: str = setting(
        AUTO,
        "Distribution of the timesteps: auto (uniform; svd_cosine for SVD), uniform, logit_normal, svd_cosine, or "
        "log_normal (EDM).",
        choices=(AUTO, *TIMESTEP_DISTRIBUTIONS, LOG_NORMAL),
    )
    stratified_timesteps: bool = setting(
        False,
        "Draw the timesteps of a forward pass from equal parts of their distribution, one from each: less noise in the "
        "gradient of batches. Off = independent draws.",
    )
    log_normal_mean: float = setting(
        -1.2, "log_normal: mean of the logarithm of sigma. Source: Karras et al. 2022 (EDM), table 1.", low=-20, high=20
    )
    log_normal_std: float = setting(
        1.2, "log_normal: standard deviation of the logarithm of sigma. Source: the same.", low=1e-3, high=20
    )
    sigma_min: float = setting(0.0, "Smallest noise level (sigma) that trains; 0 = the model's own.", low=0, high=1e6)
    sigma_max: float = setting(0.0, "Largest noise level (sigma) that trains; 0 = the model's own.", low=0, high=1e6)
    guidance: float = setting(
        1.0,
        "Guidance scale that a guidance-distilled base (Flux.1 dev) is told while the control trains; other bases are "
        "told none.",
        low=0,
        high=100,
    )
    min_snr_gamma: float = setting(0.0, "Loss weight min(SNR, gamma) / SNR; 0 = off. 5 is common.", low=0, high=1e6)
    noise_offset: float = setting(
        0.0, "Standard deviation of an offset per channel added to the noise.", low=0, high=10
    )
    caption_dropout: float = setting(
        0.0, "Probability that a sample trains without its caption, drawn at each use.", low=0, high=1
    )
    hint_dropout: float = setting(
        0.0, "Probability that a sample trains with a black hint, drawn at each use.", low=0, high=1
    )
    mask_weight: float = setting(
        0.0,
        "Extra loss weight inside a sample's mask: 1 + this; SVD's authors took 3.2 on sure hands.",
        low=0,
        high=1e6,
    )
    seed: int = setting(0, "Seed of every random number of the run.", low=0, high=2**64 - 1, fixed_on_resume=True)

    # memory and speed
    precision: str = setting(
        AUTO,
        "Number format of the computation: auto (bf16 where the device is fast at it, else fp32), fp32, bf16 or fp16. "
        "Trained weights are fp32.",
        choices=(AUTO, "fp32", "bf16", "fp16"),
    )
    checkpointing: bool = setting(
        False, "Recompute each block in the backward pass: less memory, about a third more time."
    )
    offload: bool = setting(
        False, "Keep the frozen weights in host memory and copy each to the device when used; with checkpointing."
    )
    compile: bool = setting(
        False,
        "Compile each block of the base with torch.compile: faster steps after minutes of compiling; it needs a C++ "
        "compiler, on NVIDIA triton. The loss is equal but for rounding.",
    )
    cache: bool = setting(True, "Keep encoded pictures and captions on disk, so that each is encoded once.")
    cache_folder: str = setting("", "Folder of that cache; empty = beside the runs.", is_path=True)
    zero: bool = setting(
        False, "Split the state of adamw over the processes of a distributed run: less memory, a little more time."
    )

    # saving
    output_name: str = setting("control", "Name of the run and of its files.")
    output_folder: str = setting("", "Folder of the trained file; empty = ComfyUI's models/controlnext.", is_path=True)
    runs_folder: str = setting(
        "",
        "Folder of states, logs and pictures; empty = controlnext_training in ComfyUI's output folder.",
        is_path=True,
    )
    save_every: int = setting(250, "Steps between saved states, from which a run is resumed.", low=1, high=MANY)
    keep_states: int = setting(2, "Newest saved states to keep; older ones are deleted.", low=1, high=1000)
    layout: str = setting(
        "single",
        "Layout of the trained file: single, or published (names as the authors' scripts read them); transformer: lora "
        "(a folder with the differences as a LoRA); xs: xs_official or xs_diffusers.",
        choices=tuple(dict.fromkeys(layout for layouts in LAYOUTS.values() for layout in layouts)),
    )
    save_dtype: str = setting(
        "fp16", "Number format of the trained file: fp16, bf16 or fp32.", choices=("fp16", "bf16", "fp32")
    )
    resume: bool = setting(True, "Continue from the last saved state of this name.")

    # seeing it
    log_every: int = setting(10, "Steps between lines of the log.", low=1, high=MANY)
    validate_every: int = setting(250, "Steps between validations; 0 = none.", low=0, high=MANY)
    validation_samples: int = setting(4, "Pictures of a validation grid.", low=1, high=64)
    validation_steps: int = setting(20, "Sampler steps of a validation picture.", low=1, high=1000)
    validation_cfg: float = setting(5.0, "Guidance scale of a validation picture.", low=0, high=100)
    validation_guidance: float = setting(
        3.5, "Guidance scale that a guidance-distilled base is told for a validation picture.", low=0, high=100
    )
    tensorboard: bool = setting(
        False, "Write TensorBoard events, where it is installed. JSON lines are always written."
    )

    def __post_init__(self) -> None:
        for key, facts in SETTINGS.items():
            facts.check(key, getattr(self, key))
        if self.offload and not self.checkpointing:
            raise ConfigError("offload: saves nothing without checkpointing. Set checkpointing = true as well.")
        if self.zero and self.optimizer != "adamw":
            raise ConfigError(f"zero: is for adamw, and optimizer is {self.optimizer}. Change one of them.")
        for key in OF_SOURCES:
            given = len(getattr(self, key))
            if given > 1 and self.data and given != len(self.data):
                raise ConfigError(f"{key}: are {given} for {len(self.data)} of data. Give one for each, or one.")
        self._check_names()

    def _check_names(self) -> None:
        if problem := problem_of_control(self.output_name):
            raise ConfigError(f"output_name: {problem}")
        if self.resolution % 8:
            raise ConfigError(f"resolution: {self.resolution} is not a multiple of 8.")
        if self.resolution % self.bucket_step:
            raise ConfigError(f"resolution: {self.resolution} is not a multiple of bucket_step ({self.bucket_step}).")
        layouts = LAYOUTS[self.variant]
        if self.layout not in layouts:
            raise ConfigError(f"layout: {self.layout} is not for {self.variant}. Choose {' or '.join(layouts[:2])}.")
        if self.trainable.startswith("re:"):
            try:
                Pattern(self.trainable[3:])
            except PatternError as error:
                raise ConfigError(
                    f"trainable: {self.trainable[3:][:MAX_LETTERS]!r} is not a supported regular expression "
                    f"({error}). Write one such as re:attn2.*to_(out|v)."
                ) from None
        elif self.trainable not in subsets_of(self.variant):
            raise ConfigError(
                f"trainable: {self.trainable[:MAX_LETTERS]!r} is unknown for {self.variant}. Choose "
                f"{', '.join(subsets_of(self.variant))} or re:EXPRESSION."
            )
        if self.layout == "published" and rank_of(self.variant, self.rank):
            raise ConfigError(f"rank: {self.rank} has no published layout. Set layout = single, or rank = 0.")
        parse_blocks(self.blocks)

    @property
    def effective_batch(self) -> int:
        """Number of pictures of one step in one process."""
        return self.batch_size * self.accumulation

    @property
    def learning_rate_schedule(self) -> Schedule:
        """Schedule of the learning rates over the steps."""
        return Schedule(self.schedule, self.steps, self.warmup_steps, self.schedule_cycles, self.schedule_power)

    def to_json(self) -> str:
        """Configuration as JSON, with all settings."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    def to_shared_json(self) -> str:
        """Configuration as JSON for files that are shared: paths are reduced to their last names."""
        values = dataclasses.asdict(self)
        values |= {key: last_names(values[key]) for key, facts in SETTINGS.items() if facts.is_path}
        return json.dumps(values, ensure_ascii=False)


SETTINGS = settings_of(TrainConfig)
"""Key -> its description, bounds and choices."""
