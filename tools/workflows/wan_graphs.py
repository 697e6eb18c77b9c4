"""Video workflows of Wan 2.1 1.3B: a hint for each frame, and a control that is trained first.

Values of the sampler are those of ComfyUI's own template of text to video: 30 steps of uni_pc, guidance 6, shift 8.
"""

from ..workflow_graph import Model, Workflow
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
OWN_POSE, OWN_DEPTH = "my_wan_pose.safetensors", "my_wan_depth.safetensors"
FRAMES, FPS, SHIFT = 81, 16, 8.0
LONG, SHORT = 832, 480
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
training. A preprocessor pack (DWPose) draws them; of its keypoints *ControlNeXt Pose Align* does, fitted to a person.
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


def _wan(name: str, title: str, control: str, text: str, kind: str, size: tuple[int, int], video: str) -> Workflow:
    """kind: of the sample; size: (width, height); video: how to get a hint of one's own."""
    workflow, (width, height) = Workflow(name, title, GROUPS), size
    base = workflow.add(MODELS, "UNETLoader", models=(WAN,), unet_name=WAN.name, weight_dtype="default")
    clip = workflow.add(MODELS, "CLIPLoader", models=(TEXT,), clip_name=TEXT.name, device="default")
    clip.inputs["type"] = "wan"  # `add` has an argument of that name
    vae = workflow.add(MODELS, "VAELoader", models=(VAE,), vae_name=VAE.name)
    loader = workflow.add(MODELS, "ControlNeXtLoader", model=base["MODEL"], control_name=control, weights_name="auto")
    clip.stack = vae.stack = 0
    workflow.note(
        MODELS,
        "Train the control first",
        "No trained control for Wan is shipped or published. The trainer's recipe **wan_1_3b** makes one of clips with "
        f"such hints beside them; put it into **models/controlnext** as **{control}**, or choose another here.",
        150,
    )
    positive = workflow.add(PROMPTS, "CLIPTextEncode", "Positive prompt", clip=clip["CLIP"], text=text)
    negative = workflow.add(PROMPTS, "CLIPTextEncode", "Negative prompt", clip=clip["CLIP"], text=NEGATIVE)
    hint = workflow.add(
        HINT, "ControlNeXtSampleInputs", "Sample clip of hints", kind=kind, width=width, height=height, frames=FRAMES
    )
    hint.stack = 1
    count = workflow.add(HINT, "GetImageSize", image=hint["IMAGE"])
    count.stack = 0
    workflow.note(HINT, "A video of your own", video, 170)
    latent = workflow.add(
        PROMPTS, "EmptyHunyuanLatentVideo", width=width, height=height, length=count["batch_size"], batch_size=1
    )
    applied = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=hint["IMAGE"]
    )
    shifted = workflow.add(RESULT, "ModelSamplingSD3", model=applied["MODEL"], shift=SHIFT)
    sampled = sampler(
        workflow,
        shifted["MODEL"],
        positive["CONDITIONING"],
        negative["CONDITIONING"],
        latent["LATENT"],
        steps=30,
        cfg=6.0,
        sampler_name="uni_pc",
        scheduler="simple",
    )
    workflow.note(
        RESULT,
        "81 frames",
        "The clip is as long as the hints: **4n + 1** frames, 16 a second. For longer ones put *WAN Context Windows* "
        "behind *Apply ControlNeXt*: each window gets the hints of its own frames.",
        130,
    )
    images = workflow.add(RESULT, "VAEDecode", samples=sampled["LATENT"], vae=vae["VAE"])
    video_made = workflow.add(RESULT, "CreateVideo", images=images["IMAGE"], fps=FPS)
    images.stack = video_made.stack = 1
    workflow.add(RESULT, "SaveVideo", video=video_made["VIDEO"], filename_prefix=f"ControlNeXt/{workflow.name}")
    return workflow
