"""Workflows that train a control on a folder of pictures and try it in the same graph."""

from typing import Any

from ..workflow_graph import Model, Workflow
from ..workflow_layout import Column
from .parts import CONTROL, FLOW, HINT, MODELS, PROMPTS, RESULT, SD15, SD35, edges, finish, prompts, start

FOLDER = "my_pictures"
"""Name of a folder below the host's input folder."""
PROMPT = "a portrait in a sunlit garden, detailed photo"
PICTURES = f"""
They lie in ComfyUI's **input/{FOLDER}**, each with a caption: **1.png** and **1.txt**. The edges are drawn from them.
For hints of your own choose **paired** and add **1_hint.png**. The node shows what it found.
"""
WATCH = (
    "Loss, time left and validation pictures appear on the node. *Cancel* saves first; queue again to go on. The "
    "file ends in **models/controlnext**, for *Load ControlNeXt* in other graphs."
)
GROUPS = ("Models", "Prompts and size", "Pictures", "Training", "Try it")
ARRANGEMENT = (Column((MODELS, HINT), 2), Column((CONTROL,), 1), Column((PROMPTS, RESULT), 2))


def prompts_first(workflow: Workflow) -> None:
    """Put the prompts into the stack beside the sampler, which is below them."""
    for node in workflow.nodes:
        if node.group == PROMPTS and node.type == "CLIPTextEncode":
            node.stack = 0


def train_sd15() -> Workflow:
    """Workflow that trains a canny control for SD1.5, then draws with it."""
    return _train(
        "train_sd15",
        "SD1.5, train on your pictures",
        SD15,
        "**Any of the family** can be the base, with LoRAs before the trainer. It is only read. For SDXL set *variant* "
        "to **sdxl** and *resolution* to 1024.",
        {},
        variant="sd15",
        steps=4000,
        batch_size=4,
        output_name="my_canny",
        config='gain = 0.35\nprecision = "auto"\ncheckpointing = true\n',
    )


def train_sd35() -> Workflow:
    """Workflow that trains a canny control for SD3.5 medium, then draws with it."""
    return _train(
        "train_sd35",
        "SD3.5, train on your pictures",
        SD35,
        "**SD3 and SD3.5** of any size can be the base; it is only read. For Flux.1, Chroma, Qwen-Image, Lumina2 and "
        "Z-Image put *Load Diffusion Model*, a loader of text encoders and *Load VAE* here, and set *variant*.",
        FLOW,
        variant="sd3",
        steps=5000,
        batch_size=1,
        learning_rate=1e-4,
        output_name="my_sd35_canny",
        config='accumulation = 16\nprecision = "auto"\ncheckpointing = true\ncaption_dropout = 0.1\n',
    )


def _train(name: str, title: str, checkpoint: Model, which: str, sampling: dict[str, Any], **settings: Any) -> Workflow:
    """Workflow with a folder of pictures, the trainer, and its control. sampling, settings: of the sampler, of the
    trainer.
    """
    workflow, base = start(name, title, checkpoint)
    workflow.groups, workflow.arrangement = GROUPS, ARRANGEMENT
    workflow.note(MODELS, "Which checkpoint", which, 120)
    positive, negative, latent = prompts(workflow, base["CLIP"], checkpoint, PROMPT)
    prompts_first(workflow)
    data = workflow.add(HINT, "ControlDatasetFolder", folder=FOLDER, hint="canny", resolution=512)
    workflow.note(HINT, "Pictures to learn from", PICTURES, 150)
    hint = edges(workflow, checkpoint, "Picture to try it on")
    trained = workflow.add(
        CONTROL,
        "ControlNeXtTrain",
        model=base["MODEL"],
        vae=base["VAE"],
        clip=base["CLIP"],
        dataset=data["dataset"],
        **settings,
    )
    workflow.note(CONTROL, "Press Run and watch", WATCH, 110)
    applied = workflow.add(
        RESULT, "ControlNeXtApply", model=trained["MODEL"], control_net=trained["CONTROL_NET"], image=hint
    )
    return finish(workflow, applied["MODEL"], positive, negative, latent, base["VAE"], **sampling)
