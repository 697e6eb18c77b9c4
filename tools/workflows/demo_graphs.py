"""Workflows of the demo's models, which come with the project: they run in `run.py comfy` without a download."""

from pathlib import Path
from typing import Any

from ...controlnext_training.config_files import read_recipe
from ..demo_weights.shipped import CHECKPOINT, PICTURE_EDGES, PICTUREBOOK, XS
from ..workflow_graph import Node, Output, Workflow
from .parts import CONTROL, GROUPS, HINT, MODELS, PROMPTS, RESULT, finish, sample, sampler
from .training_graphs import ARRANGEMENT as TRAINING
from .training_graphs import GROUPS as TRAINING_GROUPS
from .training_graphs import prompts_first

SIDE = 192
SAMPLER: dict[str, Any] = {"seed": 7, "steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
SCENE, PROMPT = "boat", "a red boat and a yellow balloon on the sea under a blue sky"
"""Sample that the demo's base can draw, and its caption."""
SHARP, SMALL, TIMES, TILE = "picture_sharp.safetensors", 64, 4.0, 128
"""Super-resolution control, sides of the small picture and of a tile, and the enlargement factor."""
TILE_GROUPS = ("Models", "Prompts", "Picture and tiles", "Control", "Result")
TINY = Path(__file__).resolve().parents[2] / "controlnext_training" / "recipes" / "tiny.toml"
WIDGETS = ("steps", "batch_size", "learning_rate", "control_learning_rate", "seed", "variant")
ELSEWHERE = ("base", "data", "validation_data", "output_name", "resolution", "bucket_step", "hint")
"""Keys of the recipe that other widgets of the graph set."""
FISH, FISH_PROMPT = "fish", "an orange fish under water"
"""Sample for the control that is trained in two minutes, and its caption."""
MASKS = "picturebook:mask:60:31"
"""Pictures with which the demo's ControlNet-XS for outlines learns masks."""


def _base(workflow: Workflow, checkpoint: str) -> Node:
    return workflow.add(MODELS, "CheckpointLoaderSimple", ckpt_name=checkpoint)


def _prompts(
    workflow: Workflow, clip: Output, text: str, latents: str, side: int, count: int = 1
) -> tuple[Output, Output, Output]:
    positive = workflow.add(PROMPTS, "CLIPTextEncode", "Positive prompt", clip=clip, text=text)
    negative = workflow.add(PROMPTS, "CLIPTextEncode", "Negative prompt", clip=clip, text="")
    latent = workflow.add(PROMPTS, latents, width=side, height=side, batch_size=count)
    return positive["CONDITIONING"], negative["CONDITIONING"], latent["LATENT"]


def demo() -> Workflow:
    """Workflow that loads a control, applies a sample hint and shows the result."""
    workflow = Workflow("demo", "Demo, runs now", GROUPS)
    base = _base(workflow, PICTUREBOOK)
    loader = workflow.add(
        MODELS, "ControlNeXtLoader", model=base["MODEL"], control_name=PICTURE_EDGES, weights_name="auto"
    )
    workflow.note(
        MODELS,
        "Press Run",
        "These small models come with the project and **run.py comfy** puts them here. They draw "
        "illustrations of 192 pixels in SD3's way, on a CPU in seconds. With a real checkpoint the graph is the same.",
        150,
    )
    prompts = _prompts(workflow, base["CLIP"], PROMPT, "EmptySD3LatentImage", SIDE)
    workflow.note(
        HINT,
        "Words and places",
        "**The prompt names the things**, the hint says where they are. Try other colours: red, orange, yellow, green, "
        "blue, purple, pink, brown, white; a *scene* house, cat, fish or flower wants their names.",
        150,
    )
    hint = sample(workflow, "edges", SIDE, "Sample hint", scene=SCENE)
    applied = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=hint["IMAGE"]
    )
    workflow.note(
        RESULT,
        "With and without control",
        "**Set strength to 0 and run again**: the same seed without control. Values between show how the drawing takes "
        "over. *Load ControlNeXt* says which file it found and what it is for.",
        130,
    )
    return finish(workflow, applied["MODEL"], *prompts, base["VAE"], **SAMPLER)


def demo_tiles() -> Workflow:
    """Workflow that enlarges a small picture in tiles, with a super-resolution control."""
    workflow = Workflow("demo_tiles", "SD3 tiles, your own control", TILE_GROUPS)
    base = _base(workflow, PICTUREBOOK)
    loader = workflow.add(MODELS, "ControlNeXtLoader", model=base["MODEL"], control_name=SHARP, weights_name="auto")
    workflow.note(
        MODELS,
        "Train the control first",
        f"**{SHARP}** is not shipped. **run.py bench super_resolution** trains it, in an hour on a CPU, and says "
        "where it is; put it into **models/controlnext**. With SD3.5 and a control of your own set the tiles to "
        "**1024** with overlap **128**.",
        150,
    )
    text = {"Positive prompt": PROMPT, "Negative prompt": ""}
    positive, negative = (
        workflow.add(PROMPTS, "CLIPTextEncode", title, clip=base["CLIP"], text=words)["CONDITIONING"]
        for title, words in text.items()
    )
    picture = sample(workflow, "clip", SMALL, "Small picture", scene=SCENE, frames=1)
    large = workflow.add(HINT, "ImageScaleBy", image=picture["IMAGE"], upscale_method="bicubic", scale_by=TIMES)
    cut = workflow.add(HINT, "ControlNeXtSplitTiles", image=large["IMAGE"], width=TILE, height=TILE, overlap=TILE // 4)
    cut.stack = 1
    tiles = workflow.add(HINT, "RebatchImages", "Tiles in one pass", images=cut["IMAGE"], batch_size=1)
    latent = workflow.add(CONTROL, "VAEEncode", pixels=tiles["IMAGE"], vae=base["VAE"])
    applied = workflow.add(
        CONTROL,
        "ControlNeXtApply",
        model=loader["MODEL"],
        control_net=loader["CONTROL_NET"],
        image=tiles["IMAGE"],
    )
    settings = {**SAMPLER, "cfg": 1.0, "denoise": 0.6}
    sampled = sampler(workflow, applied["MODEL"], positive, negative, latent["LATENT"], **settings)
    drawn = workflow.add(RESULT, "VAEDecode", samples=sampled["LATENT"], vae=base["VAE"])
    merged = workflow.add(RESULT, "ControlNeXtMergeTiles", tiles=drawn["IMAGE"], layout=cut["layout"])
    workflow.note(
        RESULT,
        "How much is drawn again",
        "**denoise** 1 draws all of it by the control alone; less keeps colours and makes neighbours agree. Each tile "
        "sees the whole prompt.",
        110,
    )
    workflow.add(RESULT, "SaveImage", images=merged["IMAGE"], filename_prefix=f"ControlNeXt/{workflow.name}")
    return workflow


def demo_train() -> Workflow:
    """Workflow that trains a control on drawn pictures, then draws with it."""
    workflow = Workflow("demo_train", "Demo, train in two minutes", TRAINING_GROUPS, arrangement=TRAINING)
    recipe = read_recipe(TINY)
    base = _base(workflow, CHECKPOINT)
    workflow.note(
        MODELS,
        "Press Run and watch",
        "The demo's ControlNet-XS for outlines learns to read **masks**, on a CPU in about two minutes, and is tried "
        "at once. It stays in **models/controlnext**. A control from nothing needs hours on a GPU; *SD1.5, train on "
        "your pictures* is that graph.",
        170,
    )
    side = recipe["resolution"]
    prompts = _prompts(workflow, base["CLIP"], FISH_PROMPT, "EmptyLatentImage", side, count=4)
    prompts_first(workflow)
    data = workflow.add(HINT, "ControlDatasetFolder", folder=MASKS, hint="paired", resolution=side)
    workflow.note(
        HINT,
        "No pictures are needed",
        f"**{MASKS}** are illustrations that the project draws, with masks of their things. The name of a "
        "folder below ComfyUI's input folder stands here for pictures of your own.",
        130,
    )
    hint = sample(workflow, "mask", side, "Sample hint", scene=FISH)
    workflow.note(
        HINT,
        "A mask that it never saw",
        "The trained control follows **this mask** in the pictures on the right. Choose another *scene*, or put "
        "*Load Image* here, and run again: the training is finished and does not run a second time.",
        150,
    )
    trained = workflow.add(
        CONTROL,
        "ControlNeXtTrain",
        model=base["MODEL"],
        vae=base["VAE"],
        clip=base["CLIP"],
        dataset=data["dataset"],
        output_name="my_first_control",
        config=f'init_control = "{XS}"\n' + _settings(recipe),
        **{name: recipe[name] for name in WIDGETS},
    )
    applied = workflow.add(
        RESULT, "ControlNeXtApply", model=trained["MODEL"], control_net=trained["CONTROL_NET"], image=hint["IMAGE"]
    )
    return finish(workflow, applied["MODEL"], *prompts, base["VAE"], **SAMPLER)


def _settings(recipe: dict[str, object]) -> str:
    """Settings of the recipe without a widget, as TOML."""
    import json

    rest = {key: value for key, value in recipe.items() if key not in (*WIDGETS, *ELSEWHERE)}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in rest.items())
