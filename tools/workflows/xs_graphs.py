"""Workflows of ControlNet-XS: a control without UNet weights, so that MODEL does not go through its loader."""

from ..workflow_graph import Model, Node, Workflow
from .parts import (
    CONTROL,
    HINT,
    HUB,
    MODELS,
    RESULT,
    SD15,
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
    sample,
    start,
    stock_apply,
)


def released(name: str) -> Model:
    """File of the authors' repository, which has no folders."""
    return Model("controlnext", name, f"{HUB}CVL-Heidelberg/ControlNet-XS/resolve/main/{name}")


XS_SD15_CANNY = released("sd15_encD_canny_53m.ckpt")
XS_SDXL_CANNY = released("sdxl_encD_canny_48m.safetensors")
XS_SDXL_DEPTH = released("sdxl_encD_depth_48m.safetensors")
STOCK_DOOR = """
Each conditioning is controlled by itself here: areas, masks, timestep ranges and stock ControlNets chain as usual.
MODEL goes to the sampler unchanged.
"""


def load_xs(workflow: Workflow, file: Model, title: str | None = None) -> Node:
    """Add the loader with a released file."""
    return workflow.add(MODELS, "ControlNetXSLoader", title, (file,), control_name=file.name)


def xs_sd15_canny() -> Workflow:
    """Workflow with edges on SD1.5 and this pack's Apply node."""
    workflow, base = start("xs_sd15_canny", "SD1.5 canny, ControlNet-XS", SD15)
    control = load_xs(workflow, XS_SD15_CANNY)
    workflow.note(
        MODELS,
        "Get the file",
        """
[sd15_encD_canny_53m.ckpt](https://huggingface.co/CVL-Heidelberg/ControlNet-XS/tree/main) (211 MB)
into **models/controlnext**. It is published as .ckpt only, which ComfyUI does not download by itself; only tensors are
read from it.
""",
        150,
    )
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a portrait in a sunlit garden, detailed photo")
    hint = edges(workflow, SD15)
    workflow.add(HINT, "PreviewImage", images=hint)
    applied = workflow.add(
        CONTROL, "ControlNeXtApply", model=base["MODEL"], control_net=control["CONTROL_NET"], image=hint
    )
    workflow.note(
        RESULT,
        "Strength",
        "**1** is as trained, **0** switches the control off. *ControlNet-XS Options*, between loader and Apply, "
        "has strengths of its own for the encoder, middle and decoder of the model.",
        130,
    )
    return finish(workflow, applied["MODEL"], positive, negative, latent, base["VAE"])


def xs_sdxl_canny() -> Workflow:
    """Workflow with edges on SDXL and this pack's Apply node."""
    workflow, base = start("xs_sdxl_canny", "SDXL canny, ControlNet-XS", SDXL)
    control = load_xs(workflow, XS_SDXL_CANNY)
    workflow.note(
        MODELS,
        "No UNet weights",
        "MODEL goes from the checkpoint straight to *Apply ControlNeXt*. The file belongs into **models/controlnext**; "
        "**sdxl_encD_canny_20m.safetensors** is the smaller release.",
        120,
    )
    positive, negative, latent = prompts(
        workflow, base["CLIP"], SDXL, "a portrait of a sailor in a storm, oil painting"
    )
    hint = edges(workflow, SDXL)
    workflow.add(HINT, "PreviewImage", images=hint)
    applied = workflow.add(
        CONTROL, "ControlNeXtApply", model=base["MODEL"], control_net=control["CONTROL_NET"], image=hint
    )
    return finish(workflow, applied["MODEL"], positive, negative, latent, base["VAE"])


def xs_sdxl_depth() -> Workflow:
    """Workflow with a depth map on SDXL and the stock Apply node."""
    workflow, base = start("xs_sdxl_depth", "SDXL depth, ControlNet-XS", SDXL)
    base.stack = 0
    control = load_xs(workflow, XS_SDXL_DEPTH)
    positive, negative, latent = prompts(
        workflow, base["CLIP"], SDXL, "a diamond house and tree above a lava lake, night"
    )
    image = sample(workflow, "depth", SIDE[SDXL], "Sample depth map")
    condition_note(workflow, "depth")
    applied = stock_apply(workflow, positive, negative, control, image["IMAGE"], 1.0, "Apply ControlNet (stock)")
    workflow.note(RESULT, "Why the stock node", STOCK_DOOR, 120)
    return finish(workflow, base["MODEL"], applied["positive"], applied["negative"], latent, base["VAE"])


def xs_sdxl_two() -> Workflow:
    """Workflow with two ControlNet-XS in a chain of stock nodes."""
    workflow, base = start("xs_sdxl_two", "SDXL canny and depth, two ControlNet-XS", SDXL)
    base.stack = 0
    canny = load_xs(workflow, XS_SDXL_CANNY, "Load ControlNet-XS (canny)")
    depth = load_xs(workflow, XS_SDXL_DEPTH, "Load ControlNet-XS (depth)")
    positive, negative, latent = prompts(
        workflow, base["CLIP"], SDXL, "a stone house beside a tree on a meadow, a balloon above"
    )
    edge_sample = sample(workflow, "edges", SIDE[SDXL], "Sample edges")
    edge_sample.stack = 0
    image = sample(workflow, "depth", SIDE[SDXL], "Sample depth map")
    first = stock_apply(workflow, positive, negative, canny, edge_sample["IMAGE"], 0.7, "Apply ControlNet (canny)")
    second = stock_apply(
        workflow, first["positive"], first["negative"], depth, image["IMAGE"], 0.7, "Apply ControlNet (depth)"
    )
    workflow.note(
        RESULT,
        "Two at a time",
        "Their order makes no difference. Two controls push more than one: **strength 0.7** each is a start.",
        110,
    )
    made = finish(workflow, base["MODEL"], second["positive"], second["negative"], latent, base["VAE"])
    return latent_beside_sampler(made)


def xs_controlnext_lora() -> Workflow:
    """Workflow with ControlNet-XS, ControlNeXt and a LoRA on one model, through both doors."""
    workflow, base = start("xs_controlnext_lora", "SDXL LoRA, ControlNeXt and ControlNet-XS", SDXL)
    lora = load_lora(workflow, base)
    depth = load_control(workflow, lora["MODEL"], SDXL_DEPTH, "Load ControlNeXt (depth)")
    canny = load_xs(workflow, XS_SDXL_CANNY, "Load ControlNet-XS (canny)")
    positive, negative, latent = prompts(
        workflow, lora["CLIP"], SDXL, "a stone house beside a tree on a meadow, a balloon above"
    )
    edge_sample = sample(workflow, "edges", SIDE[SDXL], "Sample edges")
    edge_sample.stack, depth.stack = 0, 1
    image = sample(workflow, "depth", SIDE[SDXL], "Sample depth map")
    model = workflow.add(
        CONTROL,
        "ControlNeXtApply",
        "Apply ControlNeXt (depth)",
        model=depth["MODEL"],
        control_net=depth["CONTROL_NET"],
        image=image["IMAGE"],
    )
    applied = stock_apply(workflow, positive, negative, canny, edge_sample["IMAGE"], 1.0, "Apply ControlNet (XS canny)")
    workflow.note(
        RESULT,
        "Two ways in",
        "The depth control goes into the **MODEL**, the canny control into the **conditionings**. Either could take "
        "the other way. Where the picture gets harsh, lower a **strength**.",
        120,
    )
    made = finish(workflow, model["MODEL"], applied["positive"], applied["negative"], latent, base["VAE"])
    return latent_beside_sampler(made)
