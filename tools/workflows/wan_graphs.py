"""Video workflows of Wan 2.1 1.3B: a hint for each frame, and a control that is trained first.

Values of the sampler are those of ComfyUI's own template of text to video: 30 steps of uni_pc, guidance 6, shift 8.
"""

from typing import Any, NamedTuple

from ..workflow_graph import Model, Node, Workflow
from .parts import CONTROL, GROUPS, HINT, HUB, MODELS, PROMPTS, RESULT, sampler

FILES = f"{HUB}Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
WAN, TEXT, VAE = (
    Model(folder, name, f"{FILES}{folder}/{name}")
    for folder, name in (
        ("diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors"),
        ("text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
        ("vae", "wan_2.1_vae.safetensors"),
    )
)
OWN_POSE, OWN_DEPTH, OWN_OUTPAINT = (f"my_wan_{kind}.safetensors" for kind in ("pose", "depth", "outpaint"))
VIDEO = "video.mp4"
"""Name of the person's video in ComfyUI's folder of inputs."""
FRAMES, FPS, SHIFT = 81, 16, 8.0
LONG, SHORT = 832, 480
NOTES = {
    False: (
        "81 frames",
        "The clip is as long as the hints: **4n + 1** frames, 16 a second. For longer ones put *WAN Context Windows* "
        "behind *Apply ControlNeXt*: each window gets the hints of its own frames.",
        130,
    ),
    True: (
        "Sides and frames",
        "*Pad Image for Outpainting* adds pixels at each side; keep width and height of the whole multiples of 16, and "
        "**feathering** at 0. Cut the video to **4n + 1** frames with *Image From Batch*, 81 for a start; Wan was made "
        "for 16 a second. Sound is not kept: connect **audio** of the video to *Create Video* for it.",
        220,
    ),
}
"""True: of outpainting. Title, text and height of the note beside the sampler."""
NEGATIVE = "static, blurry, deformed, subtitles, watermark"


def wan_pose() -> Workflow:
    """Pose frames, one for each frame of the clip."""
    return _wan(
        "wan_pose",
        "Wan pose video",
        OWN_POSE,
        "a dancer in a red dress on a stage, the camera stands still",
        "pose_clip",
        (SHORT, LONG),
        """
Put *Load Video* and *Get Video Components* in place of the sample: one skeleton picture for each frame, drawn as in
training. A preprocessor pack (DWPose) draws them; *ControlNeXt Pose Align* draws its keypoints, moved onto a person.
""",
    )


def wan_depth() -> Workflow:
    """Depth maps, one for each frame of the clip."""
    return _wan(
        "wan_depth",
        "Wan depth video",
        OWN_DEPTH,
        "a stone house beside a tree on a meadow at dawn, the camera moves to the side",
        "depth_clip",
        (LONG, SHORT),
        """
Put *Load Video* and *Get Video Components* in place of the sample: one depth map for each frame, near things white. A
preprocessor pack makes them of a video (Depth Anything).
""",
    )


def wan_outpaint() -> Workflow:
    """A video, gray added at its sides, and a control that paints there."""
    workflow = Workflow("wan_outpaint", "Wan video outpainting", GROUPS)
    text = "a wide street in a small town on a sunny morning, people walk by"
    loaded = _loaded(workflow, OWN_OUTPAINT, "wan_outpaint** makes one of clips alone", text)
    video = workflow.add(HINT, "LoadVideo", file=VIDEO)
    parts = workflow.add(HINT, "GetVideoComponents", video=video["VIDEO"])
    scaled = workflow.add(
        HINT, "ImageScale", image=parts["images"], upscale_method="area", width=SHORT, height=SHORT, crop="center"
    )
    side = (LONG - SHORT) // 2
    padded = workflow.add(
        HINT, "ImagePadForOutpaint", image=scaled["IMAGE"], left=side, top=0, right=side, bottom=0, feathering=0
    )
    count = workflow.add(HINT, "GetImageSize", image=padded["IMAGE"])
    parts.stack = count.stack = 0
    scaled.stack = padded.stack = 1
    _video(
        workflow,
        loaded,
        padded,
        {"width": count["width"], "height": count["height"], "length": count["batch_size"]},
        around=padded,
    )
    return workflow


def _wan(name: str, title: str, control: str, text: str, kind: str, size: tuple[int, int], video: str) -> Workflow:
    """kind: of the sample; size: (width, height); video: how to get a hint of one's own."""
    workflow, (width, height) = Workflow(name, title, GROUPS), size
    loaded = _loaded(workflow, control, "wan_1_3b** makes one of clips with such hints beside them", text)
    hint = workflow.add(
        HINT, "ControlNeXtSampleInputs", "Sample clip of hints", kind=kind, width=width, height=height, frames=FRAMES
    )
    hint.stack = 1
    count = workflow.add(HINT, "GetImageSize", image=hint["IMAGE"])
    count.stack = 0
    workflow.note(HINT, "A video of your own", video, 170)
    _video(workflow, loaded, hint, {"width": width, "height": height, "length": count["batch_size"]})
    return workflow


class Loaded(NamedTuple):
    """Nodes that load, and the prompts."""

    control: Node
    vae: Node
    positive: Node
    negative: Node


def _loaded(workflow: Workflow, control: str, recipe: str, text: str) -> Loaded:
    """recipe: what makes such a control, in the note's words; text: the prompt."""
    base = workflow.add(MODELS, "UNETLoader", models=(WAN,), unet_name=WAN.name, weight_dtype="default")
    clip = workflow.add(MODELS, "CLIPLoader", models=(TEXT,), clip_name=TEXT.name, device="default")
    clip.inputs["type"] = "wan"  # `add` has an argument of that name
    vae = workflow.add(MODELS, "VAELoader", models=(VAE,), vae_name=VAE.name)
    loader = workflow.add(MODELS, "ControlNeXtLoader", model=base["MODEL"], control_name=control, weights_name="auto")
    clip.stack = vae.stack = 0
    workflow.note(
        MODELS,
        "Train the control first",
        f"No trained control for Wan is shipped or published. The trainer's recipe **{recipe}; put it into "
        f"**models/controlnext** as **{control}**, or choose another here.",
        150,
    )
    prompts = {"Positive prompt": text, "Negative prompt": NEGATIVE}
    positive, negative = (
        workflow.add(PROMPTS, "CLIPTextEncode", title, clip=clip["CLIP"], text=words)
        for title, words in prompts.items()
    )
    return Loaded(loader, vae, positive, negative)


def _video(
    workflow: Workflow,
    loaded: Loaded,
    hint: Node,
    latent_inputs: dict[str, Any],
    around: Node | None = None,
) -> None:
    """Control, sampler and the saved video. around: node whose IMAGE stays where its MASK is 0."""
    latent = workflow.add(PROMPTS, "EmptyHunyuanLatentVideo", "Empty clip", **latent_inputs, batch_size=1)
    applied = workflow.add(
        CONTROL,
        "ControlNeXtApply",
        model=loaded.control["MODEL"],
        control_net=loaded.control["CONTROL_NET"],
        image=hint["IMAGE"],
    )
    shifted = workflow.add(RESULT, "ModelSamplingSD3", model=applied["MODEL"], shift=SHIFT)
    sampled = sampler(
        workflow,
        shifted["MODEL"],
        loaded.positive["CONDITIONING"],
        loaded.negative["CONDITIONING"],
        latent["LATENT"],
        steps=30,
        cfg=6.0,
        sampler_name="uni_pc",
        scheduler="simple",
    )
    title, text, height = NOTES[around is not None]
    workflow.note(RESULT, title, text, height)
    images = workflow.add(RESULT, "VAEDecode", samples=sampled["LATENT"], vae=loaded.vae["VAE"])
    images.stack = int(around is None)
    if around is not None:
        images = workflow.add(
            RESULT,
            "ImageCompositeMasked",
            "Keep the video in the middle",
            destination=around["IMAGE"],
            source=images["IMAGE"],
            mask=around["MASK"],
            x=0,
            y=0,
            resize_source=False,
        )
        images.stack = 0
    video_made = workflow.add(RESULT, "CreateVideo", images=images["IMAGE"], fps=FPS)
    video_made.stack = 1
    workflow.add(RESULT, "SaveVideo", video=video_made["VIDEO"], filename_prefix=f"ControlNeXt/{workflow.name}")
