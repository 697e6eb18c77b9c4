"""Clips: folders of frames and video files, with their hints, and the reference frame."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from comfyui_controlnext.controlnext_training.data import BrokenSample, DatasetError, FileDataset, open_dataset, report
from comfyui_controlnext.controlnext_training.data.video_frames import windows
from comfyui_controlnext.tests.fixtures.data_fixtures import coordinates, lines, marks, shard, write

SIDE = 64


def opened(source: Path, **options: Any) -> FileDataset:
    chosen = {"resolution": SIDE, "bucket_step": 8, "clip_frames": 3, "clip_stride": 2, "reference": "first"}
    return open_dataset(source, **{**chosen, **options})


def frames(root: Path, names: list[str], folder: str = "{}", hints: str = "{}/hints") -> Path:
    """Clips of 12 frames; frame N has mark N, its hint 100 + N; numbered without leading zeros."""
    for name in names:
        for number in range(12):
            write(root / folder.format(name) / f"frame {number}.png", coordinates(SIDE, SIDE, number))
            write(root / hints.format(name) / f"frame {number}.png", coordinates(SIDE, SIDE, 100 + number))
    return root


def level(number: int, guide: bool) -> int:
    """Tone of a frame, different enough from the next to survive compression."""
    return 8 + 4 * number + (2 if guide else 0)


def video(
    path: Path, count: int = 24, guide: bool = False, size: tuple[int, int] = (SIDE, SIDE), across: bool = False
) -> Path:
    """Video with frames of one tone each, a keyframe every 10. across:

    True makes black on the left and white on the right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "1", "g": "10", "bf": "2"}
        for number in range(count):
            values = np.full((*size, 3), level(number, guide), np.uint8)
            if across:
                values[:] = np.where(np.arange(size[1]) < size[1] // 2, 0, 255)[:, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(pictures: torch.Tensor, guide: bool = False) -> list[int]:
    """Numbers of these frames in `video`."""
    tones = [float(picture.mean()) * 255 for picture in pictures]
    found = [round((tone - level(0, guide)) / 4) for tone in tones]
    assert all(abs(tone - level(number, guide)) < 1.5 for tone, number in zip(tones, found, strict=True)), tones
    return found


@pytest.mark.parametrize(
    ("folder", "hints"),
    [("{}", "{}/hints"), ("{}/images", "{}/hints"), ("images/{}", "hints/{}"), ("{}", "conditioning/{}")],
)
def test_a_folder_of_frames_gives_clips_with_a_hint_for_each_frame(tmp_path: Path, folder: str, hints: str) -> None:
    dataset = opened(frames(tmp_path, ["a b", "\u4e2d"], folder, hints))
    assert len(dataset) == 4 and dataset.broken == () and dataset.sizes == [(SIDE, SIDE)] * 4
    for index, wanted in enumerate([[0, 2, 4], [5, 7, 9]] * 2):
        sample = dataset.load(index)
        assert sample.frames.shape == sample.hints.shape == (3, SIDE, SIDE, 3)
        assert marks(sample.frames) == wanted
        assert marks(sample.hints) == [100 + number for number in wanted]


@pytest.mark.parametrize(
    ("count", "length", "stride", "starts"),
    [(12, 3, 2, [0, 5]), (4, 3, 2, []), (5, 3, 2, [0]), (10, 3, 2, [0, 5]), (9, 3, 2, [0]), (3, 1, 9, [0, 1, 2])],
)
def test_clips_follow_each_other_without_overlap(count: int, length: int, stride: int, starts: list[int]) -> None:
    assert list(windows(count, length, stride)) == starts


def test_the_first_frame_and_its_hint_are_a_random_frame_of_the_source(tmp_path: Path) -> None:
    dataset = opened(frames(tmp_path, ["a"]), reference="random")
    seen = set()
    for position in range(60):
        sample = dataset.load(1, seed=3, position=position)
        reference, *rest = marks(sample.frames)
        assert rest == [7, 9] and marks(sample.hints) == [100 + reference, 107, 109]
        assert sample.frame_keys == dataset.frame_keys(1, 3, position)
        seen.add(reference)
    assert seen == set(range(12))
    again = opened(tmp_path, reference="random")
    assert all(torch.equal(again.load(1, 3, p).frames, dataset.load(1, 3, p).frames) for p in (0, 17, 59))
    others = [dataset.frame_keys(1, seed, 5)[0] for seed in range(20)]
    assert len(set(others)) > 3


def test_a_frame_has_the_same_key_in_every_clip_and_place(tmp_path: Path) -> None:
    dataset = opened(frames(tmp_path, ["a"]), reference="random")
    keys: dict[str, torch.Tensor] = {}
    for position in range(20):
        sample = dataset.load(position % 2, 0, position)
        for key, frame in zip(sample.frame_keys, sample.frames, strict=True):
            assert torch.equal(keys.setdefault(key, frame), frame)
    assert len(keys) <= 12


@pytest.mark.parametrize("layout", ["suffix", "folders", "table", "shard"])
def test_videos_are_paired_with_videos_of_hints(tmp_path: Path, layout: str) -> None:
    names = {
        "suffix": ("my cl\u00efp.mp4", "my cl\u00efp_hint.MP4"),
        "folders": ("images/\u4e2d.mp4", "hints/\u4e2d.mkv"),
        "table": ("v.mp4", "g.mp4"),
        "shard": ("s/v.mp4", "s/v.hint.mp4"),
    }[layout]
    made = [video(tmp_path / name, guide=bool(place)) for place, name in enumerate(names)]
    source = tmp_path
    if layout == "table":
        rows = [{"video_path": str(made[0]), "guide_path": "g.mp4", "meta_info": {}}]
        source = write(tmp_path / "meta.json", lines(rows))
    if layout == "shard":
        source = shard(tmp_path / "x.tar", {n: p.read_bytes() for n, p in zip(names, made, strict=True)})
    dataset = opened(source)
    assert dataset.broken == () and len(dataset) == 4
    for index in (3, 0):
        wanted = [5 * index, 5 * index + 2, 5 * index + 4]
        assert numbers(dataset.load(index).frames) == wanted
        assert numbers(dataset.load(index).hints, guide=True) == wanted
    sample = opened(source, reference="random").load(3, 0, 2)
    assert numbers(sample.frames)[1:] == [17, 19]
    assert numbers(sample.frames) == numbers(sample.hints, guide=True)


def test_distant_frames_of_a_long_video_are_found_by_jumping(tmp_path: Path) -> None:
    from comfyui_controlnext.controlnext_training.data import video_frames as reading

    path = video(tmp_path / "x.mp4", 60)
    blob = opened(tmp_path, hint="gray").items[0].clip.images.blob  # type: ignore[attr-defined]
    height, width, count, times = reading.examine_video(blob)
    assert (height, width, count, len(times)) == (SIDE, SIDE, 60, 60)
    from comfyui_controlnext.controlnext_training.data.samples import Facts

    for facts in (Facts("", height, width, count, times), Facts("", height, width, count)):
        for wanted in ([59, 0, 33], [7], [58, 59], [0, 0, 1]):
            found = reading.read_video(blob, facts, wanted)
            assert numbers(torch.from_numpy(np.stack([picture.rgb for picture in found]))) == wanted
    with pytest.raises(ValueError, match="has fewer frames"):
        reading.read_video(blob, Facts("", height, width, 99), [80])
    assert path.is_file()


def test_a_video_that_notes_how_to_turn_it_is_turned(tmp_path: Path) -> None:
    """The matrix of the track's header is set to a quarter turn clockwise, as phones write it."""
    path = video(tmp_path / "x.mp4", 6, size=(48, 80), across=True)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(content[:at] + matrix + content[at + 36 :])
    sample = opened(tmp_path, hint="gray").load(0)
    assert sample.original_size == (80, 48)
    height = sample.frames.shape[1]
    assert sample.frames[0, : height // 3].mean() < 0.1, "what was left is at the top"
    assert sample.frames[0, -height // 3 :].mean() > 0.9


def test_loss_regions_leave_out_the_reference_frame(tmp_path: Path) -> None:
    frames(tmp_path, ["a"])
    for number in range(12):
        write(tmp_path / "a" / "masks" / f"frame {number}.png", np.full((SIDE, SIDE), 255, np.uint8))
    for reference, first in (("first", 1), ("random", 0)):
        mask = opened(tmp_path, reference=reference).load(0).mask
        assert mask is not None and [float(frame.mean()) for frame in mask] == [first, 1, 1]


def test_hints_of_clips_may_be_computed(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "c" / f"{number}.jpg", np.random.default_rng(number).integers(0, 255, (50, 70, 3), np.uint8))
    sample = opened(tmp_path, hint="canny").load(0)
    assert sample.hints.shape == sample.frames.shape and set(sample.hints.unique().tolist()) == {0.0, 1.0}


def test_clips_that_cannot_be_used_are_listed_and_the_others_train(tmp_path: Path) -> None:
    frames(tmp_path, ["good", "no hint", "broken", "sizes", "half masked"])
    (tmp_path / "no hint" / "hints" / "frame 5.png").unlink()
    write(tmp_path / "broken" / "frame 7.png", "text")
    write(tmp_path / "sizes" / "frame 3.png", coordinates(SIDE, 32))
    write(tmp_path / "half masked" / "masks" / "frame 3.png", coordinates(SIDE, SIDE))
    write(tmp_path / "short" / "1.png", coordinates(SIDE, SIDE))
    write(tmp_path / "short" / "hints" / "1.png", coordinates(SIDE, SIDE))
    video(tmp_path / "long.mp4", 20)
    video(tmp_path / "long_hint.mp4", 14)
    whole = video(tmp_path / "cut.mp4", 20).read_bytes()
    write(tmp_path / "cut.mp4", whole[: len(whole) // 2])
    write(tmp_path / "text.mp4", "text")
    write(tmp_path / "empty.mp4", "")
    dataset = opened(tmp_path)
    assert {item.clip.images.label for item in dataset.items} == {str(tmp_path / "good" / "frame 0.png")}
    told = {Path(path).relative_to(tmp_path).as_posix(): why for path, why in dataset.broken}
    assert "has no hint, other frames" in told["no hint/frame 5.png"]
    assert "not a readable picture" in told["broken/frame 7.png"]
    assert f"is 32x{SIDE}, the clip's first frame is {SIDE}x{SIDE}" in told["sizes/frame 3.png"]
    assert "has no mask, other frames" in told["half masked/frame 0.png"]
    assert "has 1 frames, a clip takes 5" in told["short/1.png"]
    assert "differ in length: 20 and 14" in told["long.mp4"]
    for name in ("cut.mp4", "text.mp4", "empty.mp4"):
        assert "not a readable video" in told[name]
    assert f"{len(told)} files are left out" in report(dataset).text


def test_videos_are_not_pictures(tmp_path: Path) -> None:
    video(tmp_path / "x.mp4", 5)
    with pytest.raises(DatasetError, match=r"x.mp4: is a video. Set clip_frames above 1"):
        opened(tmp_path, clip_frames=1, hint="gray")


def test_a_video_that_goes_after_opening_is_a_broken_sample(tmp_path: Path) -> None:
    path = video(tmp_path / "x.mp4", 5)
    dataset = opened(tmp_path, hint="gray")
    path.unlink()
    with pytest.raises(BrokenSample, match="x.mp4"):
        dataset.load(0)
