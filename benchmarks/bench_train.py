"""Training throughput and peak memory against a plain loop in the style of diffusers' and the authors' scripts.

Both train the same thing on SD1.5 of real size: the ControlNeXt encoder and every `to_out` of the UNet, in the same
dtype, with AdamW. The plain loop is diffusers' UNet, autoencoder and transformers' CLIP, with the encoder added by a
forward hook; it encodes picture and caption in every step, as those scripts do. Ours is `train.train` as users run it,
its pictures and captions encoded before. Each run is a process of its own; memory is the highest during the steps.
"""

from __future__ import annotations

import json
import runpy
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

import torch
from comfyui_controlnext.benchmarks.host import Options, begin
from comfyui_controlnext.benchmarks.report import append_table

CAPTION = "a red circle and a blue square on a green background"
RATE, CONTROL_RATE = 1e-5, 1e-4
WARM_UP = 1
HEAD = ("loop", "pictures/s", "against plain", "peak memory, GiB", "against plain")


class Peak:
    """Highest memory while it is on: of the GPU, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.highest, self.on = device, 0, True

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while self.on:
            self.highest = max(self.highest, process.memory_info().rss)
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self.on = False
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self.device)


def parts(folder: Path) -> tuple[Any, Any]:
    """(autoencoder, text encoder) of SD1.5's shape, random, from files that both loops read."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True, exist_ok=True)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    return vae.eval().requires_grad_(False), CLIPTextModel(config).eval().requires_grad_(False)


def plain(steps: int, side: int, batch: int, dtype: torch.dtype, device: torch.device, folder: Path) -> dict[str, Any]:
    """The plain loop: seconds of each step, peak memory."""
    from comfyui_controlnext.controlnext_core.injection import Term, fuse, prepare
    from comfyui_controlnext.controlnext_core.specs import SPECS, config_of
    from comfyui_controlnext.models.controlnext import ControlNeXt
    from diffusers import DDPMScheduler, UNet2DConditionModel

    vae, text = (part.to(device, dtype) for part in parts(folder))
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
    ).to(device, dtype)
    unet.requires_grad_(False)
    subset = [parameter.requires_grad_(True) for name, parameter in unet.named_parameters() if "to_out" in name]
    if dtype is not torch.float32:
        for parameter in subset:
            parameter.data = parameter.data.float()
    spec = SPECS["sd15"]
    encoder = ControlNeXt(config_of(spec)).to(device)
    optimizer = torch.optim.AdamW(
        [{"params": list(encoder.parameters()), "lr": CONTROL_RATE}, {"params": subset, "lr": RATE}], weight_decay=1e-2
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    state: dict[str, torch.Tensor] = {}

    def add_control(_module: Any, _inputs: Any, output: Any) -> Any:
        h, skips = output
        control = prepare(encoder(state["hint"], state["t"]), (h.shape[-2], h.shape[-1]), spec.fusion)
        return fuse(h, [Term(control, (1.0,), spec.fusion)]), skips

    unet.down_blocks[0].register_forward_hook(add_control)
    picture = torch.rand(batch, 3, side, side, device=device)
    ids = torch.randint(0, 49408, (batch, 77), device=device)
    seconds = []
    with Peak(device) as peak, torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        for _ in range(steps):
            _synchronise(device)
            started = time.perf_counter()
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
            _synchronise(device)
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "peak": peak.highest}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(
    steps: int, side: int, batch: int, precision: str, device: torch.device, folder: Path, checkpointing: bool
) -> dict[str, Any]:
    """`train.train` on the same sizes: seconds of each step, peak memory."""
    import comfy.sd
    from comfyui_controlnext.benchmarks.real_size import make_unet
    from comfyui_controlnext.controlnext_training.base_model.encode import Base
    from comfyui_controlnext.controlnext_training.config import TrainConfig
    from comfyui_controlnext.controlnext_training.data.tensors import TensorDataset
    from comfyui_controlnext.controlnext_training.results import Run
    from comfyui_controlnext.controlnext_training.train import train

    model = make_unet("sd15", {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    for module in model.model.diffusion_model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:  # each of its own, as in a checkpoint
                module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
    vae, text = parts(folder)
    host_vae = comfy.sd.VAE(sd=vae.state_dict())
    prefix = "text_model."
    state = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in text.state_dict().items()}
    clip = comfy.sd.load_text_encoder_state_dicts([state], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    del vae, text
    data = TensorDataset(torch.rand(batch, side, side, 3), torch.rand(batch, side, side, 3), [CAPTION] * batch)
    config = TrainConfig(
        variant="sd15",
        trainable="to_out",
        steps=steps,
        batch_size=batch,
        learning_rate=RATE,
        control_learning_rate=CONTROL_RATE,
        precision=precision,
        checkpointing=checkpointing,
        validate_every=0,
        save_every=10_000_000,
        log_every=1,
        resume=False,
    )
    run = Run(folder / "run", folder / "cache", folder / "trained", "random")
    watch = Watch(device)
    train(Base(model, host_vae, clip), data, None, config, run, watch)
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text("utf-8").splitlines()]
    seconds = [line["seconds_per_step"] for line in lines if line["event"] == "step"]
    return {"seconds": seconds, "peak": watch.peak.highest}


class Watch:
    """Turns the measuring of memory on when the pictures are encoded, and off after the last step."""

    def __init__(self, device: torch.device) -> None:
        self.peak = Peak(device)

    def say(self, text: str) -> None:
        if "numbers train" in text:
            self.peak.__enter__()

    def progress(self, step: int, steps: int, text: str) -> None:
        if text.startswith("step") and step == steps:
            self.peak.__exit__()

    def picture(self, image: Any) -> None:
        pass

    def stopping(self) -> bool:
        return False


KINDS = ("plain", "ours", "ours, checkpointing")


def measure(options: Options, kind: str, steps: int, side: int, batch: int) -> dict[str, Any]:
    """One loop, in this process."""
    folder = options.scratch / "train"
    if kind == "plain":
        return plain(steps, side, batch, options.dtype, options.device, folder)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[options.dtype]
    return ours(steps, side, batch, precision, options.device, folder, kind.endswith("checkpointing"))


def in_own_process(kind: str, arguments: list[str]) -> dict[str, Any]:
    """Measure in a process that has done nothing else."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--cases", f"only:{kind}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    found = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if done.returncode or not found:
        raise SystemExit(f"{kind}: {done.stderr[-2000:]}")
    return json.loads(found[0].removeprefix("MEASURED"))


def main() -> None:
    options = begin(__doc__ or "")
    side, batch, steps = (256, 1, 3) if options.quick else (512, 1, 4)
    if options.cases and options.cases[0].startswith("only:"):
        found = measure(options, ",".join(options.cases).removeprefix("only:"), steps, side, batch)
        print("MEASURED" + json.dumps(found), flush=True)
        return
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(max(1, options.repeats // 2)):
        for kind in KINDS:
            runs[kind].append(in_own_process(kind, sys.argv[1:]))
    rows = []
    rate = {k: statistics.median(batch / s for run in v for s in run["seconds"][WARM_UP:]) for k, v in runs.items()}
    peak = {kind: statistics.median(run["peak"] for run in found) for kind, found in runs.items()}
    for kind in KINDS:
        ratio, memory = rate[kind] / rate["plain"], peak[kind] / peak["plain"]
        rows.append((kind, f"{rate[kind]:.4f}", f"{ratio:.2f}x", f"{peak[kind] / 2**30:.2f}", f"{memory:.2f}x"))
    settings = f"SD1.5, {side}x{side}, batch {batch}, {str(options.dtype).removeprefix('torch.')}, {steps} steps"
    title = "Training: encoder and to_out of SD1.5"
    append_table("train", title, HEAD, rows, settings, options.json, keep=not options.quick)


if __name__ == "__main__":
    main()
