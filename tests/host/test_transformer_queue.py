"""A queue run for each family of transformers: the host's loaders, its sampler and its decoder around our nodes.

The networks have their published width, one or two blocks, and random weights in windows (`transformer_files`); they
take the text of CLIP-L, but for Qwen-Image and Wan, whose text encoders have billions of numbers: there it is random.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.specs import SPECS
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, picture, relative
from comfyui_controlnext.tests.fixtures.transformer_files import SMALL, make_small, make_text_encoder, make_vae
from comfyui_controlnext.tests.host.test_api import Workflow, latents, let_go, node, probe
from comfyui_controlnext.tests.references import reference_controlnext as released
from comfyui_controlnext.tests.references import reference_transformers as reference
from PIL import Image

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
GIGABYTES = 1.5
"""Memory in GB above which a family runs only with `--long`."""
RANK = 4
FOLDERS = ("controlnext", "controlnet", "model_patches")
FAMILIES = [
    pytest.param(name, marks=pytest.mark.long if SMALL[name].gigabytes > GIGABYTES else ())
    for name, spec in SPECS.items()
    if spec.on_transformer
]
SIDE = 8 * CELLS
CLIPS = ("wan", "wan_5b")
TEXTS = {"qwen_image": 3584, "wan": 4096, "wan_5b": 4096}
"""Width of the text, which detection does not ask."""
FRAMES = 17
"""Number of frames of a clip."""


def make_control(path: Path, family: str) -> Path:
    """Make one file of a random encoder with a low-rank difference of the first block's attention."""
    width, generator = SMALL[family].width, torch.Generator().manual_seed(0)
    name = reference.FAMILIES[family].differences.replace("N", "0")
    encoder = released.random_weights(reference.FAMILIES[family].build, out=width)
    factors = {
        f"base.{name}.up": torch.randn(width, RANK, generator=generator) * RANK**-0.5,
        f"base.{name}.down": torch.randn(RANK, width, generator=generator) * width**-0.5,
    }
    tensors = {f"controlnext.{name}": tensor for name, tensor in encoder.items()} | factors
    facts = {"controlnext.spec": family, "controlnext.weights_kind": "low_rank"}
    return checkpoint.save(path, {name: tensor.half() for name, tensor in tensors.items()}, facts)


def files_of(models: Path, family: str, pinned: bool) -> None:
    """Files that the graph of a family loads, in the folders of a host."""
    make_small(models / "diffusion_models" / f"{family}.pt", family, pinned)
    make_text_encoder(models / "text_encoders" / "clip_l.pt")
    make_vae(models / "vae" / f"{family}.safetensors", family)
    folder = FOLDERS[list(SMALL).index(family) % len(FOLDERS)]
    make_control(models / folder / f"{family}.safetensors", family)


def prompts(family: str) -> Workflow:
    """Nodes `positive` and `negative` of a family."""
    row, graph = SMALL[family], {}
    if row.text_encoder is None:
        words = {"tokens": 7, "width": TEXTS[family]}
        return {name: node("ControlNeXtTestPrompt", seed=i, **words) for i, name in enumerate(("positive", "negative"))}
    graph["clip"] = node("CLIPLoader", clip_name="clip_l.pt", type=row.text_encoder)
    for name, text in (("positive", "a cat"), ("negative", "")):
        graph[name] = node("CLIPTextEncode", clip=["clip", 0], text=text)
    return graph


def graph_of(family: str, hint: str, door: str = "stock", **loader: Any) -> Workflow:
    """Graph of a family. door:

    "stock", "ours" or "none". loader: inputs of Load ControlNeXt that differ from the default.
    """
    model = ["base", 0]
    graph = prompts(family) | {
        "base": node("UNETLoader", unet_name=f"{family}.pt", weight_dtype="default"),
        "vae": node("VAELoader", vae_name=f"{family}.safetensors"),
        "hint": node("LoadImage", image=hint),
        "empty": node("EmptySD3LatentImage", width=SIDE, height=SIDE, batch_size=1),
    }
    if family in CLIPS:
        size = {"width": SIDE, "height": SIDE, "length": FRAMES, "batch_size": 1}
        empty = node("EmptyHunyuanLatentVideo", **size)
        graph["empty"] = empty if family == "wan" else node("Wan22ImageToVideoLatent", vae=["vae", 0], **size)
        graph["still"] = graph["hint"]
        graph["hint"] = node("RepeatImageBatch", image=["still", 0], amount=FRAMES)
    if family == "z_image":
        graph["shift"] = node("ModelSamplingAuraFlow", model=model, shift=3.0)
        model = ["shift", 0]
    if family == "flux":
        graph["guided"] = node("FluxGuidance", conditioning=["positive", 0], guidance=3.5)
    names = {"control_name": f"{family}.safetensors", "weights_name": "auto", "weights_strength": 1.0}
    graph["load"] = node("ControlNeXtLoader", model=model, **(names | loader))
    sources = {"model": ["load", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    if family == "flux":
        sources["positive"] = ["guided", 0]
    settings = {"control_net": ["load", 1], "image": ["hint", 0], "strength": 1.0}
    settings |= {"start_percent": 0.0, "end_percent": 1.0}
    if door == "ours":
        graph["apply"] = node("ControlNeXtApply", model=sources["model"], **settings)
        sources["model"] = ["apply", 0]
    elif door == "stock":
        graph["apply"] = node("ControlNetApplyAdvanced", **(sources | settings))
        del graph["apply"]["inputs"]["model"]
        sources |= {"positive": ["apply", 0], "negative": ["apply", 1]}
    sampler = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    graph["sample"] = node("KSampler", latent_image=["empty", 0], **sampler, **sources)
    graph["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents/transformer")
    graph["decode"] = node("VAEDecode", samples=["sample", 0], vae=["vae", 0])
    graph["picture"] = node("SaveImage", images=["decode", 0], filename_prefix=family)
    return graph


@pytest.fixture(scope="module")
def hint(server: ComfyServer) -> str:
    """Name of an uploaded picture."""
    stream = io.BytesIO()
    Image.fromarray((picture()[0] * 255).byte().numpy()).save(stream, "PNG")
    return server.upload_image(stream.getvalue(), "transformer.png")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_queue_run_through_the_hosts_own_loaders(
    family: str, server: ComfyServer, tiny: Any, hint: str, pinned_host: bool
) -> None:
    files_of(tiny.models, family, pinned_host)
    seen, complaints = len(server.log_lines()), len(probe(server)["complaints"])
    through_stock = latents(server, graph_of(family, hint))
    calls = len(probe(server)["calls"])
    through_ours = latents(server, graph_of(family, hint, "ours"))
    assert torch.equal(through_stock, through_ours) and through_stock.isfinite().all()
    assert len(probe(server)["calls"]) == calls, "the hint was encoded by the first run"
    encoder_alone = latents(server, graph_of(family, hint, "ours", weights_name="none"))
    weights_alone = latents(server, graph_of(family, hint, "none"))
    plain = latents(server, graph_of(family, hint, "none", weights_name="none"))
    for less in (encoder_alone, weights_alone):
        assert relative(less, plain) > 0.001 and relative(less, through_stock) > 0.001
    made = max((tiny.base / "output").glob(f"{family}_*.png"), key=lambda path: path.stat().st_mtime)
    with Image.open(made) as image:
        assert image.size == (SIDE, SIDE)
    (alone,) = probe(server)["complaints"][complaints:]
    assert "loaded without them" in alone, "runs without weights are among these"
    said = "\n".join(server.log_lines()[seen:])
    assert f"{family}.safetensors: {SPECS[family].title} ({family})" in said
    assert f"base weights: 2 tensors bundled in the control file; low rank ({RANK}) of 1 weights, strength 1" in said
    assert not re.search(r"traceback|had no effect|unet unexpected|unet missing", said, re.IGNORECASE), said
    let_go(server, also_results=True)  # the next family needs the memory
