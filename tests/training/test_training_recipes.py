"""Recipes: each can be read, and has the numbers of the released trainers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from comfyui_controlnext.controlnext_core.specs import SPECS, GainFormula
from comfyui_controlnext.controlnext_training.choices import XS
from comfyui_controlnext.controlnext_training.config import TrainConfig
from comfyui_controlnext.controlnext_training.config_files import read_recipe

FOLDER = Path(__file__).resolve().parents[2] / "controlnext_training" / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
NO_TRAINER = {"sd15_legacy", "sdxl_july", "sdxl_june"}
"""Published variants of which no trainer and no training facts are known."""
OURS = {
    "tiny",
    "tiny_transformer",
    "demo_edges",
    "demo_xs",
    "picture_edges",
    "picture_depth",
    "picture_mask",
    "picture_pose",
    "picture_sharp",
}
"""Recipes of this pack for small bases."""
TRANSFORMERS = {
    "sd35_medium": "sd3",
    "flux": "flux",
    "chroma": "chroma",
    "qwen_image": "qwen_image",
    "z_image": "z_image",
    "wan_1_3b": "wan",
    "wan_5b": "wan_5b",
    "wan_outpaint": "wan",
}
"""Recipes for bases without a released trainer, and their variants."""

each = pytest.mark.parametrize("name", RECIPES)


def config(name: str) -> TrainConfig:
    return TrainConfig(**read_recipe(RECIPES[name]))


@each
def test_a_recipe_is_a_whole_configuration(name: str) -> None:
    found = config(name)
    assert found.base and found.data and found.output_name == name


@each
def test_a_recipe_says_where_its_numbers_come_from(name: str) -> None:
    text = RECIPES[name].read_text("utf-8")
    head = text.split("\n\n")[0]
    assert "Source of the numbers" in head.replace("\n# ", " ")
    assert all(len(line) <= 120 and line.isprintable() for line in text.splitlines())


def test_every_variant_with_a_known_trainer_has_a_recipe() -> None:
    trained = {config(name).variant for name in RECIPES}
    of_unets = {name for name, spec in SPECS.items() if not spec.on_transformer}
    assert trained == (of_unets - NO_TRAINER) | {XS} | set(TRANSFORMERS.values())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_recipe_of_a_transformer_says_that_it_was_not_tried(name: str) -> None:
    found = config(name)
    assert found.variant == TRANSFORMERS[name] and found.clip and found.checkpointing and found.rank == 16
    assert "Not tried at full size" in RECIPES[name].read_text("utf-8").split("\n\n")[0]


ADAMW = {"optimizer": "adamw", "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "adam_eps": 1e-8}
SDXL = ADAMW | {
    "trainable": "attn2_to_out",
    "learning_rate": 1e-5,
    "control_learning_rate": 1e-4,
    "resolution": 1024,
    "warmup_steps": 500,
    "schedule": "constant",
    "caption_dropout": 0.2,
    "max_grad_norm": 1.0,
    "timesteps": "uniform",
    "effective_batch": 16,
    "steps": 5000,
}
SVD = ADAMW | {
    "learning_rate": 1e-5,
    "control_learning_rate": 1e-5,
    "clip_frames": 21,
    "clip_stride": 3,
    "effective_batch": 8,
    "steps": 3000,
    "timesteps": "svd_cosine",
    "objective": "edm",
    "precision": "bf16",
    "caption_dropout": 0.1,
    "mask_weight": 3.2,
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
}
XS_ANY = ADAMW | {"trainable": "none", "objective": "epsilon", "ema_decay": 0.0, "batch_size": 1, "hint": "canny"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": ADAMW
    | {
        "trainable": "to_out",
        "learning_rate": 1e-5,
        "control_learning_rate": 1e-4,
        "gain": 0.35,
        "resolution": 512,
        "effective_batch": 24,
        "steps": 8336,
        "max_grad_norm": 0.0,
        "warmup_steps": 0,
        "caption_dropout": 0.0,
    },
    "sdxl_canny": SDXL | {"gain": 0.35, "hint": "canny"},
    "sdxl_dense": SDXL | {"gain": 1.0, "hint": "paired"},
    "svd_v1": SVD | {"trainable": "to_out", "gain": 0.0},
    "svd_v2": SVD | {"trainable": "all", "gain": 0.2},
    "svd_v2_padded": SVD | {"trainable": "all", "gain": 0.2},
    "xs_sd15": XS_ANY | {"xs_ratio": 0.2, "xs_own_time": False, "control_learning_rate": 1e-5, "steps": 500_000},
    "xs_sd21": XS_ANY
    | {"xs_ratio": 0.0125, "xs_own_time": True, "control_learning_rate": 1e-5, "steps": 500_000, "hint": "paired"},
    "xs_sdxl_20m": XS_ANY
    | {"xs_ratio": 0.05, "xs_own_time": False, "control_learning_rate": 1e-4, "max_grad_norm": 0.01},
    "xs_sdxl_48m": XS_ANY
    | {"xs_ratio": 0.1, "xs_own_time": True, "control_learning_rate": 1e-4, "max_grad_norm": 0.01},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_numbers_of_its_released_trainer(name: str) -> None:
    found = config(name)
    assert {key: getattr(found, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_every_recipe_but_our_own_is_checked_against_published_numbers() -> None:
    assert set(RECIPES) - OURS == set(PUBLISHED) | set(TRANSFORMERS)


def test_no_released_trainer_took_what_came_later() -> None:
    for name in PUBLISHED:
        found = config(name)
        assert (found.min_snr_gamma, found.noise_offset, found.ema_decay, found.hint_dropout) == (0, 0, 0, 0)
        assert found.fusion == "released"
        assert found.checkpointing == (name != "sd15")


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.startswith(("svd", "sd15", "sdxl"))])
def test_the_gain_is_left_to_the_variant_where_the_file_learns_it(name: str) -> None:
    found = config(name)
    learned = SPECS[found.variant].fusion.gain.formula is not GainFormula.CONSTANT
    assert learned == (found.gain == 0)


@pytest.mark.parametrize("name", ["svd_v1", "svd_v2", "svd_v2_padded"])
def test_upright_clips_train_at_the_authors_size(name: str) -> None:
    from comfyui_controlnext.controlnext_training.data.buckets import bucket_sizes

    found = config(name)
    assert (1024, 576) in bucket_sizes(found.resolution, found.bucket_step, found.buckets)


def test_the_tiny_recipe_is_small() -> None:
    found = config("tiny")
    assert found.resolution <= 128 and found.steps * found.effective_batch <= 4000
    assert found.precision == "fp32" and found.save_dtype == "fp32"


def test_keys_stand_under_no_table_that_hides_them() -> None:
    """Headings mean nothing to the reader of recipes, so the recipes have comments in their place."""
    for path in RECIPES.values():
        assert not re.search(r"^\[", path.read_text("utf-8"), re.MULTILINE)
