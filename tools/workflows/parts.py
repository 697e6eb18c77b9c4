"""Parts of the example workflows: published files, groups, and shared nodes."""

from typing import Any

from ..workflow_graph import Model, Node, Output, Workflow

HUB = "https://huggingface.co/"
PUBLISHED = f"{HUB}Pbihao/ControlNeXt/resolve/main/"


def published(folder: str) -> tuple[Model, Model]:
    """Encoder and UNet weights in a folder of the authors' repository, with the same names below models/controlnext."""
    files = (f"{folder}/controlnet.safetensors", f"{folder}/unet.safetensors")
    encoder, weights = (Model("controlnext", name, PUBLISHED + name) for name in files)
    return encoder, weights


SD15 = Model(
    "checkpoints",
    "v1-5-pruned-emaonly-fp16.safetensors",
    f"{HUB}Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
)
SDXL = Model(
    "checkpoints",
    "sd_xl_base_1.0.safetensors",
    f"{HUB}stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
)
SD35 = Model(
    "checkpoints",
    "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
    f"{HUB}Comfy-Org/stable-diffusion-3.5-fp8/resolve/main/sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors",
)
OFFSET_LORA = Model(
    "loras",
    "sd_xl_offset_example-lora_1.0.safetensors",
    f"{HUB}stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_offset_example-lora_1.0.safetensors",
)
SDXL_DEPTH = published("ControlAny-SDXL/vidit_depth")

MODELS, PROMPTS, HINT, CONTROL, RESULT = range(5)
GROUPS = ("Models", "Prompts and size", "Hint", "Control", "Result")
NEGATIVE = "lowres, blurry, deformed, text, watermark"
SIDE = {SD15: 512, SDXL: 1024, SD35: 1024}
LATENTS = {SD15: "EmptyLatentImage", SDXL: "EmptyLatentImage", SD35: "EmptySD3LatentImage"}
"""Base -> node that makes an empty latent for it."""
FLOW: dict[str, Any] = {"steps": 28, "cfg": 4.5, "sampler_name": "euler", "scheduler": "sgm_uniform"}
"""Settings of the sampler for SD3.5."""
CONDITION_IMAGE = """
Put *Load Image* in place of the sample. A preprocessor pack, for instance **comfyui_controlnet_aux**, makes a {what}
image from a photograph. It should have the proportions of the latent: it is scaled to fill that, the middle is kept.
"""
OWN_HINT = "A {what} image of your own"


def start(name: str, title: str, base: Model) -> tuple[Workflow, Node]:
    """Workflow with its checkpoint loader."""
    workflow = Workflow(name, title, GROUPS)
    return workflow, workflow.add(MODELS, "CheckpointLoaderSimple", ckpt_name=base.name, models=(base,))


def load_control(workflow: Workflow, model: Output, files: tuple[Model, Model], title: str | None = None) -> Node:
    """Add the loader with published files, both by name: pages offer to download the files that widgets name."""
    encoder, weights = (file.name for file in files)
    return workflow.add(
        MODELS, "ControlNeXtLoader", title, files, model=model, control_name=encoder, weights_name=weights
    )


def load_lora(workflow: Workflow, base: Node) -> Node:
    """Add the LoRA that was published with SDXL, at half strength."""
    lora = workflow.add(
        MODELS,
        "LoraLoader",
        models=(OFFSET_LORA,),
        model=base["MODEL"],
        clip=base["CLIP"],
        lora_name=OFFSET_LORA.name,
        strength_model=0.5,
        strength_clip=0.5,
    )
    lora.stack = 0
    return lora


def condition_note(workflow: Workflow, what: str) -> None:
    """Add a note about making such a hint."""
    workflow.note(HINT, OWN_HINT.format(what=what), CONDITION_IMAGE.format(what=what), 170)


def prompts(workflow: Workflow, clip: Output, base: Model, text: str) -> tuple[Output, Output, Output]:
    """Add the prompts; returns positive, negative and an empty latent."""
    positive = workflow.add(PROMPTS, "CLIPTextEncode", "Positive prompt", clip=clip, text=text)
    negative = workflow.add(PROMPTS, "CLIPTextEncode", "Negative prompt", clip=clip, text=NEGATIVE)
    latent = workflow.add(PROMPTS, LATENTS[base], width=SIDE[base], height=SIDE[base], batch_size=1)
    return positive["CONDITIONING"], negative["CONDITIONING"], latent["LATENT"]


def sample(workflow: Workflow, kind: str, side: int, title: str, **inputs: Any) -> Node:
    """Add a square sample input of the pack, in the group of hints."""
    return workflow.add(HINT, "ControlNeXtSampleInputs", title, kind=kind, width=side, height=side, **inputs)


def edges(workflow: Workflow, base: Model, title: str = "Sample photograph") -> Output:
    """Add Canny edges of the sample photograph; returns their output."""
    image = sample(workflow, "photo", SIDE[base], title)
    canny = workflow.add(HINT, "Canny", image=image["IMAGE"], low_threshold=0.2, high_threshold=0.5)
    canny.stack = 1
    return canny["IMAGE"]


def stock_apply(
    workflow: Workflow, positive: Output, negative: Output, control: Node, image: Output, strength: float, title: str
) -> Node:
    """Add the host's Apply node, wired to both halves of the guidance."""
    return workflow.add(
        CONTROL,
        "ControlNetApplyAdvanced",
        title,
        positive=positive,
        negative=negative,
        control_net=control["CONTROL_NET"],
        image=image,
        strength=strength,
    )


def sampler(
    workflow: Workflow,
    model: Output,
    positive: Output,
    negative: Output,
    latent: Output,
    title: str | None = None,
    **settings: Any,
) -> Node:
    """Add a KSampler; `settings` replace its default settings."""
    usual: dict[str, Any] = {"seed": 42, "steps": 25, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    wires: dict[str, Any] = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return workflow.add(RESULT, "KSampler", title, **wires, **usual | settings)


def latent_beside_sampler(workflow: Workflow) -> Workflow:
    """Move the size to the result's group, where the group of prompts above the control would be too high."""
    (latent,) = (node for node in workflow.nodes if node.type == "EmptyLatentImage")
    latent.group, latent.stack = RESULT, 0
    return workflow


def finish(
    workflow: Workflow,
    model: Output,
    positive: Output,
    negative: Output,
    latent: Output,
    vae: Output,
    **settings: Any,
) -> Workflow:
    """Add sampler, decoder and picture. settings: of the sampler, in place of the default ones."""
    sampled = sampler(workflow, model, positive, negative, latent, **settings)
    image = workflow.add(RESULT, "VAEDecode", samples=sampled["LATENT"], vae=vae)
    image.stack = 1
    workflow.add(RESULT, "SaveImage", images=image["IMAGE"], filename_prefix=f"ControlNeXt/{workflow.name}")
    return workflow
