"""Words by which the page's search finds the nodes."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.comfy

WORDS = "canny edges depth pose preprocessor svd video train lora controlnet upscale tile".split()


def words() -> dict[str, tuple[str, ...]]:
    """Search words by node, in the order of registration, which decides between equal matches."""
    from comfyui_controlnext.controlnext_training.nodes import NODE_CLASS_MAPPINGS as TRAINING
    from comfyui_controlnext.nodes import NODE_CLASS_MAPPINGS

    return {name: node.SEARCH for name, node in {**NODE_CLASS_MAPPINGS, **TRAINING}.items()}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_people_type_finds_a_node(word: str) -> None:
    assert [name for name, search in words().items() if word in search]


def test_the_packs_own_name_finds_load_first_then_apply() -> None:
    assert [name for name, search in words().items() if "controlnext" in search] == [
        "ControlNeXtLoader",
        "ControlNeXtApply",
    ]
