"""README, help pages, locales: every node has them, nothing in them has drifted, the host serves them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import pytest
from comfyui_controlnext.tools import cli, host, make_locales, make_workflows, releases

if TYPE_CHECKING:
    from comfyui_controlnext.tools.comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "web" / "docs"
README = (ROOT / "README.md").read_text("utf-8")
LETTERS = {
    "zh": re.compile("[\u4e00-\u9fff]"),
    "ja": re.compile("[\u3040-\u30ff]"),
    "ko": re.compile("[\uac00-\ud7a3]"),
}
"""Letters of which each text of a language has some: Han, kana, Hangul."""
PAGE_LINES = 90
README_LINES = 200
TEXTS = [
    *ROOT.glob("*.md"),
    ROOT / "controlnext_training" / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *HELP.glob("*.md"),
]


def locale(language: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))


@pytest.mark.parametrize("language", make_locales.LANGUAGES)
def test_translations_are_of_the_present_english(language: str) -> None:
    assert make_locales.out_of_date(language) == []
    letters = LETTERS[language]
    plain = {key: text for key, text in make_locales.texts_of(language).items() if not key.endswith(".name")}
    assert [key for key, text in plain.items() if not letters.search(text)] == []


def shape_of(text: str) -> list[int]:
    """Shape of a text: headings, points, numbered points, rows of tables, fences of code."""
    return [len(re.findall(mark, text, re.M)) for mark in (r"^#+ ", r"^\* ", r"^\d\. ", r"^\|", r"^```")]


@pytest.mark.parametrize("language", make_locales.LANGUAGES)
def test_help_pages_in_other_languages_have_the_parts_of_the_english(language: str) -> None:
    """Parts, names of inputs, values and messages in quotes; the words are compared by their hash."""
    names = locale(language)
    for english in HELP.glob("*.md"):
        text, theirs = english.read_text("utf-8"), (HELP / english.stem / f"{language}.md").read_text("utf-8")
        assert theirs.startswith(f"# {names[english.stem]['display_name']}\n")
        assert shape_of(theirs) == shape_of(text), english.name
        for name in re.findall(r"\*\*([a-z_, ]+?)(?: \(optional\))?\*\*:", text):
            assert f"**{name}" in theirs, f"{english.name} {language}: {name}"
        for word in (*re.findall(r"`[\w.*/=:]+`", text), *re.findall(r'\*\*"(.+?)"', text)):
            assert word in theirs, f"{english.name} {language}: {word}"


def test_every_help_page_says_when_a_stock_node_does() -> None:
    assert [path.stem for path in HELP.glob("*.md") if "**Or the stock node.** " not in path.read_text("utf-8")] == []


def test_a_changed_lost_or_left_over_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {language: make_locales.texts_of(language) for language in ("en", "ja")}
    mask, strength = "ControlNeXtApply.inputs.mask.tooltip", "ControlNeXtApply.inputs.strength.tooltip"
    texts["en"][mask] += " More."
    texts["ja"][strength] = ""
    texts["ja"]["Gone.description"] = "x"
    monkeypatch.setattr(make_locales, "texts_of", texts.__getitem__)
    said = make_locales.out_of_date("ja")
    assert [line.partition(":")[0] for line in said] == [strength, "Gone.description", mask]
    assert "no ja text for '1 as released, 0 no control.'" in said[0] and "--translated ja" in said[2]
    texts["en"]["ControlNeXtApply.help"] += "One more line."
    assert [
        line for line in make_locales.out_of_date("ja") if line.startswith("ControlNeXtApply.help: translate '# Apply")
    ]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_between_our_texts_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / unquote(target)).exists(), f"{path.name} links to {target}"


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def test_readme_is_read_in_a_minute() -> None:
    """Length, order of the questions that a reader has, no words of our own."""
    assert len(README.splitlines()) <= README_LINES
    headings = re.findall("^## (.+)$", README, re.M)
    assert headings[:4] == ["What you get", "What you need", "Install", "Which file first"]
    assert "Questions" in headings and "Train your own, in ten lines" in headings
    assert not re.search(r"\bdoors?\b", README)


def test_readme_says_what_was_not_run() -> None:
    assert "| Windows, macOS, Docker, the workflows in `.github`, publishing | **written and untried** |" in README
    assert re.search(r"^\| GPUs: .*\*\*not run\*\*", README, re.M)
    for asked in ("Flux", "SD3", "Pony, Illustrious", "GGUF", "AnimateDiff", "IPAdapter", "Inpainting"):
        assert re.search(rf"^\* \*\*[^*]*{asked}[^*]*\*\* .", README, re.M), asked


def test_readme_has_the_counted_figures() -> None:
    """Ratios and MiB of the README are those of performance.md and of the table that the benchmark wrote."""
    counted = (ROOT / "benchmarks" / "results" / "memory_2-cores-amd-epyc_202611.md").read_text("utf-8")
    for base, name, control in (("SD1.5 512", "sd15", "ControlNeXt"), ("SDXL 1024", "sdxl", "ControlNeXt")):
        first, second = re.findall(rf"^\| {base} \| {control} \| ([\d.]+) \| ([\d.]+) ", page("performance"), re.M)[0]
        (stock,) = re.findall(rf"^\| {base} \| stock ControlNet \| ([\d.]+) ", page("performance"), re.M)
        table = counted.partition(f"## {name}, ")[2].partition("\n## ")[0]
        step, weights = re.findall(rf"^\| {name} +\| \d+ +\| \+(\d+) .*?\| (\d+) ", table, re.M)[0]
        more, whole = re.findall(r"^\| stock ControlNet \| \d+ +\| \+(\d+) +\| (\d+) ", table, re.M)[0]
        adds, stock_adds = int(step) + int(weights), int(more) + int(whole)
        row = rf"\| {base.split()[0]}, .*\| {adds} \| {stock_adds:,} \| {first}, {second} \| {stock} \|"
        assert re.search(row, README), (base, row)


def test_index_names_every_page() -> None:
    index = page("index")
    for path in sorted((ROOT / "docs").glob("*.md")):
        assert path.stem == "index" or f"]({path.name})" in index, path.name
    assert "(docs/index.md)" in README


def test_pages_name_what_there_is() -> None:
    nodes, examples, commands = page("nodes"), page("examples"), page("run")
    for texts in locale("en").values():
        assert texts["display_name"] in nodes
    for describe in make_workflows.WORKFLOWS:
        assert f"[{describe().title}](../example_workflows/{quote(describe().title)}.json)" in examples
    for name, command in cli.COMMANDS.items():
        assert f"run.py {name}" in commands, command.help
    for told in (
        host.WHEEL.replace("==", " "),
        f"ComfyUI {host.VERSION}",
        "AGPL-3",
        "GPL-3",
        "8.1 MB",
        releases.PINNED.tag,
    ):
        assert told in commands, told


def test_examples_page_says_where_the_controls_are() -> None:
    for workflow in (describe() for describe in make_workflows.WORKFLOWS):
        files = {model for node in workflow.nodes for model in node.models}
        for file in (file for file in files if file.folder == "controlnext"):
            repository = file.url.partition("/resolve/")[0]
            assert repository in page("examples"), f"{workflow.name}: {file.url}"
            assert (file.name.rpartition("/")[0] or file.name) in page("examples"), f"{workflow.name}: {file.name}"


def test_changelog_has_the_present_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert version and f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_engineers_pages_stay_pages(path: Path) -> None:
    text = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("|")]
    assert len(text) <= PAGE_LINES, "tables do not count"


@pytest.mark.comfy
def test_english_is_what_the_nodes_say(server: "ComfyServer") -> None:
    text = (ROOT / "locales" / "en" / "nodeDefs.json").read_text("utf-8")
    assert text == make_locales.english(server.object_info()), "run tools/make_locales.py"


@pytest.mark.comfy
def test_every_node_has_a_help_page_that_names_its_inputs(server: "ComfyServer") -> None:
    nodes = make_locales.own_nodes(server.object_info())
    assert {path.stem for path in HELP.glob("*.md")} == nodes.keys()
    for name, info in nodes.items():
        page = (HELP / f"{name}.md").read_text("utf-8")
        assert page.startswith(f"# {info['display_name']}\n")
        assert re.search("^## .*[Ee]rrors", page, re.M)
        for part in ("required", "optional"):
            for field in info["input"].get(part, {}):
                assert re.search(rf"\b{field}\b", page), f"{name}.md does not explain {field}"


@pytest.mark.comfy
def test_the_host_serves_help_texts_and_workflows(server: "ComfyServer") -> None:
    pack = quote(ROOT.name)
    for path in HELP.rglob("*.md"):
        served = quote(path.relative_to(HELP).as_posix())
        assert server.request(f"/extensions/{pack}/docs/{served}") == path.read_bytes()
    translations = server.get("/i18n")
    for language in ("en", *make_locales.LANGUAGES):
        for name, texts in locale(language).items():
            assert translations[language]["nodeDefs"][name] == texts
    names = [describe().title for describe in make_workflows.WORKFLOWS]
    assert sorted(server.get("/workflow_templates")[ROOT.name]) == sorted(names)
    for name in names:
        for suffix in ("json", "jpg"):
            served = server.request(f"/api/workflow_templates/{pack}/{quote(name)}.{suffix}")
            assert served == (make_workflows.FOLDER / f"{name}.{suffix}").read_bytes()
