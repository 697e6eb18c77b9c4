"""Candidates of benchmarks/candidates on the CPU: each gives the product's result by its own method."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_controlnext.benchmarks import bench_candidates
from comfyui_controlnext.benchmarks.candidates import encoder_and_fuse, merged_products, one_graph, streams
from comfyui_controlnext.tests.fixtures.sampling_fixtures import REASSOCIATED, Studio, picture, relative
from comfyui_controlnext.tools import tiny_models
from torch import Tensor

pytestmark = pytest.mark.comfy
CPU = torch.device("cpu")
CELLS, STEPS = 4, 3
OF_XS = ("merged products", "block on a second stream", "one CUDA graph")


@pytest.fixture(scope="module")
def xs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_controlnet_xs(tmp_path_factory.mktemp("xs") / "xs.safetensors")


def control_for(candidate: bench_candidates.Candidate, studio: Studio, xs_file: Path) -> Any:
    from comfyui_controlnext.controlnext_core.comfy_adapter.files.xs_loading import load_controlnet_xs

    return load_controlnet_xs(xs_file).control if candidate.name in OF_XS else studio.load().control


def sample(studio: Studio, control: Any, **settings: Any) -> Tensor:
    conds = studio.stock(control, picture(side=8 * CELLS))
    return studio.sample(studio.model, *conds, **{"steps": STEPS, "cells": CELLS, **settings})


def around(candidate: bench_candidates.Candidate, studio: Studio, control: Any) -> AbstractContextManager[None]:
    return candidate.around(studio.model, control.get_models()[-1].model, CPU)


@pytest.mark.parametrize("candidate", bench_candidates.CANDIDATES, ids=lambda candidate: candidate.name)
def test_a_candidate_gives_what_the_product_does_and_leaves_it_as_it_was(
    candidate: bench_candidates.Candidate, studio: Studio, xs_file: Path
) -> None:
    control = control_for(candidate, studio, xs_file)
    expected = sample(studio, control)
    assert relative(studio.sample(steps=STEPS, cells=CELLS), expected) > 1e-2, "the control must show"
    for seed in (1, 2):  # what a first run has joined or captured serves the second
        plain = sample(studio, control, seed=seed)
        studio.cache.clear()
        with around(candidate, studio, control):
            assert relative(sample(studio, control, seed=seed), plain) < REASSOCIATED
            assert relative(sample(studio, control, seed=seed), plain) < REASSOCIATED
    assert torch.equal(sample(studio, control), expected)


def candidate_of(name: str) -> bench_candidates.Candidate:
    return next(candidate for candidate in bench_candidates.CANDIDATES if candidate.name == name)


def test_merged_products_are_fewer(studio: Studio, xs_file: Path) -> None:
    candidate = candidate_of("merged products")
    control = control_for(candidate, studio, xs_file)
    joined: list[int] = []
    real = merged_products.F.linear

    with pytest.MonkeyPatch.context() as patch, around(candidate, studio, control):
        patch.setattr(merged_products.F, "linear", lambda x, w, *rest: joined.append(len(w)) or real(x, w, *rest))
        sample(studio, control, steps=1)
    net = control.get_models()[-1].model
    attentions = {n: m for n, m in net.named_modules() if isinstance(m, merged_products.CrossAttention)}
    own = [3 * len(m.to_q.weight) for n, m in attentions.items() if n.endswith("attn1")]
    text = sum(2 * len(m.to_k.weight) for n, m in attentions.items() if n.endswith("attn2"))
    assert joined.count(text) == 1 and all(joined.count(width) >= own.count(width) for width in own)


def test_blocks_start_when_the_base_has_been_heard(studio: Studio, xs_file: Path) -> None:
    candidate = candidate_of("block on a second stream")
    control, started = control_for(candidate, studio, xs_file), []
    real = streams.Side.run
    with pytest.MonkeyPatch.context() as patch, around(candidate, studio, control):
        patch.setattr(streams.Side, "run", lambda side, work: started.append(work) or real(side, work))
        sample(studio, control, steps=1)
    assert len(started) == len(control.loaded.net.encoder) - 1, "all but the first"


def test_features_of_the_next_step_are_asked_for_in_this_one(studio: Studio, xs_file: Path) -> None:
    candidate = candidate_of("features a step ahead")
    control, fetched = control_for(candidate, studio, xs_file), []
    sample(studio, control)
    real = streams.Side.run
    with pytest.MonkeyPatch.context() as patch, around(candidate, studio, control):
        patch.setattr(streams.Side, "run", lambda side, work: fetched.append(work) or real(side, work))
        sample(studio, control)
    assert len(fetched) == STEPS - 1, "the last step has none after it"


def test_a_graph_runs_on_tensors_of_its_own(studio: Studio, xs_file: Path) -> None:
    candidate = candidate_of("one CUDA graph")
    control, seen = control_for(candidate, studio, xs_file), set()
    real = one_graph.Graphed.__call__

    def noted(self: Any, *given: Any, **kwargs: Any) -> Tensor:
        result = real(self, *given, **kwargs)
        seen.add(self.inputs["x"].data_ptr())
        return result

    with pytest.MonkeyPatch.context() as patch, around(candidate, studio, control):
        patch.setattr(one_graph.Graphed, "__call__", noted)
        sample(studio, control)
    assert len(seen) == 1


def test_encoder_weights_lie_in_channels_last_inside_alone(studio: Studio) -> None:
    net = studio.load().control.net.patcher.model
    weight = net.down_res[0].conv2.weight
    with encoder_and_fuse.channels_last(net):
        inside = net.down_res[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert inside and weight.is_contiguous() and "begin" not in vars(net)


def test_the_addition_is_compiled(studio: Studio) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    control = studio.load().control
    torch._dynamo.reset()
    counters.clear()
    with encoder_and_fuse.one_kernel(CPU):
        sample(studio, control, steps=1)
    assert counters["stats"]["unique_graphs"] >= 1
