"""Detection of the headers of every published file, and of files that are mistaken for one: a name or a helpful
message.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfyui_controlnext.controlnext_core import checkpoint
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError, Header
from comfyui_controlnext.controlnext_core.detection import DetectionError, choose_spec, read_control_file
from comfyui_controlnext.controlnext_core.specs import SPECS, Family
from comfyui_controlnext.tests.fixtures import wrong_files
from comfyui_controlnext.tests.references import reference_controlnext as reference

HEADERS = Path(__file__).parents[1] / "data" / "headers"
FOREIGN = json.loads((HEADERS / "foreign.json").read_text("utf-8"))
# published file -> family of the base model -> variant
PUBLISHED: dict[str, dict[str, str]] = {
    "sd15_l": {"SD1.5": "sd15_legacy"},
    "sdxl_0": {"SDXL": "sdxl_june"},
    "sdxl_1": {"SDXL": "sdxl_july"},
    "svd_v1": {"SVD": "svd_v1"},
    "sd15_t": {"SD1.5": "sd15", "SDXL": "sdxl", "SVD": "svd_v2"},
    "sdxl_2": {"SD1.5": "sd15", "SDXL": "sdxl", "SVD": "svd_v2"},
    "svd_v2": {"SD1.5": "sd15", "SDXL": "sdxl", "SVD": "svd_v2"},
}
PREFIXES = ("", "controlnext.", "module.", "controlnet.", "module.controlnext.")
UNET_WEIGHT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"


def published(name: str) -> dict[str, tuple[int, ...]]:
    shapes = json.loads((HEADERS / f"{name}.json").read_text("utf-8"))["shapes"]
    return {key: tuple(shape) for key, shape in shapes.items()}


def header(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None) -> Header:
    return Header(Path("some file.safetensors"), shapes, dict.fromkeys(shapes, "F32"), metadata or {})


def refused(shapes: dict[str, tuple[int, ...]]) -> str:
    with pytest.raises(DetectionError) as caught:
        read_control_file(header(shapes))
    assert str(caught.value).startswith("some file.safetensors: ")
    return str(caught.value)


def test_there_is_a_header_for_every_published_file_and_each_is_the_layer_tables() -> None:
    assert {path.stem for path in HEADERS.glob("*.json")} - {"foreign"} == set(PUBLISHED)
    for name in PUBLISHED:
        build = {"sd15_l": "SD15-L", "sd15_t": "SD15-T", "svd_v1": "SVD-v1", "svd_v2": "SVD-v2"}.get(name)
        assert published(name) == reference.shapes(build or name.upper().replace("_", "-"))


@pytest.mark.parametrize(
    ("name", "dtype", "metadata", "size"),
    [
        ("sdxl_2", torch.float32, None, 14_110_296),  # as published for anime-canny and vidit-depth
        ("sdxl_0", torch.float16, {"format": "pt"}, 10_711_742),  # vidit-depth of June 2024
        ("sd15_l", torch.float32, None, 21_414_004),
    ],
)
def test_a_header_makes_a_file_of_the_published_size(
    name: str, dtype: torch.dtype, metadata: dict[str, str] | None, size: int, tmp_path: Path
) -> None:
    tensors = {key: torch.zeros(shape, dtype=dtype) for key, shape in published(name).items()}
    path = checkpoint.save(tmp_path / "controlnet.safetensors", tensors, metadata or {})
    slack = 8 + len('"__metadata__":{},') if metadata is None else 0  # an empty table of metadata and its padding
    assert size <= path.stat().st_size <= size + slack


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_header_is_identified(name: str, prefix: str) -> None:
    shapes = published(name)
    file = read_control_file(header({prefix + key: shape for key, shape in shapes.items()}))
    assert file.encoder == {key: prefix + key for key in shapes}
    assert file.weights == {} and file.metadata.spec is None
    for family in Family:
        if family.value in PUBLISHED[name]:
            assert choose_spec(file, family).name == PUBLISHED[name][family.value]
        else:
            with pytest.raises(DetectionError, match="is a control for"):
                choose_spec(file, family)


def test_no_two_specs_claim_one_header_on_one_base() -> None:
    for name, by_family in PUBLISHED.items():
        claims = [spec for spec in read_control_file(header(published(name))).candidates]
        for family in by_family:
            names = [spec.name for spec in claims if spec.family.value == family]
            assert names == ["svd_v2", "svd_v2_padded"] or len(names) == 1, (name, family)


def test_every_variant_can_be_reached() -> None:
    reached = {name for by_family in PUBLISHED.values() for name in by_family.values()}
    assert reached | {"svd_v2_padded"} == {name for name, spec in SPECS.items() if not spec.on_transformer}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_header_is_named_and_says_what_to_do(kind: str) -> None:
    message = refused({key: tuple(shape) for key, shape in FOREIGN[kind]["shapes"].items()})
    for words in FOREIGN[kind]["says"]:
        assert words in message, message


def test_every_wrong_file_is_refused_in_words(tmp_path: Path) -> None:
    messages = {}
    for kind, path in wrong_files.make_wrong_files(tmp_path / "wrong \u00e4 files").items():
        with pytest.raises(CheckpointError) as caught:
            read_control_file(checkpoint.peek(path))
        assert path.name in str(caught.value)
        messages[kind] = str(caught.value)
    assert not list(tmp_path.rglob(wrong_files.CODE_MARKER)), "the code in the pickle was run"
    for kind, words in {
        "lora": "is a LoRA",
        "stock_controlnet": "is a classic ControlNet",
        "t2i_adapter": "is a T2I-Adapter",
        "controlnet_xs": "is a ControlNet-XS",
        "controlnet_xs_diffusers": "is a ControlNet-XS",
        "checkpoint": "is a full checkpoint",
        "vae": "is an image autoencoder",
        "truncated": "truncated",
        "header_overflow": "truncated or not a .safetensors file",
        "header_not_json": "truncated or not a .safetensors file",
        "pickle_with_code": "was not opened",
        "empty": "is empty (0 bytes)",
        "text": "truncated or not a .safetensors file",
        "folder": "is a folder",
    }.items():
        assert words in messages.pop(kind)
    assert not messages, "kinds without expected words"


@pytest.mark.parametrize(
    ("name", "family", "words"),
    [
        ("sdxl_1", Family.SD15, ("control for SDXL (sdxl_july)", "model is SD1.5", "Connect a checkpoint")),
        ("svd_v1", Family.SDXL, ("control for SVD (svd_v1)", "model is SDXL", "choose a control made for SDXL")),
        ("sd15_l", Family.SD21, ("control for SD1.5 (sd15_legacy)", "model is SD2.1")),
        ("sdxl_2", Family.OTHER, ("control for SD1.5 / SDXL / SVD", "sd15, sdxl, svd_v2, svd_v2_padded")),
    ],
)
def test_a_wrong_pair_is_refused_with_both_sides(name: str, family: Family, words: tuple[str, ...]) -> None:
    with pytest.raises(DetectionError) as caught:
        choose_spec(read_control_file(header(published(name))), family)
    for part in words:
        assert part in str(caught.value)


def test_the_user_may_say_the_variant_within_the_same_names() -> None:
    gen2, legacy = (read_control_file(header(published(name))) for name in ("svd_v2", "sd15_l"))
    assert choose_spec(gen2, Family.SVD, "svd_v2_padded").name == "svd_v2_padded"
    assert choose_spec(gen2, Family.SDXL, "sdxl").name == "sdxl"
    assert choose_spec(legacy, Family.SD15, "sd15_legacy").name == "sd15_legacy"
    with pytest.raises(
        DetectionError, match="variant=sd15_legacy needs other weights.* sd15, sdxl, svd_v2, svd_v2_padded"
    ):
        choose_spec(gen2, Family.SD15, "sd15_legacy")
    with pytest.raises(DetectionError, match=r"control for SDXL \(sdxl\), but the connected model is SD1.5"):
        choose_spec(gen2, Family.SD15, "sdxl")


def test_metadata_decides_before_names_and_the_user_before_metadata() -> None:
    file = read_control_file(header(published("svd_v2"), {"controlnext.spec": "svd_v2_padded"}))
    assert [spec.name for spec in file.candidates] == ["svd_v2_padded"]
    assert choose_spec(file, Family.SVD).name == "svd_v2_padded"
    assert choose_spec(file, Family.SVD, "svd_v2").name == "svd_v2"
    with pytest.raises(DetectionError, match=r"control for SVD \(svd_v2_padded\), but the connected model is SDXL"):
        choose_spec(file, Family.SDXL)


def test_metadata_that_contradicts_the_names_is_refused() -> None:
    with pytest.raises(DetectionError, match="metadata says sd15_legacy, but .* those of sd15, sdxl, svd_v2"):
        read_control_file(header(published("sdxl_2"), {"controlnext.spec": "sd15_legacy"}))


@pytest.mark.parametrize("shape", [(), (0,), (0, 256, 1, 1), (320,), (320, 256), (256, 320, 1, 1)])
@pytest.mark.parametrize("name", ["mid_convs.1.weight", "down_res.0.norm1.weight", "mid_convs.0.2.weight"])
def test_a_mark_of_any_shape_is_refused_in_words(name: str, shape: tuple[int, ...]) -> None:
    message = refused(published("sd15_l") | {name: shape})
    assert "of another shape" in message and f"{name} {list(shape)}" in message


def test_another_width_at_the_end_is_the_same_build() -> None:
    for name, widths in {"sd15_t": (64, 640), "sd15_l": (128,)}.items():
        for width in widths:
            shapes = published(name) | {"mid_convs.1.weight": (width, 256, 1, 1), "mid_convs.1.bias": (width,)}
            file = read_control_file(header(shapes))
            assert file.out_channels == width
            assert choose_spec(file, Family.SD15).name == PUBLISHED[name]["SD1.5"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_unexpected_and_misshapen_names_are_listed(name: str) -> None:
    shapes = published(name)
    kept = {key: shape for key, shape in shapes.items() if key != "down_res.1.conv2.bias"}
    assert "1 missing: down_res.1.conv2.bias" in refused(kept)
    assert "1 unexpected: down_res.9.conv1.bias" in refused(shapes | {"down_res.9.conv1.bias": (1,)})
    wrong = refused(shapes | {"down_res.0.conv1.weight": (128, 5, 3, 3)})
    assert "1 of another shape: down_res.0.conv1.weight [128, 5, 3, 3] (expected [128," in wrong
    assert "looks most like ControlNeXt" in wrong and "download it again" in wrong
    few = dict(list(shapes.items())[:-6]) | {key: shapes[key] for key in shapes if key.startswith("mid_convs.1")}
    many = refused({key: shape for key, shape in few.items() if "down_sample" not in key})
    assert "and " in many and " more" in many


def test_a_bundle_is_split_into_its_parts() -> None:
    encoder = {f"controlnext.{key}": shape for key, shape in published("sdxl_2").items()}
    file = read_control_file(header(encoder | {UNET_WEIGHT: (320, 320)}))
    assert file.weights == {UNET_WEIGHT.removeprefix("unet."): UNET_WEIGHT}
    assert file.encoder["mid_convs.1.weight"] == "controlnext.mid_convs.1.weight"
    assert choose_spec(file, Family.SDXL).name == "sdxl"


def test_an_encoder_half_hidden_in_a_prefix_is_no_encoder() -> None:
    shapes = published("sdxl_2")
    mixed = {(f"controlnext.{key}" if key.startswith("mid") else key): shape for key, shape in shapes.items()}
    assert "is not a ControlNeXt encoder" in refused(mixed)


@pytest.mark.parametrize("mark", ["mid_convs.1.weight", "down_res.0.norm1.weight"])
def test_a_file_without_a_mark_names_the_nearest_variant(mark: str) -> None:
    message = refused({key: shape for key, shape in published("sd15_l").items() if key != mark})
    assert "Nearest is ControlNeXt SD1.5 (first generation" in message and "50 names in common" in message
