"""A workflow that trains: a control of one's own from a folder of pictures, tried in the same graph."""

from ..workflow_graph import Workflow
from ..workflow_layout import Column
from .parts import CONTROL, HINT, MODELS, PROMPTS, RESULT, SD15, edges, finish, prompts, start

FOLDER = "my_pictures"
"""Below the host's input folder."""
GROUPS = ("Models", "Prompts and size", "Pictures", "Training", "Try it")
ARRANGEMENT = (Column((MODELS, HINT), 2), Column((CONTROL,), 1), Column((PROMPTS, RESULT), 2))


def prompts_first(workflow: Workflow) -> None:
    """Put the prompts at the side of the sampler, which stands below them."""
    for node in workflow.nodes:
        if node.group == PROMPTS and node.type == "CLIPTextEncode":
            node.stack = 0


def train_sd15() -> Workflow:
    """Train a canny control for SD1.5, then draw with it."""
    workflow, base = start("train_sd15", "SD1.5, train on your pictures", SD15)
    workflow.groups, workflow.arrangement = GROUPS, ARRANGEMENT
    workflow.note(
        MODELS,
        "Which checkpoint",
        "**Any of the family** can be the base, with LoRAs before the trainer. It is only read. For SDXL set *variant* "
        "to **sdxl** and *resolution* to 1024.",
        120,
    )
    positive, negative, latent = prompts(workflow, base["CLIP"], SD15, "a portrait in a sunlit garden, detailed photo")
    prompts_first(workflow)
    data = workflow.add(HINT, "ControlDatasetFolder", folder=FOLDER, hint="canny", resolution=512)
    workflow.note(
        HINT,
        "Pictures to learn from",
        f"""
They lie in ComfyUI's **input/{FOLDER}**, each with a caption: **1.png** and **1.txt**. The edges are drawn from them.
For hints of your own choose **paired** and add **1_hint.png**. The node shows what it found.
""",
        150,
    )
    hint = edges(workflow, SD15, "Picture to try it on")
    trained = workflow.add(
        CONTROL,
        "ControlNeXtTrain",
        model=base["MODEL"],
        vae=base["VAE"],
        clip=base["CLIP"],
        dataset=data["dataset"],
        variant="sd15",
        steps=4000,
        batch_size=4,
        output_name="my_canny",
        config='gain = 0.35\nprecision = "auto"\ncheckpointing = true\n',
    )
    workflow.note(
        CONTROL,
        "Press Run and watch",
        "Loss, time left and validation pictures appear on the node. *Cancel* saves first; queue again to go on. The "
        "file ends in **models/controlnext**, for *Load ControlNeXt* in other graphs.",
        110,
    )
    applied = workflow.add(
        RESULT, "ControlNeXtApply", model=trained["MODEL"], control_net=trained["CONTROL_NET"], image=hint
    )
    return finish(workflow, applied["MODEL"], positive, negative, latent, base["VAE"])
