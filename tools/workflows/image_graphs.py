"""Image workflows of ControlNeXt."""

from typing import Any

from ..workflow_graph import Model, Workflow
from .parts import (
    CONTROL,
    FLOW,
    HINT,
    MODELS,
    RESULT,
    SD15,
    SD35,
    SDXL,
    SDXL_DEPTH,
    SIDE,
    condition_note,
    edges,
    finish,
    latent_beside_sampler,
    load_control,
    load_lora,
    prompts,
    published,
    sample,
    sampler,
    start,
    stock_apply,
)

SD15_DEPTH = published("ControlNeXt-SD1.5/vidit_depth")
SD15_POSE = published("ControlNeXt-SD1.5/deepfashion_multiview")
SD15_MASK = published("ControlNeXt-SD1.5/deepfashoin_mask")  # spelled this way where it is published
SDXL_CANNY = published("ControlAny-SDXL/anime_canny")
OWN_SD15_CANNY = "sd15_canny/controlnet.safetensors"
OWN_SD35_CANNY = "my_sd35_canny.safetensors"


def sd15_canny() -> Workflow:
    """Workflow with two nodes of this pack: load and apply."""
    return _own_canny(
        "sd15_canny",
        "SD1.5 canny, your own control",
        SD15,
        OWN_SD15_CANNY,
        {},
        """
No canny control for SD1.5 has been published. Put one that you trained into **models/controlnext/sd15_canny**
(controlnet.safetensors, and unet.safetensors if there is one), or choose another file here.
""",
    )


def sd35_canny() -> Workflow:
    """Workflow for a trained control on SD3.5, as the graph `train_sd35` saves it."""
    return _own_canny(
        "sd35_canny",
        "SD3.5 canny, your own control",
        SD35,
        OWN_SD35_CANNY,
        FLOW,
        """
No ControlNeXt for SD3.5 has been published. *SD3.5, train on your pictures* leaves this file in **models/controlnext**;
or choose another one here. For other transformers put their loaders in place of the checkpoint's.
""",
    )


def _own_canny(name: str, title: str, checkpoint: Model, control: str, sampling: dict[str, Any], own: str) -> Workflow:
    """Workflow that loads and applies a control. own: note about its origin; sampling: settings of the sampler."""
    workflow, base = start(name, title, checkpoint)
    loader = workflow.add(MODELS, "ControlNeXtLoader", model=base["MODEL"], control_name=control, weights_name="auto")
    workflow.note(MODELS, "Bring your own control", own, 150)
    positive, negative, latent = prompts(
        workflow, base["CLIP"], checkpoint, "a portrait in a sunlit garden, detailed photo"
    )
    hint = edges(workflow, checkpoint)
    workflow.add(HINT, "PreviewImage", images=hint)
    applied = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=hint
    )
    workflow.note(
        RESULT,
        "Strength",
        "**1** is as trained, **0** switches the control off. *Apply ControlNeXt* controls every conditioning of "
        "the model, so the prompts go straight to the sampler.",
        120,
    )
    return finish(workflow, applied["MODEL"], positive, negative, latent, base["VAE"], **sampling)


def sd15_depth() -> Workflow:
    """Workflow with a depth map and the published SD1.5 files."""
    return _sd15_depth("sd15_depth", "SD1.5 depth, one control", "Sample depth map")


def _sd15_depth(name: str, title: str, hint: str, masked: bool = False) -> Workflow:
    """Workflow for depth on SD1.5. hint: title of the hint's node; masked: True uses the sample's mask, False none."""
    workflow, base = start(name, title, SD15)
    loader = load_control(workflow, base["MODEL"], SD15_DEPTH)
    positive, negative, latent = prompts(
        workflow, base["CLIP"], SD15, "a small stone house and a tree on a meadow at dawn, photo"
    )
    image = sample(workflow, "depth", SIDE[SD15], hint)
    mask: dict[str, Any] = {}
    if masked:
        mask["mask"] = image["MASK"]
        workflow.note(
            HINT,
            "Where the control counts",
            "**mask** white: controlled; black: free. For a mask of your own put *Load Image* in place of the sample, "
            "right-click the picture and paint in *Open in MaskEditor*. Grey counts in part.",
            150,
        )
    else:
        condition_note(workflow, "depth")
    control = workflow.add(
        CONTROL,
        "ControlNeXtApply",
        model=loader["MODEL"],
        control_net=loader["CONTROL_NET"],
        image=image["IMAGE"],
        **mask,
    )
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sd15_pose() -> Workflow:
    """Workflow with a pose picture, through the stock Apply node."""
    workflow, base = start("sd15_pose", "SD1.5 pose, stock Apply node", SD15)
    loader = load_control(workflow, base["MODEL"], SD15_POSE)
    workflow.note(
        MODELS,
        "More of the checkpoint's style",
        "Pose often works with the encoder alone: set **weights_name** to **none** to keep more of the checkpoint's "
        "own style, at looser control.",
        120,
    )
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a woman in a blue coat, street, detailed photo")
    image = sample(workflow, "pose", SIDE[SD15], "Sample pose")
    condition_note(workflow, "pose")
    control = stock_apply(workflow, positive, negative, loader, image["IMAGE"], 1.0, "Apply ControlNet (stock)")
    workflow.note(
        RESULT,
        "Why the stock node",
        "Each conditioning is controlled by itself here: areas, masks, timestep ranges and stock ControlNets chain as "
        "usual.",
        110,
    )
    return finish(workflow, loader["MODEL"], control["positive"], control["negative"], latent, base["VAE"])


def sd15_pose_positive() -> Workflow:
    """Workflow with a pose that does not control the negative prompt."""
    workflow, base = start("sd15_pose_positive", "SD1.5 pose, positive prompt only", SD15)
    loader = load_control(workflow, base["MODEL"], SD15_POSE)
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a dancer in a red dress, stage, detailed photo")
    image = sample(workflow, "pose", SIDE[SD15], "Sample pose")
    condition_note(workflow, "pose")
    options = workflow.add(CONTROL, "ControlNeXtOptions", control_net=loader["CONTROL_NET"], apply_to="positive")
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=options["CONTROL_NET"], image=image["IMAGE"]
    )
    workflow.note(
        RESULT,
        "Which prompt is controlled",
        "**apply_to** at **positive** lets guidance push towards the hint: more control at the same strength. With "
        "**both** the pose is held without that push.",
        120,
    )
    made = finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])
    return latent_beside_sampler(made)


def sd15_depth_in_mask() -> Workflow:
    """Workflow with a depth map that controls a part of the picture."""
    return _sd15_depth("sd15_depth_in_mask", "SD1.5 depth, inside a mask", "Sample depth map and its mask", masked=True)


def sd15_mask() -> Workflow:
    """Workflow with the mask of a figure."""
    workflow, base = start("sd15_mask", "SD1.5 mask, one control", SD15)
    loader = load_control(workflow, base["MODEL"], SD15_MASK)
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a woman in a red dress, studio, detailed photo")
    image = sample(workflow, "photo", SIDE[SD15], "Sample photograph and its mask")
    workflow.note(
        HINT,
        "A picture of your own",
        "Put *Load Image* in place of the sample and paint the figure: right-click the picture, *Open in MaskEditor*, "
        "paint, save. What is painted becomes white, the rest black. A mask picture can go to *image* directly.",
        170,
    )
    mask = workflow.add(HINT, "MaskToImage", mask=image["MASK"])
    mask.stack = 1
    workflow.add(HINT, "PreviewImage", images=mask["IMAGE"])
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=mask["IMAGE"]
    )
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sdxl_canny() -> Workflow:
    """Workflow with edges of any picture and the published SDXL files."""
    workflow, base = start("sdxl_canny", "SDXL canny, one control", SDXL)
    loader = load_control(workflow, base["MODEL"], SDXL_CANNY)
    workflow.note(
        MODELS,
        "An anime checkpoint fits",
        "It was trained on anime pictures: an SDXL **anime checkpoint** suits it better than the base model here.",
        110,
    )
    positive, negative, latent = prompts(workflow, base["CLIP"], SDXL, "a girl in a spring meadow, anime style")
    hint = edges(workflow, SDXL)
    workflow.add(HINT, "PreviewImage", images=hint)
    control = workflow.add(
        CONTROL,
        "ControlNeXtApply",
        model=loader["MODEL"],
        control_net=loader["CONTROL_NET"],
        image=hint,
        strength=0.35,
    )
    workflow.note(RESULT, "Why 0.35", "The authors recommend **strength 0.35** for canny on SDXL.", 90)
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sdxl_depth() -> Workflow:
    """Workflow with a depth map and a strength schedule."""
    workflow, base = start("sdxl_depth", "SDXL depth, strength over time", SDXL)
    loader = load_control(workflow, base["MODEL"], SDXL_DEPTH)
    positive, negative, latent = prompts(
        workflow, base["CLIP"], SDXL, "a diamond house and tree above a lava lake, night"
    )
    image = sample(workflow, "depth", SIDE[SDXL], "Sample depth map")
    condition_note(workflow, "depth")
    options = workflow.add(
        CONTROL, "ControlNeXtOptions", control_net=loader["CONTROL_NET"], schedule="0:1, 0.6:1, 0.9:0.3"
    )
    workflow.note(
        RESULT,
        "Strength over time",
        "**schedule**: full up to 60 % of sampling, then down to 0.3, so that the last steps are free for detail. "
        "Empty is constant.",
        110,
    )
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=options["CONTROL_NET"], image=image["IMAGE"]
    )
    made = finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])
    return latent_beside_sampler(made)


def sdxl_second_pass() -> Workflow:
    """Workflow in which edges control two passes of growing size."""
    workflow, base = start("sdxl_second_pass", "SDXL canny, second pass half as large again", SDXL)
    loader = load_control(workflow, base["MODEL"], SDXL_CANNY)
    positive, negative, latent = prompts(workflow, base["CLIP"], SDXL, "a girl in a spring meadow, anime style")
    hint = edges(workflow, SDXL)
    workflow.add(HINT, "PreviewImage", images=hint)
    control = workflow.add(
        CONTROL,
        "ControlNeXtApply",
        model=loader["MODEL"],
        control_net=loader["CONTROL_NET"],
        image=hint,
        strength=0.35,
    )
    first = sampler(workflow, control["MODEL"], positive, negative, latent, "First pass")
    larger = workflow.add(RESULT, "LatentUpscaleBy", samples=first["LATENT"], upscale_method="bicubic", scale_by=1.5)
    workflow.note(
        MODELS,
        "One control for both passes",
        "The hint is fitted to whatever size is sampled, so one *Apply* serves both. **denoise 0.5** keeps the first "
        "picture and redraws its detail; the edges keep it from doubling.",
        130,
    )
    made = finish(workflow, control["MODEL"], positive, negative, larger["LATENT"], base["VAE"], denoise=0.5)
    made.nodes[-3].title = "Second pass"
    return made


def sdxl_lora_two_controls() -> Workflow:
    """Workflow with a LoRA, canny and depth together."""
    workflow, base = start("sdxl_lora_two_controls", "SDXL LoRA, canny and depth", SDXL)
    lora = load_lora(workflow, base)
    canny = load_control(workflow, lora["MODEL"], SDXL_CANNY, "Load ControlNeXt (canny)")
    depth = load_control(workflow, canny["MODEL"], SDXL_DEPTH, "Load ControlNeXt (depth)")
    positive, negative, latent = prompts(
        workflow, lora["CLIP"], SDXL, "a stone house beside a tree on a meadow, a balloon above"
    )
    workflow.note(
        RESULT,
        "MODEL passes both loaders",
        "Each adds its UNet weights. LoRA and loaders may come in any order, the sum is the same. Where the picture "
        "gets harsh, lower **weights_strength**.",
        120,
    )
    edge_sample = sample(workflow, "edges", SIDE[SDXL], "Sample edges")
    edge_sample.stack, canny.stack = 0, 1
    image = sample(workflow, "depth", SIDE[SDXL], "Sample depth map")
    first = stock_apply(workflow, positive, negative, canny, edge_sample["IMAGE"], 0.35, "Apply ControlNet (canny)")
    second = stock_apply(
        workflow, first["positive"], first["negative"], depth, image["IMAGE"], 1.0, "Apply ControlNet (depth)"
    )
    made = finish(workflow, depth["MODEL"], second["positive"], second["negative"], latent, base["VAE"])
    return latent_beside_sampler(made)
