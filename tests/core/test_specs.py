"""Table of variants against the facts of the released code, stated a second time in the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from comfyui_controlnext.controlnext_core.injection import NORMALIZATIONS, gain_of
from comfyui_controlnext.controlnext_core.specs import (
    BUILDS,
    PAPER_FUSION,
    SPECS,
    GainFormula,
    Site,
    config_of,
    with_normalization,
    with_trained_gain,
)
from comfyui_controlnext.models.controlnext import ControlNeXt
from comfyui_controlnext.tests.references import reference_controlnext as reference

SITES = {
    "after conv_in": Site.AFTER_CONV_IN,
    "after down 0": Site.AFTER_DOWN_0,
    "before middle": Site.BEFORE_MIDDLE,
    "after middle": Site.AFTER_MIDDLE,
}
FORMULAS = {"scale": GainFormula.LEARNED, "1.3*sigmoid(scale)": GainFormula.SIGMOID}


def test_the_table_has_every_released_variant_and_else_transformers_alone() -> None:
    assert {name for name, spec in SPECS.items() if not spec.on_transformer} == set(reference.VARIANTS)
    assert all(name == spec.name for name, spec in SPECS.items())


@pytest.mark.parametrize("name", reference.VARIANTS)
def test_a_row_is_what_the_released_code_does(name: str) -> None:
    spec, variant = SPECS[name], reference.VARIANTS[name]
    assert spec.family.value == variant.family
    assert spec.fusion.site is SITES[variant.site]
    assert spec.fusion.pool_first is (variant.order == "pool, norm")
    assert spec.fusion.eps == variant.eps
    assert spec.fusion.normalization == "released"
    assert spec.fusion.gain.formula is FORMULAS.get(variant.gain, GainFormula.CONSTANT)
    assert gain_of(spec.fusion.gain, 0.37) == pytest.approx(reference.gain(variant, 0.37))
    assert spec.fusion.gain.uncond == variant.uncond
    assert spec.source and spec.title


@pytest.mark.parametrize("name", reference.VARIANTS)
def test_the_encoder_of_a_row_is_the_released_one(name: str) -> None:
    config, build = config_of(SPECS[name]), reference.BUILDS[reference.VARIANTS[name].build]
    assert tuple((s.in_ch, s.out_ch, s.groups) for s in config.stages) == build.stages
    assert config.stem is (build.padding is not None)
    assert config.stem_padded is (build.padding == 1) or not config.stem
    assert config.stem_pool is build.pooled_stem
    assert (config.mid_norm, config.mid_skip) == (build.middle != "bare", build.middle == "norm and skip")
    assert (config.out_channels, config.learned_scale) == (build.out, build.scale)


@pytest.mark.parametrize("name", sorted(set(SPECS) - set(reference.VARIANTS)))
def test_a_row_of_a_transformer_is_the_rule_of_sd15_with_tokens_for_pixels(name: str) -> None:
    spec, sd15 = SPECS[name], SPECS["sd15"]
    assert spec.build == ("gen2_deep" if name == "wan_5b" else "gen2") and spec.source and spec.title
    assert spec.differences is not None and spec.differences.subset == "to_out"
    tokens = {"site": Site.AFTER_JOINT_0, "project_last": True}
    assert spec.fusion == dataclasses.replace(sd15.fusion, **tokens)


def test_a_build_for_wide_tokens_has_a_third_stage_and_ends_at_a_sixteenth() -> None:
    spec = dataclasses.replace(SPECS["sd3"], build="gen2_deep")
    deep, gen2 = (ControlNeXt(config_of(each), dtype=torch.float32, device="meta") for each in (spec, SPECS["sd3"]))
    assert set(deep.state_dict()) > set(gen2.state_dict())
    hint = torch.empty(1, 3, 250, 190, device="meta")
    assert deep(hint, torch.empty(1, device="meta")).shape == (1, 2048, 16, 12)


def test_every_build_is_used_and_gains_that_are_learned_have_a_scale() -> None:
    assert {spec.build for spec in SPECS.values()} == set(BUILDS)
    for spec in SPECS.values():
        assert BUILDS[spec.build].learned_scale is (spec.fusion.gain.formula is not GainFormula.CONSTANT)


def test_changed_rows_leave_the_table_alone() -> None:
    spec = SPECS["svd_v2"]
    paper, trained = with_normalization(spec, PAPER_FUSION), with_trained_gain(spec, 0.35)
    assert paper.fusion.normalization in NORMALIZATIONS and paper.fusion.site is spec.fusion.site
    assert trained.fusion.gain.factor == 0.35 and trained.fusion.gain.uncond == 0.0
    assert config_of(spec, 64).out_channels == 64
    assert SPECS["svd_v2"].fusion.gain.factor == 0.2 and config_of(spec).out_channels == 320
