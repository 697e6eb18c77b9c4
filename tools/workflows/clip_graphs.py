"""Video workflows: SVD with the second ControlNeXt release, in one window and in many.

Values are those of the authors' script: 24 frames per window with 6 shared, guidance 3 in every frame, 25 Euler steps
on Karras' noise levels, time ids 6 (the host takes one off its fps), 128 and 0.02.
"""

from dataclasses import dataclass

from ..workflow_graph import Model, Output, Workflow
from ..workflow_layout import Column
from .parts import HUB, RESULT

FP16 = f"{HUB}Kijai/ControlNeXt-SVD-V2-Comfy/resolve/main/"
"""Published file as fp16 safetensors: half the size, and the page can download it."""
ENCODER, UNET = (
    Model("controlnext", name, FP16 + name)
    for name in ("controlnext-svd_v2-controlnet-fp16.safetensors", "controlnext-svd_v2-unet-fp16.safetensors")
)
SVD = Model(
    "checkpoints",
    "svd_xt.safetensors",
    f"{HUB}stabilityai/stable-video-diffusion-img2vid-xt/resolve/main/svd_xt.safetensors",
)
MODELS, POSES, START, CONTROL = range(4)
GROUPS = ("Models", "Pose frames and start image", "Start and size", "Control", "Result")
ARRANGEMENT = (Column((MODELS, POSES), 2), Column((CONTROL, START), 1), Column((RESULT,), 2))
WIDTH, HEIGHT, GUIDANCE = 576, 1024, 3.0
WINDOW, OVERLAP, LONG, FPS = 24, 6, 72, 8


@dataclass(frozen=True)
class Clip:
    """Outputs of a video workflow's nodes before sampling."""

    model: Output
    positive: Output
    negative: Output
    latent: Output
    vae: Output


def clip(workflow: Workflow, frames: int) -> Clip:
    """Add loaders, pose frames, start image and control."""
    base = workflow.add(MODELS, "ImageOnlyCheckpointLoader", models=(SVD,), ckpt_name=SVD.name)
    unet = workflow.add(MODELS, "ControlNeXtUNetLoader", models=(UNET,), weights_name=UNET.name)
    loader = workflow.add(
        MODELS,
        "ControlNeXtLoader",
        models=(ENCODER,),
        model=unet["MODEL"],
        control_name=ENCODER.name,
        weights_name="none",
    )
    workflow.note(
        MODELS,
        "A whole UNet",
        "It stands in place of the checkpoint's; of that, CLIP vision and VAE are used (svd_xt_1_1 does as well). The "
        "files are fp16 copies of **ControlNeXt-SVD/v2**; both go into **models/controlnext**.",
        130,
    )
    hint, count = pose_frames(workflow, frames)
    image = workflow.add(
        POSES, "ControlNeXtSampleInputs", "Sample start image", kind="photo", width=WIDTH, height=HEIGHT
    )
    image.stack = 0
    started = workflow.add(
        START,
        "SVD_img2vid_Conditioning",
        clip_vision=base["CLIP_VISION"],
        init_image=image["IMAGE"],
        vae=base["VAE"],
        width=WIDTH,
        height=HEIGHT,
        video_frames=count,
        motion_bucket_id=128,
        fps=7,
        augmentation_level=0.02,
    )
    workflow.note(
        START,
        "The person to animate",
        "*Load Image* gives your own. Motion bucket, fps and augmentation are those of the release; leave them.",
        90,
    )
    control = workflow.add(
        CONTROL, "ControlNeXtApply", model=loader["MODEL"], control_net=loader["CONTROL_NET"], image=hint
    )
    return Clip(control["MODEL"], started["positive"], started["negative"], started["latent"], base["VAE"])


def pose_frames(workflow: Workflow, frames: int) -> tuple[Output, Output]:
    """Add the pose frames; returns them and their number."""
    poses = workflow.add(
        POSES,
        "ControlNeXtSampleInputs",
        "Sample poses",
        kind="pose_clip",
        width=WIDTH,
        height=HEIGHT,
        frames=frames,
    )
    poses.stack = 1
    size = workflow.add(POSES, "GetImageSize", image=poses["IMAGE"])
    workflow.note(
        START,
        "A pose video of your own",
        """
Put *Load Video* and *Get Video Components* in place of the sample: one skeleton picture per frame, the start image's
own pose first, in the proportions of the result. *ControlNeXt Pose Align* makes such frames from the keypoints of a
pose estimator (DWPose of a preprocessor pack). Pose pictures of other nodes are not aligned, and have red and blue
exchanged.
""",
        250,
    )
    return poses["IMAGE"], size["batch_size"]


def sampled(workflow: Workflow, clip: Clip, model: Output) -> Output:
    """Add the sampler; returns the frames of the video."""
    guided = workflow.add(RESULT, "VideoLinearCFGGuidance", model=model, min_cfg=GUIDANCE)
    sampler = workflow.add(
        RESULT,
        "KSampler",
        model=guided["MODEL"],
        positive=clip.positive,
        negative=clip.negative,
        latent_image=clip.latent,
        seed=42,
        steps=25,
        cfg=GUIDANCE,
        sampler_name="euler",
        scheduler="karras",
    )
    image = workflow.add(RESULT, "VAEDecode", samples=sampler["LATENT"], vae=clip.vae)
    image.stack = 1
    return image["IMAGE"]


def svd_short_clip() -> Workflow:
    """Workflow for SVD with as many frames as fit into one window."""
    workflow = Workflow("svd_short_clip", "SVD pose, 24 frames", GROUPS, arrangement=ARRANGEMENT)
    made = clip(workflow, WINDOW)
    workflow.note(
        RESULT,
        "24 frames",
        "This is what the release was trained on at once; *SVD pose, 72 frames in windows* goes on. **strength** 1 is "
        "as released: the 0.2 of the authors' code is in it.",
        120,
    )
    images = sampled(workflow, made, made.model)
    workflow.add(
        RESULT,
        "SaveAnimatedWEBP",
        images=images,
        filename_prefix=f"ControlNeXt/{workflow.name}",
        fps=FPS,
        lossless=False,
        quality=90,
        method="default",
    )
    return workflow


def svd_long_clip() -> Workflow:
    """Workflow for SVD with more frames than fit into one window."""
    workflow = Workflow("svd_long_clip", "SVD pose, 72 frames in windows", GROUPS, arrangement=ARRANGEMENT)
    made = clip(workflow, LONG)
    windows = workflow.add(
        RESULT,
        "ControlNeXtVideoWindows",
        model=made.model,
        length=WINDOW,
        overlap=OVERLAP,
        fuse="pyramid",
        repeat_first_hint=True,
    )
    workflow.note(
        RESULT,
        "72 frames in windows of 24",
        "They share 6; in the joints **pyramid** weighs the middle of a window most. **repeat_first_hint** begins each "
        "window with the reference pose, as the authors' script does. For a longer video raise *frames* of *Sample "
        "poses*; memory for sampling stays that of one window.",
        190,
    )
    images = sampled(workflow, made, windows["MODEL"])
    video = workflow.add(RESULT, "CreateVideo", images=images, fps=FPS)
    video.stack = 1
    workflow.add(RESULT, "SaveVideo", video=video["VIDEO"], filename_prefix=f"ControlNeXt/{workflow.name}")
    return workflow
