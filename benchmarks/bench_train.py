"""Training throughput and peak memory against a plain loop in the style of diffusers' and the authors' scripts.

Both loops train the same weights on SD1.5 of real size: the ControlNeXt encoder and every `to_out` of the UNet, with
AdamW. The plain loop is diffusers' UNet, autoencoder and transformers' CLIP, with the encoder added by a forward hook;
it encodes picture and caption in every step and holds all weights in the compute dtype, as those scripts do. This
pack's loop is `run.py train` with a checkpoint file: pictures and captions are encoded before, and the file's dtype is
retained with checkpointing. Each run is a separate process, without ComfyUI for the plain loop and without diffusers
for this pack's. Memory is the peak of the whole process during the steps, on a GPU the peak of the device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

import torch
from comfyui_controlnext.benchmarks.host_start import DTYPES, begin, bring_in
from comfyui_controlnext.benchmarks.meters import WARM_UP, Peak, Times
from comfyui_controlnext.benchmarks.recording import append_table
from torch import Tensor

FILE_DTYPES = {**DTYPES, "fp8": torch.float8_e4m3fn}
CAPTION = "a red circle and a blue square on a green background"
RATE, CONTROL_RATE = 1e-5, 1e-4
GPU_STEPS = 12
HEAD = (
    *("loop", "pictures/s", "speed against plain", "processor s/picture"),
    *("peak memory, GiB", "memory against plain"),
)


@dataclass(frozen=True)
class Case:
    """Case: one training loop to measure, in a separate process."""

    kind: str
    """Kind of process: plain, ours, or file, which writes the checkpoint for ours."""
    file: str = ""
    """Dtype of the checkpoint: fp16, fp32 or fp8 (of its UNet's matrices); '' for plain."""
    checkpointing: bool = False
    offload: bool = False

    @property
    def title(self) -> str:
        how = "offload" if self.offload else "checkpointing" if self.checkpointing else ""
        parts = (self.kind, how, f"{self.file} file" if self.file else "")
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Setting:
    """Settings shared by all loops of one table."""

    comfyui: str
    folder: str
    cpu: bool
    threads: int
    dtype: str
    steps: int
    side: int
    batch: int
    small: bool = False
    """True: small networks, in this process. False: networks of real size, in separate processes."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else "cuda")


def plain(setting: Setting) -> dict[str, Any]:
    """Run the plain loop: seconds of each step, peak memory."""
    from comfyui_controlnext.tools.launcher import declare_missing_torchvision_ops

    declare_missing_torchvision_ops()
    from comfyui_controlnext.controlnext_core.injection import Term, fuse, prepare
    from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
    from comfyui_controlnext.models.controlnext import ControlNeXt
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    device, dtype, batch, side = setting.device, DTYPES[setting.dtype], setting.batch, setting.side
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    part, layers = (4, 1) if setting.small else (1, 12)  # divisor of the widths, and layers of the text encoder
    widths = tuple(width // part for width in (128, 256, 512, 512))
    vae: Any = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks)
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12, projection_dim=768
    )
    text: Any = CLIPTextModel(clip)
    vae, text = (part.eval().requires_grad_(False).to(device, dtype) for part in (vae, text))
    unet: Any = UNet2DConditionModel(
        block_out_channels=(320, *(width // part for width in (640, 1280, 1280))),
        **{"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    )
    unet.to(device, dtype).requires_grad_(False)
    subset = [parameter.requires_grad_(True) for name, parameter in unet.named_parameters() if "to_out" in name]
    if dtype is not torch.float32:
        for parameter in subset:
            parameter.data = parameter.data.float()
    spec = SPECS["sd15"]
    encoder = ControlNeXt(config_of(spec)).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": list(encoder.parameters()), "lr": CONTROL_RATE}, {"params": subset, "lr": RATE}], weight_decay=1e-2
    )
    scheduler: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    state: dict[str, Tensor] = {}

    def add_control(_module: Any, _inputs: Any, output: Any) -> Any:
        h, skips = output
        control = prepare(encoder(state["hint"], state["t"]), (h.shape[-2], h.shape[-1]), spec.fusion)
        return fuse(h, [Term(control, (1.0,), spec.fusion)]), skips

    unet.down_blocks[0].register_forward_hook(add_control)
    picture = torch.rand(batch, 3, side, side, device=device)
    ids = torch.randint(0, 49408, (batch, 77), device=device)
    times = Times()
    with Peak(device) as peak, torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        for _ in range(setting.steps):
            times.note()
            with torch.no_grad():
                latent = vae.encode(picture.to(dtype) * 2 - 1).latent_dist.sample() * 0.18215
                context = text(ids)[0]
            noise = torch.randn_like(latent)
            state["t"] = torch.randint(0, 1000, (batch,), device=device)
            state["hint"] = picture
            noisy = scheduler.add_noise(latent, noise, state["t"])
            out = unet(noisy, state["t"], encoder_hidden_states=context).sample
            torch.nn.functional.mse_loss(out.float(), noise.float()).backward()
            torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *subset], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        times.note()
    return {**times.of_steps(), "peak": peak.highest}


def checkpoint_file(setting: Setting, dtype: str) -> Path:
    return Path(setting.folder) / f"sd15_{dtype}.{'ckpt' if setting.small else 'safetensors'}"


def write_checkpoint(setting: Setting, dtype: str) -> dict[str, Any]:
    """Write the checkpoint file for this pack's loop."""
    bring_in(Path(setting.comfyui), setting.cpu, Path(setting.folder))
    from comfyui_controlnext.benchmarks.real_size import save_sd15
    from comfyui_controlnext.tools.tiny_models import make_sd15

    path = checkpoint_file(setting, dtype)
    make_sd15(path) if setting.small else save_sd15(path, FILE_DTYPES[dtype])
    return {}


def ours(setting: Setting, case: Case) -> dict[str, Any]:
    """Run `train.train` on the same sizes, from a checkpoint file: seconds of each step, peak memory."""
    bring_in(Path(setting.comfyui), setting.cpu, Path(setting.folder))
    from comfyui_controlnext.controlnext_training.base_model.base_files import load_base
    from comfyui_controlnext.controlnext_training.config import TrainConfig
    from comfyui_controlnext.controlnext_training.data.tensors import TensorDataset
    from comfyui_controlnext.controlnext_training.results import RunFiles
    from comfyui_controlnext.controlnext_training.train import train

    batch, side = setting.batch, setting.side
    with tempfile.TemporaryDirectory(dir=setting.folder) as scratch:
        config = TrainConfig(
            base=str(checkpoint_file(setting, case.file)),
            variant="sd15",
            trainable="to_out",
            steps=setting.steps,
            batch_size=batch,
            learning_rate=RATE,
            control_learning_rate=CONTROL_RATE,
            precision=setting.dtype,
            checkpointing=case.checkpointing or case.offload,
            offload=case.offload,
            validate_every=0,
            save_every=10_000_000,
            log_every=1,
            resume=False,
        )
        data = TensorDataset(torch.rand(batch, side, side, 3), torch.rand(batch, side, side, 3), [CAPTION] * batch)
        folder, watch = Path(scratch), Watch(setting.device)
        run = RunFiles(folder / "run", folder / "cache", folder / "trained", "random")
        train(load_base(config, folder), data, None, config, run, watch)
    return {**watch.times.of_steps(), "peak": watch.peak.highest}


class Watch:
    """Observer that starts measuring once the pictures are encoded, and stops after the last step."""

    def __init__(self, device: torch.device) -> None:
        self.peak, self.times = Peak(device), Times()

    def say(self, text: str) -> None:
        if "numbers train" in text:
            self.peak.__enter__()
            self.times.note()

    def progress(self, step: int, steps: int, text: str) -> None:
        if text.startswith("step"):
            self.times.note()
            if step == steps:
                self.peak.__exit__()

    def picture(self, image: Any) -> None:
        pass

    def curve(self, draw: Any) -> None:
        pass

    def stopping(self) -> bool:
        return False


def measure(setting: Setting, case: Case) -> dict[str, Any]:
    """Measure one training loop in this process."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    if case.kind == "file":
        return write_checkpoint(setting, case.file)
    return plain(setting) if case.kind == "plain" else ours(setting, case)


ALONE = "--one"
"""First argument of a process that measures one loop; its Setting and Case follow, as JSON."""


def in_own_process(setting: Setting, case: Case) -> dict[str, Any]:
    """Measure one loop in a fresh process; small networks in this one."""
    if setting.small:
        return measure(setting, case)
    given = [json.dumps(dataclasses.asdict(part)) for part in (setting, case)]
    command = [sys.executable, str(Path(__file__).resolve()), ALONE, *given]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if done.returncode or not found:
        raise SystemExit(f"{case.title}: {done.stderr[-2000:]}")
    return json.loads(found[0].removeprefix("MEASURED"))


def cases_of(dtype: str, everything: bool = False) -> list[Case]:
    """Cases of a table, plain first. A file in fp16, the most common, and where the loops compute in fp32 also one in
    fp32.

    everything: True adds weights offloaded to host memory, and a base in fp8; False does not.
    """
    files = ("fp16", "fp32") if dtype == "fp32" else ("fp16",)
    cases = [Case("plain"), *(Case("ours", file, on) for on in (False, True) for file in files)]
    return [*cases, Case("ours", "fp16", offload=True), Case("ours", "fp8", True)] if everything else cases


def rows_of(runs: dict[Case, list[dict[str, Any]]], batch: int) -> list[tuple[str, ...]]:
    """Rows of the table; ratios are against the first case."""
    pairs = runs.items()
    rate = {case: statistics.median(batch / s for run in found for s in run["wall"]) for case, found in pairs}
    work = {case: statistics.median(s / batch for run in found for s in run["processor"]) for case, found in pairs}
    peak = {case: statistics.median(run["peak"] for run in found) for case, found in pairs}
    first = next(iter(runs))
    return [
        (
            case.title,
            f"{rate[case]:.4f}",
            f"{rate[case] / rate[first]:.2f}x",
            f"{work[case]:.1f}",
            f"{peak[case] / 2**30:.2f}",
            f"{peak[case] / peak[first]:.2f}x",
        )
        for case in runs
    ]


def main() -> None:
    if sys.argv[1:2] == [ALONE]:
        setting, case = Setting(**json.loads(sys.argv[2])), Case(**json.loads(sys.argv[3]))
        print("MEASURED" + json.dumps(measure(setting, case)), flush=True)
        return
    if importlib.util.find_spec("diffusers") is None:
        print("train: left out: the plain loop needs diffusers (tools/requirements-test.txt).", flush=True)
        return
    options = begin(__doc__ or "", "--all")
    side, steps = (64 if options.small else 256, 3) if options.quick else (512, 3)
    steps = (WARM_UP + 1 if options.small else steps) if options.cpu else GPU_STEPS
    dtype = next(name for name, value in DTYPES.items() if value is options.dtype)
    folder = str(options.scratch)
    setting = Setting(
        *(str(options.comfyui), folder, options.cpu, options.threads, dtype, steps, side, options.batch, options.small)
    )
    every = cases_of("fp16" if options.small else dtype, "--all" in options.switches)
    cases = [case for case in every if case.kind == "plain" or options.wants(case.title)]
    runs: dict[Case, list[dict[str, Any]]] = {}
    failed: list[str] = []
    for _ in range(max(1, options.repeats // 5)):  # each repeat has several steps
        for case in cases:
            if runs and options.left < 0:
                break
            if case.file and not checkpoint_file(setting, case.file).is_file():
                in_own_process(setting, Case("file", case.file))
            try:
                runs.setdefault(case, []).append(in_own_process(setting, case))
            except SystemExit as error:  # without the plain loop no ratio can be computed; the others may continue
                if case.kind == "plain":
                    raise
                runs.pop(case)
                failed.append(str(error))
    settings = f"SD1.5, {side}x{side}, batch {options.batch}, computed in {dtype}, {steps} steps"
    title = "Training: encoder and to_out of SD1.5"
    append_table("train", title, HEAD, rows_of(runs, options.batch), settings, options.json, keep=not options.quick)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
