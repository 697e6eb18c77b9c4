"""Small SVD checkpoint through the host's nodes, from the file to the pictures of a video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures import video_fixtures as video
from comfyui_controlnext.tests.fixtures.sampling_fixtures import relative
from comfyui_controlnext.tools.tiny_models import make_controlnext, make_svd
from torch import Tensor

pytestmark = pytest.mark.comfy

SIDE = 64
POSE_SEED = 9


@dataclass
class VideoStage:
    """Loaded checkpoint with its start image encoded, and a control on it."""

    model: Any
    control: Any
    vae: Any
    positive: Any
    negative: Any

    def film(self, model: Any, frames: int, steps: int = 1) -> Tensor:
        """Pictures (frames, SIDE, SIDE, 3) from VideoLinearCFGGuidance, KSampler and VAEDecode."""
        from comfy_extras.nodes_video_model import VideoLinearCFGGuidance

        import nodes as host_nodes

        (guided,) = VideoLinearCFGGuidance().patch(model, 1.0)
        latent = {"samples": torch.zeros(frames, 4, SIDE // 8, SIDE // 8)}
        (result,) = host_nodes.KSampler().sample(
            guided, 1, steps, 2.5, "euler", "karras", self.positive, self.negative, latent
        )
        return host_nodes.VAEDecode().decode(self.vae, result)[0]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VideoStage]:
    """Stage from ImageOnlyCheckpointLoader, SVD_img2vid_Conditioning, and the loader of a control."""
    import folder_paths
    from comfy_extras.nodes_video_model import ImageOnlyCheckpointLoader, SVD_img2vid_Conditioning
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    folder = tmp_path_factory.mktemp("models")
    make_svd(folder / "svd.ckpt")
    make_controlnext(folder / "svd_v2" / "controlnet.bin", "gen2")
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(folder)], {".ckpt"}))
        model, clip_vision, vae = ImageOnlyCheckpointLoader().load_checkpoint("svd.ckpt")
        start = video.hints(1, (SIDE // 8, SIDE // 8), POSE_SEED)
        positive, negative, latent = SVD_img2vid_Conditioning().encode(
            clip_vision, start, vae, SIDE, SIDE, 40, 127, 6, 0.0
        )
        assert latent["samples"].shape == (40, 4, SIDE // 8, SIDE // 8)
        loaded = load_controlnext(model, folder / "svd_v2" / "controlnet.bin")
        assert loaded.control.net.spec.name == "svd_v2"
        yield VideoStage(loaded.model, loaded.control, vae, positive, negative)


def controlled_in_windows(stage: VideoStage, frames: int, length: int, overlap: int, strength: float = 1.0) -> Any:
    hints = video.hints(frames, (SIDE // 8, SIDE // 8))
    model = video.controlled(stage.model, "svd_v2", hints, strength, control=stage.control)
    return video.windowed(model, length, overlap, "standard_static", "pyramid")


def check_film(pictures: Tensor, frames: int) -> None:
    assert pictures.shape == (frames, SIDE, SIDE, 3)
    assert pictures.isfinite().all() and float(pictures.std()) > 0.02


def test_the_control_shows_in_every_frame_of_a_film_in_windows(stage: VideoStage) -> None:
    with torch.inference_mode():
        pictures = stage.film(controlled_in_windows(stage, 7, 4, 1), 7)
        off = stage.film(controlled_in_windows(stage, 7, 4, 1, 0.0), 7)
    check_film(pictures, 7)
    assert all(relative(one, other) > 1e-4 for one, other in zip(pictures, off, strict=True))


def test_forty_frames_in_windows_of_fourteen(stage: VideoStage) -> None:
    with torch.inference_mode():
        pictures = stage.film(controlled_in_windows(stage, 40, 14, 4), 40)
    check_film(pictures, 40)
