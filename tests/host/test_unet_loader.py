"""Whole UNets from files: as a MODEL under both sets of names, and as differences on a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.controlnext_core.checkpoint import CheckpointError
from comfyui_controlnext.tests.fixtures import video_fixtures as video
from comfyui_controlnext.tests.fixtures.lazy_layers import EITHER_WAY
from comfyui_controlnext.tests.fixtures.wrong_files import make_wrong_files
from comfyui_controlnext.tools.tiny_models import make_controlnext, unet_tensors
from comfyui_controlnext.tools.tiny_models.storage import save
from torch import Tensor

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("ignore:::diffusers")]

Tensors = dict[str, Tensor]
TOLERANCE = 1e-4
"""Relative tolerance of weights from differences of a tenth of their size, stored in fp16: 2^-12 / 10."""


def published(tensors: Tensors) -> Tensors:
    """Tensors under the names of the published files, from host names."""
    from comfy.model_detection import detect_unet_config
    from comfyui_controlnext.controlnext_core.key_maps import unet_key_map

    names = unet_key_map(detect_unet_config(tensors, ""))
    assert set(names.values()) == tensors.keys()
    return {name: tensors[host] for name, host in names.items()}


@pytest.fixture(scope="module")
def svd() -> Tensors:
    """UNet of a small SVD checkpoint, under host names."""
    return unet_tensors("svd")


@pytest.fixture(scope="module")
def svd_published(svd: Tensors) -> Tensors:
    return published(svd)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Save tensors as a file of the controlnext folder and load it through the node."""
    import folder_paths
    from comfyui_controlnext.nodes.video import ControlNeXtUNetLoader

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "controlnext", ([str(tmp_path)], {".bin", ".safetensors"}))

    def run(tensors: Tensors, name: str = "unet.bin", weight_dtype: str = "default") -> Any:
        save(tmp_path / name, tensors)
        with torch.inference_mode():
            return ControlNeXtUNetLoader.execute(name, weight_dtype)[0]

    return run


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    """Free the models, each hundreds of megabytes."""
    import comfy.model_management

    yield
    comfy.model_management.unload_all_models()


def assert_holds(model: Any, tensors: Tensors) -> None:
    """Assert that the model's UNet has exactly these values (both formats here represent fp16 exactly)."""
    found = model.model.diffusion_model.state_dict()
    assert found.keys() == tensors.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor.float(), tensors[name].float())]
    assert different == []


@EITHER_WAY
@pytest.mark.parametrize("prefix", ["", "unet."])
def test_a_published_svd_is_loaded_whole(
    load: Callable[..., Any], svd: Tensors, svd_published: Tensors, prefix: str
) -> None:
    """Stock loaders do not know these names."""
    model = load({prefix + name: tensor for name, tensor in svd_published.items()})
    assert_holds(model, svd)
    assert type(model.model).__name__ == "SVD_img2vid"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_converted_svd_is_what_the_stock_loader_makes_of_it(
    load: Callable[..., Any], svd: Tensors, prefix: str
) -> None:
    import comfy.sd

    model = load({prefix + name: tensor for name, tensor in svd.items()})
    with torch.inference_mode():
        stock = comfy.sd.load_diffusion_model_state_dict(dict(svd))
    assert_holds(model, svd)
    assert type(model.model) is type(stock.model)
    for name in ("load_device", "offload_device", "size"):
        assert getattr(model, name) == getattr(stock, name)
    assert model.model_dtype() == stock.model_dtype()
    assert model.model.manual_cast_dtype == stock.model.manual_cast_dtype


def test_a_number_format_is_as_in_the_stock_node(load: Callable[..., Any], svd_published: Tensors) -> None:
    model = load(svd_published, weight_dtype="fp8_e4m3fn")
    assert model.model_dtype() == torch.float8_e4m3fn
    assert model.model.diffusion_model.input_blocks[0][0].weight.dtype == torch.float8_e4m3fn


@EITHER_WAY
def test_a_published_sd15_is_loaded_as_sd15(load: Callable[..., Any]) -> None:
    tensors = unet_tensors("sd15")
    model = load(published(tensors))
    assert_holds(model, tensors)
    assert type(model.model).__name__ == "BaseModel" and type(model.model.model_config).__name__ == "SD15"


def test_it_samples_as_the_checkpoint_does(load: Callable[..., Any], svd: Tensors, svd_published: Tensors) -> None:
    import comfy.sd

    with torch.inference_mode():
        stock = comfy.sd.load_diffusion_model_state_dict(dict(svd))
        conds = _wide_conditioning()
        expected = video.sample(stock, 2, 1, conds, cells=(8, 8))
        assert torch.equal(video.sample(load(svd_published), 2, 1, conds, cells=(8, 8)), expected)


def _wide_conditioning() -> Any:
    """Conditioning with the context of the real family."""
    positive, negative = video.conditioning(cells=(8, 8))
    wide = torch.randn(1, 1, 1024, generator=torch.Generator().manual_seed(2))
    return [[wide, positive[0][1]]], [[torch.zeros_like(wide), negative[0][1]]]


# what the host makes of the MODEL


def test_the_host_makes_a_plain_patcher_of_it_for_weight_hooks(
    load: Callable[..., Any], svd: Tensors, svd_published: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patcher made by the host's code for dynamic VRAM, from one that calls itself dynamic: real ones need a GPU."""
    from comfy import model_patcher

    if not hasattr(model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic patchers (comfy.model_patcher.ModelPatcherDynamic)")

    class Dynamic(model_patcher.ModelPatcher):
        non_dynamic_delegate_model = None
        get_non_dynamic_delegate = model_patcher.ModelPatcherDynamic.get_non_dynamic_delegate

        def is_dynamic(self) -> bool:
            return True

    monkeypatch.setattr(model_patcher, "CoreModelPatcher", Dynamic)
    model = load(svd_published, weight_dtype="fp8_e5m2")
    assert type(model) is Dynamic
    delegate = model.clone().get_non_dynamic_delegate()
    assert type(delegate) is model_patcher.ModelPatcher
    assert delegate.model is not model.model and delegate.model_dtype() == torch.float8_e5m2
    assert_holds(delegate, {name: tensor.to(torch.float8_e5m2) for name, tensor in svd.items()})


def test_the_host_makes_another_of_it_for_another_device(
    load: Callable[..., Any], svd: Tensors, svd_published: Tensors
) -> None:
    model = load(svd_published)
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI samples on one device alone (no ModelPatcher.deepclone_multigpu)")
    with torch.inference_mode():
        other = model.deepclone_multigpu(new_load_device=torch.device("cpu", 1))
    assert other.load_device == torch.device("cpu", 1) and other.model is not model.model
    assert_holds(other, svd)


# refusals


@EITHER_WAY
@pytest.mark.parametrize("names", ["published", "host"])
@pytest.mark.parametrize("drop", [1, 7])
def test_missing_tensors_are_listed(
    load: Callable[..., Any], svd: Tensors, svd_published: Tensors, names: str, drop: int
) -> None:
    tensors = dict(svd_published if names == "published" else svd)
    gone = sorted(name for name in tensors if name.endswith("attn1.to_q.weight"))[-drop:]
    for name in gone:
        del tensors[name]
    with pytest.raises(
        CheckpointError, match=rf"unet\.bin: {drop} missing: .*The UNet is not whole: download it again"
    ) as e:
        load(tensors)
    assert gone[0] in str(e.value)


@EITHER_WAY
def test_what_stops_the_hosts_detection_is_said_in_our_words(load: Callable[..., Any], svd: Tensors) -> None:
    tensors = {name: tensor for name, tensor in svd.items() if name != "input_blocks.1.0.out_layers.3.weight"}
    with pytest.raises(
        CheckpointError, match=r"unet\.bin: the host cannot load it .*out_layers\.3\.weight.*not a whole UNet"
    ):
        load(tensors)


@EITHER_WAY
def test_another_shape_is_said_in_our_words(load: Callable[..., Any], svd: Tensors) -> None:
    tensors = svd | {"out.2.weight": svd["out.2.weight"][:, :100]}
    with pytest.raises(
        CheckpointError, match=r"(?s)unet\.bin: the host cannot load it .*size mismatch for out\.2\.weight"
    ):
        load(tensors)


@EITHER_WAY
def test_a_subset_is_sent_to_the_control_loader(load: Callable[..., Any], svd_published: Tensors) -> None:
    subset = {name: tensor for name, tensor in svd_published.items() if "to_out" in name}
    with pytest.raises(
        CheckpointError, match=rf"does not hold a whole UNet \({len(subset)} tensors.*weights_name in Load ControlNeXt"
    ):
        load(subset)


def test_names_of_no_unet_are_listed(load: Callable[..., Any], svd_published: Tensors) -> None:
    with pytest.raises(CheckpointError, match=r"unet\.bin: .*mid_block\.extra\.weight"):
        load(svd_published | {"mid_block.extra.weight": torch.zeros(2)})


def test_an_encoder_is_not_a_unet(load: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    encoder = load_file(make_controlnext(tmp_path / "controlnet.safetensors", "gen2"))
    with pytest.raises(CheckpointError, match=r"unet\.bin: does not hold a whole UNet \(52 tensors"):
        load(encoder)


def test_a_unet_of_another_kind_is_sent_to_the_stock_loader(load: Callable[..., Any]) -> None:
    """The toy has the names, but a width that no release has."""
    with (
        torch.inference_mode(),
        pytest.raises(CheckpointError, match=r"the host does not know this UNet.*stock Load Diffusion Model"),
    ):
        load(video.base().diffusers.state_dict())


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    """Errors of this pack name the file and the remedy, for every kind of wrong file."""
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.whole_unets import load_unet

    for kind, path in make_wrong_files(tmp_path).items():
        with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.")) as error:
            load_unet(path)
        assert "Traceback" not in str(error.value) and str(error.value).count(". ") >= 1, (kind, error.value)


def test_a_file_that_is_gone_is_said_so() -> None:
    from comfyui_controlnext.nodes.video import ControlNeXtUNetLoader

    with pytest.raises(
        CheckpointError, match=r"gone\.bin: no such file in models/controlnext or models/diffusion_models.*Put it there"
    ):
        ControlNeXtUNetLoader.execute("gone.bin", "default")
    assert "gone.bin: no such file" in ControlNeXtUNetLoader.fingerprint_inputs("gone.bin")


def test_the_list_has_both_folders_and_the_stamp_follows_the_file(load: Callable[..., Any], tmp_path: Path) -> None:
    from comfyui_controlnext.nodes.video import ControlNeXtUNetLoader

    save(tmp_path / "svd" / "unet.bin", {"a": torch.zeros(1)})
    combo = ControlNeXtUNetLoader.define_schema().inputs[0]
    assert str(Path("svd/unet.bin")) in combo.options
    first = ControlNeXtUNetLoader.fingerprint_inputs(str(Path("svd/unet.bin")))
    save(tmp_path / "svd" / "unet.bin", {"a": torch.zeros(2000)})
    assert ControlNeXtUNetLoader.fingerprint_inputs(str(Path("svd/unet.bin"))) != first


# as differences on a loaded model


@pytest.fixture(scope="module")
def trained() -> Tensors:
    """Toy UNet after training, under published names: every weight moved by a tenth of its size."""
    generator = torch.Generator().manual_seed(4)
    before = video.base().diffusers.state_dict()
    return {
        name: tensor + 0.1 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in before.items()
    }


def loaded_with(folder: Path, tensors: Tensors, name: str = "unet.safetensors", **settings: Any) -> Any:
    """Run `ControlNeXtLoader` on the toy, with an encoder and these weights beside it."""
    from comfyui_controlnext.controlnext_core import checkpoint
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.loading import load_controlnext

    path = checkpoint.save(folder / "controlnet.safetensors", video.encoder_weights("svd_v2"), {})
    checkpoint.save(folder / name, tensors, {})
    with torch.inference_mode():
        return load_controlnext(video.toy_patcher(), path, **settings)


def host_model(tensors: Tensors) -> Any:
    """Toy model of the host with these published weights, loaded plainly."""
    import comfy.model_base
    import comfy.supported_models
    from comfyui_controlnext.controlnext_core.key_maps import unet_key_map

    config = comfy.supported_models.SVD_img2vid(video.HOST_CONFIG)
    config.unet_config["num_head_channels"] = video.HEAD_CHANNELS
    model = comfy.model_base.SVD_img2vid(config).eval().requires_grad_(False)
    names = unet_key_map(video.HOST_CONFIG)
    model.diffusion_model.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})
    return video.patcher_of(model)


@pytest.mark.parametrize("names", ["published", "host"])
def test_a_whole_file_on_a_loaded_model_is_the_whole_file(tmp_path: Path, trained: Tensors, names: str) -> None:
    """weights_kind auto measures that it holds full weights; differences are held in fp16."""
    from comfyui_controlnext.controlnext_core.key_maps import unet_key_map

    key_map = unet_key_map(video.HOST_CONFIG)
    file = trained if names == "published" else {key_map[name]: tensor for name, tensor in trained.items()}
    loaded = loaded_with(tmp_path, file)
    assert f"full, {len(trained)} of {len(trained)} tensors" in loaded.report
    with torch.inference_mode():
        found = video.sample(loaded.model, 4, 1)
        expected = video.sample(host_model(trained), 4, 1)
        before = video.sample(video.toy_patcher(), 4, 1)
    scale = float((expected - before).norm())
    assert scale / float(before.norm()) > 0.01
    assert float((found - expected).norm()) / scale < 0.03  # this toy makes 1 % of 2e-5 in the weights
    assert relative_to_file(loaded.model, trained) < TOLERANCE


def relative_to_file(model: Any, tensors: Tensors) -> float:
    """Largest relative difference between the patched weights of a model and a file's."""
    import comfy.model_management
    from comfyui_controlnext.controlnext_core.key_maps import unet_key_map

    names, worst = unet_key_map(video.HOST_CONFIG), 0.0
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        state = model.model.diffusion_model.state_dict()
        for name, tensor in tensors.items():
            worst = max(worst, float((state[names[name]] - tensor).norm() / tensor.norm()))
    return worst


def test_half_the_strength_is_half_the_way(tmp_path: Path, trained: Tensors) -> None:
    half = {name: (tensor + video.base().diffusers.state_dict()[name]) / 2 for name, tensor in trained.items()}
    loaded = loaded_with(tmp_path, trained, weights_strength=0.5)
    assert relative_to_file(loaded.model, half) < TOLERANCE


@EITHER_WAY
def test_a_subset_of_full_weights_is_measured_as_such(tmp_path: Path, trained: Tensors) -> None:
    """SVD v1's `learned_params` hold every `to_out`, absolute or not: the file does not say."""
    subset = {name: tensor for name, tensor in trained.items() if "to_out" in name}
    loaded = loaded_with(tmp_path, subset)
    assert f"full, {len(subset)} of {len(subset)} tensors" in loaded.report
    assert relative_to_file(loaded.model, subset) < TOLERANCE
    base = video.base().diffusers.state_dict()
    differences = {name: (tensor - base[name]).half() for name, tensor in subset.items()}
    again = loaded_with(tmp_path / "differences", differences)
    assert f"difference, {len(subset)} of {len(subset)} tensors" in again.report
    assert relative_to_file(again.model, subset) < TOLERANCE


def test_weights_of_another_family_are_refused_by_name(tmp_path: Path) -> None:
    whole = published(unet_tensors("sd15_full"))
    tensors = {name: tensor.clone() for name, tensor in whole.items() if "up_blocks.3" in name and "to_out" in name}
    with pytest.raises(
        CheckpointError, match=r"unet\.safetensors: .*names that the connected model does not have.*SD1\.5"
    ):
        loaded_with(tmp_path, tensors)
