"""Real server, used as by the page: queue prompts, read results and messages."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comfyui_controlnext.tests.fixtures.sampling_fixtures import CELLS, picture
from comfyui_controlnext.tests.fixtures.wrong_files import CODE_MARKER, make_wrong_files
from comfyui_controlnext.tools import tiny_models
from comfyui_controlnext.tools.comfy_client import PromptError
from PIL import Image
from safetensors.torch import load as read_tensors
from torch import Tensor

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

pytestmark = pytest.mark.comfy
Workflow = dict[str, dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hint(server: ComfyServer) -> str:
    """Name of an uploaded picture."""
    stream = io.BytesIO()
    Image.fromarray((picture()[0] * 255).byte().numpy()).save(stream, "PNG")
    return server.upload_image(stream.getvalue(), "hint.png")


@pytest.fixture(scope="module")
def wrong(server: ComfyServer, tiny: Any) -> dict[str, Path]:
    """Files other than controls, among the controls of the server."""
    return make_wrong_files(tiny.models / "controlnext" / "wrong")


class Graph:
    """Graph builder: workflows of a controlled KSampler run that saves its latent."""

    def __init__(self, names: Mapping[str, str], hint: str) -> None:
        self.names, self.hint = names, hint

    def __call__(self, door: str = "stock", seed: int = 1, text: str = "a cat", **loader: Any) -> Workflow:
        """Workflow. door:

        "stock", "ours" or "none". loader: inputs of Load ControlNeXt that differ from the default.
        """
        graph: Workflow = {
            "checkpoint": node("CheckpointLoaderSimple", ckpt_name=self.names["checkpoint"]),
            "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text=text),
            "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text=""),
            "hint": node("LoadImage", image=self.hint),
            "load": node(
                "ControlNeXtLoader",
                **{
                    "model": ["checkpoint", 0],
                    "control_name": self.names["control"],
                    "weights_name": "auto",
                    "weights_strength": 1.0,
                    **loader,
                },
            ),
            "empty": node("EmptyLatentImage", width=8 * CELLS, height=8 * CELLS, batch_size=1),
        }
        settings = {"image": ["hint", 0], "strength": 0.9, "start_percent": 0.0, "end_percent": 0.9}
        sources = {"model": ["load", 0], "positive": ["positive", 0], "negative": ["negative", 0]}
        if door == "ours":
            graph["apply"] = node("ControlNeXtApply", model=["load", 0], control_net=["load", 1], **settings)
            sources["model"] = ["apply", 0]
        elif door == "stock":
            prompts = {"positive": ["positive", 0], "negative": ["negative", 0]}
            graph["apply"] = node("ControlNetApplyAdvanced", control_net=["load", 1], **prompts, **settings)
            sources |= {"positive": ["apply", 0], "negative": ["apply", 1]}
        sampler = {"seed": seed, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        graph["sample"] = node("KSampler", latent_image=["empty", 0], **sampler, **sources)
        graph["save"] = node("SaveLatent", samples=["sample", 0], filename_prefix="latents/test")
        return graph


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def graph(tiny: Any, hint: str) -> Graph:
    return Graph(tiny.names, hint)


def latents(server: ComfyServer, workflow: Workflow) -> Tensor:
    """Queue a workflow and read its saved latent."""
    (entry,) = server.run(workflow).outputs["save"]["latents"]
    return read_tensors(server.image(entry))["latent_tensor"]


def probe(server: ComfyServer) -> dict[str, Any]:
    return server.get("/controlnext_probe")


def test_both_doors_give_equal_latents_and_the_log_stays_clean(server: ComfyServer, graph: Graph) -> None:
    seen = len(server.log_lines())
    through_stock, through_ours = latents(server, graph("stock")), latents(server, graph("ours"))
    assert torch.equal(through_stock, through_ours)
    plain = latents(server, graph("none", weights_name="none"))
    assert float((through_stock - plain).norm() / plain.norm()) > 0.01
    (alone,) = probe(server)["complaints"]
    assert "loaded without them" in alone, "the third run chose no weights"
    said = "\n".join(server.log_lines()[seen:])
    assert "controlnet.safetensors: ControlNeXt SD1.5" in said and "UNet weights: unet.safetensors" in said
    assert not re.search(r"traceback|error|warn|leak|deprecat", said, re.IGNORECASE), said


def let_go(server: ComfyServer, also_results: bool) -> None:
    """Free the server's memory and wait until no features are cached."""
    for _ in range(6):  # the host's thread misses a request that comes just before it goes to sleep
        server.free(unload_models=True, free_memory=also_results)
        until = time.monotonic() + 5
        while probe(server)["kept"] and time.monotonic() < until:
            time.sleep(0.1)
        if not probe(server)["kept"]:
            break
    assert probe(server)["kept"] == 0


def test_queueing_again_with_another_seed_or_prompt_runs_no_encoder(server: ComfyServer, graph: Graph) -> None:
    let_go(server, also_results=True)
    first = latents(server, graph("stock", seed=10))
    calls = len(probe(server)["calls"])
    assert calls > 0
    assert not torch.equal(latents(server, graph("stock", seed=11)), first)
    latents(server, graph("ours", seed=12, text="a dog"))
    assert len(probe(server)["calls"]) == calls
    assert torch.equal(latents(server, graph("ours", seed=10)), first)
    assert len(probe(server)["calls"]) == calls


@pytest.mark.parametrize("also_results", [False, True], ids=["unload models", "free memory"])
def test_free_empties_the_cache_and_the_next_prompt_works(
    server: ComfyServer, graph: Graph, also_results: bool
) -> None:
    """Unloading without freeing retains the nodes' results, and with them the control."""
    probe(server)
    seed = 20 + also_results
    first = latents(server, graph("stock", seed=seed))
    before = probe(server)
    assert before["kept"] > 0
    let_go(server, also_results)
    assert torch.equal(latents(server, graph("ours", seed=seed)), first)
    assert len(probe(server)["calls"]) > len(before["calls"])


COMPLAINTS = {
    "lora": "is a LoRA. Put it into models/loras",
    "stock_controlnet": "is a classic ControlNet. Load it with the stock Load ControlNet Model",
    "t2i_adapter": "is a T2I-Adapter. Load it with the stock Load ControlNet Model",
    "controlnet_xs": "is a ControlNet-XS",
    "controlnet_xs_diffusers": "is a ControlNet-XS",
    "checkpoint": "is a full checkpoint. Put it into models/checkpoints",
    "vae": "is an image autoencoder. Put it into models/vae",
    "truncated": "truncated .* download it again",
    "header_overflow": "cannot be read .* download it again",
    "header_not_json": "cannot be read .* download it again",
    "pickle_with_code": "was not opened .* get the .safetensors version",
    "empty": r"is empty \(0 bytes\).*Download it again",
    "text": "cannot be read .* download it again",
    "folder": "is a folder, not a weight file. Choose",
}


@pytest.mark.parametrize("kind", COMPLAINTS)
def test_a_wrong_file_fails_its_prompt_in_words_and_nothing_else(
    server: ComfyServer, graph: Graph, wrong: dict[str, Path], kind: str, pinned_host: bool
) -> None:
    name = str(Path("wrong") / wrong[kind].name)
    with pytest.raises(PromptError) as failure:
        server.run(graph("stock", control_name=name))
    message = failure.value.node_errors["load"]
    assert wrong[kind].name in message
    expected = COMPLAINTS[kind]
    if kind == "folder" and not pinned_host:  # later hosts refuse files that they do not offer
        expected += "|Value not in list"
    assert re.search(expected, message, re.DOTALL), message
    assert not (wrong[kind].parent / CODE_MARKER).exists()
    seed = 100 + list(COMPLAINTS).index(kind)
    assert latents(server, graph("ours", seed=seed)).isfinite().all()


def test_every_kind_of_wrong_file_is_tried(wrong: dict[str, Path]) -> None:
    assert wrong.keys() == COMPLAINTS.keys()


@pytest.mark.parametrize(
    ("kind", "words"), [("lora", "does not have.*Nothing was loaded"), ("truncated", "download it again")]
)
def test_wrong_unet_weights_fail_the_prompt(
    server: ComfyServer, graph: Graph, wrong: dict[str, Path], kind: str, words: str
) -> None:
    name = str(Path("wrong") / wrong[kind].name)
    with pytest.raises(PromptError, match=rf"{wrong[kind].name}.*{words}"):
        server.run(graph("stock", weights_name=name))


def test_a_control_of_another_family_is_refused_at_every_door(server: ComfyServer, graph: Graph, tiny: Any) -> None:
    tiny_models.make_sdxl(tiny.models / "checkpoints" / "xl.ckpt", clip=False)
    tiny_models.make_controlnext(tiny.models / "controlnext" / "june.safetensors", "sdxl_june")
    with pytest.raises(PromptError, match=r"june\.safetensors: is a control for SDXL .*model is SD1\.5\. Connect"):
        server.run(graph("stock", control_name="june.safetensors"))
    words = r"controlnet\.safetensors: is a SDXL control \(sdxl\), but the connected model is SD1\.5\. Connect a SDXL"
    for door, failing in (("stock", "sample"), ("ours", "apply")):
        workflow = graph(door, model=["xl", 0], weights_name="none")
        workflow["xl"] = node("CheckpointLoaderSimple", ckpt_name="xl.ckpt")
        if door == "stock":
            workflow["sample"]["inputs"]["model"] = ["checkpoint", 0]
        else:
            workflow["apply"]["inputs"]["model"] = ["checkpoint", 0]
        with pytest.raises(PromptError, match=words) as failure:
            server.run(workflow)
        assert list(failure.value.node_errors) == [failing]
    assert latents(server, graph("stock", seed=30)).isfinite().all()


def test_a_stock_controlnet_in_our_apply_node_is_refused(server: ComfyServer, graph: Graph, tiny: Any) -> None:
    workflow = graph("ours")
    workflow["stock"] = node("ControlNetLoader", control_net_name=tiny.names["stock_control"])
    workflow["apply"]["inputs"]["control_net"] = ["stock", 0]
    with pytest.raises(PromptError, match="control_net: is a stock ControlNet. Use the stock Apply ControlNet node"):
        server.run(workflow)


@pytest.mark.parametrize(
    ("at", "values", "words"),
    [
        ("options", {"schedule": "0:1; 1:0"}, "schedule: '0:1; 1:0' is not a percent:strength pair"),
        ("load", {"variant": "sd16"}, "variant: 'sd16' is not one of auto, sd15, "),
        ("load", {"weights_kind": "half"}, "weights_kind: 'half' is not one of auto, difference, full"),
        ("keep", {"layout": "zip"}, "layout: 'zip' is not one of single, published"),
        ("keep", {"dtype": "int4"}, "dtype: 'int4' is not one of fp16, bf16, fp32"),
        ("unet", {"weight_dtype": "int4"}, "weight_dtype: 'int4' is not one of default, fp8_e4m3fn, "),
        ("windows", {"schedule": "spiral"}, "schedule: 'spiral' is not one of standard_static, "),
        ("windows", {"fuse": "glue"}, "fuse: 'glue' is not one of pyramid, relative, flat, overlap-linear"),
        ("windows", {"overlap": 14}, "overlap 14 must be 0 or more and less than length 14"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_values_that_no_widget_offers_are_refused_before_anything_runs(
    server: ComfyServer, graph: Graph, at: str, values: dict[str, str], words: str
) -> None:
    workflow = graph("ours")
    workflow["options"] = node("ControlNeXtOptions", control_net=["load", 1], apply_to="auto")
    workflow["unet"] = node("ControlNeXtUNetLoader", weights_name="svd.bin", weight_dtype="default")
    settings = {"length": 14, "overlap": 4, "schedule": "batched", "fuse": "flat"}
    workflow["windows"] = node("ControlNeXtVideoWindows", model=["unet", 0], **settings)
    workflow["xs"] = node("ControlNetXSLoader", control_name="xs.safetensors")
    workflow["apply"]["inputs"] |= {"model": ["windows", 0], "control_net": ["xs", 0]}
    saved = {"control_net": ["options", 0], "model": ["apply", 0], "filename_prefix": "refused"}
    workflow["keep"] = node("ControlNeXtSave", **saved)
    workflow[at]["inputs"] |= values
    del workflow["save"], workflow["sample"]
    with pytest.raises(PromptError) as refusal:
        server.queue(workflow)
    assert "refused the workflow" in str(refusal.value) and words in refusal.value.node_errors[at]


def test_what_is_connected_is_checked_when_it_is_known(server: ComfyServer, graph: Graph) -> None:
    """Text and numbers from other nodes, asked about before they are there; and inputs that are left out."""
    workflow = graph("ours", seed=31, variant="auto")
    workflow["options"] = node("ControlNeXtOptions", control_net=["load", 1], apply_to="both", schedule="0:1, 1:0.2")
    settings = {"length": 3, "overlap": 1, "schedule": "batched", "fuse": "flat"}
    workflow["windows"] = node("ControlNeXtVideoWindows", model=["apply", 0], **settings)
    workflow["apply"]["inputs"]["control_net"], workflow["sample"]["inputs"]["model"] = ["options", 0], ["windows", 0]
    expected = latents(server, workflow)
    workflow["text"] = node("PrimitiveString", value="0:1, 1:0.2")
    workflow["number"] = node("PrimitiveInt", value=1)
    workflow["options"]["inputs"]["schedule"] = ["text", 0]
    workflow["windows"]["inputs"]["overlap"] = ["number", 0]
    assert torch.equal(latents(server, workflow), expected)
    workflow["number"]["inputs"]["value"] = 3
    with pytest.raises(PromptError, match="overlap 3 must be 0 or more and less than length 3"):
        server.run(workflow)


def test_inspect_and_save_show_their_text_on_the_node(server: ComfyServer, graph: Graph, tiny: Any) -> None:
    inspect = {"inspect": node("ControlNeXtInspect", control_name=tiny.names["control"])}
    (text,) = server.run(inspect).outputs["inspect"]["text"]
    assert "3,526,400 parameters" in text
    workflow = {name: graph()[name] for name in ("checkpoint", "load")}
    inputs = {"control_net": ["load", 1], "model": ["load", 0], "filename_prefix": "controlnext/kept"}
    workflow["keep"] = node("ControlNeXtSave", **inputs, layout="single", dtype="fp32")
    (path,) = server.run(workflow).outputs["keep"]["text"]
    assert Path(path).is_file() and Path(path).is_relative_to(tiny.base / "output" / "controlnext")
    saved = latents(server, graph("stock", control_name=Path(path).name))  # the loaders list what was saved
    assert torch.equal(saved, latents(server, graph("stock")))


def test_a_changed_file_is_loaded_again(server: ComfyServer, graph: Graph, tiny: Any) -> None:
    path = tiny.models / "controlnext" / "edited" / "controlnet.safetensors"
    name = str(Path("edited") / path.name)
    tiny_models.make_controlnext(path, "gen2", seed=1)
    first = latents(server, graph("stock", control_name=name))
    assert server.run(graph("stock", control_name=name)).executed == ()
    tiny_models.make_controlnext(path, "gen2", seed=2)
    assert not torch.equal(latents(server, graph("stock", control_name=name)), first)
