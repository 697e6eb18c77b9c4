"""Command `run.py gpu-day`: slices, failing and hanging parts, resuming, the pack, the report, and a dry run of every
part.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import runpy
import sys
import time
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from comfyui_controlnext.tools import bench, bench_report, cli, gpu_day, gpu_pack, gpu_parts
from comfyui_controlnext.tools.environment import SetupError
from comfyui_controlnext.tools.gpu_day import Day, in_a_process
from comfyui_controlnext.tools.gpu_parts import PARTS, PYTEST, TRAINED, Part

ROOT = Path(__file__).resolve().parents[2]
TABLE = {"what": "w", "title": "t", "facts": "f", "settings": "s", "rows": [{"case": "bare", "wall": "1"}]}
CHILDREN = {
    "good": "import json, sys; open(sys.argv[1], 'w').write(json.dumps({table}) + '\\n')",
    "bad": "print('half way'); raise SystemExit(3)",
    "full": "raise RuntimeError('torch.OutOfMemoryError: CUDA out of memory')",
    "hanging": "import subprocess, sys, time\n"
    "late = 'import time, pathlib; time.sleep(3); pathlib.Path(%r).touch()' % {mark!r}\n"
    "subprocess.Popen([sys.executable, '-c', late])\n"
    "print('waits', flush=True); time.sleep(60)",
}


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Day:
    """Day of small processes in place of benchmarks; the name of a part selects its behaviour."""

    def command(self: Day, part: Part, tables: Path, seconds: float) -> list[str]:
        return ["-c", CHILDREN[part.name].format(table=TABLE, mark=str(tmp_path / "mark")), str(tables)]

    monkeypatch.setattr(Day, "command", command)
    monkeypatch.setattr(gpu_day, "LEAST", 0.5)
    monkeypatch.setattr(gpu_day, "RESERVE", 0.0)
    return Day(tmp_path / "out", tmp_path, dry=False, variables={})


def part(name: str, seconds: float = 30.0, endless: bool = False) -> Part:
    return Part(name, "?", "none.py", (), seconds, endless)


def statuses(day: Day) -> dict[str, str]:
    return {
        name: entry["status"] for name, entry in json.loads((day.out / "gpu_day.json").read_text())["parts"].items()
    }


def test_parts_that_fail_run_out_of_memory_or_hang_are_noted_and_the_next_begins(day: Day, tmp_path: Path) -> None:
    day.run([part("bad"), part("full"), part("hanging", 1.5), part("good")], 60)
    assert statuses(day) == {"bad": "failed", "full": "out of memory", "hanging": "out of time", "good": "done"}
    assert day.entries["good"]["tables"] == [TABLE]
    page = day.page.read_text("utf-8")
    assert "half way" in page and "waits" in page and "| bare | 1 |" in page
    assert all(key in page for key in ("python: ", "torch: ", "gpu: ", "date: "))
    time.sleep(3)
    assert not (tmp_path / "mark").exists(), "what a part has started ends with it"


def test_a_result_is_on_the_disk_before_the_next_part_begins(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def runner(arguments: list[str], seconds: float, output: Path, environment: Mapping[str, str]) -> int:
        seen.append(statuses(day))
        return len(seen) - 1

    day.runner = runner
    day.run([part("good"), part("bad"), part("full")], 60)
    assert seen == [{}, {"good": "done"}, {"good": "done", "bad": "failed"}]


def test_what_the_end_cut_short_is_tried_again_and_what_ended_is_not(day: Day, tmp_path: Path) -> None:
    day.run([part("good"), part("hanging", 50.0), part("bad")], 2.5)
    assert statuses(day) == {"good": "done", "hanging": "cut short"}, "no time was left for the last"
    again = Day(tmp_path / "second", tmp_path, False, {})
    (day.out / TRAINED[0]).write_bytes(b"weights")
    again.resume_from(day.out)
    assert [again.ended(part(name)) for name in ("good", "hanging", "bad")] == [True, False, False]
    assert not again.ended(part("good", endless=True)), "training goes on in every run"
    assert (again.out / TRAINED[0]).read_bytes() == b"weights"
    with pytest.raises(SetupError, match="--continue .*no gpu_day.json there"):
        again.resume_from(tmp_path / "nowhere")


def test_there_are_at_most_six_files_of_twelve_mebibytes(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_day.LIMIT_MIB == 12 and len(TRAINED) + 2 <= 6
    (day.out / TRAINED[1]).write_bytes(bytes(13 * 2**20))
    day.run([part("good")], 60)
    assert sorted(path.name for path in day.out.iterdir()) == ["gpu_day.json", "gpu_day.md"]


def test_names_of_trained_weights_are_those_of_the_stages() -> None:
    from comfyui_controlnext.tools.demo_weights import shipped

    assert (shipped.PAINTER, shipped.MMDIT) == TRAINED and gpu_parts.STARTS == (shipped.AUTOENCODER, *TRAINED)


def test_every_part_has_its_script_and_a_name_of_its_own() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert [p.name for p in PARTS if p.script != PYTEST and not (ROOT / "benchmarks" / p.script).is_file()] == []
    assert PARTS[0].name == "machine" and [p.name for p in PARTS if p.endless] == ["picture-base"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--out DIR"),
        (["--out", "x", "--parts", "fly"], "--parts fly: there are machine, loads"),
        (["--out", "x", "--continue", "nowhere"], "--continue nowhere: no gpu_day.json"),
    ],
)
def test_a_wrong_command_line_is_answered(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match=says):
        gpu_day.run_gpu_day(cli.parse(["gpu-day", *arguments]), lambda: tmp_path)


# the pack


@pytest.mark.comfy
def test_the_pack_holds_code_graphs_host_and_wheels_and_no_picture(host: Path, tmp_path: Path) -> None:
    wheels, path = tmp_path / "wheels", tmp_path / "pack.zip"
    wheels.mkdir()
    (wheels / "small-1-py3-none-any.whl").write_bytes(b"wheel")
    said = gpu_pack.pack(path, host, wheels)
    assert f"{path.stat().st_size / 2**20:.1f} MiB" in said and path.stat().st_size < 55 * 2**20
    names = zipfile.ZipFile(path).namelist()
    clone = gpu_pack.CLONE
    for name in ("run.py", "tools/gpu_day.py", "tests/host/test_on_gpu.py", "wheels/small-1-py3-none-any.whl"):
        assert f"{clone}/{name}" in names
    assert any(name.startswith(f"{clone}/example_workflows/") for name in names)
    assert {"ComfyUI/main.py", "ComfyUI/nodes.py", "ComfyUI/comfy/samplers.py"} <= set(names)
    assert not [name for name in names if name.endswith((".png", ".jpg", ".jpeg"))]
    weights = {name.rpartition("/")[2] for name in names if "demo/weights/" in name}
    assert weights == {name for name in gpu_parts.STARTS if (ROOT / "demo" / "weights" / name).is_file()}


def test_a_pack_that_is_too_large_says_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_pack, "LIMIT_MIB", 0.1)
    with pytest.raises(SetupError, match=r"of at most 0.1. The largest parts: ComfyUI/.* \d+\.\d"):
        gpu_pack.pack(tmp_path / "pack.zip", tmp_path, None)
    assert not (tmp_path / "pack.zip").exists()
    with pytest.raises(SetupError, match="no .whl"):
        gpu_pack.pack(tmp_path / "pack.zip", tmp_path, tmp_path)


# the report


def finished(tmp_path: Path, wall: str, dry: bool = False) -> Path:
    """Results of a day with one figure."""
    table = {**TABLE, "rows": [{"case": "bare", "wall": "1"}, {"case": "ControlNeXt, first run", "wall": wall}]}
    entry = {"status": "done", "tables": [table]}
    machine = {"gpu": "NVIDIA Some 4, 10 MiB, 1.2", "date": "2026-12-01"}
    (tmp_path / "gpu_day.json").write_text(
        json.dumps({"machine": machine, "dry_run": dry, "parts": {"step-sd15": entry}})
    )
    return tmp_path


@pytest.mark.parametrize(("wall", "verdict"), [("1.021 (1.0 to 1.1)", "met"), ("1.031", "MISSED")])
def test_the_report_puts_figures_beside_goals_and_the_rest_is_owed(wall: str, verdict: str, tmp_path: Path) -> None:
    page, results = tmp_path / "performance.md", tmp_path / "results"
    results.mkdir()
    for path in (page, tmp_path / "gpu_day.md"):
        path.write_text(f"before\n{bench_report.BEGIN}\nof before\n{bench_report.END}\nafter\n", encoding="utf-8")
    bench_report.write_report(finished(tmp_path, wall), results, tmp_path)
    text = page.read_text("utf-8")
    assert (results / "gpu_day_nvidia-some-4_202612.json").is_file()
    assert text.startswith("before\n") and text.endswith("after\n") and "of before" not in text
    assert "| figure | goal | NVIDIA Some 4, 2026-12-01 |" in text
    assert f"| SD1.5 512, ControlNeXt, first run | at most 1.03 | {wall}, {verdict} |" in text
    assert "| SDXL 1024, ControlNeXt, first run | at most 1.02 | owed |" in text
    assert "at least 1.3 | owed |" in text
    parts = (tmp_path / "gpu_day.md").read_text("utf-8")
    assert "with each control, SD1.5 at 512 | done |" in parts and "the same, SDXL at 1024 | owed |" in parts
    bench_report.write_report(None, results, tmp_path)
    assert page.read_text("utf-8") == text
    with pytest.raises(SetupError, match="dry run"):
        bench_report.keep(finished(tmp_path, wall, dry=True), results)


def test_more_is_better_where_a_goal_says_so() -> None:
    goal = next(goal for goal in bench_report.GOALS if goal.at_least)
    assert bench_report.verdict("1.31x", goal) == "1.31x, met" and "MISSED" in bench_report.verdict("1.29x", goal)


def test_the_pages_are_what_the_command_writes(tmp_path: Path) -> None:
    for name in (bench_report.GOALS_PAGE, bench_report.PARTS_PAGE):
        (tmp_path / name).write_bytes((bench_report.DOCS / name).read_bytes())
    bench_report.write_report(None, docs=tmp_path)
    for name in (bench_report.GOALS_PAGE, bench_report.PARTS_PAGE):
        assert (tmp_path / name).read_bytes() == (bench_report.DOCS / name).read_bytes(), "run: run.py bench report"


def test_report_is_a_name_of_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_report, "write_report", lambda folder: f"wrote from {folder}")
    assert bench.run_benchmarks(cli.parse(["bench", "report", "--folder", "x"]), lambda: Path("never")) == 0
    assert "wrote from x" in capsys.readouterr().out


# every part, small, on the CPU


@pytest.fixture
def real_sizes() -> Iterator[None]:
    """Real sizes and the log's level again after a benchmark has put small sizes and silence in their place."""
    from comfyui_controlnext.benchmarks import real_size

    kept = [(table, dict(table)) for table in (real_size.UNETS, real_size.XS)]
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
    for table, before in kept:
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]


def in_this_process(arguments: list[str], seconds: float, output: Path, environment: Mapping[str, str]) -> int | None:
    """Run a part without the seconds that a process takes to import the host; of the tests only a
    few, in one process.
    """
    if arguments[0] == "-m":
        return in_a_process([*arguments, "-k", "right_in_fp32"], seconds, output, environment)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", arguments)
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = int(bool(ended.code))
            said.write(str(ended.code))
        except Exception:
            code = 1
            said.write(traceback.format_exc())
    output.write_text(said.getvalue(), "utf-8")
    return code


@pytest.mark.comfy
@pytest.mark.filterwarnings("default")
@pytest.mark.long
def test_a_dry_run_goes_through_every_part_and_writes_its_tables(host: Path, tmp_path: Path, real_sizes: None) -> None:
    day = Day(tmp_path, host, dry=True, variables={}, run=in_this_process)
    day.run(PARTS, 3600)
    assert {name: entry["status"] for name, entry in day.entries.items()} == {part.name: "done" for part in PARTS}, [
        entry["said"] for entry in day.entries.values() if entry["status"] != "done"
    ]
    tables = {name: entry["tables"] for name, entry in day.entries.items()}
    assert [name for name, found in tables.items() if not found] == ["tests"]
    assert "passed" in day.entries["tests"]["said"]
    said = json.dumps(tables)
    assert "FAILED" not in said and "failed" not in said
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(files) == {"gpu_day.json", "gpu_day.md", *TRAINED} and max(files.values()) <= 12 * 2**20
    page = day.page.read_text("utf-8")
    assert "dry run on the CPU" in page and all(f"## {part.name}\n" in page for part in PARTS)
