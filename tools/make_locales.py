"""Write locales/en/nodeDefs.json: `python tools/make_locales.py [ADDRESS]`

ADDRESS is a running ComfyUI with this pack (default 127.0.0.1:8188). The English texts come from the nodes. Texts in
other languages are written by hand under the same keys, as are the help pages: web/docs/NODE.md in English,
web/docs/NODE/LANGUAGE.md in other languages.

`python tools/make_locales.py --translated ja` records that the Japanese texts and pages translate the present English
ones: tools/translated_from.json then holds a hash of each English text by language and key. Tests fail where the
English file differs from the nodes, and name each text that a language lacks or whose English source has changed.
"""

import hashlib
import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "_alias.py"))

from comfyui_controlnext.tools.comfy_client import ComfyClient, ComfyError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CATEGORY = "ControlNeXt"
PATH = ROOT / "locales" / "en" / "nodeDefs.json"
HELP = ROOT / "web" / "docs"
LANGUAGES = ("zh", "ja", "ko")
TRANSLATED = ROOT / "tools" / "translated_from.json"


def own_nodes(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Descriptions of this pack's nodes, from a host's /object_info."""
    return {name: info for name, info in object_info.items() if info["category"].split("/")[0] == CATEGORY}


def node_texts(info: Mapping[str, Any]) -> dict[str, Any]:
    """Texts of a node in the form of nodeDefs.json."""
    inputs = {
        name: {"name": name, "tooltip": options[0]["tooltip"]}
        for part in ("required", "optional")
        for name, (_, *options) in info["input"].get(part, {}).items()
    }
    outputs = {
        str(index): {"name": name, "tooltip": tooltip}
        for index, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def english(object_info: Mapping[str, Any]) -> str:
    """Content of locales/en/nodeDefs.json. Raises KeyError where an input has no tooltip."""
    texts = {name: node_texts(info) for name, info in sorted(own_nodes(object_info).items())}
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def texts_of(language: str) -> dict[str, str]:
    """Texts of a language by key: `ControlNeXtApply.inputs.mask.tooltip`, `ControlNeXtApply.help` for the help page."""
    pages = HELP.glob("*.md") if language == "en" else HELP.glob(f"*/{language}.md")
    names = {path: path.stem if language == "en" else path.parent.name for path in pages}
    found = {f"{name}.help": path.read_text("utf-8") for path, name in sorted(names.items())}

    def take(values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                take(value, (*keys, key))
            else:
                found[".".join((*keys, key))] = value

    take(json.loads(PATH.parents[1].joinpath(language, "nodeDefs.json").read_text("utf-8")), ())
    return found


def stamp(text: str) -> str:
    """Short hash of an English text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]


def out_of_date(language: str) -> list[str]:
    """Messages that name each text of a language that is missing, superfluous, or translated from other English."""
    english, theirs = texts_of("en"), texts_of(language)
    noted = json.loads(TRANSLATED.read_text("utf-8")).get(language, {})
    missing = [f"{key}: no {language} text for {_short(text)}" for key, text in english.items() if not theirs.get(key)]
    left = [f"{key}: a {language} text of no node" for key in theirs.keys() - english.keys()]
    changed = [
        f"{key}: translate {_short(text)} again into {language}, then run tools/make_locales.py --translated {language}"
        for key, text in english.items()
        if key in theirs and noted.get(key) != stamp(text)
    ]
    return [*missing, *sorted(left), *changed]


def _short(text: str) -> str:
    """Text in quotes, or the title of a page."""
    return repr(text.partition("\n")[0])


def note_translated(language: str) -> None:
    """Record the current English texts as the source of the language's texts."""
    noted = json.loads(TRANSLATED.read_text("utf-8")) if TRANSLATED.is_file() else {}
    theirs = texts_of(language)
    noted[language] = {key: stamp(text) for key, text in texts_of("en").items() if key in theirs}
    TRANSLATED.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8", newline="\n")


def main(address: str = "127.0.0.1:8188") -> None:
    """Ask the server at `address` for its nodes and write the file."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(english(ComfyClient(address).object_info()), encoding="utf-8", newline="\n")
    print(PATH.relative_to(ROOT))


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--translated"]:
            for language in sys.argv[2:]:
                note_translated(language)
        else:
            main(*sys.argv[1:2])
    except ComfyError as error:
        sys.exit(str(error))
