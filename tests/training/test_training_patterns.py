"""Expressions of `trainable`: the matches of `re`, in time linear in the names."""

from __future__ import annotations

import re
import time

import hypothesis.strategies as st
import pytest
from comfyui_controlnext.controlnext_core.families import UNET_SUBSETS
from comfyui_controlnext.controlnext_core.key_maps import unet_key_map
from comfyui_controlnext.controlnext_training.config import ConfigError, TrainConfig
from comfyui_controlnext.controlnext_training.patterns import MAX_LETTERS, Pattern, PatternError
from comfyui_controlnext.controlnext_training.trainables import selected
from comfyui_controlnext.tests.core.test_key_maps import SDXL
from hypothesis import given, settings

QUICK = settings(max_examples=400, deadline=None, derandomize=True)
SINGLE = st.sampled_from(["a", "b", "1", "_", ".", r"\.", r"\d", r"\w", r"\S", "[ab]", "[^a]", "[0-9]", "[a-]", "[]b]"])
COUNT = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{1,}"])


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.builds("({})".format, inner) | st.builds("(?:{})".format, inner)
    repeated = st.builds("{}{}".format, group | SINGLE, COUNT)
    return st.builds("{}{}".format, inner, inner) | st.builds("{}|{}".format, inner, inner) | group | repeated


EXPRESSION = st.recursive(SINGLE | st.sampled_from(["^", "$", ""]), grown, max_leaves=8)


@QUICK
@given(EXPRESSION, st.lists(st.text("ab1_.", max_size=6), min_size=1, max_size=6))
def test_the_same_texts_are_found_as_by_re(expression: str, texts: list[str]) -> None:
    wanted = re.compile(expression)
    found = Pattern(expression)
    assert [found.search(text) for text in texts] == [wanted.search(text) is not None for text in texts]


NAMES = list(unet_key_map(SDXL))


@pytest.mark.parametrize(
    "expression",
    [
        r"attn2.*to_(out|v)\.",
        "to_(out|v)",
        "conv_(in|out)",
        "",
        r"up_blocks\.[0-2]\..*attn[12]\.to_[qkv]",
        "^down.*weight$",
        r"transformer_blocks\.\d{1,2}\.ff",
        r"(?:norm|proj)_(in|out)",
        "no_such",
        *UNET_SUBSETS.values(),
    ],
)
def test_of_the_names_of_sdxl_the_same_are_chosen(expression: str) -> None:
    if expression.startswith("(?!"):
        pytest.skip("an expression of the tables, not of a user")
    pattern = Pattern(expression)
    assert [n for n in NAMES if pattern.search(n)] == [n for n in NAMES if re.search(expression, n)]


@pytest.mark.parametrize(
    "expression",
    [
        "^(([a-z0-9_.])+)+!$",
        "(a*)*!",
        "(.*)*.*.*.*.*.*x!",
        "(a|a)*!",
        "(_|.|[a-z]*)*!{3}",
        ".*" * 99 + "!",
        "((.?){9}){9}!",
    ],
)
def test_no_expression_takes_long(expression: str) -> None:
    """Expressions that kept Python's `re`, and with it the whole server, busy for ever."""
    started = time.process_time()
    for blocks in ("", "input.0"):
        with pytest.raises(ConfigError, match="selects none of the"):
            selected(unet_key_map(SDXL), f"re:{expression}", blocks)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("(", "a ( has no ) behind it"),
        ("a)", "a ) has no ( before it"),
        ("*a", "nothing stands before *"),
        ("a**", "two repetitions stand side by side"),
        ("[a", "it ends too soon"),
        ("a\\", "it ends too soon"),
        ("[z-a]", "z-a is not a range"),
        ("(?=a)", "(? begins something that is not supported"),
        ("(?i)a", "(? begins something that is not supported"),
        (r"(a)\1", r"\1 is not supported"),
        ("a{x}", "a { begins no count"),
        ("a{3,2}", "{3,2} is not a count"),
        ("a{9999999}", "{9999999} is not a count"),
        ("(((a{99}){99}){99}){99}", "its repetitions make it too long"),
        ("a" * (MAX_LETTERS + 1), "it has 201 letters"),
    ],
)
def test_what_is_not_supported_is_refused_in_words(expression: str, words: str) -> None:
    with pytest.raises(PatternError, match=re.escape(words)):
        Pattern(expression)
    with pytest.raises(ConfigError, match=f"trainable: .*is not a supported regular expression.*{re.escape(words)}"):
        TrainConfig(trainable=f"re:{expression}")
