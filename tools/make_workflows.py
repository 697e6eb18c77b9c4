"""Write example_workflows/: `python tools/make_workflows.py [ADDRESS]`

ADDRESS is a running ComfyUI with this pack (default 127.0.0.1:8188, `python run.py comfy` starts one); it is asked for
its nodes, nothing else. Each workflow is described here once; a test fails where the files differ from this.
"""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError  # noqa: E402
from comfyui_controlnext.tools.workflow_graph import (  # noqa: E402
    Model,
    Node,
    ObjectInfo,
    Output,
    Workflow,
    api_format,
    page_format,
)

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
HUB = "https://huggingface.co/"
PUBLISHED = f"{HUB}Pbihao/ControlNeXt/resolve/main/"


def published(folder: str) -> tuple[Model, Model]:
    """Encoder and UNet weights in a folder of the authors' repository; names below models/controlnext are the same."""
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
OFFSET_LORA = Model(
    "loras",
    "sd_xl_offset_example-lora_1.0.safetensors",
    f"{HUB}stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_offset_example-lora_1.0.safetensors",
)
SD15_DEPTH = published("ControlNeXt-SD1.5/vidit_depth")
SD15_POSE = published("ControlNeXt-SD1.5/deepfashion_multiview")
SD15_MASK = published("ControlNeXt-SD1.5/deepfashoin_mask")  # spelled so where it is published
SDXL_CANNY = published("ControlAny-SDXL/anime_canny")
SDXL_DEPTH = published("ControlAny-SDXL/vidit_depth")
OWN_SD15_CANNY = "sd15_canny/controlnet.safetensors"

MODELS, PROMPTS, HINT, CONTROL, RESULT = range(5)
COLUMNS = ("Models", "Prompts and size", "Hint", "Control", "Result")
NEGATIVE = "lowres, blurry, deformed, text, watermark"
SIDE = {SD15: 512, SDXL: 1024}
CONDITION_IMAGE = """
**Needs a {what} image.** Choose yours in *Load Image*; a preprocessor pack (for instance comfyui_controlnet_aux)
makes one from a photograph. Its sides should have the proportions of the latent: it is scaled to fill it, the
middle is kept.
"""


def start(name: str, base: Model, models: tuple[Model, ...] = ()) -> tuple[Workflow, Node]:
    """A workflow with its checkpoint loader."""
    workflow = Workflow(name, COLUMNS, models)
    return workflow, workflow.add(MODELS, "CheckpointLoaderSimple", ckpt_name=base.name, models=(base,))


def load_control(workflow: Workflow, model: Output, files: tuple[Model, Model], title: str | None = None) -> Node:
    """The loader with published files; `auto` finds the UNet weights beside the encoder."""
    return workflow.add(
        MODELS, "ControlNeXtLoader", title, (files[0],), model=model, control_name=files[0].name, weights_name="auto"
    )


def prompts(workflow: Workflow, clip: Output, base: Model, text: str) -> tuple[Output, Output, Output]:
    """Positive, negative and an empty latent."""
    positive = workflow.add(PROMPTS, "CLIPTextEncode", "Positive prompt", clip=clip, text=text)
    negative = workflow.add(PROMPTS, "CLIPTextEncode", "Negative prompt", clip=clip, text=NEGATIVE)
    latent = workflow.add(PROMPTS, "EmptyLatentImage", width=SIDE[base], height=SIDE[base], batch_size=1)
    return positive["CONDITIONING"], negative["CONDITIONING"], latent["LATENT"]


def edges(workflow: Workflow, title: str | None = None) -> Output:
    """Canny edges of a picture that every ComfyUI has."""
    image = workflow.add(HINT, "LoadImage", title, image="example.png")
    return workflow.add(HINT, "Canny", image=image["IMAGE"], low_threshold=0.2, high_threshold=0.5)["IMAGE"]


def stock_apply(
    workflow: Workflow, positive: Output, negative: Output, control: Node, image: Output, strength: float, title: str
) -> Node:
    """The host's own Apply node, wired to both halves."""
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


def finish(
    workflow: Workflow, model: Output, positive: Output, negative: Output, latent: Output, vae: Output
) -> Workflow:
    """Sampler, decoder, picture."""
    sampler = workflow.add(
        RESULT,
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=42,
        steps=25,
        cfg=7.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    )
    image = workflow.add(RESULT, "VAEDecode", samples=sampler["LATENT"], vae=vae)
    workflow.add(RESULT, "SaveImage", images=image["IMAGE"], filename_prefix=f"ControlNeXt/{workflow.name}")
    return workflow


def sd15_canny() -> Workflow:
    """Two nodes of ours: load, apply."""
    workflow, base = start("sd15_canny", SD15)
    loader = workflow.add(
        MODELS, "ControlNeXtLoader", model=base["MODEL"], control_name=OWN_SD15_CANNY, weights_name="auto"
    )
    workflow.note(
        MODELS,
        """
**Bring your own control.** No canny control for SD1.5 has been published. Put one that you trained into
`models/controlnext/sd15_canny/` (controlnet.safetensors, and unet.safetensors if there is one), or choose another file
above.
""",
        120,
    )
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a portrait in a sunlit garden, detailed photo")
    hint = edges(workflow)
    workflow.add(HINT, "PreviewImage", images=hint)
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=hint
    )
    workflow.note(
        CONTROL,
        "**strength** 1 is as trained, 0 switches the control off. *Apply ControlNeXt* controls every conditioning of "
        "the model, so the prompts go straight to the sampler.",
        120,
    )
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sd15_depth() -> Workflow:
    """A depth map, the published SD1.5 files."""
    workflow, base = start("sd15_depth", SD15, (SD15_DEPTH[1],))
    loader = load_control(workflow, base["MODEL"], SD15_DEPTH)
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a mossy stone courtyard at dawn, photo")
    image = workflow.add(HINT, "LoadImage", "Depth map", image="depth.png")
    workflow.note(HINT, CONDITION_IMAGE.format(what="depth"), 160)
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=image["IMAGE"]
    )
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sd15_pose() -> Workflow:
    """A pose picture, through the stock Apply node."""
    workflow, base = start("sd15_pose", SD15, (SD15_POSE[1],))
    loader = load_control(workflow, base["MODEL"], SD15_POSE)
    workflow.note(
        MODELS,
        "Pose often works with the encoder alone: set **weights_name** to `none` to keep more of the checkpoint's own "
        "style, at looser control.",
        110,
    )
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a woman in a blue coat, street, detailed photo")
    image = workflow.add(HINT, "LoadImage", "Pose picture", image="pose.png")
    workflow.note(HINT, CONDITION_IMAGE.format(what="pose (OpenPose skeleton)"), 160)
    control = stock_apply(workflow, positive, negative, loader, image["IMAGE"], 1.0, "Apply ControlNet (stock)")
    workflow.note(
        CONTROL,
        "The control also goes into the **stock** Apply node: then each conditioning is controlled by itself, and "
        "areas, masks, timestep ranges and stock ControlNets chain as usual.",
        130,
    )
    return finish(workflow, loader["MODEL"], control["positive"], control["negative"], latent, base["VAE"])


def sd15_mask() -> Workflow:
    """A mask painted on the page."""
    workflow, base = start("sd15_mask", SD15, (SD15_MASK[1],))
    loader = load_control(workflow, base["MODEL"], SD15_MASK)
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a woman in a red dress, studio, detailed photo")
    image = workflow.add(HINT, "LoadImage", "Paint the mask here", image="example.png")
    workflow.note(
        HINT,
        "**Paint the figure:** right-click the picture, *Open in MaskEditor*, paint, save. What is painted becomes "
        "white, the rest black. A mask picture of your own can go to *image* directly.",
        140,
    )
    mask = workflow.add(HINT, "MaskToImage", mask=image["MASK"])
    workflow.add(HINT, "PreviewImage", images=mask["IMAGE"])
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=mask["IMAGE"]
    )
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sdxl_canny() -> Workflow:
    """Edges from any picture, the published SDXL files."""
    workflow, base = start("sdxl_canny", SDXL, (SDXL_CANNY[1],))
    loader = load_control(workflow, base["MODEL"], SDXL_CANNY)
    workflow.note(
        MODELS,
        "This control was trained on anime pictures: an SDXL **anime checkpoint** suits it better than the base model "
        "chosen here.",
        110,
    )
    positive, negative, latent = prompts(workflow, base["CLIP"], SDXL, "a girl in a spring meadow, anime style")
    hint = edges(workflow)
    workflow.add(HINT, "PreviewImage", images=hint)
    control = workflow.add(
        CONTROL,
        "ControlNeXtApply",
        model=loader["MODEL"],
        control_net=loader["CONTROL_NET"],
        image=hint,
        strength=0.35,
    )
    workflow.note(CONTROL, "The authors recommend **strength 0.35** for canny on SDXL.", 90)
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sdxl_depth() -> Workflow:
    """A depth map with a strength schedule."""
    workflow, base = start("sdxl_depth", SDXL, (SDXL_DEPTH[1],))
    loader = load_control(workflow, base["MODEL"], SDXL_DEPTH)
    positive, negative, latent = prompts(workflow, base["CLIP"], SDXL, "a diamond tower above a lava lake, night")
    image = workflow.add(HINT, "LoadImage", "Depth map", image="depth.png")
    workflow.note(HINT, CONDITION_IMAGE.format(what="depth"), 160)
    options = workflow.add(
        CONTROL, "ControlNeXtOptions", control_net=loader["CONTROL_NET"], schedule="0:1, 0.6:1, 0.9:0.3"
    )
    workflow.note(
        CONTROL,
        "**schedule**: full strength up to 60 % of sampling, then down to 0.3, so that the last steps are free for "
        "detail. Empty = constant. This node can be left out.",
        120,
    )
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=options["CONTROL_NET"], image=image["IMAGE"]
    )
    return finish(workflow, control["MODEL"], positive, negative, latent, base["VAE"])


def sdxl_lora_two_controls() -> Workflow:
    """A LoRA, canny and depth together."""
    workflow, base = start("sdxl_lora_two_controls", SDXL, (SDXL_CANNY[1], SDXL_DEPTH[1]))
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
    canny = load_control(workflow, lora["MODEL"], SDXL_CANNY, "Load ControlNeXt (canny)")
    depth = load_control(workflow, canny["MODEL"], SDXL_DEPTH, "Load ControlNeXt (depth)")
    positive, negative, latent = prompts(workflow, lora["CLIP"], SDXL, "a castle on a cliff above the sea")
    workflow.note(
        PROMPTS,
        "**MODEL goes through both loaders**: each adds its UNet weights. LoRA and loaders may come in any order, the "
        "sum is the same. Where the picture gets harsh, lower **weights_strength**.",
        140,
    )
    hint = edges(workflow, "Picture for the edges")
    image = workflow.add(HINT, "LoadImage", "Depth map", image="depth.png")
    first = stock_apply(workflow, positive, negative, canny, hint, 0.35, "Apply ControlNet (canny)")
    second = stock_apply(
        workflow, first["positive"], first["negative"], depth, image["IMAGE"], 1.0, "Apply ControlNet (depth)"
    )
    return finish(workflow, depth["MODEL"], second["positive"], second["negative"], latent, base["VAE"])


WORKFLOWS: tuple[Callable[[], Workflow], ...] = (
    sd15_canny,
    sd15_depth,
    sd15_pose,
    sd15_mask,
    sdxl_canny,
    sdxl_depth,
    sdxl_lora_two_controls,
)


def files(object_info: ObjectInfo) -> dict[Path, str]:
    """Every file of example_workflows/ that this script writes, with its text."""
    written: dict[Path, str] = {}
    for describe in WORKFLOWS:
        workflow = describe()
        for folder, made in ((FOLDER, page_format), (FOLDER / "api", api_format)):
            text = json.dumps(made(workflow, object_info), indent=2, ensure_ascii=False) + "\n"
            written[folder / f"{workflow.name}.json"] = text
    return written


def main(address: str = "127.0.0.1:8188") -> None:
    """Ask the server at `address` for its nodes and write the files."""
    for path, text in files(ComfyClient(address).object_info()).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(path.relative_to(FOLDER.parent))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except ComfyError as error:
        sys.exit(str(error))
